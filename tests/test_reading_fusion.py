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
from mmlib.records import PERCENTILE_EDGES
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


def swept(table, *, data="simulated"):
    """Records of weights, from {weight: [AP of seed 0, AP of seed 1, ...]}."""
    return {
        fusion.weight_name(weight): [record(SCORED, seed, np.atleast_1d(ap), data=data) for seed, ap in enumerate(line)]
        for weight, line in table.items()
    }


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


def test_arms_of_absent_modalities_are_left_out_and_named(partial):
    kept = fusion.possible(systems.FUSIONS, partial)
    assert list(kept) == [name for name in systems.FUSIONS if name not in ("head", "body", "audio", "all")]
    assert fusion.left_out(systems.FUSIONS, partial) == (
        "These clips have no head, body and audio, so these arms are not run: head, body, audio, all."
    )


def test_clips_with_faces_alone_have_nothing_to_fuse(bare):
    assert list(fusion.possible(systems.FUSIONS, bare)) == ["face"]
    assert "nothing to fuse" in fusion.left_out(systems.FUSIONS, bare)
    assert fusion.weighted(FACE, bare) == {}


def test_arms_see_scores_where_there_are_some(store, bare):
    seen = {arm.aggregator for arm in fusion.possible(systems.FUSIONS, store).values()}
    assert (seen, fusion.left_out(systems.FUSIONS, store)) == ({"attention + scores"}, "")
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
    assert [arm.fallback.weight for arm in plan.values()] == list(fusion.WEIGHTS)
    assert {(arm.fallback.share, arm.fallback.absent) for arm in plan.values()} == {(0, None)}
    second = next(iter(plan.values())).second().training
    assert second == replace(FACE.training, lr=systems.CHOSEN["scene"]) != FACE.training


@pytest.mark.parametrize("name, by", [("store", "quality"), ("partial", "norm")])
def test_clips_are_ordered_by_a_score_that_the_store_has(name, by, request):
    plan = fusion.weighted(FACE, request.getfixturevalue(name))
    assert {arm.fallback.by for arm in plan.values()} == {by}


def test_records_are_named_in_the_order_they_were_asked_for():
    one, two = ([record(seed=seed, ap=[ap]) for seed in (0, 1)] for ap in (0.1, 0.2))
    assert fusion.by_name(["a", "b"], one + two) == {"a": one, "b": two}


def test_only_arms_that_were_run_are_compared():
    found = {"face": [record(ap=[0.5, 0.5])], "all": [record(ap=[0.6, 0.8])]}
    frame = fusion.against(found, ["all", "audio", "face"], "face")
    assert frame["arm"].tolist() == ["all", "face"]
    assert frame["difference"].tolist() == pytest.approx([20, 0])


def test_cost_of_score_fusion_counts_both_models():
    scene = systems.FUSIONS["scene"]
    found = {
        "face": [record(seed=s, parameters=10) for s in (0, 1)],
        "scene": [record(scene, s, parameters=3) for s in (0, 1)],
        "mix": [record(SCORED, s, parameters=10) for s in (0, 1)],
    }
    frame = fusion.costs(found).set_index("arm")
    assert frame["parameters"].tolist() == [10, 3, 13]
    assert frame.loc["face"].tolist() == [10, 2.5, 7]


# -- groups of clips -----------------------------------------------------------------------------------------

LOW = [[0, 1, 1, 0.0, 0.2], [1, 2, 3, 0.0, 0.6], [40, 60, 10, 0.0, 0.9]]
HIGH = [[0, 1, 1, 0.0, 1.0], [1, 2, 3, 0.0, 0.6], [40, 60, 10, 0.0, 0.8]]


@pytest.fixture
def grouped():
    few, more = ([[1, 5, 2, 0.0, 0.5], [5, 10, 2, 0.0, last]] for last in (0.7, 0.8))
    return {
        "face": [record(breakdown={"quality": LOW, "frames": few})],
        "scene 128": [record(breakdown={"quality": HIGH, "frames": more})],
    }


def test_percentiles_are_pooled_by_the_number_of_their_clips(grouped):
    frame = fusion.gains(grouped, ["scene 128"]).set_index(["arm", "group", "range"])
    assert frame["precision"]["face", "quality", "0–4"] == pytest.approx((1 * 0.2 + 3 * 0.6) / 4)
    assert frame["clips"]["face", "quality", "0–4"] == 4
    assert frame["gain"]["scene 128", "quality", "0–4"] == pytest.approx(100 * 0.8 / 4)
    assert frame["gain"]["scene 128", "quality", "40–60"] == pytest.approx(-10)
    assert frame["gain"]["face"].tolist() == [0] * 4


def test_pools_end_where_ranges_of_the_records_do():
    assert set(fusion.QUALITY_POOLS) <= set(PERCENTILE_EDGES)


def test_sentence_on_groups_weighs_clips_alike(grouped):
    said = fusion.where_sentence(fusion.gains(grouped, ["scene 128"]))
    assert "+20.00 points of precision among the worst 8 % by quality (4 clips), -10.00 among" in said
    assert "frames" not in said  # there are none of more frames to set beside
    assert "nothing" in fusion.where_sentence(fusion.gains({"face": grouped["face"]}, []))


# -- what a clip has -----------------------------------------------------------------------------------------


def test_coverage_counts_clips_with_and_without_a_face(partial):
    frame = fusion.coverage(partial)
    assert list(frame.columns) == ["split", "face", "clips", "scene (16)"]
    assert frame["clips"].tolist() == [3, 0, 1, 2]
    np.testing.assert_allclose(frame["scene (16)"], [2 / 3, np.nan, 1, 1 / 2])


def absent(train, gallery):
    measures = {"train_without_scene": train, "gallery_without_scene": gallery}
    return {"scene 128": [record(systems.FUSIONS["scene 128"], measures=measures)]}


def test_clips_without_a_context_are_said():
    assert "none lacks its scene" in fusion.absent_sentence(absent(0, 0))
    assert "0 in training and 3 in the gallery have no scene" in fusion.absent_sentence(absent(0, 3))
    assert fusion.absent_sentence({"face": [record()]}) == ""


# -- the weight ----------------------------------------------------------------------------------------------


def test_weight_of_a_world_is_chosen_on_the_others():
    # world 0 likes .5, worlds 1 and 2 like .1, of which .1 is also the best of 0 and 1, and of 0 and 2
    found = swept({0.0: [0.0, 0.5, 0.5], 0.1: [0.2, 0.9, 0.8], 0.5: [0.3, 0.1, 0.2]})
    records, frame = fusion.held_out(found)
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
    assert records[0].measures["map_at_100"] == pytest.approx(0.25)


def test_lowest_of_equal_weights_is_taken():
    assert fusion.held_out(swept({0.0: [0.5, 0.5], 0.2: [0.5, 0.5]}))[1]["weight"].tolist() == [0, 0]


def test_without_weights_nothing_is_held_out():
    records, frame = fusion.held_out({"face": [record()]})
    assert records == [] and frame.empty


def test_weights_are_compared_with_weight_0_in_their_order():
    frame = fusion.weight_frame(swept({0.0: [0.5, 0.4], 0.1: [0.7, 0.4], 0.5: [0.1, 0.2]}))
    assert frame["weight"].tolist() == [0.0, 0.1, 0.5]
    assert frame["difference"].tolist() == pytest.approx([0, 10, -30])
    assert fusion.weight_frame({"face": [record()]})[["weight", "difference"]].values.tolist() == [[0, 0]]


def test_line_of_a_seed_starts_at_its_own_weight_0():
    frame = fusion.weight_lines(swept({0.0: [0.5, 0.4], 0.1: [0.7, 0.3]}))
    assert frame[["seed", "weight"]].values.tolist() == [[0, 0], [1, 0], [0, 0.1], [1, 0.1]]
    assert frame["difference"].tolist() == pytest.approx([0, 0, 20, -10])


def test_largest_gap_is_over_seeds_and_identities():
    found = {"face": [record(seed=0, ap=[0.5, 0.4]), record(seed=1, ap=[0.5, 0.4])]}
    assert fusion.largest_gap(found) == 0
    found |= swept({0.0: [[0.5, 0.4], [0.5, 0.7]]})
    assert fusion.largest_gap(found) == pytest.approx(0.3)


# -- sentences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gains, word",
    [
        ((0.10, 0.11, 0.12), "is ahead of"),
        ((-0.10, -0.11, -0.12), "is behind"),
        ((0.1, -0.1, 0.0), "cannot be told apart from"),
    ],
)
def test_verdict_follows_the_interval(gains, word):
    found = {
        "face": [record(seed=s, ap=[0.5]) for s in range(3)],
        "all": [record(seed=s, ap=[0.5 + gain]) for s, gain in enumerate(gains)],
    }
    assert fusion.verdict(found, "all", "face").startswith(f"all {word} face, {100 * np.mean(gains):+.2f} points")
    assert fusion.sample(found) == "3 worlds"


def test_verdict_on_what_was_not_run_says_so():
    assert fusion.verdict({"face": [record()]}, "all", "face") == "all against face was not run"


def stepped(*gains):
    return {
        "face": [record(seed=s, ap=[0.5]) for s in range(len(gains))],
        "scene 128": [record(systems.FUSIONS["scene 128"], s, [0.5 + gain]) for s, gain in enumerate(gains)],
    }


@pytest.mark.parametrize(
    "gains, says, about",
    [
        ((0.050, 0.051, 0.052), "larger", "too strong"),
        ((0.001, 0.001, 0.001), "smaller", "too weak"),
        ((0.004, 0.005, 0.006), "cannot be told apart", None),
    ],
)
def test_published_step_is_held_against_the_interval(gains, says, about):
    said = fusion.published_sentence(stepped(*gains), simulated=True)
    assert says in said and ("too" in said) == (about is not None) and (about or "") in said
    assert "stand-in" not in fusion.published_sentence(stepped(*gains), simulated=False)


def test_one_world_does_not_condemn_the_stand_in():
    assert "stand-in" not in fusion.published_sentence(stepped(0.3), simulated=True)


def paired(without=0):
    """Records of what the sentences on score-level fusion look at; ``without``: clips with a face and no scene."""
    lacking = {"gallery_without_scene": without, "parameters": 1}
    return {
        "face": [record()],
        "scene": [
            record(
                systems.FUSIONS["scene"], ap=[0.25], measures={"map_at_100": 0.25, "train_clips": 6, "gallery_clips": 9}
            )
        ],
        "scene 128": [record(systems.FUSIONS["scene 128"], measures=lacking)],
        fusion.weight_name(1.0): [record(SCORED, ap=[0.125])],
    }


def test_gallery_of_scenes_alone_is_said():
    said = fusion.gallery_sentence(paired())
    assert "learns from 6 clips instead of 5 and ranks 9 instead of 7: its MAP@100 is 0.2500" in said
    assert "reaches 0.1250" in said


def test_weight_1_is_no_scene_model_where_some_clips_have_no_scene():
    assert "reaches" not in fusion.gallery_sentence(paired(without=2))


def test_sentences_of_faces_alone_name_no_scene_arm():
    found = {"face": [record()]}
    assert fusion.gallery_sentence(found) == ""
    assert "no scene" in fusion.answer(found, simulated=False)
    assert fusion.width_sentence(found) == "No scene was reduced."
    assert "no step" in fusion.published_sentence(found, simulated=False)


def test_plan_of_the_chapter_has_distinct_experiments(store):
    plan = fusion.possible(systems.arms(systems.FUSIONS), store) | fusion.weighted(FACE, store)
    keys = [replace(arm, profile="tiny").key() for arm in plan.values()]
    assert len(keys) == len(set(keys)) == len(systems.FUSIONS) + len(fusion.WEIGHTS)
    assert all(isinstance(arm, Experiment) for arm in plan.values())
