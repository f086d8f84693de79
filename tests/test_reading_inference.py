from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import made, of

from mmlib import retrieve
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.studies import inference
from mmlib.studies.inference import NONE, NONE_FLAT, labelled, pick, rule_frame, with_rule


@pytest.fixture(scope="module")
def faceless(tmp_path_factory):
    """Val clips a, b of identity 0 and c of identity 1, and distractors d, e; b and e have no face.

    Norms of a, c, d: 3, 1 (a frame of 0 and one of 2), 5; quality 10, 30, 20.
    """
    clips = pd.DataFrame({"clip": list("abcde"), "split": ["val"] * 5, "identity": [0, 0, 1, -1, -1]})
    path = tmp_path_factory.mktemp("faceless") / "store"
    with ClipStore.create(path, simulated=False, provenance={}) as writer:
        writer.append("face", np.array([[3, 0], [0, 0], [0, 2], [3, 4]], np.float16), quality=[10, 20, 40, 20])
        start, count = np.array([0, 0, 1, 0, 0]), np.array([1, 0, 2, 0, 0])
        start[3], count[3] = 3, 1
        writer.finish(clips, ["7", "8"], {"face": (start, count)})
    return ClipStore.open(path)


BASE = Experiment(aggregator="quality", context=("scene",), combine="softmax")


def record(asked, ap, **known):
    return made(asked, ap=ap, measures={"map_at_100": float(np.mean(ap))}, **known)


# -- the rules -----------------------------------------------------------------------------------------------


def test_rules_and_sweeps_share_the_trained_members():
    every = [*inference.rules(BASE).values(), *inference.sweeps(BASE)["experiment"]]
    assert {e.branch() for e in every} == {BASE.branch()}
    assert len({e.second().branch() for e in every if e.fallback}) == 1


def test_a_share_or_a_weight_of_nothing_is_one_rule():
    assert with_rule(BASE, share=0.0) == with_rule(BASE, low=0.0) == with_rule(BASE, by="norm", share=0.0)
    assert with_rule(BASE, share=0.01) != with_rule(BASE, share=0.0)


def test_the_described_rule_is_that_of_the_system():
    from mmlib.systems import ONE_NAME, ONE_NAME_AS_CODED

    rules = inference.rules(BASE)
    for name, system in (("described", ONE_NAME), ("coded", ONE_NAME_AS_CODED)):
        wanted = replace(system.fallback, members=(0,))
        assert (rules[name].fallback, rules[name].scale) == (wanted, system.scale)


def test_sweeps_have_every_value_on_every_line():
    points = inference.sweeps(BASE)
    count = points.groupby(["sweep", "line"])["x"].nunique().to_dict()
    assert count == {
        ("absent", "described"): 5,
        ("low", "lowest 1%"): 5,
        ("low", "lowest 5%"): 5,
        ("share", "norm"): 6,
        ("share", "quality"): 6,
    }
    shares = points[(points["line"] == "norm") & (points["x"] == 0.05)]["experiment"].item().fallback
    assert (shares.by, shares.share, shares.low) == ("norm", 0.05, 0.8)


def test_without_a_scene_there_is_no_rule(bare):
    base = inference.base(bare, data=str(bare.path))
    assert (base.context, base.aggregator) == ((), "norm")  # there is no det score either
    assert list(inference.rules(base)) == [NONE] and inference.sweeps(base).empty


def test_without_scores_every_rule_goes_by_the_norm():
    base = replace(BASE, aggregator="norm")
    every = [*inference.rules(base).values(), *inference.sweeps(base)["experiment"]]
    assert {e.fallback.by for e in every if e.fallback} == {"norm"}


def test_base_of_a_complete_store_has_scene_and_quality_weights(store):
    base = inference.base(store, seed=3)
    assert (base.context, base.aggregator, base.seed, base.combine) == (("scene",), "quality", 3, "softmax")


# -- what they are worth -------------------------------------------------------------------------------------


def ran(named, aps):
    """Records of named experiments in worlds 0 and 1; aps by name, one MAP a world."""
    return {
        replace(e, seed=seed): record(replace(e, seed=seed), [aps[name][seed]])
        for name, e in named.items()
        for seed in (0, 1)
    }


APS = {
    NONE: (0.5, 0.6),
    "clips without a face": (0.51, 0.61),
    "described": (0.53, 0.63),
    NONE_FLAT: (0.4, 0.4),
    "coded": (0.3, 0.3),
    "coded, scale 30": (0.53, 0.63),
}


@pytest.fixture
def records():
    named = inference.rules(BASE)
    return pick(ran(named, APS), named)


def test_each_rule_is_compared_with_the_same_scores_without_it(records):
    frame = rule_frame(records).set_index("rule")
    assert frame["difference"].to_dict() == pytest.approx(
        {"described": 3, "coded, scale 30": 3, "clips without a face": 1, NONE: 0, NONE_FLAT: 0, "coded": -10}
    )
    assert frame.loc["coded", "baseline"] == NONE_FLAT
    assert frame["map_at_100"].is_monotonic_decreasing


def test_the_answer_tells_the_two_rules_apart(records):
    text = inference.answer(records, "some clips")
    assert text.startswith("On some clips, the described rules are worth +3.00 points")
    assert "by the scene alone +1.00 points" in text and "lowest percent by quality +2.00 points" in text
    assert "over 2 worlds" in text


def test_the_coded_rules_are_set_beside_the_described_ones(records):
    text = inference.coded_sentence(records)
    assert "coded rules are worth -10.00 points (95 % interval -10.00 to -10.00, a loss)" in text
    assert "from the described rules by +0.00 points (95 % interval +0.00 to +0.00, nothing)" in text
    assert "at scale 30 by -15.00 points" in text


def test_without_rules_the_sentences_say_so():
    alone = labelled([record(BASE, [0.5, 0.7])], [NONE])
    assert "no fallback can be run" in inference.answer(alone, "these clips")
    assert "Neither" in inference.coded_sentence(alone)
    assert "nothing to vary" in inference.sweep_sentences(inference.sweeps(replace(BASE, context=())))


def test_the_points_of_a_sweep_have_the_values_of_their_experiments():
    points = inference.sweeps(BASE)
    named = {NONE: BASE} | {str(i): e for i, e in enumerate(dict.fromkeys(points["experiment"]))}
    aps = {name: (0.5 + i / 100, 0.5 + i / 100) for i, name in enumerate(named)}
    curve = inference.sweep_frame(ran(named, aps), points, BASE)
    place = {e: int(name) for name, e in named.items() if name != NONE}
    assert curve["difference"].tolist() == pytest.approx([place[e] + 1 for e in points["experiment"]])
    assert curve[["sweep", "line", "x"]].equals(points[["sweep", "line", "x"]])


def test_sweep_sentences_name_best_and_worst():
    curve = pd.DataFrame({"sweep": "share", "line": "norm", "x": [0.0, 0.01, 0.1], "difference": [0.5, 1.25, -1.0]})
    assert inference.sweep_sentences(curve) == (
        "Over the share of low clips by norm, MAP@100 is best at 0.01 and worst at 0.1, 2.25 points apart."
    )


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.5, 1.5, "a gain"), (-1.5, -0.5, "a loss"), (-1, 1, "not told apart"), (0, 0, "nothing")],
)
def test_the_interval_decides_what_a_difference_is_called(low, high, says):
    assert says in inference.worth({"difference": (low + high) / 2, "low": low, "high": high})


def test_precision_by_quality_is_compared_within_seed_and_scale():
    parts = {NONE: 0.5, "described": 0.75, NONE_FLAT: 0.25, "coded": 0.125}
    named = {name: e for name, e in inference.rules(BASE).items() if name in parts}
    found = [
        record(replace(e, seed=seed), [0.5], breakdown={"quality": [[0, 1, 4, 0.0, parts[name] + seed / 4]]})
        for name, e in named.items()
        for seed in (0, 1)
    ]
    gain = inference.breakdown_gain(labelled(found, [name for name in named for _ in range(2)]))
    assert dict(zip(gain["rule"], gain["gain"])) == pytest.approx(
        {NONE: 0, "described": 25, NONE_FLAT: 0, "coded": -12.5}
    )
    assert gain["range"].tolist() == ["0–1"] * 4 and gain["clips"].tolist() == [4] * 4


def test_clips_without_quality_have_no_gain_by_quality():
    assert inference.breakdown_gain(labelled([record(BASE, [0.5])], [NONE])).empty


# -- where the points are lost -------------------------------------------------------------------------------


def test_the_ceiling_is_what_a_perfect_ranking_of_faces_reaches(faceless):
    assert inference.ceiling(faceless) == {
        "relevant": 3,
        "without": 1,
        "map_at_100": 0.75,  # half of identity 0, all of identity 1
        "gallery_without": 2,
    }


def test_the_share_below_counts_clips_with_a_face_by_their_mean_norm(faceless):
    assert [inference.share_below(faceless, threshold) for threshold in (1.0, 1.5, 4.0, 9.0)] == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )


def test_groups_are_cut_as_the_rule_cuts_them(faceless):
    group = inference.quality_groups(faceless, "quality", shares=(0.34, 0.67))
    assert group.tolist() == ["lowest 34 %", "no face", "the rest", "34–67 %", "no face"]


def test_points_lost_are_counted_clip_by_clip(faceless):
    # Identity 0 finds clip a at rank 2, identity 1 clip c at rank 1; b is never found.
    found = SimpleNamespace(
        gallery=np.array([0, 2, 3]),
        queries=np.array([0, 1]),
        ranking=np.array([[1, 0, -1], [1, -1, -1]]),
        hits=np.array([[False, True, False], [True, False, False]]),
    )
    group = np.array(["lowest 1 %", "no face", "the rest", "", ""], object)
    lost = inference.lost_points(found, faceless, group).set_index("group")
    assert lost["lost"].to_dict() == pytest.approx({"no face": 25, "lowest 1 %": 12.5, "the rest": 0})
    assert lost["precision"].to_dict() == pytest.approx({"no face": 0, "lowest 1 %": 0.5, "the rest": 1})
    assert lost["clips"].tolist() == [1, 1, 1]


def test_points_lost_add_up_to_what_is_missing(store):
    found = retrieve.retrieve(of(store, aggregator="norm"), store)
    lost = inference.lost_points(found, store, inference.quality_groups(store, "quality"))
    assert lost["lost"].sum() == pytest.approx(100 - 100 * found.ap.mean())
    assert lost["clips"].sum() == len(store.select("val", labelled=True))


def test_the_sentence_gives_points_lost_before_and_after():
    lost = pd.DataFrame(
        {"group": ["no face", "the rest"] * 2, "clips": [3, 9] * 2, "lost": [4.0, 8.0, 1.0, 8.5],
         "rule": [NONE, NONE, "described", "described"]}
    )  # fmt: skip
    assert inference.where_sentence(lost) == (
        "From no fallback to the described rules, the points lost go from 4.00 to 1.00 for clips without a face "
        "(3 clips), from 8.00 to 8.50 for the rest (9 clips)."
    )
    assert inference.where_sentence(lost[lost["rule"] == NONE]) == (
        "Without a rule, no face (3 clips) loses 4.00 points, the rest (9 clips) loses 8.00 points."
    )
