from dataclasses import replace

import pandas as pd
import pytest
from conftest import made

from mmlib import compare as compare_module
from mmlib import records
from mmlib.compare import compare_arms
from mmlib.experiment import Experiment
from mmlib.records import write_results

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
    return lambda pairs: write_results(tmp_path / compare_module.KEPT, [record for _, record in pairs])


def beside(pairs, baseline="quality"):
    return compare_module.beside([record for _, record in pairs], [name for name, _ in pairs], baseline)


def test_an_arm_is_found_again_in_other_worlds(kept):
    own, large = (
        of_worlds("quick", (0, 1), quality=0, NAN=0.01, norm=-0.02),
        of_worlds("full", (0, 1, 2), 0.3, quality=0, norm=-0.01, NAN=0.03),
    )
    kept(large)
    frame = beside(own).set_index("arm")
    for name, row in frame.iterrows():
        for before, pairs in (("", own), ("large ", large)):
            expected = compare_arms([r for _, r in pairs], "arm", "quality", names=[n for n, _ in pairs]).set_index(
                "arm"
            )
            for column in ("map_at_100", "difference", "low", "high", "n"):
                assert row[before + column] == pytest.approx(expected.loc[name, column])
    assert frame["large difference"].to_dict() == pytest.approx({"NAN": 3, "quality": 0, "norm": -1})
    assert frame["large n"].tolist() == [3, 3, 3] and frame["n"].tolist() == [2, 2, 2]


def test_other_arms_and_those_of_fewer_worlds_are_left_out(kept):
    kept([*of_worlds("full", (0, 1), quality=0), *of_worlds("full", (0,), NAN=0.01)])
    frame = beside(of_worlds("quick", (0, 1), quality=0, NAN=0.01, norm=0))
    assert frame["arm"].tolist() == ["quality"]


def test_worlds_of_searches_and_second_names_do_not_count(kept):
    kept([*of_worlds("full", (0, 1), quality=0, NAN=0.01), *of_worlds("full", (100, 101), NAN=0.2)])
    own = of_worlds("quick", (0, 1), quality=0, NAN=0.01)
    frame = beside([*own, *((f"also {name}", record) for name, record in own)]).set_index("arm")
    assert frame["large n"].to_dict() == {"quality": 2, "NAN": 2} and frame.loc[
        "NAN", "large difference"
    ] == pytest.approx(1)


def test_without_kept_records_the_page_says_so(kept):
    frame = beside(of_worlds("quick", (0, 1), quality=0, NAN=0.01))
    assert frame.empty and compare_module.shown(frame) is None
    assert compare_module.sentence(frame, "quality", "simulated").startswith(
        "No records of this comparison in simulated worlds"
    )
    kept(of_worlds("full", (0, 1), NAN=0.01))
    assert beside(of_worlds("quick", (0, 1), quality=0, NAN=0.01)).empty  # their baseline is not among them


def test_records_of_a_given_store_have_no_larger_world(kept):
    kept(of_worlds("full", (0, 1), quality=0))
    given = [
        (name, replace(record, experiment=record.experiment | {"data": "store"}))
        for name, record in of_worlds("quick", (0, 1), quality=0)
    ]
    frame = beside(given)
    assert frame.empty and compare_module.sentence(frame, "quality", "store") == (
        "The clips of this page were given to it, and have one size."
    )


def test_sentence_counts_signs_by_the_intervals():
    rows = [
        ("base", 0, 0, 0, 0),
        ("same", 1, 2, 3, 4),
        ("turned", 1, 2, -2, -1),
        ("gone", 1, 2, -1, 1),
        ("new", -1, 1, -2, -1),
        ("never", -1, 1, -1, 1),
        ("both low", -2, -1, -3, -2),
    ]
    frame = pd.DataFrame(rows, columns=["arm", "low", "high", "large low", "large high"])
    assert compare_module.sentence(frame, "base", "simulated").startswith(
        "Of 6 differences from base, by their intervals, 2 have the same sign at both sizes, 1 have opposite signs, 1 are "
        "told from zero at the larger size alone, 1 are told from zero at the smaller size alone and 1 are told from zero "
        "at neither. The larger worlds: "
    )


def test_page_shows_both_sizes(kept):
    kept(of_worlds("full", (0, 1, 2), 0.3, quality=0, NAN=0.03))
    table = compare_module.shown(beside(of_worlds("quick", (0, 1), quality=0, NAN=0.01))).data
    assert table["arm"].tolist() == ["NAN", "quality"] and table["MAP@100 at full size"].tolist() == [
        pytest.approx(0.84),
        pytest.approx(0.81),
    ]
    assert table["difference here"].tolist() == ["+1.00 (+1.00 to +1.00)", "+0.00 (+0.00 to +0.00)"]
