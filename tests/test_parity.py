import numpy as np
import pytest
import released_network
import torch

from benchmarks import __main__ as command
from benchmarks import parity
from mmlib.aggregate import AGGREGATORS
from mmlib.systems import ONE_NAME_AS_CODED
from mmlib.train import _optimiser


def twin(*, alone=False, alive=False):
    torch.manual_seed(0)
    made = released_network.SceneAlone() if alone else released_network.FaceAndScene()
    return parity.randomised(made, dead=not alive)


@pytest.mark.parametrize("kind", [{}, {"alive": True}, {"alone": True}], ids=["both", "alive", "scene alone"])
def test_network_with_the_released_weights_is_the_released_network(kind):
    """Cosines, loss, gradients, and weights and running statistics after three steps of its optimiser, in float64."""
    alone = kind.get("alone", False)
    arguments, inputs, label = parity.batch(scene=1984 if alone else 1920)
    given = (arguments[1:], {"contexts": inputs["contexts"]}) if alone else (arguments, inputs)
    found = parity.compare_networks(twin(**kind), parity.network(**kind), *given, released_network.loss, label)
    assert {*found} >= {"outputs, eval", "outputs, training", "loss", "gradients", "weights after steps"}
    assert max(found.values()) <= parity.BOUND == 1e-9, found


def test_a_bias_before_a_batch_norm_moves_into_its_mean():
    made, (arguments, inputs, _) = twin(alone=True), parity.batch(scene=1984)
    with torch.no_grad():
        for layer in (made.fc[0], made.fc[4]):
            layer.bias += 1
        for norm in (made.fc[1], made.fc[5]):
            norm.running_mean += 0.5
    ours = parity.network(alone=True)
    ours.load_state_dict(parity.converted(made.state_dict()), strict=False)
    with torch.no_grad():
        found, expected = ours.eval()(contexts=inputs["contexts"]), made.eval()(arguments[1])
    assert parity.difference(found, expected) <= parity.BOUND


def test_what_is_no_number_is_a_difference(monkeypatch, capsys):
    rows = [{"part": "one", "of": "outputs", "difference": value} for value in (1e-12, float("nan"), 1e-6)]
    monkeypatch.setattr(command, "isolated", lambda *_, **__: {"rows": rows})
    assert ["failed" in row for row in command.hold("")] == [False, True, True]
    nan, one = torch.tensor([float("nan")]), torch.ones(1)
    assert np.isnan(parity._largest([(one, one), (nan, one), (one, one)]))


def test_a_wrong_weight_is_a_difference():
    """The harness can fail: one weight that differs shows."""
    arguments, inputs, label = parity.batch()
    ours = parity.network()
    plain = ours.load_state_dict

    def spoiled(state, strict):
        result = plain(state, strict=strict)
        with torch.no_grad():
            ours.mlp.layers[6].weight += 1e-3
        return result

    ours.load_state_dict = spoiled
    found = parity.compare_networks(twin(), ours, arguments, inputs, released_network.loss, label)
    assert found["outputs, eval"] > 1e-6


# -- the map is dead -----------------------------------------------------------------------------------------------


def clips(seed, count=6, dim=30):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(count, 40, dim)) * rng.uniform(0.1, 30))
    quality, det = (torch.from_numpy(rng.uniform(0, top, (count, 40))) for top in (200, 1))
    return x, torch.ones(count, 40, dtype=torch.bool), quality, det


def as_released(dim=30):
    """The map that is alive, with the start of the released code."""
    made = AGGREGATORS["as coded, alive"](dim)
    for layer in (made.theta, made.phi):
        torch.nn.init.zeros_(layer.weight)
    return made.double()


@pytest.mark.parametrize("seed", range(5))
def test_released_start_has_no_gradient_whatever_the_clips(seed):
    made = as_released()
    with torch.no_grad():  # the query and the last layers anywhere
        for value in (made.query, made.z.weight, made.norm.weight, made.norm.bias):
            value += torch.randn_like(value)
    made.train()(*clips(seed)).pow(3).sum().backward()
    parts = (made.theta, made.theta_norm, made.phi, made.phi_norm)
    assert all((value.grad == 0).all() for part in parts for value in part.parameters())
    assert all((value.grad != 0).any() for value in (made.g.weight, made.z.weight, made.query))
    assert (made.attention(*clips(seed)) == 1 / 20).all()


def test_released_start_has_no_gradient_in_layers_of_torch():
    made = released_network.ChannelAttention().double()
    with torch.no_grad():
        made.W_z[0].weight.normal_()
    for seed in range(5):
        x = clips(seed)[0]
        (made(x) ** 3).sum().backward()
        assert (made.map(x) == 1 / 20).all()
    assert all((p.grad == 0).all() for part in (made.W_theta, made.W_phi) for p in part.parameters())


def test_released_start_stays_dead_under_the_released_optimiser():
    torch.manual_seed(0)
    living, made = as_released(), AGGREGATORS["as coded"](30).double()
    made.load_state_dict({name: value for name, value in living.state_dict().items() if name in made.state_dict()})
    optimisers = [_optimiser(dict(one.named_parameters()), ONE_NAME_AS_CODED.training) for one in (living, made)]
    for step in range(20):
        pooled = [one.train()(*clips(step)) for one in (living, made)]
        torch.testing.assert_close(*pooled, rtol=1e-9, atol=1e-9)
        for value, optimiser in zip(pooled, optimisers):
            optimiser.zero_grad()
            value.square().mean().backward()
            optimiser.step()
    assert (living.theta.weight == 0).all() and (living.phi.weight == 0).all()
    assert (living.z.weight != 0).any() and (living.attention(*clips(0)) == 1 / 20).all()
    for name, value in made.state_dict().items():
        torch.testing.assert_close(value, living.state_dict()[name], rtol=1e-9, atol=1e-9)


def test_random_start_attends_and_learns():
    torch.manual_seed(0)
    made = AGGREGATORS["as coded, alive"](30).double().train()
    with torch.no_grad():
        made.z.weight.normal_()
    made(*clips(0)).pow(3).sum().backward()
    assert (made.theta.weight.grad != 0).any() and (made.phi.weight.grad != 0).any()
    assert made.attention(*clips(0)).amax(2).mean() > 0.2


def test_dead_map_is_constant_without_theta_and_phi():
    made = AGGREGATORS["as coded"](30).double()
    assert (made.attention(*clips(0)) == 1 / 20).all()
    assert {name.split(".")[0] for name, _ in made.named_parameters()} == {"g", "z", "norm", "query"}
