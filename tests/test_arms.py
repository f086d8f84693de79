import json
from dataclasses import asdict, replace

import pytest
from conftest import made

from mmlib import systems
from mmlib.studies import rates
from mmlib.systems import BASE, FUSED, FUSIONS, LOSSES

GROUPS = pytest.mark.parametrize("group", [LOSSES, FUSIONS], ids=["losses", "fusions"])


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
def test_arms_have_the_rates_chosen_for_them_and_else_their_own(group, monkeypatch):
    first, second, *_ = group
    monkeypatch.setattr(systems, "CHOSEN", {first: 0.25})
    found = systems.arms(group)
    assert list(found) == list(group) and found[first].training.lr == 0.25
    assert found[second] == group[second]
    assert changes(found[first], group[first]) == {"lr": 0.25}


@GROUPS
def test_every_arm_has_the_same_budget_of_search(group):
    trials = systems.search(group, profile="tiny")
    names = rates.names_of(group, [made(e) for e in trials])
    tried = {
        name: [(e.seed, e.training.lr, e.training.epochs) for e, n in zip(trials, names, strict=True) if n == name]
        for name in group
    }
    expected = sorted(
        (seed, lr, epochs) for seed in (100, 101) for lr in (3e-4, 1e-3, 3e-3, 1e-2) for epochs in (8, 16)
    )
    assert all(sorted(of) == expected for of in tried.values())
    assert {e.profile for e in trials} == {"tiny"}


@GROUPS
def test_trial_is_its_arm_but_for_world_rate_and_length(group):
    for trial in systems.search(group):
        free = replace(trial, seed=0, training=replace(trial.training, lr=1e-3, epochs=BASE.training.epochs))
        assert free in group.values()


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
