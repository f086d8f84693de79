from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from conftest import made
from scipy import stats

from mmlib import compare, metrics, records
from mmlib.compare import as_frame, breakdown_frame, compare_arms, provenance
from mmlib.experiment import Experiment
from mmlib.retrieve import WRONG_EDGES


def record(aggregator="mean", seed=0, ap=(0.5,), *, data="simulated", settings=(), **known):
    asked = Experiment(data=data, aggregator=aggregator, seed=seed, settings=settings)
    return made(asked, **{"key": f"{aggregator}{seed}{settings}", "ap": list(ap)} | known)


# -- comparisons ---------------------------------------------------------------------------------------------

WORLDS = {"mean": [[0.5, 0.7], [0.4, 0.2], [0.9, 0.5]], "norm": [[0.6, 0.8], [0.4, 0.3], [0.9, 0.8]]}


@pytest.fixture
def over_worlds():
    return compare_arms(
        [record(name, seed, ap) for name, worlds in WORLDS.items() for seed, ap in enumerate(worlds)],
        by="aggregator",
        baseline="mean",
    ).set_index("aggregator")


def test_worlds_are_compared_by_the_t_interval_of_their_differences(over_worlds):
    points = 100 * np.array([0.1, 0.05, 0.15])
    expected = stats.ttest_1samp(points, 0).confidence_interval(0.95)
    row = over_worlds.loc["norm"]
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert (row["difference"], row["sd"], row["n"], row["interval"]) == (
        pytest.approx(10),
        pytest.approx(5),
        3,
        "worlds",
    )


def test_splits_of_real_clips_are_compared_as_worlds_are(over_worlds):
    """A store a seed; seeds on one store are trainings on the same identities, and no splits."""
    for stores, interval in (["a", "b", "c"], "splits"), (["a"] * 3, "identities"):
        records = [record(name, seed, ap, data=stores[seed]) for name in WORLDS for seed, ap in enumerate(WORLDS[name])]
        row = compare_arms(records, by="aggregator", baseline="mean").set_index("aggregator").loc["norm"]
        assert row["interval"] == interval
        columns = ["difference", "low", "high", "sd", "n"]
        assert (row[columns].tolist() == over_worlds.loc["norm", columns].tolist()) == (interval == "splits")


def test_arms_that_differ_in_several_fields_are_compared_by_their_names():
    records = [record("mean", seed, ap) for seed, ap in enumerate([[0.5], [0.4]])]
    others = [record("norm", seed, [0.8], settings=(("no_face", 0.1),)) for seed in (0, 1)]
    frame = compare_arms(records + others, by="arm", baseline="a", names=["a", "a", "b", "b"])
    assert frame["arm"].tolist() == ["b", "a"]
    assert frame["difference"].tolist() == pytest.approx([35, 0])


def test_a_record_without_a_name_is_refused():
    with pytest.raises(ValueError, match="shorter|longer"):
        compare_arms([record(), record(seed=1)], by="arm", baseline="a", names=["a"])


def test_only_the_arms_that_are_asked_for_are_compared():
    records = [record(name, seed) for name in ("mean", "norm") for seed in (0, 1)] + [record("NAN", 7)]
    frame = compare_arms(records, by="aggregator", baseline="mean", arms=("mean", "norm"))
    assert sorted(frame["aggregator"]) == ["mean", "norm"]


@pytest.mark.parametrize("data, seeds", [("simulated", [0]), ("some store", [0]), ("some store", [0, 1])])
@pytest.mark.parametrize("ap", [(0.5,), (0.75,)])
def test_one_identity_has_no_interval(data, seeds, ap):
    records = [
        record(name, seed, [0.5] if name == "mean" else ap, data=data) for name in ("mean", "norm") for seed in seeds
    ]
    row = compare_arms(records, by="aggregator", baseline="mean").set_index("aggregator").loc["norm"]
    assert row["difference"] == 100 * (ap[0] - 0.5) and row["n"] == 1
    assert np.isnan([row["low"], row["high"]]).all()
    assert (compare.sign(row), compare.interval_text(row)) == (None, "no interval")


def test_worlds_whose_records_keep_one_ap_have_an_interval_over_worlds():
    records = [
        record(name, seed, [0.5 + gain * seed]) for name, gain in (("mean", 0), ("norm", 0.1)) for seed in (1, 2)
    ]
    row = compare_arms(records, by="aggregator", baseline="mean").set_index("aggregator").loc["norm"]
    expected = stats.ttest_1samp([10, 20], 0).confidence_interval(0.95)
    assert row["interval"] == "worlds"
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))


def test_one_query_has_no_interval_by_itself_or_paired():
    assert np.isnan(metrics.bootstrap_interval(np.array([0.5]))).all() and np.isnan(metrics.standard_error([0.5]))
    pair = metrics.paired_test(np.array([0.5]), np.array([0.25]))
    assert (pair.difference, pair.n, pair.p_value) == (0.25, 1, 1) and np.isnan([pair.low, pair.high]).all()


def test_steps_are_those_whose_two_arms_were_run():
    values = {"mean": 0.5, "norm": 0.6, "NAN": 0.8}
    records = [record(name, seed, [value]) for name, value in values.items() for seed in (0, 1)]
    steps = {"first": ("norm", "mean"), "second": ("NAN", "norm"), "not run": ("quality", "mean")}
    frame = compare.steps_frame(steps, records, [each.experiment["aggregator"] for each in records])
    assert frame[["step", "arm", "against", "n"]].values.tolist() == [
        ["first", "norm", "mean", 2],
        ["second", "NAN", "norm", 2],
    ]
    assert frame["difference"].tolist() == pytest.approx([10, 20])
    assert compare.steps_frame({"not run": ("quality", "mean")}, records, ["mean"] * 6).empty


def test_breakdown_takes_names_too():
    one, two = (record(breakdown={"frames": [[1, 5, 2, 0.5, value]]}) for value in (0.25, 0.75))
    frame = breakdown_frame([one, two], "arm", names=["a", "b"])
    assert frame[["arm", "precision"]].values.tolist() == [["a", 0.25], ["b", 0.75]]


def test_map_is_the_mean_over_seeds_and_best_comes_first(over_worlds):
    assert over_worlds.index.tolist() == ["norm", "mean"]
    assert over_worlds["map_at_100"].tolist() == pytest.approx([3.8 / 6, 3.2 / 6])


def test_baseline_differs_from_itself_by_nothing(over_worlds):
    assert over_worlds.loc["mean", ["difference", "low", "high", "sd"]].tolist() == [0, 0, 0, 0]


def test_worlds_may_have_different_numbers_of_identities():
    records = [
        record(name, seed, [value] * (seed + 1)) for name, value in (("mean", 0.4), ("norm", 0.6)) for seed in (0, 1)
    ]
    assert compare_arms(records, by="aggregator", baseline="mean")["difference"].tolist() == pytest.approx([20, 0])


@pytest.mark.parametrize("data, seeds", [("some store", (0, 1)), ("simulated", (0,))])
def test_identities_are_resampled_where_there_is_one_store_or_one_world(data, seeds):
    rng = np.random.default_rng(0)
    one = rng.uniform(size=(len(seeds), 400))
    two = np.clip(one + rng.normal(0.05, 0.1, one.shape), 0, 1)
    frame = compare_arms(
        [
            record(name, seed, ap[i], data=data)
            for name, ap in (("mean", one), ("norm", two))
            for i, seed in enumerate(seeds)
        ],
        by="aggregator",
        baseline="mean",
    ).set_index("aggregator")
    row, difference = frame.loc["norm"], 100 * (two - one).mean(axis=0)
    assert (row["difference"], row["n"], row["interval"]) == (pytest.approx(difference.mean()), 400, "identities")
    half = 1.96 * difference.std() / np.sqrt(400)
    # the percentile interval of 2000 draws is the normal one but for a tenth of its half width
    assert row["low"] == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert row["high"] == pytest.approx(difference.mean() + half, abs=0.1 * half)
    assert np.isnan(row["sd"])


def test_arms_with_different_seeds_are_refused():
    records = [record("mean", 0), record("mean", 1), record("norm", 0), record("norm", 2)]
    with pytest.raises(ValueError, match=r"aggregator = 'norm' has seeds \[0, 2\], the baseline \[0, 1\]"):
        compare_arms(records, by="aggregator", baseline="mean")


def test_absent_baseline_is_refused():
    with pytest.raises(ValueError, match="no record has aggregator = 'quality', only mean, norm"):
        compare_arms([record("mean"), record("norm")], by="aggregator", baseline="quality")


def test_records_that_differ_in_something_else_are_refused():
    records = [record("mean"), record("mean", settings=(("no_face", 0.1),))]
    with pytest.raises(ValueError, match="two different experiments have aggregator = 'mean' and seed 0"):
        compare_arms(records, by="aggregator", baseline="mean")


def test_record_given_twice_counts_once():
    records = [record("mean", seed) for seed in (0, 1)]
    assert compare_arms(records * 2, by="aggregator", baseline="mean")["n"].tolist() == [2]


# -- frames --------------------------------------------------------------------------------------------------


def test_frame_has_a_row_a_record_with_its_fields_and_measures():
    frame = as_frame(
        [record("mean", 0, measures={"map_at_100": 0.25}), record("norm", 1, measures={"map_at_100": 0.75})]
    )
    assert frame[["aggregator", "seed", "map_at_100"]].values.tolist() == [["mean", 0, 0.25], ["norm", 1, 0.75]]


def test_breakdown_is_averaged_over_seeds():
    parts = [{"frames": [[1, 5, 10, 0.5, 0.2], [40, None, 4, 1, 0.8]]}, {"frames": [[1, 5, 20, 0.7, 0.4]]}]
    frame = breakdown_frame([record(seed=seed, breakdown=part) for seed, part in enumerate(parts)], "aggregator")
    assert frame.values.tolist() == [
        ["mean", "frames", "1–4", 15, pytest.approx(0.6), pytest.approx(0.3)],
        ["mean", "frames", "40+", 4, 1, 0.8],
    ]


@pytest.mark.parametrize("open_end", [None, np.nan, np.inf, 241])
def test_longest_clips_are_one_range_whatever_its_upper_edge(open_end):
    parts = [{"frames": [[40, 241, 2, 0.5, 0.2]]}, {"frames": [[40, open_end, 4, 1.0, 0.4]]}]
    frame = breakdown_frame([record(seed=seed, breakdown=part) for seed, part in enumerate(parts)], "aggregator")
    assert frame.values.tolist() == [["mean", "frames", "40+", 3, 0.75, pytest.approx(0.3)]]


def test_ranges_are_in_order_where_a_world_or_an_arm_lacks_one():
    edges = [(1, 5), (5, 10), (10, 15), (40, None)]
    rows = [[*at, 1, 0.5, 0.5] for at in edges]
    quality = [[0, 1, 1, 0.5, 0.5], [80, 100, 1, 0.5, 0.5]]
    records = [
        record("mean", 0, breakdown={"frames": rows[1:3], "quality": quality[1:]}),
        record("mean", 1, breakdown={"frames": rows, "quality": quality}),
        record("norm", 0, breakdown={"frames": rows[::-1], "quality": quality}),
    ]
    frame = breakdown_frame(records, "aggregator")
    for _, part in frame.groupby("aggregator"):
        ranges = part.groupby("group", sort=False)["range"].agg(list)
        assert ranges["frames"] == ["1–4", "5–9", "10–14", "40+"] and ranges["quality"] == ["0–1", "80–100"]
    in_order = frame[frame["group"] == "frames"]["range"]
    assert list(in_order.unique()) == ["1–4", "5–9", "10–14", "40+"]
    assert list(frame["aggregator"].unique()) == ["mean", "norm"]


def test_ranges_of_wrong_frames_are_shares():
    parts = {"wrong": [[low, high, 1, 0, 0] for low, high in pairwise(WRONG_EDGES)]}
    ranges = breakdown_frame([record(breakdown=parts)], "aggregator")["range"].tolist()
    assert ranges[0] == "none" and ranges[-1] == "0.8–1" and len(set(ranges)) == len(WRONG_EDGES) - 1


# -- what an interval says -----------------------------------------------------------------------------------

INTERVALS = [(0.1, 0.4, 1), (-0.4, -0.1, -1), (-0.1, 0.4, 0), (0.0, 0.4, 0), (-0.4, 0.0, 0), (np.nan, np.nan, None)]


@pytest.mark.parametrize("low, high, expected", INTERVALS)
def test_sign_is_that_of_an_interval_without_zero(low, high, expected):
    row = {"low": low, "high": high}
    assert compare.sign(row) == expected
    words = {1: "up", 0: "open", -1: "down", None: "unknown"}
    assert compare.verdict(row, "up", "open", "down", "unknown") == words[expected]


def test_sign_is_against_a_bound():
    assert [compare.sign({"low": 0.2, "high": 0.4}, bound) for bound in (0.1, 0.3, 0.5)] == [1, 0, -1]


def test_counts_add_up_to_the_rows():
    frame = pd.DataFrame(INTERVALS, columns=["low", "high", "expected"])
    assert compare.counts(frame) == {"all": 6, "gains": 1, "losses": 1, "open": 4}
    assert compare.counts(frame[:0]) == {"all": 0, "gains": 0, "losses": 0, "open": 0}


WRITTEN = [
    (-1, 0.5, "[-1.00, +0.50]"),
    (-0.5, -0.0004, "[-0.5000, -0.0004]"),
    (-0.0021, 0.0014, "[-0.002, +0.001]"),
    (0, 0, "[0.00, 0.00]"),
]


@pytest.mark.parametrize("low, high, text", WRITTEN)
def test_interval_has_the_digits_that_show_its_side(low, high, text):
    assert compare.interval_text({"low": low, "high": high}) == text


def test_table_has_words_for_headings_and_one_column_an_interval():
    frame = compare_arms([record("mean", ap=[0.5, 0.5]), record("norm", ap=[0.6, 0.8])], "aggregator", "mean")
    shown = compare.table(frame).data
    # what the intervals are over stands in their heading, as it is the same in every row
    heading = "95 % interval, 2\N{NO-BREAK SPACE}identities"
    assert list(shown) == ["aggregator", "MAP@100", "gain, points", heading]
    assert shown["gain, points"].tolist() == ["+20.00", "—"]  # the reference is not held against itself
    assert shown[heading].tolist() == ["[+10.00,\N{NO-BREAK SPACE}+30.00]", ""]


def test_table_says_row_by_row_what_intervals_are_over_where_that_differs():
    frame = compare_arms([record("mean", ap=[0.5, 0.5]), record("norm", ap=[0.6, 0.8])], "aggregator", "mean")
    shown = compare.table(frame.assign(n=[2, 3], sd=0.1)).data
    assert list(shown)[2:] == ["gain, points", "95 % interval", "over"]
    assert shown["over"].tolist() == ["2\N{NO-BREAK SPACE}identities", "3\N{NO-BREAK SPACE}identities"]


def test_comparisons_say_where_their_records_come_from(current):
    records = [record("mean"), record("norm")]
    frames = [compare_arms(records, "aggregator", "mean"), compare.breakdown_frame(records, "aggregator")]
    frames.append(compare.steps_frame({"a step": ("norm", "mean")}, records, ["mean", "norm"]))
    assert [frame.attrs["made"] for frame in frames] == [provenance(records)] * 3
    assert frames[0].sort_values("difference").assign(more=1).attrs["made"] == provenance(records)


def test_empty_table_is_not_shown():
    assert compare.table(pd.DataFrame(columns=["arm"])) is None


# -- words ---------------------------------------------------------------------------------------------------


def test_missing_scores_are_named():
    assert compare.scores_missing([]) == ""
    assert {"quality", "det"} <= set(compare.scores_missing(["quality", "det"]).split())


@pytest.fixture
def current(monkeypatch):
    monkeypatch.setattr(records, "library_hash", lambda: "here")


@pytest.mark.parametrize(
    "simulated, kind", [([True, True], "simulated"), ([False, False], "real"), ([True, False], "partly simulated")]
)
def test_provenance_says_whether_clips_are_simulated(current, simulated, kind):
    sentence = provenance([record(simulated=each) for each in simulated])
    assert f"2 records on {kind} clips" in sentence


def test_provenance_says_when_where_and_by_which_commit(current):
    sentence = provenance([record(made="2024-03-01T00:00:00"), record(commit="fed9876")])
    assert all(word in sentence for word in ("2024-02-03 to 2024-03-01", "CPU", "abc1234", "fed9876"))


def test_records_of_one_day_name_it_once(current):
    assert provenance([record(), record("norm")]).count("2024-02-03") == 1


def test_provenance_of_a_stale_record_is_not_that_of_a_fresh_one(current):
    fresh, stale = (provenance([record(), record(library=library)]) for library in ("here", "old"))
    assert fresh != stale and "earlier" in stale


def test_provenance_of_no_records_names_none():
    assert "no such records" in provenance([])


def test_smallest_difference_told_is_told_four_times_in_five():
    """Of many draws of ten worlds with that mean, four in five have an interval above zero."""
    n, sd = 10, 2.0
    (told,) = compare.smallest_told(pd.Series([sd]), pd.Series([n]))
    draws = np.random.default_rng(0).normal(told, sd, (20_000, n))
    half = stats.t.ppf(0.975, n - 1) * draws.std(axis=1, ddof=1) / n**0.5
    assert np.mean(draws.mean(axis=1) > half) == pytest.approx(0.8, abs=0.02)
