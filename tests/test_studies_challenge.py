from dataclasses import replace

import pandas as pd
import pytest
from conftest import made

from mmlib import records
from mmlib.compare import COMPARED, compare_arms
from mmlib.experiment import Experiment
from mmlib.records import write_results
from mmlib.studies import challenge

ARMS = {"quality": Experiment(), "NAN": Experiment(aggregator="NAN"), "norm": Experiment(aggregator="norm")}


def of_worlds(profile, seeds, level=0.0, spread=0.0, **gains):
    """Records of arms in worlds: 0.5 and what the arm gains, each world a little higher than the one before."""
    return [
        (
            name,
            made(
                replace(ARMS[name], profile=profile, seed=seed), ap=[0.5 + level + gain + 0.01 * seed + spread * seed]
            ),
        )
        for name, gain in gains.items()
        for seed in seeds
    ]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Write records where the book keeps them."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return lambda pairs: write_results(tmp_path / challenge.KEPT, [record for _, record in pairs])


def beside(pairs, baseline="quality"):
    return challenge.beside([record for _, record in pairs], [name for name, _ in pairs], baseline)


def test_an_arm_is_found_again_in_other_worlds(kept):
    own = of_worlds("quick", (0, 1), quality=0, NAN=0.01, norm=-0.02)
    large = of_worlds("full", (0, 1, 2), 0.3, quality=0, norm=-0.01, NAN=0.03)
    kept(large)
    frame = beside(own)
    for size, pairs in (("here", own), ("challenge", large)):
        expected = compare_arms([r for _, r in pairs], "arm", "quality", names=[n for n, _ in pairs])
        part = frame[frame["size"] == size].set_index("arm")
        pd.testing.assert_frame_equal(part.loc[expected["arm"], COMPARED], expected.set_index("arm"))
    # the best at the challenge's size comes first, and of an arm its own world
    assert frame["arm"].tolist() == ["NAN", "NAN", "quality", "quality", "norm", "norm"]
    assert frame["size"].tolist() == ["here", "challenge"] * 3


def test_other_arms_and_those_of_fewer_worlds_are_left_out(kept):
    kept([*of_worlds("full", (0, 1), quality=0), *of_worlds("full", (0,), NAN=0.01)])
    assert set(beside(of_worlds("quick", (0, 1), quality=0, NAN=0.01, norm=0))["arm"]) == {"quality"}


def test_worlds_of_searches_and_second_names_do_not_count(kept):
    kept([*of_worlds("full", (0, 1), quality=0, NAN=0.01), *of_worlds("full", (100, 101), NAN=0.2)])
    own = of_worlds("quick", (0, 1), quality=0, NAN=0.01)
    frame = beside([*own, *((f"also {name}", record) for name, record in own)])
    large = frame[frame["size"] == "challenge"].set_index("arm")
    assert large["n"].to_dict() == {"quality": 2, "NAN": 2}
    assert large.loc["NAN", "difference"] == pytest.approx(1)


def test_without_kept_records_there_is_nothing_to_compare(kept):
    own = of_worlds("quick", (0, 1), quality=0, NAN=0.01)
    assert beside(own).empty and challenge.both_sizes(beside(own), "quality")["all"] == 0
    kept(of_worlds("full", (0, 1), NAN=0.01))
    assert beside(own).empty  # their baseline is not among them


def test_records_of_a_given_store_have_no_larger_world(kept):
    kept(of_worlds("full", (0, 1), quality=0))
    given = [
        (name, replace(record, experiment=record.experiment | {"data": "store"}))
        for name, record in of_worlds("quick", (0, 1), quality=0)
    ]
    frame = beside(given)
    assert frame.empty and "imulated" not in challenge.both_sizes(frame, "quality")["source"]


def test_signs_at_both_sizes_are_counted_by_the_intervals():
    none = float("nan")
    ends = {
        "base": (0, 0, 0, 0),
        "same": (1, 2, 3, 4),
        "turned": (1, 2, -2, -1),
        "gone": (1, 2, -1, 1),
        "new": (-1, 1, -2, -1),
        "never": (-1, 1, -1, 1),
        "both low": (-2, -1, -3, -2),
        "of one world": (none, none, 1, 2),
    }
    rows = [row for arm, (a, b, c, d) in ends.items() for row in ((arm, "here", a, b), (arm, "challenge", c, d))]
    found = challenge.both_sizes(pd.DataFrame(rows, columns=["arm", "size", "low", "high"]), "base")
    del found["source"]
    reading = str(found.pop("reading"))
    assert reading.startswith("the same sign at both sizes in 2, opposite signs in 1") and reading.count(" in 1") == 5
    assert list(found.values()) == [7, 2, 1, 1, 1, 1, 1]
