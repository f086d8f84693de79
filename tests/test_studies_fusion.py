"""What chapter 07 computes from records and stores, against values computed by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import made

from mmlib import retrieve, systems
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.rank import Fallback
from mmlib.retrieve import PERCENTILE_EDGES
from mmlib.studies import fusion

FACE = systems.FUSIONS["face"]
SCORED = replace(FACE, combine="softmax", fallback=Fallback(share=0.0, absent=None))


def record(arm=FACE, seed=0, ap=(0.5,), *, data="simulated", parameters=10, **known):
    measures = {"map_at_100": float(np.mean(ap)), "parameters": parameters, "gallery_clips": 7, "train_clips": 5}
    asked = replace(arm, seed=seed)
    if data != "simulated":
        known["key"] = "on a store"  # no store lies there to be hashed
        asked = replace(asked, data=data)
    return made(asked, **{"measures": measures, "ap": list(ap), "seconds": {"fit": 2.0 + seed}} | known)


def found(arms):
    """Records by the names of their arms, as the chapter has them."""
    pairs = [(name, each) for name, records in arms.items() for each in records]
    return pd.Series([each for _, each in pairs], index=[name for name, _ in pairs])


def swept(table, *, data="simulated"):
    """Records of weights, from {weight: [AP of seed 0, AP of seed 1, ...]}."""
    return found(
        {
            f"weight {weight:g}": [record(SCORED, seed, np.atleast_1d(ap), data=data) for seed, ap in enumerate(line)]
            for weight, line in table.items()
        }
    )


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """Six clips; the last two have no face, the second and the last no scene; no scores, no other modality."""
    clips = pd.DataFrame({"clip": list("abcdef"), "split": ["train"] * 3 + ["val"] * 3, "identity": [0, 1, 0, 0, 1, 1]})
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("partial") / "store"
    with ClipStore.create(path, simulated=False, provenance={}) as writer:
        writer.append("face", rng.normal(size=(4, 8)).astype(np.float16))
        writer.append("scene", rng.normal(size=(4, 16)).astype(np.float16))
        spans = {
            "face": (np.array([0, 1, 2, 3, 0, 0]), np.array([1, 1, 1, 1, 0, 0])),
            "scene": (np.array([0, 0, 1, 2, 3, 0]), np.array([1, 0, 1, 1, 1, 0])),
        }
        writer.finish(clips, ["7", "8"], spans)
    return ClipStore.open(path)


# -- arms ----------------------------------------------------------------------------------------------------


def test_arms_of_absent_modalities_are_left_out(partial):
    kept = fusion.possible(systems.FUSIONS, partial)
    assert list(kept) == [name for name in systems.FUSIONS if name not in ("head", "body", "audio", "all")]


def test_clips_with_faces_alone_have_nothing_to_fuse(bare):
    assert list(fusion.possible(systems.FUSIONS, bare)) == ["face"]
    assert fusion.weighted(FACE, bare) == {}


def test_arms_see_scores_where_there_are_some(store, bare):
    seen = {arm.aggregator for arm in fusion.possible(systems.FUSIONS, store).values()}
    assert seen == {"attention + scores"}
    assert fusion.possible(systems.FUSIONS, bare)["face"].aggregator == "attention"  # quality, but no det score


def test_possible_arms_can_be_run(partial):
    for arm in (fusion.possible(systems.FUSIONS, partial) | fusion.weighted(FACE, partial)).values():
        if arm.fallback:
            arm = replace(arm, aggregator="attention")
        retrieve.require(arm, partial)  # raises where something is missing


def test_weights_share_both_models_and_differ_in_nothing_else(store):
    plan = fusion.weighted(FACE, store)
    assert {arm.branch() for arm in plan.values()} == {FACE.branch()}
    assert len({arm.second().branch() for arm in plan.values()}) == 1
    assert [arm.fallback.weight for arm in plan.values()] == list(fusion.WEIGHTS.values())
    assert {(arm.fallback.share, arm.fallback.absent) for arm in plan.values()} == {(0, None)}
    second = next(iter(plan.values())).second().training
    assert second == replace(FACE.training, lr=systems.CHOSEN["scene"]) != FACE.training


@pytest.mark.parametrize("name, by", [("store", "quality"), ("partial", "norm")])
def test_clips_are_ordered_by_a_score_that_the_store_has(name, by, request):
    plan = fusion.weighted(FACE, request.getfixturevalue(name))
    assert {arm.fallback.by for arm in plan.values()} == {by}


def test_only_arms_that_were_run_are_compared():
    runs = found({"face": [record(ap=[0.5, 0.5])], "all": [record(ap=[0.6, 0.8])]})
    frame = fusion.against(runs, ["all", "audio", "face"], "face")
    assert frame["arm"].tolist() == ["all", "face"]
    assert frame["difference"].tolist() == pytest.approx([20, 0])


def test_pairs_are_of_arms_that_the_chapter_has():
    named = {name for pair in fusion.PAIRS.values() for name in pair}
    assert named <= {*systems.FUSIONS, fusion.SCORE} and set(fusion.WIDTHS) | set(fusion.OTHERS) <= set(systems.FUSIONS)


def test_a_start_at_random_is_that_of_both_models_and_has_pairs_and_a_weight_of_its_own():
    face, scene = (systems.arms(systems.FUSIONS_AT_RANDOM)[name + systems.RANDOM] for name in ("face", "scene"))
    plan = fusion.at_every_weight(face)
    assert list(plan) == [name + systems.RANDOM for name in fusion.WEIGHTS]
    assert {(arm.start, arm.fallback.lr) for arm in plan.values()} == {("random", scene.training.lr)}
    named = {name for pair in fusion.FROM_RANDOM.values() for name in pair} - {fusion.SCORE}
    assert named <= {*systems.FUSIONS_AT_RANDOM, fusion.SCORE + systems.RANDOM}
    runs = swept({0.0: [0.0, 0.5, 0.5], 0.1: [0.2, 0.9, 0.8], 0.5: [0.3, 0.1, 0.2]})
    both = pd.concat([runs, runs.iloc[::-1].rename(lambda name: name + systems.RANDOM)])
    assert fusion.held_out(both)[0].index.unique().tolist() == [fusion.SCORE]
    records, frame = fusion.held_out(both[both.index.str.endswith(systems.RANDOM)], systems.RANDOM)
    assert records.index.unique().tolist() == [fusion.SCORE + systems.RANDOM] and len(frame) == 3


def test_cost_of_score_fusion_counts_both_models():
    scene = systems.FUSIONS["scene"]
    runs = found(
        {
            "face": [record(seed=s, parameters=10) for s in (0, 1)],
            "scene": [record(scene, s, parameters=3) for s in (0, 1)],
            "mix": [record(SCORED, s, parameters=10) for s in (0, 1)],
        }
    )
    frame = fusion.costs(runs).set_index("arm")
    assert frame["parameters"].tolist() == [10, 3, 13]
    assert frame.loc["face"].to_dict() == {
        "parameters": 10,
        "training, s": 2.5,
        "clips trained on": 5,
        "clips ranked": 7,
    }


# -- groups of clips -----------------------------------------------------------------------------------------

LOW = [[0, 1, 1, 0.0, 0.2], [1, 2, 3, 0.0, 0.6], [40, 60, 10, 0.0, 0.9]]
HIGH = [[0, 1, 1, 0.0, 1.0], [1, 2, 3, 0.0, 0.6], [40, 60, 10, 0.0, 0.8]]


@pytest.fixture
def grouped():
    few, more = ([[1, 5, 2, 0.0, 0.5], [5, 10, 2, 0.0, last]] for last in (0.7, 0.8))
    return found(
        {
            "face": [record(breakdown={"quality": LOW, "frames": few})],
            "scene 128": [record(breakdown={"quality": HIGH, "frames": more})],
        }
    )


def test_percentiles_are_pooled_by_the_number_of_their_clips(grouped):
    frame = fusion.gains(grouped, ["scene 128"]).set_index(["arm", "group", "range"])
    assert frame["precision"]["face", "quality", "0–4"] == pytest.approx((1 * 0.2 + 3 * 0.6) / 4)
    assert frame["clips"]["face", "quality", "0–4"] == 4
    assert frame["gain"]["scene 128", "quality", "0–4"] == pytest.approx(100 * 0.8 / 4)
    assert frame["gain"]["scene 128", "quality", "40–60"] == pytest.approx(-10)
    assert frame["gain"]["face"].tolist() == [0] * 4


def test_pools_end_where_ranges_of_the_records_do():
    assert set(fusion.POOLS) <= set(PERCENTILE_EDGES)


def test_low_groups_and_the_rest_weigh_clips_alike(grouped):
    frame = fusion.low_and_rest(fusion.gains(grouped, ["scene 128"])).set_index(["group", "arm", "side"])
    assert frame.loc[("quality", "scene 128", "low"), ["clips", "gain"]].tolist() == pytest.approx([4, 100 * 0.8 / 4])
    assert frame.loc[("quality", "scene 128", "rest"), ["clips", "gain"]].tolist() == pytest.approx([10, -10])
    assert frame.loc[("frames", "scene 128", "low"), ["clips", "gain"]].tolist() == pytest.approx([4, 5])
    assert ("frames", "scene 128", "rest") not in frame.index  # there are none of more frames to set beside
    assert (frame.xs("face", level="arm")["gain"] == 0).all()


# -- what a clip has -----------------------------------------------------------------------------------------


def test_coverage_counts_clips_with_and_without_a_face(partial):
    frame = fusion.coverage(partial)
    assert list(frame.columns) == ["split", "face", "clips", "scene (16)"]
    assert frame["clips"].tolist() == [3, 0, 1, 2]
    np.testing.assert_allclose(frame["scene (16)"], [2 / 3, np.nan, 1, 1 / 2])


def test_coverage_of_faces_alone_has_no_other_column(bare):
    frame = fusion.coverage(bare)
    assert list(frame.columns) == ["split", "face", "clips"] and frame["clips"].tolist() == [4, 0, 2, 0]


def test_clips_without_a_context_are_counted_by_the_arms_that_see_a_face():
    def lacking(arm, seed, **counts):
        return record(systems.FUSIONS[arm], seed, measures={"parameters": 1} | counts)

    scene = {"train_without_scene": 2, "gallery_without_scene": 3}
    runs = found(
        {
            "face": [record()],
            "scene": [lacking("scene", 0, train_without_scene=0, gallery_without_scene=0)],
            "scene 128": [lacking("scene 128", 0, **scene), lacking("scene 128", 1, train_without_scene=9)],
            "head": [lacking("head", 0, train_without_head=0, gallery_without_head=1)],
        }
    )
    assert fusion.absent(runs).values.tolist() == [["scene", 2, 3], ["head", 0, 1]]
    assert fusion.absent(found({"face": [record()]})).empty


# -- the weight ----------------------------------------------------------------------------------------------


def test_weight_of_a_world_is_chosen_on_the_others():
    # world 0 likes .5, worlds 1 and 2 like .1, of which .1 is also the best of 0 and 1, and of 0 and 2
    records, frame = fusion.held_out(swept({0.0: [0.0, 0.5, 0.5], 0.1: [0.2, 0.9, 0.8], 0.5: [0.3, 0.1, 0.2]}))
    assert set(records.index) == {fusion.SCORE}
    assert frame["weight"].tolist() == [0.1, 0.1, 0.1]
    assert [r.ap for r in records] == [[0.2], [0.9], [0.8]]


def test_world_that_differs_gets_the_weight_that_the_others_like():
    records, frame = fusion.held_out(swept({0.0: [0.4, 0.9], 0.5: [0.6, 0.1]}))
    assert frame["weight"].tolist() == [0.0, 0.5]
    assert [r.ap for r in records] == [[0.4], [0.1]]


@pytest.mark.parametrize("data, seeds", [("simulated", 1), ("some store", 2)])
def test_halves_of_the_identities_choose_for_each_other(data, seeds):
    # identities 0 and 2 like weight .5, 1 and 3 weight 0
    lines = {0.0: [0.1, 0.9, 0.2, 0.8], 0.5: [0.6, 0.3, 0.7, 0.4]}
    records, frame = fusion.held_out(swept({w: [ap] * seeds for w, ap in lines.items()}, data=data))
    assert frame["weight"].tolist() == [0.0, 0.5]
    assert [r.ap for r in records] == [[0.1, 0.3, 0.2, 0.4]] * seeds
    assert records.iloc[0].measures["map_at_100"] == pytest.approx(0.25)


def test_lowest_of_equal_weights_is_taken():
    assert fusion.held_out(swept({0.0: [0.5, 0.5], 0.2: [0.5, 0.5]}))[1]["weight"].tolist() == [0, 0]


def test_without_weights_nothing_is_held_out():
    records, frame = fusion.held_out(found({"face": [record()]}))
    assert records.empty and frame.empty


def test_weights_are_compared_with_weight_0_in_their_order():
    frame = fusion.weight_frame(swept({0.0: [0.5, 0.4], 0.1: [0.7, 0.4], 0.5: [0.1, 0.2]}))
    assert frame["weight"].tolist() == [0.0, 0.1, 0.5]
    assert frame["difference"].tolist() == pytest.approx([0, 10, -30])
    assert fusion.weight_frame(found({"face": [record()]}))[["weight", "difference"]].values.tolist() == [[0, 0]]


def test_line_of_a_seed_starts_at_its_own_weight_0():
    frame = fusion.weight_lines(swept({0.0: [0.5, 0.4], 0.1: [0.7, 0.3]}))
    assert fusion.weight_lines(found({"face": [record()]})).empty
    assert frame[["seed", "weight"]].values.tolist() == [[0, 0], [1, 0], [0, 0.1], [1, 0.1]]
    assert frame["difference"].tolist() == pytest.approx([0, 0, 20, -10])


def test_largest_gap_is_over_seeds_and_identities():
    faces = found({"face": [record(seed=0, ap=[0.5, 0.4]), record(seed=1, ap=[0.5, 0.4])]})
    assert fusion.largest_gap(faces) == 0
    runs = pd.concat([faces, swept({0.0: [[0.5, 0.4], [0.5, 0.7]]})])
    assert fusion.largest_gap(runs) == pytest.approx(0.3)


def test_plan_of_the_chapter_has_distinct_experiments(store):
    plan = fusion.possible(systems.arms(systems.FUSIONS), store) | fusion.weighted(FACE, store)
    keys = [replace(arm, profile="tiny").key() for arm in plan.values()]
    assert len(keys) == len(set(keys)) == len(systems.FUSIONS) + len(fusion.WEIGHTS)
    assert all(isinstance(arm, Experiment) for arm in plan.values())


# -- kept records --------------------------------------------------------------------------------------------


def test_kept_records_are_named_by_their_arms_whatever_their_world():
    plan = {"face": FACE, "scene 128": systems.FUSIONS["scene 128"]}
    records = [record(replace(arm, settings=(("identities", 60),)), seed) for arm in plan.values() for seed in (3, 4)]
    assert fusion.named(records, plan).index.tolist() == ["face", "face", "scene 128", "scene 128"]


def test_a_kept_record_of_no_arm_is_refused():
    with pytest.raises(ValueError, match="is of no arm of this page"):
        fusion.named([record(replace(FACE, hidden=7))], {"face": FACE})
