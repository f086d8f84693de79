import copy
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmlib import aggregate

DIM = 6


def clips(device="cpu", dtype=torch.float64, lengths=(4, 1, 7, 0, 3), dim=DIM, seed=0):
    """Ragged clips, zero where padded, with quality and det: x, mask, quality, det."""
    rng = np.random.default_rng(seed)
    steps = max(lengths)
    mask = np.arange(steps)[None] < np.array(lengths)[:, None]
    x = rng.normal(size=(len(lengths), steps, dim)) * mask[..., None]
    quality = rng.uniform(-10, 150, mask.shape) * mask
    det = rng.uniform(0.8, 1, mask.shape) * mask
    made = [torch.tensor(part, dtype=dtype, device=device) for part in (x, quality, det)]
    return made[0], torch.tensor(mask, device=device), made[1], made[2]


def trained(module, seed=1, spread=0.5):
    """Give every parameter (and batch-norm statistic) a value away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for value in [*module.parameters(), *module.buffers()]:
        if value.is_floating_point():
            with torch.no_grad():
                value.copy_(torch.rand(value.shape, generator=generator) * spread + 0.1)
    return module.double()


def with_scores(x, quality, det):
    """Append the scores to every frame, as the 2019 code does."""
    return torch.cat([x, aggregate.frame_scores(quality, det)], dim=-1)


POOLS = {
    "mean": lambda x, m, q, d: aggregate.mean_pool(x, m),
    "norm": lambda x, m, q, d: aggregate.norm_pool(x, m),
    "quality": aggregate.quality_pool,
    "best half": lambda x, m, q, d: aggregate.best_half_pool(x, m, q),
    "score attention": trained(aggregate.ScoreAttention(DIM)),
    "nan": trained(aggregate.NAN(DIM)),
    "nan two": trained(aggregate.NAN(DIM, two_blocks=True)),
    "nan scores": trained(aggregate.NAN(DIM, scores=True)),
    "channel": trained(aggregate.ChannelAttention(DIM)),
    "channel inverted": trained(aggregate.ChannelAttention(DIM, invert=True, scores=True)),
}
every_pool = pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)


# What holds for every order-free aggregator


@every_pool
def test_order_of_frames_does_not_change_output(pool):
    x, mask, quality, det = clips()
    order = torch.tensor(np.random.default_rng(3).permutation(x.shape[1]))
    torch.testing.assert_close(
        pool(x[:, order], mask[:, order], quality[:, order], det[:, order]),
        pool(x, mask, quality, det),
        rtol=0,
        atol=1e-12,
    )


@every_pool
def test_padding_does_not_change_output(pool):
    x, mask, quality, det = clips()
    longer = [torch.nn.functional.pad(part, (0, 5)) for part in (mask, quality, det)]
    junk = torch.full((x.shape[0], 5, DIM), 1e6, dtype=x.dtype)
    longer[1][:, -5:], longer[2][:, -5:] = 1e4, 1.0
    torch.testing.assert_close(pool(torch.cat([x, junk], 1), *longer), pool(x, mask, quality, det), rtol=0, atol=1e-12)


@every_pool
def test_clip_without_frames_gives_zeros(pool):
    x, mask, quality, det = clips()
    assert torch.equal(pool(x, mask, quality, det)[3], torch.zeros(getattr(pool, "out_dim", DIM), dtype=x.dtype))


@every_pool
def test_batch_without_any_frame_gives_zeros(pool):
    x, mask, quality, det = (part[:, :0] for part in clips())
    assert torch.equal(pool(x, mask, quality, det), torch.zeros(5, getattr(pool, "out_dim", DIM), dtype=x.dtype))


@every_pool
def test_gradients_are_finite_and_zero_where_padded(pool):
    x, mask, quality, det = clips()
    x.requires_grad_()
    pool(x, mask, quality, det).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[~mask] == 0).all() and (x.grad[0] != 0).any()


@every_pool
def test_gradient_agrees_with_finite_differences(pool):
    x, mask, quality, det = clips(lengths=(3, 0, 2))
    assert torch.autograd.gradcheck(
        lambda y: pool(y, mask, quality, det), x.requires_grad_(), atol=1e-7, fast_mode=True
    )


@pytest.mark.parametrize("name", [name for name in POOLS if name not in ("mean", "channel", "channel inverted")])
def test_one_frame_is_its_own_clip_feature(name):
    x, mask, quality, det = clips(lengths=(1, 1))
    expected = with_scores(x, quality, det) if getattr(POOLS[name], "scores", False) else x
    torch.testing.assert_close(POOLS[name](x, mask, quality, det), expected[:, 0], rtol=0, atol=1e-12)


def test_one_frame_keeps_its_direction_under_mean_and_channel_attention():
    x, mask, quality, det = clips(lengths=(1,))
    gamma = POOLS["channel"].gamma.detach()
    torch.testing.assert_close(POOLS["mean"](x, mask, quality, det), x[:, 0] / x[:, 0].norm())
    torch.testing.assert_close(POOLS["channel"](x, mask, quality, det), (1 + gamma) * x[:, 0])


@every_pool
def test_float32_on_each_device_agrees_with_float64(pool, device):
    x, mask, quality, det = clips()
    expected = pool(x, mask, quality, det)
    pool32 = copy.deepcopy(pool).float().to(device) if isinstance(pool, torch.nn.Module) else pool
    found = pool32(
        *(
            part.to(device, torch.bool if part.dtype is torch.bool else torch.float32)
            for part in (x, mask, quality, det)
        )
    )
    assert found.dtype == torch.float32 and found.device.type == device
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nan", "nan two", "channel"])
def test_autocast_does_not_round_the_attention(name, device):
    x, mask, _, _ = clips(device, torch.float32)
    pool = {
        "nan": aggregate.NAN(DIM),
        "nan two": aggregate.NAN(DIM, two_blocks=True),
        "channel": aggregate.ChannelAttention(DIM),
    }[name].to(device)
    plain = pool(22 * x, mask)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(pool(22 * x, mask), plain)


# Values by hand


def test_mean_pool_averages_directions():
    x = torch.tensor([[[3.0, 0.0], [0.0, 8.0]]])
    torch.testing.assert_close(aggregate.mean_pool(x, torch.ones(1, 2, dtype=torch.bool)), torch.tensor([[0.5, 0.5]]))


def test_norm_pool_averages_raw_embeddings():
    x = torch.tensor([[[3.0, 0.0], [0.0, 8.0]]])
    torch.testing.assert_close(aggregate.norm_pool(x, torch.ones(1, 2, dtype=torch.bool)), torch.tensor([[1.5, 4.0]]))


def test_quality_pool_divides_by_the_total_weight():
    x, mask = torch.tensor([[[3.0, 0.0], [0.0, 8.0]]]), torch.ones(1, 2, dtype=torch.bool)
    found = aggregate.quality_pool(x, mask, torch.tensor([[120.0, 80.0]]), torch.tensor([[1.0, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([[3 * 120 / 160, 8 * 40 / 160]]))


def test_seefun_weight_is_stepped_with_inclusive_edges():
    quality = torch.tensor([[-5.0, 0.0, 1.0, 20.0, 20.5, 30.0, 60.0, 60.5, 100.0]])
    expected = torch.tensor([[0, 0, 0.1, 2.0, 3.075, 4.5, 18.0, 30.25, 50.0]])
    torch.testing.assert_close(aggregate.seefun_weight(quality, torch.full_like(quality, 0.5)), expected)


def test_seefun_weight_is_of_the_poster_and_differs_from_the_code_at_edges_and_from_40_to_60():
    def coded(quality):  # 2019_iQIYI_ACMMM/src/inference.py: a chain of `if quality < edge`
        steps = ((0, 0.0), (20, 0.2), (30, 0.3), (40, 0.6))
        return quality * next((level for edge, level in steps if quality < edge), 1.0)

    quality = torch.arange(-10.0, 101.0)
    found = aggregate.seefun_weight(quality[None], torch.ones(1, len(quality)))[0]
    differs = [int(q) for q, weight in zip(quality, found) if abs(weight - coded(float(q))) > 1e-4]
    assert differs == [20, 30, *range(40, 61)]


def test_quality_pool_of_only_bad_frames_is_norm_pool():
    x, mask, _, det = clips()
    torch.testing.assert_close(
        aggregate.quality_pool(x, mask, torch.full_like(det, -1.0), det), aggregate.norm_pool(x, mask)
    )


def test_best_half_is_rounded_down_and_of_eight_frames_at_least():
    """Its source, zheey, keeps all frames of a clip of fewer than eight."""
    x = torch.tensor([[[10.0**place] for place in range(9)]], dtype=torch.float64)
    quality = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]])
    found = [aggregate.best_half_pool(x, torch.arange(9)[None] < n, quality).item() for n in (1, 7, 8, 9)]
    assert found == [1, pytest.approx(1_111_111 / 7), 11_110_000 / 4, 111_100_000 / 4]


def test_best_half_keeps_frames_that_tie_with_the_last():
    x = torch.tensor([[[10.0**place] for place in range(8)]], dtype=torch.float64)
    quality = torch.tensor([[9.0, 8.0, 7.0, 6.0, 6.0, 5.0, 5.0, 5.0]])
    assert aggregate.best_half_pool(x, torch.ones(1, 8, dtype=torch.bool), quality).item() == 11_111 / 5


def test_nan_pool_weighs_by_softmax():
    x = torch.tensor([[[math.log(3.0)], [0.0], [5.0]]])
    pooled, weight = aggregate.nan_pool(x, torch.tensor([[True, True, False]]), torch.tensor([1.0]))
    torch.testing.assert_close(weight, torch.tensor([[0.75, 0.25, 0.0]]))
    torch.testing.assert_close(pooled, torch.tensor([[0.75 * math.log(3.0)]]))


def test_channel_map_of_orthogonal_frames():
    x = torch.eye(2)[None]
    mask = torch.ones(1, 2, dtype=torch.bool)
    same, other = math.e / (math.e + 1), 1 / (math.e + 1)
    agree = torch.tensor([[[same, other], [other, same]]])
    torch.testing.assert_close(aggregate.channel_map(x, mask, 1.0, None, False), agree)
    torch.testing.assert_close(aggregate.channel_map(x, mask, 1.0, None, True), agree.flip(2))
    torch.testing.assert_close(aggregate.channel_map(x, mask, 1.0, None, False, slice(1, 2)), agree[:, 1:])


# Independent slow references, in float64 and plain loops


def softmax(values):
    total = sum(math.exp(value - max(values)) for value in values)
    return [math.exp(value - max(values)) / total for value in values]


def slow_nan(frames, query, weight=None, bias=None):
    attention = softmax([float(np.dot(query, frame)) for frame in frames])
    pooled = sum(a * frame for a, frame in zip(attention, frames, strict=True))
    if weight is None:
        return pooled
    second = [
        math.tanh(sum(w * r for w, r in zip(row, pooled, strict=True)) + b) for row, b in zip(weight, bias, strict=True)
    ]
    return slow_nan(frames, np.array(second))


def slow_channel(frames, gamma, temperature, invert):
    mixed = []
    for frame in frames:
        scores = [float(np.dot(frame, other)) for other in frames]
        if invert:
            scores = [max(scores) - score for score in scores]
        row = softmax([score / temperature for score in scores])
        mixed.append(gamma * sum(a * other for a, other in zip(row, frames, strict=True)) + frame)
    return mixed


def ragged(x, mask):
    return [[frame.numpy() for frame in clip[present]] for clip, present in zip(x, mask, strict=True)]


@pytest.mark.parametrize("two_blocks", [False, True])
def test_nan_agrees_with_a_slow_loop(two_blocks):
    x, mask, _, _ = clips(lengths=(4, 1, 7))
    module = trained(aggregate.NAN(DIM, two_blocks=two_blocks))
    state = [parameter.detach().numpy() for parameter in module.parameters()]
    expected = np.array([slow_nan(frames, *state) for frames in ragged(x, mask)])
    np.testing.assert_allclose(module(x, mask).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("invert", [False, True])
def test_channel_attention_agrees_with_a_slow_loop(invert):
    x, mask, quality, det = clips(lengths=(4, 1, 7))
    module = trained(aggregate.ChannelAttention(DIM, invert=invert, scores=True))
    frames = torch.cat([x, quality[..., None] / 100, det[..., None]], -1)
    gamma, temperature = module.gamma.item(), math.exp(module.log_temperature.item())
    query = module.query.detach().numpy()
    expected = [slow_nan(slow_channel(clip, gamma, temperature, invert), query) for clip in ragged(frames, mask)]
    np.testing.assert_allclose(module(x, mask, quality, det).detach().numpy(), np.array(expected), rtol=1e-11)


def slow_norm(value, norm, training):
    """Batch norm of (B, C, D) over clips and dimensions, channel by channel."""
    out = np.empty_like(value)
    for channel in range(value.shape[1]):
        part = value[:, channel]
        mean = part.mean() if training else norm.running_mean[channel].item()
        variance = part.var() if training else norm.running_var[channel].item()
        scaled = (part - mean) / math.sqrt(variance + 1e-5)
        out[:, channel] = scaled * norm.weight[channel].item() + norm.bias[channel].item()
    return out


def slow_convolution(value, convolution):
    weight = convolution.weight.detach().numpy()
    out = np.zeros((value.shape[0], weight.shape[0], value.shape[2]))
    for clip in range(value.shape[0]):
        for row in range(weight.shape[0]):
            out[clip, row] = sum(w * frame for w, frame in zip(weight[row], value[clip], strict=True))
    return out


def slow_factors(module, frames, training):
    """The factors of the affinity; of a dead map both are 0."""
    if not module.alive:
        return (np.zeros((len(frames), module.frames // 2, frames.shape[2])),) * 2
    layers = (module.theta, module.theta_norm), (module.phi, module.phi_norm)
    return tuple(slow_norm(slow_convolution(frames, layer), norm, training) for layer, norm in layers)


living = pytest.mark.parametrize("alive", [False, True], ids=["dead", "alive"])


@living
@pytest.mark.parametrize("training", [False, True])
def test_coded_attention_agrees_with_a_slow_loop(training, alive):
    x, mask, quality, det = clips(lengths=(8, 8, 8))
    module = trained(aggregate.CodedAttention(DIM, frames=8, alive=alive), spread=0.2).train(training)
    frames = torch.cat([x, quality[..., None] / 100, det[..., None]], -1).numpy()
    theta, phi = slow_factors(module, frames, training)
    g = slow_convolution(frames, module.g)
    mixed = np.zeros_like(g)
    for clip in range(len(g)):
        for i in range(4):
            row = softmax([float(np.dot(theta[clip, i], phi[clip, j])) for j in range(4)])
            mixed[clip, i] = sum(a * part for a, part in zip(row, g[clip], strict=True))
    residual = slow_norm(slow_convolution(mixed, module.z), module.norm, training) + frames
    expected = np.array([slow_nan(list(clip), module.query.detach().numpy()) for clip in residual])
    np.testing.assert_allclose(module(x, mask, quality, det).detach().numpy(), expected, rtol=1e-10)


def layered(module, x, mask, quality, det):
    """CodedAttention layer by layer, with torch's own batch norms."""
    frames = with_scores(x, quality, det)
    affinity = torch.full((len(x), module.frames // 2, module.frames // 2), 2 / module.frames).to(frames)
    if module.alive:
        theta = module.theta_norm(module.theta.weight @ frames)
        affinity = torch.softmax(theta @ module.phi_norm(module.phi.weight @ frames).mT, dim=-1)
    mixed = module.norm(module.z.weight @ (affinity @ (module.g.weight @ frames)))
    return aggregate.nan_pool(mixed + frames, mask, module.query)[0]


@living
@pytest.mark.parametrize("training", [False, True])
def test_coded_attention_has_the_gradients_and_statistics_of_its_layers(training, alive):
    batch = clips(lengths=(8, 8, 8))
    found, expected = (trained(aggregate.CodedAttention(DIM, frames=8, alive=alive), spread=0.2) for _ in range(2))
    found.train(training)(*batch).square().sum().backward()
    layered(expected.train(training), *batch).square().sum().backward()
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)
    for one, other in zip(found.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def slow_statistics(value):
    """Mean and unbiased variance of (B, C, D) over clips and dimensions, channel by channel."""
    parts = [[v for clip in value for v in clip[channel]] for channel in range(value.shape[1])]
    means = [sum(part) / len(part) for part in parts]
    return np.array(means), np.array(
        [sum((v - m) ** 2 for v in part) / (len(part) - 1) for part, m in zip(parts, means)]
    )


@living
def test_coded_attention_keeps_the_running_statistics_of_a_slow_loop(alive):
    """Three batches: running value = .9 running value + .1 of the batch, in all batch norms; then evaluation."""
    module = trained(aggregate.CodedAttention(DIM, frames=8, alive=alive), spread=0.2).train()
    layers = [(module.z, module.norm)]
    if alive:
        layers += [(module.theta, module.theta_norm), (module.phi, module.phi_norm)]
    expected = [[norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()] for _, norm in layers]
    for seed in range(3):
        batch = clips(lengths=(8, 8, 8), seed=seed)
        frames = with_scores(batch[0], *batch[2:]).numpy()
        theta, phi = slow_factors(module, frames, True)
        g = slow_convolution(frames, module.g)
        rows = [[softmax([float(row @ other) for other in phi[clip]]) for row in theta[clip]] for clip in range(3)]
        mixed = np.array([[sum(a * part for a, part in zip(row, g[clip])) for row in rows[clip]] for clip in range(3)])
        for kept, (layer, _), value in zip(expected, layers, (mixed, frames, frames)):
            for i, new in enumerate(slow_statistics(slow_convolution(value, layer))):
                kept[i] = 0.9 * kept[i] + 0.1 * new
        module(*batch)
    for (mean, variance), (_, norm) in zip(expected, layers, strict=True):
        np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(norm.running_var, variance, rtol=1e-9)
        assert norm.num_batches_tracked == 3
    before = copy.deepcopy(module.state_dict())
    module.eval()(*batch)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: aggregate.NAN(3, scores=True),
        lambda: aggregate.NAN(3, two_blocks=True, scores=True),
        lambda: aggregate.CodedAttention(3, frames=4),
        lambda: aggregate.CodedAttention(3, frames=4, alive=True),
    ],
    ids=["NAN", "NAN, two blocks", "coded", "coded, alive"],
)
def test_gradient_of_every_parameter_agrees_with_finite_differences(make, training):
    module = trained(make()).train(training)
    batch = clips(lengths=(4, 4, 4), dim=3)
    names, values = zip(*module.named_parameters(), strict=True)

    def pooled(*given):
        # A copy of the statistics: every call would move them.
        state = {name: value.clone() for name, value in module.named_buffers()}
        return torch.func.functional_call(module, dict(zip(names, given, strict=True)) | state, batch)

    assert torch.autograd.gradcheck(pooled, values, atol=1e-7, fast_mode=True)


def test_nan_with_scores_agrees_with_a_slow_loop():
    x, mask, quality, det = clips(lengths=(4, 1, 7))
    module = trained(aggregate.NAN(DIM, scores=True))
    frames = ragged(with_scores(x, quality, det), mask)
    expected = np.array([slow_nan(clip, module.query.detach().numpy()) for clip in frames])
    np.testing.assert_allclose(module(x, mask, quality, det).detach().numpy(), expected, rtol=1e-12)


@living
def test_coded_attention_in_float32_agrees_with_its_layers_on_raw_embeddings(device, alive):
    x, mask, quality, det = clips(device, torch.float32, lengths=(40,) * 16, dim=512)
    batch = 22 / 512**0.5 * x, mask, quality, det
    made = [trained(aggregate.CodedAttention(512, alive=alive), spread=0.05) for _ in range(2)]
    found, expected = (module.float().to(device) for module in made)
    with torch.autocast(device, dtype=torch.bfloat16):
        pooled = found(*batch)
    # Two orders of float32 sums over 514 dimensions and 40 frames.
    torch.testing.assert_close(pooled, layered(expected, *batch), rtol=1e-3, atol=1e-3)


# Modules


@pytest.mark.parametrize(
    "module",
    [
        aggregate.NAN(DIM),
        aggregate.NAN(DIM, two_blocks=True),
        aggregate.ScoreAttention(DIM),
        aggregate.ChannelAttention(DIM),
        aggregate.ChannelAttention(DIM, invert=True),
        aggregate.CodedAttention(DIM, frames=4),
        aggregate.CodedAttention(DIM, frames=4, alive=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_untrained_attention_is_norm_pool(module):
    x, mask, quality, det = clips(lengths=(4, 4))
    found = module.double()(x, mask, quality, det)[:, :DIM]
    torch.testing.assert_close(found, aggregate.norm_pool(x, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["nan", "nan two", "nan scores", "channel", "channel inverted"])
def test_output_is_the_weighted_sum_of_the_frames(name):
    x, mask, quality, det = clips()
    module = POOLS[name]
    frames = with_scores(x, quality, det) if module.scores else x
    weight = module.weights(x, mask, quality, det)
    assert weight.shape == mask.shape and (weight[~mask] == 0).all()
    torch.testing.assert_close((weight[..., None] * frames).sum(1), module(x, mask, quality, det), rtol=0, atol=1e-12)


def test_score_attention_weighs_by_softmax_of_quality_det_and_norm():
    module = aggregate.ScoreAttention(2).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([2.0, 3.0, 1.0]))
    x = torch.tensor([[[20.0, 0.0], [0.0, 40.0]]], dtype=torch.float64)
    quality, det = torch.tensor([[50.0, 100.0]]).double(), torch.tensor([[1.0, 0.5]]).double()
    # logits 2 * .5 + 3 * 1 + 1 = 5 and 2 * 1 + 3 * .5 + 2 = 5.5
    first = 1 / (1 + math.exp(0.5))
    mask = torch.ones(1, 2, dtype=torch.bool)
    np.testing.assert_allclose(module.weights(x, mask, quality, det)[0].tolist(), [first, 1 - first], rtol=1e-12)
    np.testing.assert_allclose(module(x, mask, quality, det)[0].tolist(), [20 * first, 40 * (1 - first)], rtol=1e-12)


def test_weights_sum_to_one_and_with_gamma_to_one_plus_gamma():
    x, mask, _, _ = clips(lengths=(4, 2))
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(POOLS["nan two"].weights(x, mask).sum(1), ones)
    torch.testing.assert_close(POOLS["channel"].weights(x, mask).sum(1), ones * (1 + POOLS["channel"].gamma.detach()))


def test_agreeing_frames_outweigh_an_outlier_unless_inverted():
    x = torch.tensor([[[10.0, 0.0], [10.0, 1.0], [0.0, 10.0]]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    for invert in (False, True):
        module = aggregate.ChannelAttention(2, invert=invert)
        with torch.no_grad():
            module.gamma.fill_(1.0)
        weight = module.weights(x, mask)[0]
        assert (weight[2] < weight[:2].min()) == (not invert)


def test_scores_add_two_pooled_dimensions():
    x, mask, quality, det = clips(lengths=(2,))
    found = aggregate.NAN(DIM, scores=True).double()(x, mask, quality, det)
    assert found.shape == (1, DIM + 2)
    torch.testing.assert_close(found[0, -2:], torch.stack([quality.mean() / 100, det.mean()]))


@pytest.mark.parametrize(
    "module",
    [
        aggregate.NAN(DIM, two_blocks=True, scores=True),
        aggregate.ChannelAttention(DIM),
        aggregate.CodedAttention(DIM, frames=4),
        aggregate.CodedAttention(DIM, frames=4, alive=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_every_parameter_has_a_gradient(module):
    x, mask, quality, det = clips(lengths=(4, 4))
    trained(module)(x, mask, quality, det).square().sum().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in module.parameters())
    assert all((parameter.grad != 0).any() for parameter in module.parameters())


def test_coded_attention_depends_on_the_order_of_frames():
    x, mask, quality, det = clips(lengths=(4, 4))
    module = trained(aggregate.CodedAttention(DIM, frames=4)).eval()
    turned = [part.flip(1) for part in (x, mask, quality, det)]
    assert (module(*turned) - module(x, mask, quality, det)).abs().max() > 1e-3


# Long clips


@pytest.mark.parametrize("name", ["channel", "channel inverted"])
def test_channel_attention_in_blocks_of_rows_is_that_of_the_whole_map(name, monkeypatch):
    x, mask, quality, det = clips()
    whole = POOLS[name](x, mask, quality, det), POOLS[name].weights(x, mask, quality, det)
    monkeypatch.setattr(aggregate, "_MAP", 2 * mask.numel())  # rows in pairs, the last one alone
    parts = POOLS[name](x, mask, quality, det), POOLS[name].weights(x, mask, quality, det)
    for one, other in zip(parts, whole):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", aggregate.AGGREGATORS)
def test_memory_for_a_long_clip_grows_with_its_length_alone(name, monkeypatch):
    """Of a clip of 600 frames of 8 numbers nothing is made that holds more than those frames and some rows of a map."""
    monkeypatch.setattr(aggregate, "_MAP", 20 * 600)
    module, sizes = aggregate.AGGREGATORS[name](8).eval(), []
    x, mask, quality, det = clips(dtype=torch.float32, lengths=(getattr(module, "frames", 600),), dim=8)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            made = function(*arguments, **(options or {}))
            sizes.extend(part.numel() for part in (made if isinstance(made, list | tuple) else (made,)))
            return made

    with torch.no_grad(), Watching():
        module(x, mask, quality, det)
    assert max(sizes) <= 20 * 600


# What the book calls by name

BUILT = {
    "mean": (aggregate.FixedPool, set()),
    "norm": (aggregate.FixedPool, set()),
    "quality": (aggregate.FixedPool, set()),
    "best half": (aggregate.FixedPool, set()),
    "learned scores": (aggregate.ScoreAttention, set()),
    "NAN": (aggregate.NAN, set()),
    "NAN, two blocks": (aggregate.NAN, {"bias"}),
    "NAN + scores": (aggregate.NAN, {"scores"}),
    "attention": (aggregate.ChannelAttention, set()),
    "attention + scores": (aggregate.ChannelAttention, {"scores"}),
    "DANet + scores": (aggregate.ChannelAttention, {"scores", "invert"}),
    "as coded": (aggregate.CodedAttention, set()),
    "as coded, alive": (aggregate.CodedAttention, {"alive"}),
}


def test_every_name_builds_its_class_with_its_switches():
    for name, make in aggregate.AGGREGATORS.items():
        kind, switches = BUILT[name]
        module = make(DIM)
        on = {key for key in ("scores", "invert", "alive") if getattr(module, key, False)}
        on |= {"bias"} if getattr(module, "bias", None) is not None else set()
        assert (type(module), on) == (kind, switches), name
        assert module.out_dim == DIM + 2 * ("scores" in switches or kind is aggregate.CodedAttention), name
    assert {*aggregate.AGGREGATORS} == {*BUILT}


def test_names_that_learn_and_that_need_scores():
    assert {*BUILT} - aggregate.LEARNED == {"mean", "norm", "quality", "best half"} and {*BUILT} > aggregate.LEARNED
    needy = {"quality", "best half", "learned scores", "NAN + scores", "attention + scores", "DANet + scores"}
    assert needy | {"as coded", "as coded, alive"} == aggregate.NEEDS_SCORES


@pytest.mark.parametrize("name", ["mean", "norm", "quality", "best half"])
def test_a_name_without_parameters_is_its_function_and_has_its_weights(name):
    x, mask, quality, det = clips()
    pool = aggregate.AGGREGATORS[name](DIM)
    torch.testing.assert_close(pool(x, mask, quality, det), POOLS[name](x, mask, quality, det), rtol=0, atol=0)
    frames = torch.nn.functional.normalize(x, dim=2) if name == "mean" else x
    weight = pool.weights(x, mask, quality, det)
    torch.testing.assert_close((weight[..., None] * frames).sum(1), pool(x, mask, quality, det), rtol=0, atol=1e-12)


def test_weights_smaller_than_one_are_divided_by_their_total():
    x, mask = torch.tensor([[[2.0], [4.0]]]), torch.ones(1, 2, dtype=torch.bool)
    quality, det = torch.tensor([[0.1, 0.1]]), torch.tensor([[0.5, 0.5]])  # weights of .01 each
    assert aggregate.quality_pool(x, mask, quality, det).item() == pytest.approx(3.0)


def test_channel_attention_starts_at_the_temperature_of_raw_embeddings():
    assert aggregate.ChannelAttention(DIM).log_temperature.exp().item() == pytest.approx(100)


@pytest.mark.parametrize(
    "module",
    [
        aggregate.NAN(DIM, scores=True),
        aggregate.ChannelAttention(DIM, scores=True),
        aggregate.CodedAttention(DIM, frames=4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_scores_without_quality_are_refused(module):
    x, mask, _, det = clips(lengths=(4,), dtype=torch.float32)
    with pytest.raises(ValueError, match="lack the quality or det scores"):
        module(x, mask, None, det)


def test_quality_pools_say_when_scores_are_missing():
    x, mask, quality, _ = clips()
    with pytest.raises(ValueError, match="lack the quality or det scores"):
        aggregate.quality_pool(x, mask, quality, None)
    with pytest.raises(ValueError, match="lack the quality or det scores"):
        aggregate.best_half_pool(x, mask, None)


def test_coded_attention_refuses_another_number_of_frames():
    x, mask, quality, det = clips(lengths=(7,))
    with pytest.raises(ValueError, match="exactly 40 frames a clip, got T = 7"):
        aggregate.CodedAttention(DIM)(x, mask, quality, det)


def test_coded_attention_of_one_frame_is_refused():
    with pytest.raises(ValueError, match="frames must be at least 2"):
        aggregate.CodedAttention(DIM, frames=1)
