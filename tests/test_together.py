"""Models trained together are those trained one by one."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmlib import ensemble, retrieve
from mmlib.aggregate import AGGREGATORS
from mmlib.ensemble import Together
from mmlib.experiment import Experiment, Training
from mmlib.models import IdentityModel
from mmlib.retrieve import make_model
from mmlib.train import train_together

BRIEF = Training(epochs=3, batch=32, frames=8, lr=3e-3, aggregator_lr=3e-3)
MEMBERS = (0, 1, 2, 7)
# Products of 4 x 32 clips are added up in another order than those of 32; three epochs let that grow.
CLOSE = {"rtol": 2e-3, "atol": 2e-4}


def experiment(store, **options):
    return Experiment(**{"data": str(store.path), "training": BRIEF, "hidden": 24, "context_dim": 4} | options)


@pytest.fixture(autouse=True)
def a_pass_of_many(monkeypatch):
    monkeypatch.setitem(retrieve.TOGETHER, "cpu", 16)


def fit_together(wanted, store, *, device):
    trained = retrieve.train_members(wanted, store, device=device.type).values()
    return [(member.model, member.clips, member.losses) for member in trained]


def fit(e, store, member=0, *, device):
    return fit_together([(e, member)], store, device=device)[0]


@pytest.fixture(autouse=True)
def no_slow_fallback():
    """A layer that ``vmap`` can only loop over would cost what training together saves: it warns, and fails here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_same(alone, together):
    for (one, clips, losses), (other, others, history) in zip(alone, together, strict=True):
        assert np.array_equal(clips, others) and not other.training
        np.testing.assert_allclose(history, losses, rtol=1e-3)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(
                other.state_dict()[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_every_aggregator_trains_together_as_alone(patchy, device, aggregator):
    e, at = experiment(patchy, aggregator=aggregator), torch.device(device)
    assert_same(
        [fit(e, patchy, member, device=at) for member in MEMBERS],
        fit_together([(e, member) for member in MEMBERS], patchy, device=at),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"ensemble": "views", "regions": 8, "context": ("scene",)},
        {"ensemble": "views", "regions": 8, "context": ("scene",), "modality": None},
        {"ensemble": "bagging", "concat": "normalised"},
        {"ensemble": "stratified", "context": ("scene",), "fusion": "gated"},
        {"distractors": "class", "start": "random"},
        {"classifier": "linear"},
        {"training": replace(BRIEF, optimiser="sgd", lr=0.05, gamma=2.0, focal="batch")},
        {"head": "dot", "training": replace(BRIEF, margin=0.0, scale=1.0, gamma=2.0)},
    ],
    ids=lambda options: " ".join(str(value) for value in options.values() if not isinstance(value, Training)) or "loss",
)
def test_every_kind_of_ensemble_trains_together_as_alone(patchy, device, options):
    e, at = experiment(patchy, **options), torch.device(device)
    assert_same(
        [fit(e, patchy, member, device=at) for member in MEMBERS],
        fit_together([(e, member) for member in MEMBERS], patchy, device=at),
    )


def test_members_differ_from_each_other_and_from_where_they_started(patchy):
    e = experiment(patchy, ensemble="views", regions=8, aggregator="NAN")
    found = fit_together([(e, member) for member in [0, 1]], patchy, device=torch.device("cpu"))
    assert not torch.allclose(found[0][0].prototype, found[1][0].prototype, atol=1e-2)
    assert found[0][2][-1] < found[0][2][0] and found[1][2][-1] < found[1][2][0]
    assert not torch.equal(found[1][0].mlp.layers[0].weight, make_model(e, patchy, 1).mlp.layers[0].weight)


def test_regions_that_leave_unequal_widths_are_trained_in_groups(patchy):
    e = experiment(patchy, ensemble="views", regions=5)  # 16 dimensions: regions of 3 and 4
    members = [0, 1, 2, 3, 4]
    together = fit_together([(e, member) for member in members], patchy, device=torch.device("cpu"))
    assert {model.dim for model, _, _ in together} == {12, 13}
    assert_same([fit(e, patchy, member, device=torch.device("cpu")) for member in members], together)


@pytest.mark.parametrize("options", [{"ensemble": "bagging"}, {"distractors": "class", "context": ("scene",)}], ids=str)
def test_seeds_of_an_arm_train_together_as_alone(patchy, device, options):
    seeds, at = [experiment(patchy, seed=seed, aggregator="NAN", **options) for seed in range(3)], torch.device(device)
    assert_same(
        [fit(e, patchy, member, device=at) for e in seeds for member in (0, 1)],
        fit_together([(e, member) for e in seeds for member in (0, 1)], patchy, device=at),
    )


def test_arms_that_differ_in_more_than_their_seeds_are_trained_apart(patchy):
    at, e = torch.device("cpu"), experiment(patchy)
    wanted = [(e, 0), (replace(e, seed=1, hidden=7), 0), (replace(e, seed=1), 0)]
    found = retrieve.train_members(wanted, patchy, device="cpu")
    alone = [fit(one, patchy, number, device=at) for one, number in wanted]
    assert_same(alone, [(found[key].model, found[key].clips, found[key].losses) for key in wanted])


def test_order_of_the_members_has_no_meaning(patchy):
    e = experiment(patchy, aggregator="attention + scores")
    forth = fit_together([(e, member) for member in [0, 1, 2]], patchy, device=torch.device("cpu"))
    back = fit_together([(e, member) for member in [2, 1, 0]], patchy, device=torch.device("cpu"))
    assert_same(forth, back[::-1])


def test_dropout_masks_are_the_members_own(patchy):
    """With one mask for all, members of one seed and those of several would be equally far apart."""
    models = [IdentityModel(AGGREGATORS["norm"](16), 6, hidden=64) for _ in range(2)]
    together = Together(models)
    seen = []
    for layer in models:
        drop = layer.mlp.layers[3]
        drop.draw = lambda clips, generator, plain=drop.draw: seen.append(plain(clips, generator)) or seen[-1]
    x, mask = torch.randn(2, 5, 3, 16), torch.ones(2, 5, 3, dtype=torch.bool)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    together.loss({"x": x, "mask": mask}, torch.zeros(2, 5, dtype=torch.long), BRIEF.loss, generators)
    assert len(seen) == 2 and not torch.equal(*seen)


def test_first_member_is_the_plain_model(patchy):
    e = experiment(patchy)
    model, clips, losses = fit(e, patchy, 0, device=torch.device("cpu"))
    plain = make_model(e, patchy)
    plain.prototype.data.copy_(
        fit(
            replace(e, training=replace(BRIEF, epochs=1, lr=1e-30, weight_decay=0.0, aggregator_lr=0.0)),
            patchy,
            device=torch.device("cpu"),
        )[0].prototype
    )
    assert train_together([plain], patchy, [clips], BRIEF, seeds=[0]) == [losses]
    assert ensemble.member_seed(0, 0) == 0 and torch.equal(plain.prototype, model.prototype)
