import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import made
from torch import nn

from mmlib import systems
from mmlib.aggregate import AGGREGATORS, CodedAttention
from mmlib.records import read_results
from mmlib.retrieve import make_model
from mmlib.studies import ladder, rates
from mmlib.systems import (
    BASE,
    FACE_ONLY,
    FUSED,
    FUSIONS,
    LOSSES,
    ONE_NAME,
    ONE_NAME_AS_CODED,
    SYSTEMS,
    climb,
    with_members,
)

CODED = ONE_NAME_AS_CODED


@pytest.fixture(scope="module")
def official():
    """What a model asks of a store of the challenge's widths: faces of 512 dimensions, scenes of 2048."""
    widths = {"face": 512, "scene": 2048}
    modalities = {name: SimpleNamespace(feature=np.zeros((0, dim))) for name, dim in widths.items()}
    return SimpleNamespace(modalities=modalities, identities=np.arange(5))


# -- as coded: the values of LegenDong/IQIYI_VID_FACE_2019 ------------------------------------------------------


def test_coded_members_are_the_eleven_of_sixteen_that_the_code_keeps():
    assert CODED.members == (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 15)
    assert CODED.fallback.members == (1, 2, 3, 4, 6, 8, 10, 11, 12, 14, 15)


def test_coded_views_are_one_of_sixteen_blocks_and_one_of_thirty_two_for_scenes():
    assert (CODED.ensemble, CODED.regions, CODED.second().regions) == ("views", 16, 32)


def test_coded_frames_are_forty_drawn_ones():
    assert (CODED.training.frames, CODED.training.sample) == (40, "draw")


def test_coded_scores_are_appended_to_raw_frames_and_never_normalised():
    assert (CODED.aggregator, CODED.concat) == ("as coded", "frames")


def test_coded_loss_is_arcface_with_focal_on_the_batch_mean():
    training = CODED.training
    assert (training.scale, training.margin, training.gamma, training.focal) == (30.0, 0.5, 2.0, "batch")


def test_coded_optimiser_is_sgd_for_a_hundred_epochs():
    training = CODED.training
    assert (training.optimiser, training.lr, training.aggregator_lr) == ("sgd", 0.1, 0.1)
    assert (training.weight_decay, training.epochs, training.batch) == (1e-5, 100, 4096)
    assert (training.decay, training.schedule) == ("all", "epoch")


def test_coded_layers_and_vectors_start_as_released(official):
    assert (CODED.layers, CODED.start, CODED.context_scale) == ("released", "xavier", "raw")
    many = SimpleNamespace(modalities=official.modalities, identities=np.arange(10_034))
    model = make_model(CODED, many)
    assert model.prototype.norm(dim=1).mean().item() == pytest.approx(0.34, abs=0.005)
    assert (model.aggregator.z.weight == 0).all() and (model.aggregator.norm.weight == 1).all()
    assert model.mlp.layers[0].weight.std().item() == pytest.approx((2 / 602) ** 0.5, rel=0.02)
    assert (model.mlp.layers[5].weight == 1).all() and isinstance(model.mlp.layers[6], nn.PReLU)
    assert model.raw_contexts


def test_coded_score_is_the_mean_softmax_of_raw_cosines():
    assert (CODED.combine, CODED.scale, CODED.head) == ("softmax", 1.0, "cosine")


def test_coded_fallback_is_that_of_the_last_day():
    fallback = CODED.fallback
    assert (fallback.by, fallback.threshold, fallback.context) == ("norm, float16", 8.867, ("scene",))
    assert (fallback.absent, fallback.low, fallback.weight) == (0.95, 0.8, 0.0)


def test_coded_distractors_are_in_the_gallery_and_not_in_training():
    assert CODED.distractors == "all"


def test_coded_network_has_the_widths_of_the_code(official):
    model = make_model(CODED, official, 5)
    assert isinstance(model.aggregator, CodedAttention)
    assert (model.aggregator.frames, model.aggregator.out_dim) == (40, 480 + 2)
    scene = model.branches["scene"].layers
    assert (scene[0].in_features, scene[0].out_features, scene[4].out_features) == (1920, 480, 120)
    assert (model.dim, model.mlp.layers[0].out_features, model.mlp.layers[4].out_features) == (602, 964, 602)
    assert model.mlp.layers[3].p == scene[3].p == 0.5 and not model.gates


def test_coded_scene_model_sees_all_but_one_of_thirty_two_blocks(official):
    model = make_model(CODED.second(), official, 15)
    assert model.aggregator is None and list(model.branches) == ["scene"]
    assert model.discard == (15, 32) and not len(model.branches["scene"].layers)
    assert (model.dim, model.mlp.layers[0].out_features, model.prototype.shape[1]) == (1984, 3968, 1984)
    count = sum(p.numel() for name, p in model.named_parameters() if "absent" not in name)
    assert round((count + (10_035 - 5) * 1984) / 1e6, 1) == 35.7  # of the released network, at its classes


# -- as described: Dong et al., ACM MM 2019 -----------------------------------------------------------------


def test_described_system_attends_and_appends_scores_to_normalised_features():
    assert (ONE_NAME.aggregator, ONE_NAME.concat) == ("attention + scores", "normalised")


def test_described_loss_is_a_margin_with_focal_clip_by_clip():
    training = ONE_NAME.training
    assert training.margin > 0 and (training.gamma, training.focal) == (2.0, "clip")


def test_described_scene_is_reduced_to_128_dimensions(official):
    model = make_model(ONE_NAME, official)
    assert (model.branches["scene"].out_dim, ONE_NAME.fusion) == (128, "concat")


def test_described_ensemble_discards_every_region_once():
    assert ONE_NAME.ensemble == "views" and ONE_NAME.members == tuple(range(ONE_NAME.regions))


def test_described_fallback_mixes_the_lowest_percent_by_quality():
    fallback = ONE_NAME.fallback
    assert (fallback.by, fallback.share, fallback.threshold) == ("quality", 0.01, None)
    assert (fallback.absent, fallback.context) == (1.0, ("scene",)) and 0 < fallback.low < 1


def test_face_only_is_one_model_of_faces():
    assert (FACE_ONLY.modality, FACE_ONLY.context, FACE_ONLY.fallback) == ("face", (), None)
    assert len(FACE_ONLY.members) == 1


def test_names_of_systems_are_those_of_the_command_line():
    assert SYSTEMS == {"one-name": ONE_NAME, "one-name-as-coded": CODED, "face-only": FACE_ONLY}


# -- fewer members ---------------------------------------------------------------------------------------------


def test_fewer_members_are_the_first_of_both_models():
    fewer = with_members(CODED, 3)
    assert (fewer.members, fewer.fallback.members) == ((0, 1, 2), (1, 2, 3))


def test_fewer_members_leave_all_else_alone():
    fewer = with_members(CODED, 3)
    assert fewer.branch() == CODED.branch() and fewer.second().branch() == CODED.second().branch()
    assert replace(fewer, members=CODED.members, fallback=CODED.fallback) == CODED


def test_system_without_a_fallback_stays_without_one():
    assert with_members(FACE_ONLY, 1) == FACE_ONLY


def test_more_members_than_there_are_is_all_of_them():
    assert with_members(ONE_NAME, 99) == ONE_NAME


# -- rungs -----------------------------------------------------------------------------------------------------


def test_system_of_a_submission_is_the_top_rung_of_the_ladder():
    planned = ladder.plan(members=16)
    assert planned["described: fallback"] == ONE_NAME == SYSTEMS["one-name"]
    assert planned["described: baseline"] == FACE_ONLY == SYSTEMS["face-only"]


def test_rates_of_the_systems_are_those_that_the_searches_chose():
    rates = systems.CHOSEN_RATES
    assert (ONE_NAME.training.lr, ONE_NAME.training.aggregator_lr) == rates["described: ensemble"]
    assert ONE_NAME.second().training.lr == rates["described: fallback"].lr
    assert FACE_ONLY.training.lr == rates["described: baseline"].lr


def test_coded_rung_is_the_coded_system_but_for_its_budget_of_training():
    top = ladder.plan(members=16)["as coded: fallback"]
    own = {"training": CODED.training, "fallback": CODED.fallback}
    assert replace(top, **own) == CODED != top and replace(top.fallback, lr=None) == CODED.fallback
    rates = systems.CHOSEN_RATES["as coded: ensemble"]
    assert top.training == replace(systems.BUDGET, gamma=2.0, focal="batch", **rates._asdict())


@pytest.mark.parametrize("scene", [True, False])
@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("name", systems.LADDERS)
def test_every_rung_has_one_part_more_than_the_one_before(name, scores, scene):
    names, rungs = zip(*climb(name, members=2, scene=scene, scores=scores).items())
    for step, lower, higher in zip(names[1:], rungs, rungs[1:]):
        assert {*changes(higher, lower)} - {"training"} <= {
            *systems.RUNGS[step],
            "lr",
            "aggregator_lr",
            "gamma",
            "focal",
        }
    assert scene == ("scene" in names) and (scene and name != "as coded, alive") == ("fallback" in names)
    if not scores:
        assert all(rung.aggregator in ("norm", "attention") and rung.concat == "none" for rung in rungs)
        assert all(rung.fallback is None or "norm" in rung.fallback.by for rung in rungs)


# -- arms ------------------------------------------------------------------------------------------------------

RUNGS = systems.rung_arms()
EVERY = {
    "losses": LOSSES,
    "fusions": FUSIONS | systems.FUSIONS_AT_RANDOM,
    "ensembles": systems.ENSEMBLES,
    "rungs": RUNGS,
}
GROUPS = pytest.mark.parametrize("group", EVERY.values(), ids=EVERY)


def changes(arm, base):
    """Name the fields in which an arm differs from its base, those of the training too."""
    one, two = ({**asdict(e), **asdict(e.training)} for e in (arm, base))
    return {name: one[name] for name in one if one[name] != two[name] and name != "training"}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("softmax", {"margin": 0.0, "scale": 1.0, "head": "dot"}),
        ("cosine softmax", {"margin": 0.0}),
        ("margin", {}),
        ("margin + focal", {"gamma": 2.0}),
        ("margin + batch focal", {"gamma": 2.0, "focal": "batch"}),
        ("margin, scores", {"concat": "normalised"}),
        ("margin + focal, scores", {"gamma": 2.0, "concat": "normalised"}),
        ("margin + focal, raw scores", {"gamma": 2.0, "concat": "raw"}),
    ],
)
def test_loss_arm_changes_nothing_but_what_it_names(name, expected):
    assert changes(LOSSES[name], BASE) == expected


def test_plain_softmax_is_trained_and_ranked_on_unscaled_inner_products():
    arm = LOSSES["softmax"]
    assert arm.scale == arm.training.scale == 1.0


@pytest.mark.parametrize(
    "name, expected",
    [
        ("face", {}),
        ("scene", {"modality": None, "context": ("scene",)}),
        ("scene 32", {"context": ("scene",), "context_dim": 32}),
        ("scene 64", {"context": ("scene",), "context_dim": 64}),
        ("scene 128", {"context": ("scene",)}),
        ("scene 256", {"context": ("scene",), "context_dim": 256}),
        ("scene 128, gated", {"context": ("scene",), "fusion": "gated"}),
        ("head", {"context": ("head",)}),
        ("body", {"context": ("body",)}),
        ("audio", {"context": ("audio",)}),
        ("all", {"context": ("scene", "head", "body", "audio")}),
    ],
)
def test_fusion_arm_changes_nothing_but_what_it_names(name, expected):
    assert changes(FUSIONS[name], FUSED) == expected


def test_arms_of_a_group_are_all_looked_at_above():
    assert (len(LOSSES), len(FUSIONS)) == (8, 11)


@GROUPS
def test_arms_have_the_rates_chosen_for_them(group, monkeypatch):
    first, *_ = group
    monkeypatch.setitem(systems.CHOSEN_RATES, first, systems.Rates(0.25, 0.5))
    found = systems.arms(group)
    assert list(found) == list(group)
    assert changes(found[first], group[first]) == {"lr": 0.25, "aggregator_lr": 0.5}
    for name, arm in found.items():
        assert replace(arm, training=group[name].training) == group[name]


@GROUPS
def test_one_table_says_the_rates_of_every_arm(group):
    assert all(systems.arms(group)[name].training.lr == systems.CHOSEN[name] for name in group)
    assert {*LOSSES, *EVERY["fusions"], *RUNGS, *AGGREGATORS} <= systems.CHOSEN_RATES.keys() == systems.CHOSEN.keys()
    assert sum(len(names) for _, names in systems._ARMS) == len(systems.CHOSEN_RATES)  # no arm stands there twice


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_training_of_an_aggregator_is_one_of_its_search(aggregator):
    tried, chosen = systems.tuning_grid(aggregator), systems.tuned(aggregator)
    assert len(tried) == 8 and {training.epochs for training in tried} == {8, 16}
    # Of fixed weights none of the other rates was better than the common one.
    assert chosen in tried and chosen.epochs == 8


@GROUPS
def test_every_arm_has_the_same_budget_of_search(group):
    trials = systems.search(group, profile="tiny")
    names = rates.names_of(group, [made(e) for e in trials])
    tried = {
        name: [(e.seed, e.training.lr, e.training.epochs) for e, n in zip(trials, names, strict=True) if n == name]
        for name in group
    }
    for name, of in tried.items():
        random = group[name].start != "class means"
        few = (1e-3, 3e-3, 1e-2, 3e-2) if random else (3e-4, 1e-3, 3e-3, 1e-2)
        assert sorted(of) == sorted((seed, lr, epochs) for seed in (100, 101) for lr in few for epochs in (8, 16))
    assert {e.profile for e in trials} == {"tiny"}


@GROUPS
def test_trial_is_its_arm_but_for_world_rate_and_length(group):
    for trial in systems.search(group):
        free = replace(trial, seed=0, training=replace(trial.training, lr=1e-3, epochs=BASE.training.epochs))
        assert free in [replace(arm, training=replace(arm.training, lr=1e-3)) for arm in group.values()]


@GROUPS
def test_arms_are_named_from_records_that_were_written_and_read(group):
    asked = [
        replace(
            arm, profile="tiny", seed=7, settings=(("no_face", 0.1),), training=replace(arm.training, lr=0.5, epochs=3)
        )
        for arm in group.values()
    ]
    records = [replace(made(e), experiment=json.loads(json.dumps(asdict(e)))) for e in asked]
    assert rates.names_of(group, records) == list(group)


def test_record_of_no_arm_is_refused():
    with pytest.raises(KeyError):
        rates.names_of(LOSSES, [made(replace(BASE, hidden=7))])


@pytest.mark.parametrize(
    "group, name",
    [(group, f"{number}_search.jsonl.gz") for group, number in zip(EVERY.values(), ("05", "07", "08", "10"))],
    ids=EVERY,
)
def test_rates_are_the_best_short_ones_of_the_committed_searches(group, name):
    best = rates.search_frame(group, read_results(name)).set_index("arm")["lr"].to_dict()
    assert best == {arm: systems.CHOSEN[arm] for arm in group}
