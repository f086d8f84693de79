from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import made, of

from mmlib import retrieve
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.rank import Fallback
from mmlib.studies import inference
from mmlib.studies.inference import NONE, NONE_FLAT, pick, rule_frame, with_rule
from mmlib.systems import ONE_NAME, ONE_NAME_AS_CODED


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


def test_the_rules_have_the_constants_of_description_and_code():
    rules = inference.rules(BASE)
    assert rules["described"].fallback == Fallback(by="quality", share=0.01, low=0.8, absent=1.0)
    coded = Fallback(by="norm, float16", threshold=8.867, low=0.8, absent=0.95)
    assert rules["coded"].fallback == rules["coded, scale 30"].fallback == coded
    alone = {
        "members": (0,),
        "lr": None,
        "context_dim": None,
        "hidden": None,
    }  # one model, trained alike, so that nothing but the rule differs
    systems = ((rules["described"], ONE_NAME), (rules["coded"], ONE_NAME_AS_CODED))
    assert all(replace(system.fallback, **alone) == rule.fallback for rule, system in systems)
    assert [rules[name].scale for name in ("described", "coded", "coded, scale 30", NONE_FLAT)] == [30, 1, 30, 1]


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
    assert points["experiment"].map(lambda e: e.fallback.absent).tolist() == [1.0] * 22 + [0.5, 0.8, 0.95, 1.0, 1.2]


def test_without_a_scene_there_is_no_rule(bare):
    base = inference.base(bare, data=str(bare.path))
    assert (base.context, base.aggregator) == ((), "norm")  # there is no det score either
    assert list(inference.rules(base)) == [NONE] and inference.sweeps(base).empty


def test_without_scores_every_rule_goes_by_the_norm():
    base = replace(BASE, aggregator="norm")
    every = [*inference.rules(base).values(), *inference.sweeps(base)["experiment"]]
    assert {e.fallback.by for e in every if e.fallback} == {"norm", "norm, float16"}


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
def picked():
    named = inference.rules(BASE)
    return pick(ran(named, APS), named)


def test_each_rule_is_compared_with_the_same_scores_without_it(picked):
    frame = rule_frame(*picked).set_index("rule")
    assert frame["difference"].to_dict() == pytest.approx(
        {"described": 3, "coded, scale 30": 3, "clips without a face": 1, NONE: 0, NONE_FLAT: 0, "coded": -10}
    )
    assert frame.loc["coded", "baseline"] == NONE_FLAT
    assert frame["map_at_100"].is_monotonic_decreasing


def test_without_a_scene_there_is_the_baseline_alone():
    named = inference.rules(replace(BASE, context=()))
    records, names = pick({BASE: record(BASE, [0.5, 0.7])}, {NONE: BASE})
    assert list(named) == rule_frame(records, names)["rule"].tolist() == [NONE]
    curve = inference.sweep_frame({BASE: records[0]}, inference.sweeps(replace(BASE, context=())), BASE)
    assert curve.empty and inference.extremes(curve).empty


def test_the_points_of_a_sweep_have_the_values_of_their_experiments():
    points = inference.sweeps(BASE)
    named = {NONE: BASE} | {str(i): e for i, e in enumerate(dict.fromkeys(points["experiment"]))}
    aps = {name: (0.5 + i / 100, 0.5 + i / 100) for i, name in enumerate(named)}
    curve = inference.sweep_frame(ran(named, aps), points, BASE)
    place = {e: int(name) for name, e in named.items() if name != NONE}
    assert curve["difference"].tolist() == pytest.approx([place[e] + 1 for e in points["experiment"]])
    assert curve[["sweep", "line", "x"]].equals(points[["sweep", "line", "x"]])


def test_a_sweep_is_best_and_worst_where_its_differences_are():
    curve = pd.DataFrame({"sweep": "share", "line": ["norm"] * 3 + ["a"] * 2, "x": [0.0, 0.01, 0.1, 1, 2]})
    curve["difference"] = [0.5, 1.25, -1, 2, 2]
    assert inference.extremes(curve).to_dict("records") == [
        {"sweep": "share", "line": "norm", "best": 0.01, "worst": 0.1, "apart": 2.25},
        {"sweep": "share", "line": "a", "best": 1, "worst": 1, "apart": 0},
    ]


def test_precision_by_quality_is_compared_within_seed_and_scale():
    parts = {NONE: 0.5, "described": 0.75, NONE_FLAT: 0.25, "coded": 0.125}
    named = {name: e for name, e in inference.rules(BASE).items() if name in parts}
    found = [
        record(replace(e, seed=seed), [0.5], breakdown={"quality": [[0, 1, 4, 0.0, parts[name] + seed / 4]]})
        for name, e in named.items()
        for seed in (0, 1)
    ]
    gain = inference.breakdown_gain(found, [name for name in named for _ in range(2)])
    assert dict(zip(gain["rule"], gain["gain"])) == pytest.approx(
        {NONE: 0, "described": 25, NONE_FLAT: 0, "coded": -12.5}
    )
    assert gain["range"].tolist() == ["0–1"] * 4 and gain["clips"].tolist() == [4] * 4


def test_clips_without_quality_have_no_gain_by_quality():
    assert inference.breakdown_gain([record(BASE, [0.5])], [NONE]).empty


# -- where the points are lost -------------------------------------------------------------------------------


def test_the_ceiling_is_what_a_perfect_ranking_of_faces_reaches(faceless):
    assert inference.ceiling(faceless, threshold=4.0) == {
        "relevant": 3,
        "without": 1,
        "map_at_100": 0.75,  # half of identity 0, all of identity 1
        "gallery_without": 2,
        "below": pytest.approx(2 / 3),  # norms 3 and 1, not 5
    }


@pytest.mark.parametrize("threshold, share", [(1.0, 0), (1.5, 1 / 3), (8.867, 1)])
def test_the_share_below_counts_clips_with_a_face_by_their_mean_norm(faceless, threshold, share):
    assert inference.ceiling(faceless, threshold)["below"] == pytest.approx(share)


def test_groups_are_cut_as_the_rule_cuts_them(faceless):
    group = inference.quality_groups(faceless, "quality", shares=(0.34, 0.67))
    assert group.tolist() == ["lowest 34 %", "no face", "the rest", "34–67 %", "no face"]
    assert list(group.categories) == ["no face", "lowest 34 %", "34–67 %", "the rest"]


@pytest.mark.parametrize("shares", [(0.01, 0.05), (0.02, 0.1), (0.67, 0.34), (0.005,), ()])
def test_no_clip_is_lost_whatever_the_shares(store, shares):
    found = retrieve.retrieve(of(store, aggregator="norm"), store)
    group = inference.quality_groups(store, "quality", shares)
    lost = inference.lost_points(found, store, group)
    assert lost["clips"].sum() == len(store.select("val", labelled=True))
    assert lost["lost"].sum() == pytest.approx(100 - 100 * found.ap.mean())
    assert lost["group"].tolist() == [name for name in group.categories if name in set(lost["group"])]


def test_points_lost_are_counted_clip_by_clip(faceless):
    # Identity 0 finds clip a at rank 2, identity 1 clip c at rank 1; b is never found.
    found = SimpleNamespace(
        gallery=np.array([0, 2, 3]),
        queries=np.array([0, 1]),
        ranking=np.array([[1, 0, -1], [1, -1, -1]]),
        hits=np.array([[False, True, False], [True, False, False]]),
    )
    group = pd.Categorical(["low", "no face", "the rest", None, None], ["no face", "low", "the rest"])
    lost = inference.lost_points(found, faceless, group).set_index("group")
    assert lost["lost"].to_dict() == pytest.approx({"no face": 25, "low": 12.5, "the rest": 0})
    assert lost["precision"].to_dict() == pytest.approx({"no face": 0, "low": 0.5, "the rest": 1})
    assert lost["clips"].tolist() == [1, 1, 1]
