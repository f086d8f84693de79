from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import made
from scipy import stats

from mmlib import compare as compare_module
from mmlib import records, systems
from mmlib.aggregate import AGGREGATORS, make_aggregator
from mmlib.compare import as_frame, breakdown_frame, compare_arms, provenance, scores_sentence
from mmlib.data.simulate import Settings, settings_for
from mmlib.experiment import Experiment, Training
from mmlib.models import IdentityModel
from mmlib.records import WRONG_EDGES
from mmlib.studies import aggregation
from mmlib.studies.aggregation import (
    frame_weights,
    grid_frame,
    grid_sentences,
    grid_settings,
    grid_verdicts,
    mixed_clips,
    weight_on_wrong,
)


def record(aggregator="mean", seed=0, ap=(0.5,), *, settings=(), training=Training(), data="simulated", **known):
    asked = Experiment(data=data, aggregator=aggregator, seed=seed, settings=settings, training=training)
    fields = dict(key=f"{aggregator}{seed}{settings}", measures={"map_at_100": float(np.mean(ap))}, ap=list(ap))
    return made(asked, **fields | known)


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


def test_arms_that_differ_in_several_fields_are_compared_by_their_names():
    records = [record("mean", seed, ap) for seed, ap in enumerate([[0.5], [0.4]])]
    others = [record("norm", seed, [0.8], training=Training(lr=9.0)) for seed in (0, 1)]
    frame = compare_arms(records + others, by="arm", baseline="a", names=["a", "a", "b", "b"])
    assert frame["arm"].tolist() == ["b", "a"]
    assert frame["difference"].tolist() == pytest.approx([35, 0])


def test_a_record_without_a_name_is_refused():
    with pytest.raises(ValueError, match="1 entries for 2 records"):
        compare_arms([record(), record(seed=1)], by="arm", baseline="a", names=["a"])


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
    frame = as_frame([record("mean", 0, [0.25]), record("norm", 1, [0.75])])
    assert frame[["aggregator", "seed", "map_at_100"]].values.tolist() == [["mean", 0, 0.25], ["norm", 1, 0.75]]


def test_breakdown_is_averaged_over_seeds():
    parts = [{"frames": [[1, 5, 10, 0.5, 0.2], [40, 241, 4, 1, 0.8]]}, {"frames": [[1, 5, 20, 0.7, 0.4]]}]
    frame = breakdown_frame([record(seed=seed, breakdown=part) for seed, part in enumerate(parts)], "aggregator")
    assert frame.values.tolist() == [
        ["mean", "frames", "1–4", 15, pytest.approx(0.6), pytest.approx(0.3)],
        ["mean", "frames", "40+", 4, 1, 0.8],
    ]


def test_ranges_of_wrong_frames_are_shares():
    parts = {"wrong": [[low, high, 1, 0, 0] for low, high in pairwise(WRONG_EDGES)]}
    ranges = breakdown_frame([record(breakdown=parts)], "aggregator")["range"].tolist()
    assert ranges[0] == "none" and ranges[-1] == "0.8–1" and len(set(ranges)) == len(WRONG_EDGES) - 1


# -- attention -----------------------------------------------------------------------------------------------


def models(*names):
    torch.manual_seed(0)
    made = {name: IdentityModel(make_aggregator(name, 512), 30, hidden=0) for name in names}
    for model in made.values():
        for parameter in model.aggregator.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
    return made


def test_mixed_clips_show_two_persons(store):
    clips = mixed_clips(store, 3)
    face = store.modalities["face"]
    for clip in clips:
        wrong = face.columns["wrong"][face.start[clip] : face.start[clip] + face.count[clip]]
        assert 0.2 <= wrong.mean() <= 0.6 and 12 <= len(wrong) <= 30
    assert (store.identity_of(clips) >= 0).all() and len(clips) == 3


def test_longest_clips_fill_up_where_too_few_are_mixed(store):
    clips = mixed_clips(store, 10_000)
    assert sorted(clips) == store.select("val", labelled=True, having="face").tolist()


def test_weights_of_a_clip_sum_to_one_over_its_own_frames(store):
    clips = mixed_clips(store, 4)
    frame = frame_weights(models("norm", "quality", "NAN", "attention + scores"), store, clips)
    assert frame.groupby(["clip", "method"])["weight"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    count = dict(zip(store.clips["clip"].iloc[clips], store.modalities["face"].count[clips], strict=True))
    assert (
        frame.groupby(["clip", "method"]).size() == frame.groupby(["clip", "method"])["clip"].first().map(count)
    ).all()


def test_frames_are_marked_wrong_where_the_store_says_so(store):
    clips = mixed_clips(store, 2)
    frame, face = frame_weights(models("norm"), store, clips), store.modalities["face"]
    expected = np.concatenate([face.columns["wrong"][face.start[c] : face.start[c] + face.count[c]] for c in clips])
    assert np.array_equal(frame["wrong"], expected)


def test_weight_on_wrong_frames_is_their_share_where_all_frames_weigh_the_same(store):
    row = weight_on_wrong(models("norm"), store).iloc[0]
    face, shares = store.modalities["face"], []
    for clip in store.select("val", labelled=True, having="face"):
        wrong = face.columns["wrong"][face.start[clip] : face.start[clip] + face.count[clip]].mean()
        shares += [wrong] if 0 < wrong < 1 else []
    assert row["clips"] == len(shares)
    assert row["share of frames"] == pytest.approx(np.mean(shares))
    assert row["weight on wrong frames"] == pytest.approx(np.mean(shares), abs=1e-6)


# -- the search for learning rates ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_arm_is_given_as_many_trials(name):
    trials = systems.tuning_grid(name)
    assert len(set(trials)) == len(trials) == len(systems.tuning_grid("mean"))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_training_of_an_arm_is_one_that_was_tried(name):
    assert systems.tuned(name) in systems.tuning_grid(name)


def test_search_averages_over_worlds_and_names_the_training_that_is_used(monkeypatch):
    trials = systems.tuning_grid("quality")
    monkeypatch.setattr(aggregation, "TUNED", {"quality": {"lr": trials[3].lr, "epochs": trials[3].epochs}})
    records = [
        record("quality", seed, [0.5 + 0.01 * i + gain], training=trial, key=f"{i} {seed}")
        for i, trial in enumerate(trials)
        for seed, gain in zip(systems.TUNING_SEEDS, (0, 0.002), strict=True)
    ]
    frame = aggregation.tuning_frame(records)
    best_first = list(reversed(trials))
    assert list(zip(frame["epochs"], frame["lr"], strict=True)) == [(t.epochs, t.lr) for t in best_first]
    assert frame["map_at_100"].iloc[0] == pytest.approx(0.501 + 0.01 * (len(trials) - 1))
    assert np.flatnonzero(frame["chosen"]).tolist() == [best_first.index(trials[3])]


def test_training_of_an_arm_was_the_best_short_one_of_the_committed_search():
    frame = aggregation.tuning_frame(records.read_results("04_search.jsonl.gz"))
    short = frame[frame["epochs"] == frame["epochs"].min()].groupby("aggregator").head(1)
    assert set(short["aggregator"]) == set(AGGREGATORS) and short["chosen"].all()


# -- the sensitivity grid ------------------------------------------------------------------------------------


def cell(share, quality, reliability, gain, seeds=(0, 1)):
    """Records of all arms of a cell, each world with its own small difference."""
    settings = grid_settings(share, quality, reliability, 60)
    return [
        record(name, seed, [0.5 + (gain + 0.001 * seed) * (name != "quality")], settings=settings)
        for name in aggregation.GRID_ARMS
        for seed in seeds
    ]


def test_grid_settings_scale_the_shares_of_contaminated_clips():
    world = settings_for("quick", **dict(grid_settings(2.0, 0.0, 0.6, 60)))
    assert world == replace(
        Settings(),
        identities=60,
        contaminated=2 * Settings().contaminated,
        wrong_quality=0.0,
        mostly_wrong=2 * Settings().mostly_wrong,
        reliability=0.6,
    )


@pytest.mark.parametrize("name", aggregation.GRIDS)
def test_cells_of_every_grid_are_worlds_that_can_be_drawn(name):
    cells = [settings_for("quick", **dict(grid_settings(*at, 60))) for at in aggregation.GRIDS[name]]
    assert len(set(cells)) == len(cells)


def test_grid_compares_learned_arms_with_quality_weights_cell_by_cell():
    frame = grid_frame(cell(0.5, -1.0, 0.95, 0.02) + cell(2.0, -1.0, 0.95, -0.03))
    assert set(frame["aggregator"]) == set(aggregation.GRID_LEARNED)
    by_share = frame.groupby("share")["difference"].first()
    assert by_share.to_dict() == {0.5: pytest.approx(2.05), 2.0: pytest.approx(-2.95)}


def test_grid_without_records_is_empty_and_says_nothing():
    assert grid_frame([]).empty and grid_sentences(grid_frame([])) == []


def test_verdict_counts_the_cells_whose_interval_excludes_zero():
    cells = pd.DataFrame({"aggregator": ["NAN"] * 4, "low": [0.1, -0.1, -0.3, 0], "high": [0.2, 0.1, -0.2, 0.3]})
    assert grid_verdicts(cells).values.tolist() == [["NAN", 4, 1, 1, 2]]


def test_grid_sentences_name_only_the_axes_that_vary():
    sentences = grid_sentences(grid_frame(cell(0.5, -1.0, 0.95, 0.02) + cell(2.0, -1.0, 0.95, -0.03)))
    assert len(sentences) == 2
    assert "share of wrong frames (factor) goes from 0.5 to 2" in sentences[1] and "+2.05 to -2.95" in sentences[1]


# -- sentences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing, sentence",
    [
        ([], ""),
        (["det"], "These clips have no det score, so what needs one is not run."),
        (["quality", "det"], "These clips have no quality and no det score, so what needs one is not run."),
    ],
)
def test_missing_scores_are_said(missing, sentence):
    assert scores_sentence(missing) == sentence


@pytest.fixture
def current(monkeypatch):
    monkeypatch.setattr(compare_module, "library_hash", lambda: "here")


@pytest.mark.parametrize(
    "simulated, kind", [([True, True], "simulated"), ([False, False], "real"), ([True, False], "partly simulated")]
)
def test_provenance_says_whether_clips_are_simulated(current, simulated, kind):
    sentence = provenance([record(simulated=each) for each in simulated])
    assert sentence.startswith(f"2 records on {kind} clips, ")


def test_provenance_says_when_where_and_by_which_commit(current):
    sentence = provenance([record(made="2024-03-01T00:00:00"), record(commit="fed9876")])
    assert "made 2024-02-03 to 2024-03-01 on CPU, commit abc1234, fed9876, " in sentence


def test_records_of_one_day_name_it_once(current):
    assert "made 2024-02-03 on CPU" in provenance([record(), record("norm")])


@pytest.mark.parametrize(
    "libraries, ending",
    [
        (["here", "here"], "by the code that built this page."),
        (["here", "old"], "by an earlier version of the code than this page."),
    ],
)
def test_provenance_says_when_a_record_is_stale(current, libraries, ending):
    assert provenance([record(library=library) for library in libraries]).endswith(ending)


def test_no_records_are_said_to_be_none():
    assert provenance([]) == "There are no such records."
