"""What the chapters run, held against the records that are kept with the book."""

from dataclasses import replace

import pytest

from mmlib import retrieve, systems
from mmlib.experiment import arm_key
from mmlib.records import read_results
from mmlib.studies import fusion, plans

WORLDS = range(10)
KEPT = {"04_aggregation": "04_arms", "07_fusion": "07_arms", "08_ensemble": "08_ensemble", "10_ladder": "10_ladder"}


@pytest.mark.parametrize("chapter", KEPT)
def test_committed_records_are_of_the_arms_of_the_chapter_in_ten_worlds(chapter, store):
    """An arm that changed without a word would find no record."""
    free = ("members", "fallback.members") if chapter == "10_ladder" else ()
    planned = {arm_key(arm, *free) for arm in plans.PLANS[chapter](store).values()}
    kept = read_results(f"{KEPT[chapter]}.jsonl.gz")
    found = {(arm_key(record.experiment, *free), record.experiment["seed"]) for record in kept}
    assert found == {(arm, seed) for arm in planned for seed in WORLDS}
    assert {(r.experiment["data"], r.experiment["profile"]) for r in kept} == {("simulated", "quick")}
    assert len({record.key for record in kept}) == len(kept)


def test_committed_records_have_what_joins_face_and_scene_from_a_start_at_random_too(store):
    planned = {arm_key(arm) for name, arm in plans.fusions(store, starts=True).items() if systems.RANDOM in name}
    kept = [(arm_key(record.experiment), record.experiment["seed"]) for record in read_results("07_random.jsonl.gz")]
    assert len(planned) == 3 + len(fusion.WEIGHTS) and len(kept) == len({*kept})
    assert {*kept} == {(arm, seed) for arm in planned for seed in WORLDS}


@pytest.mark.parametrize("chapter", plans.PLANS)
def test_every_arm_of_a_chapter_can_be_run_on_clips_that_have_all(chapter, store):
    for arm in plans.placed(plans.PLANS[chapter](store), [3], profile="tiny"):
        retrieve.require(arm, store)
        assert (arm.seed, arm.profile) == (3, "tiny")


def test_clips_without_scores_or_scene_leave_the_arms_that_need_neither(bare):
    for chapter, plan in plans.PLANS.items():
        arms = plan(bare)
        assert arms, chapter
        for arm in arms.values():
            retrieve.require(arm, bare)


def test_arms_are_placed_in_every_world_and_shrunk(store):
    plan = {"one": systems.BASE, "other": replace(systems.BASE, concat="normalised")}
    placed = plans.placed(plan, [1, 2], profile="quick", identities=50)
    assert [(e.concat, e.seed) for e in placed] == [("none", 1), ("none", 2), ("normalised", 1), ("normalised", 2)]
    assert all(dict(e.settings)["identities"] == 50 for e in placed)
