import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made
from scipy import stats

from mmlib import metrics
from mmlib.experiment import TRAINED_ON, Experiment, Training, arm_key
from mmlib.studies import ladder
from mmlib.studies.ladder import (
    ALL,
    AS_CODED,
    ATTENTION,
    BUDGET,
    LADDERS,
    NO_MARGIN,
    STEPS,
    climb,
    differences,
    names_of,
    plan,
    step_frame,
)
from mmlib.systems import CHOSEN_RATES, ONE_NAME_AS_CODED, SYSTEMS

# -- the experiments -----------------------------------------------------------------------------------------


def changed(before, after):
    """The fields in which two experiments, or two fallbacks, differ."""
    return {item.name for item in fields(before) if getattr(before, item.name) != getattr(after, item.name)}


def steps_between(rungs):
    """What each rung changes, but for the learning rates, which are its own."""
    plain = [replace(e, training=replace(e.training, lr=1.0, aggregator_lr=1.0)) for e in rungs]
    return [changed(a, b) for a, b in zip(plain, plain[1:])]


def test_described_steps_change_what_they_name_and_nothing_else():
    rungs = list(climb("described").values())
    assert steps_between(rungs) == [
        {"aggregator", "concat", "training"},
        {"context"},  # 128 dimensions are the default
        {"ensemble", "members"},
        {"fallback"},
    ]


def test_coded_steps_change_what_they_name_and_nothing_else():
    rungs = list(climb("as coded").values())
    assert steps_between(rungs) == [
        {"aggregator", "concat", "training"},
        {"context", "context_dim", "context_scale", "hidden"},
        {"ensemble", "members"},
        {"fallback"},
    ]


def test_the_last_rung_of_the_described_ladder_is_the_system():
    assert climb("described")["fallback"] == SYSTEMS["one-name"]


def test_the_last_rung_of_the_coded_ladder_is_the_system_but_for_the_budget():
    last, system = climb("as coded")["fallback"], LADDERS["as coded"]
    assert system == ONE_NAME_AS_CODED
    assert changed(last, system) <= {"training", "fallback"}
    assert changed(last.fallback, system.fallback) <= {"lr"}
    loss = ("margin", "scale", "gamma", "focal")
    assert [getattr(last.training, f) for f in loss] == [getattr(system.training, f) for f in loss]


def test_ladders_differ_in_one_thing_from_those_that_they_are_named_after():
    assert changed(LADDERS["described"], LADDERS["described, random start"]) == {"start"}
    ensemble = {"ensemble", "members", "fallback"}  # which the living map does without
    assert changed(LADDERS["as coded"], LADDERS["as coded, alive"]) == {"aggregator"} | ensemble
    assert list(climb("as coded, alive")) == ["baseline", "aggregation and loss", "scene"]


def test_every_experiment_has_one_budget_and_rule_of_ranking_and_a_ladder_one_start():
    every = plan()
    free = {"margin": 0.5, "scale": 30.0, "gamma": 0.0, "focal": "clip", "lr": 1e-3, "aggregator_lr": 1e-3}
    assert {replace(e.training, **free) for e in every.values()} == {BUDGET}
    assert {e.combine for e in every.values()} == {"softmax"}
    starts = {name.split(":")[0]: (e.start, e.layers) for name, e in every.items() if ": " in name}
    assert starts == {
        "described": ("class means", "study"),
        "described, random start": ("random", "study"),
        "as coded": ("xavier", "released"),
        "as coded, alive": ("xavier", "released"),
    }
    assert len({(name.split(":")[0], e.start) for name, e in every.items() if ": " in name}) == 4
    assert Training(epochs=8, batch=256, lr=1e-3, aggregator_lr=1e-3) == BUDGET


def test_every_rung_has_the_rates_of_its_own_search():
    for name in LADDERS:
        for step, rung in climb(name).items():
            asked = CHOSEN_RATES[f"{name}: {'ensemble' if step == 'fallback' else step}"]
            assert (rung.training.lr, rung.training.aggregator_lr) == asked
        assert not rung.fallback or rung.fallback.lr == CHOSEN_RATES[f"{name}: fallback"].lr


def test_arms_beside_the_ladder_differ_from_it_in_one_thing():
    every = plan()
    start = every["described: baseline"]
    assert changed(start, every[NO_MARGIN]) == {"training"} and every[NO_MARGIN].training.margin == 0
    for side, rung in (("faces alone", "baseline"), ("faces with scenes", "scene")):
        held_out = every[f"{side}, held out"]
        assert changed(held_out, every[f"described: {rung}"]) == {"distractors"}
        for form in TRAINED_ON:
            arm = every[f"{side}, {form}"]
            assert changed(arm, held_out) <= {"distractors", "training"} and arm.distractors == form
            rates = CHOSEN_RATES[f"{side}, {form}"]._asdict()
            assert arm.training == replace(held_out.training, **rates)
    for name in ("described: scene", "described: ensemble"):
        assert changed(every[name], every[f"{name}, scale 1"]) == {"scale"} and every[name].scale == 30
    for name in ("as coded: scene", "as coded: ensemble"):
        assert changed(every[name], every[f"{name}, scale 30"]) == {"scale"} and every[name].scale == 1


def test_no_arm_has_two_names():
    for have in ({}, {"scores": False}, {"scene": False}, {"distractors": False}):
        every = plan(**have)
        names = [arm_key(e, "members", "fallback.members") for e in every.values()]  # as records are named
        assert len({*names}) == len(every)


def test_members_are_limited_in_both_models():
    rung = plan(members=3)["as coded: fallback"]
    assert (rung.members, rung.fallback.members) == ((0, 1, 2), (1, 2, 3))


def test_without_a_scene_its_step_and_the_fallback_are_left_out():
    every = plan(scene=False)
    assert [name for name in every if re.fullmatch("described: [a-z ]*", name)] == [
        "described: baseline",
        "described: aggregation and loss",
        "described: ensemble",
    ]
    assert not any(e.context or e.fallback for e in every.values())


def test_without_scores_nothing_needs_them():
    every = plan(scores=False)
    assert {e.aggregator for e in every.values()} == {"norm", "attention"}
    assert "as coded: aggregation and loss" not in every and "as coded, alive: scene" not in every
    assert {e.concat for e in every.values()} == {"none"}
    assert {e.fallback.by for e in every.values() if e.fallback} == {"norm", "norm, float16"}


def test_without_distractors_none_are_trained_on():
    assert {e.distractors for e in plan(distractors=False).values()} == {"all"}


def test_a_store_is_asked_for_what_the_plan_needs(store, bare):
    assert ladder.has(store) == {"scene": True, "scores": True, "distractors": True}
    assert ladder.has(bare) == {"scene": False, "scores": False, "distractors": False}


# -- records -------------------------------------------------------------------------------------------------


def record(asked, ap, **known):
    ap = list(ap)
    return made(
        asked, "" if asked.simulated else f"{hash(asked)}", ap=ap, measures={"map_at_100": float(np.mean(ap))}, **known
    )


def test_records_are_named_whatever_their_world_and_number_of_members():
    every = plan()
    few = plan(members=2)
    found = [record(replace(e, seed=4, settings=(("identities", 60),)), [0.5]) for e in few.values()]
    assert names_of(found, every) == list(every)


def test_a_record_of_another_experiment_is_refused():
    strange = replace(plan()["described: scene"], context_dim=64)
    with pytest.raises(ValueError, match="no experiment of this ladder"):
        names_of([record(strange, [0.5])], plan())


def test_a_record_from_before_a_field_has_its_default():
    every = plan()
    old = record(every["described: fallback"], [0.5])
    for part, name in ((old.experiment, "shrinkage"), (old.experiment["training"], "sample")):
        del part[name]
    del old.experiment["fallback"]["weight"]
    assert names_of([old], every) == ["described: fallback"]


def found(aps, every=None):
    """Records and their names; aps by name, a list of APs a world."""
    every = every or plan()
    asked = [(name, seed, ap) for name, worlds in aps.items() for seed, ap in enumerate(worlds)]
    return [record(replace(every[name], seed=seed), ap) for name, seed, ap in asked], [name for name, *_ in asked]


PAIR = {"it": ("described: scene", "described: baseline")}


def test_a_difference_has_an_interval_over_worlds_and_one_over_identities():
    one = [[0.5, 0.7, 0.9], [0.4, 0.4, 0.1]]
    other = [[0.4, 0.7, 0.3], [0.4, 0.2, 0.0]]
    (row,) = differences(PAIR, *found({"described: scene": one, "described: baseline": other})).to_dict("records")
    worlds = stats.ttest_1samp([100 * 0.7 / 3, 100 * 0.3 / 3], 0).confidence_interval(0.95)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((100 / 6, worlds.low, worlds.high))
    pooled = metrics.paired_test(np.concatenate(one), np.concatenate(other))
    assert (row["within_low"], row["within_high"]) == pytest.approx((100 * pooled.low, 100 * pooled.high))


def test_on_a_given_store_seeds_are_averaged_before_identities_are_drawn():
    every = {name: replace(e, data="/faces") for name, e in plan().items()}
    one, other = [[0.5, 0.7], [0.3, 0.9]], [[0.1, 0.7], [0.1, 0.3]]
    ran = found({"described: scene": one, "described: baseline": other}, every)
    (row,) = differences(PAIR, *ran).to_dict("records")
    pair = metrics.paired_test(np.array([0.4, 0.8]), np.array([0.1, 0.5]))
    assert row["interval"] == "identities"
    assert (row["low"], row["within_low"]) == pytest.approx((100 * pair.low, 100 * pair.low))


HEIGHTS = {
    "described: baseline": 0.80,
    "described: aggregation and loss": 0.83,
    "described: scene": 0.82,
    "described: ensemble": 0.82,
    "described: fallback": 0.85,
    "as coded: baseline": 0.70,
    "as coded: ensemble": 0.75,
}


@pytest.fixture
def ran():
    return found({name: [[height], [height + 0.1]] for name, height in HEIGHTS.items()})


@pytest.fixture
def steps(ran):
    return step_frame(*ran)


def test_each_step_is_compared_with_the_rung_before(steps):
    described = steps[steps["ladder"] == "described"].set_index("step")
    assert list(described.index) == [*STEPS[1:], "all before the fallback", "all steps"]
    assert described["difference"].tolist() == pytest.approx([3, -1, 0, 3, 2, 5])
    assert described["before"].tolist() == pytest.approx([0.85, 0.88, 0.87, 0.87, 0.85, 0.85])
    assert described["map_at_100"].tolist() == pytest.approx([0.88, 0.87, 0.87, 0.90, 0.87, 0.90])
    assert described["published"].tolist() == pytest.approx([2, 0.5, 0.3, np.nan, 2.8, np.nan], nan_ok=True)


def test_a_rung_that_was_not_run_is_stepped_over(steps):
    coded = steps[steps["ladder"] == "as coded"].set_index("step")
    assert coded["difference"].to_dict() == pytest.approx({"ensemble": 5, "all steps": 5})


def test_the_published_ladder_is_the_sum_of_its_steps(steps):
    rungs = ladder.heights(steps)
    published = rungs[rungs["ladder"] == "published"]
    assert published["map_at_100"].tolist() == pytest.approx([0.87, 0.89, 0.895, 0.898])
    assert set(rungs["step"]) <= {*STEPS}
    described = rungs[rungs["ladder"] == "described"]
    assert described["step"].tolist() == list(STEPS)
    assert described["map_at_100"].tolist() == pytest.approx([0.85, 0.88, 0.87, 0.87, 0.90])
    gains = ladder.gains(steps)
    assert gains[gains["ladder"] == "published"]["difference"].tolist() == [2.0, 0.5, 0.3]
    assert len(gains[gains["ladder"] == "described"]) == 4


def test_steps_that_a_ladder_lacks_keep_their_place():
    worlds = {name: [[0.5]] for name in ("described: baseline", "described: ensemble")}
    steps = step_frame(*found(worlds))
    assert ladder.heights(steps)["step"].unique().tolist() == list(STEPS[:4])
    assert ladder.gains(steps)["step"].unique().tolist() == list(STEPS[1:4])
    assert ladder.heights(steps)["ladder"].unique().tolist() == ["described", "published"]


def test_ladders_are_compared_at_their_ends():
    every = {name: pair for name, pair in ladder.ENDS.items() if "random" not in name}
    ran = found({"as coded: fallback": [[0.75], [0.85]], "described: fallback": [[0.85], [0.95]]})
    frame = differences(every, *ran)
    assert frame[["step", "difference"]].values.tolist() == [["as coded against described", pytest.approx(-10)]]


def test_a_ladder_that_shares_its_first_rung_starts_from_it():
    worlds = {"as coded: baseline": [[0.5]], "as coded, alive: aggregation and loss": [[0.6]]}
    steps = step_frame(*found(worlds)).set_index(["ladder", "step"])
    assert steps["difference"].to_dict() == {
        ("as coded, alive", "aggregation and loss"): pytest.approx(10),
        ("as coded, alive", "all steps"): pytest.approx(10),
    }
    assert steps["published"].to_dict() == {("as coded, alive", step): 2.0 for step in ("aggregation and loss", ALL)}


def test_scales_are_compared_with_the_rung_at_its_own():
    every = plan()
    for name, (scaled, raw) in ladder.SCALED.items():
        assert name in (scaled, raw) and (every[scaled].scale, every[raw].scale) == (30.0, 1.0)
        assert changed(every[scaled], every[raw]) == {"scale"}


def test_distractors_are_compared_by_form_and_system():
    ran = found({"faces alone, negatives": [[0.6], [0.7]], "faces alone, held out": [[0.5], [0.6]]})
    frame = differences(ladder.DISTRACTORS, *ran)
    assert frame[["step", "difference"]].values.tolist() == [["faces alone: negatives only", pytest.approx(10)]]
    assert differences(ladder.DISTRACTORS, [], []).empty
    assert len(ladder.DISTRACTORS) == 8


def test_a_page_shows_steps_with_both_intervals_and_leaves_out_what_was_not_run(steps, ran):
    shown = ladder.table(steps, within=True).data
    assert shown["published, points"].fillna("").tolist()[:5] == ["+2.0", "+0.5", "+0.3", "", "+2.8"]
    assert shown["over identities alone"].tolist()[0] == "[+3.00,\N{NO-BREAK SPACE}+3.00]"
    assert ladder.table(ladder.claims(*ran, [], [])).data["claim"].tolist() == [
        "aggregation with the loss adds",
        "the scene adds",
        "the ensemble adds",
        "the fallback adds",
    ]


# -- views and bagging ---------------------------------------------------------------------------------------


def ensemble_records(kind, members, heights, **fields):
    asked = Experiment(ensemble=kind, members=tuple(range(members)), **{"combine": "softmax"} | fields)
    return [record(replace(asked, seed=seed), [height]) for seed, height in enumerate(heights)]


def test_views_are_compared_with_bagging_at_the_most_members_of_both():
    records = [
        *ensemble_records("views", 2, [0.5, 0.5]),
        *ensemble_records("bagging", 2, [0.1, 0.1]),
        *ensemble_records("views", 4, [0.6, 0.7]),
        *ensemble_records("bagging", 4, [0.5, 0.6]),
        *ensemble_records("views", 8, [0.9, 0.9]),
        *ensemble_records("seeds", 8, [0.9, 0.9]),
        *ensemble_records("views", 6, [0.1, 0.1], scale=1.0),
        *ensemble_records("bagging", 6, [0.9, 0.9], scale=1.0),
    ]
    assert ladder.views_against_bagging(records)["difference"].tolist() == pytest.approx([10])
    assert ladder.views_against_bagging(records, 2)["difference"].tolist() == pytest.approx([40])
    assert ladder.views_against_bagging(records, 8).empty


def test_views_are_not_compared_with_bagging_of_another_system():
    records = [*ensemble_records("views", 2, [0.5], context=("scene",)), *ensemble_records("bagging", 2, [0.1])]
    assert ladder.views_against_bagging(records).empty
    assert ladder.views_against_bagging([]).empty


# -- the claims ----------------------------------------------------------------------------------------------

SPREAD = {  # name: MAP in two worlds
    "described: baseline": (0.50, 0.60),
    NO_MARGIN: (0.40, 0.50),
    "described: aggregation and loss": (0.51, 0.61),  # +1: smaller than 2; +11 from no margin: larger
    "described: scene": (0.50, 0.60),  # -1: a loss
    "described: ensemble": (0.503, 0.604),  # +.3, +.4: open, and compatible with .3
    "described: fallback": (0.523, 0.624),
}


@pytest.fixture
def claims():
    pooled = {"attention + scores": (0.50, 0.62), "quality": (0.50, 0.60), "as coded": (0.40, 0.49)}
    arms = [(Experiment(aggregator=name, seed=s), ap) for name, aps in pooled.items() for s, ap in enumerate(aps)]
    arms += [(Experiment(aggregator="quality", classifier="class means"), 0.9)]  # which chapter 04 keeps too
    records = [record(arm, [ap]) for arm, ap in arms]
    ran = found({name: [[a], [b]] for name, (a, b) in SPREAD.items()})
    return ladder.claims(*ran, records, []).set_index("claim")


NO_MARGIN_CLAIM = "aggregation with the loss adds to a baseline without a margin"


def test_verdicts_are_read_off_the_intervals(claims):
    told = claims["verdict"].to_dict()
    assert told.pop(AS_CODED) == "contradicted"
    others = [claim for claim in told if claims["whose"][claim] != "One Name"]
    assert {told.pop(claim) for claim in others} == {"not in these records"} and len(others) == 12
    assert told == {
        ATTENTION: "open",
        "aggregation with the loss adds": "supported",
        NO_MARGIN_CLAIM: "supported",
        "the scene adds": "contradicted",
        "the ensemble adds": "open",
        "views beat bagging": "not in these records",
        "the fallback adds": "supported",
    }


def test_claims_of_other_teams_are_of_what_other_teams_do(claims):
    """None of them has strangers in a class with the margin."""
    others = claims.index[claims["whose"] == "other teams"]
    assert [claim.split(" as ")[1] for claim in others] == ["one class without margin", "negatives only"] * 2
    assert {*claims["whose"]} == {"One Name", "other teams", "nobody's"}


def test_claims_say_what_their_worlds_could_tell(claims):
    row = claims.loc[ATTENTION]  # +0 and +2 points in two worlds
    told = (stats.t.ppf(0.975, 1) + stats.t.ppf(0.8, 1)) * np.std([0, 2], ddof=1) / 2**0.5
    assert (row["sd"], row["told"]) == pytest.approx((2**0.5, told))


def test_sizes_are_held_against_the_published_ones(claims):
    sizes = claims["size"]
    assert sizes[sizes != ""].to_dict() == {
        "aggregation with the loss adds": "smaller",
        NO_MARGIN_CLAIM: "larger",
        "the scene adds": "smaller",
        "the ensemble adds": "compatible",
    }


def test_a_claim_without_a_step_before_is_held_against_the_rung_below():
    worlds = {"described: baseline": [[0.5], [0.6]], "described: ensemble": [[0.6], [0.7]]}
    row = ladder.claims(*found(worlds), [], []).set_index("claim").loc["the ensemble adds"]
    assert (row["against"], row["difference"]) == ("described: baseline", pytest.approx(10))


def test_views_come_from_the_records_of_ensembles():
    records = [*ensemble_records("views", 2, [0.5, 0.6]), *ensemble_records("bagging", 2, [0.6, 0.7])]
    row = ladder.claims([], [], [], records).set_index("claim").loc["views beat bagging"]
    assert (row["verdict"], row["difference"]) == ("contradicted", pytest.approx(-10))


# -- where nobody's vector lies ------------------------------------------------------------------------------


def test_clips_nearest_to_nobody_are_counted_among_identities_and_strangers(store, monkeypatch):
    arm = plan()["faces alone, class, no margin"]
    gallery = ladder.retrieve.gallery_of(arm, store)
    identity = store.identity_of(gallery)
    cosines = np.zeros((len(gallery), len(store.identities) + 1))
    known = np.flatnonzero(identity >= 0)
    cosines[known, identity[known]] = 0.5
    cosines[known[:3], -1] = 0.9  # three labelled clips and every stranger but one
    cosines[identity < 0, -1] = 0.2
    cosines[np.flatnonzero(identity < 0)[0], 0] = 0.3
    member = type("Member", (), {"cosines": lambda self, clips: torch.from_numpy(cosines)})()
    monkeypatch.setattr(ladder.retrieve, "fit", lambda *_, **__: member)
    (row,) = ladder.taken_for_nobody({"form": arm}, store).to_dict("records")
    assert row["of identities"] == pytest.approx(3 / len(known))
    assert row["of strangers"] == pytest.approx(1 - 1 / (identity < 0).sum())
    assert (row["own"], row["nobody"]) == pytest.approx((0.5, 2.7 / len(known)))


# -- the released code ---------------------------------------------------------------------------------------


def test_options_of_the_released_code_exist():
    page = (Path(__file__).parents[1] / "book" / "chapters" / "10_ladder.md").read_text()
    options = re.findall(
        r'`(\w+)="([^"]+)"`', page[page.index("## As coded") : page.index("## Training on distractors")]
    )
    assert {"aggregator", "concat", "ensemble", "focal", "start", "distractors", "combine", "by"} <= dict(
        options
    ).keys()
    for name, value in options:
        asked = replace(ONE_NAME_AS_CODED, split="val", fallback=None)
        part = {"focal": asked.training, "by": ONE_NAME_AS_CODED.fallback}.get(name, asked)
        replace(part, **{name: value})  # refuses what it does not know
