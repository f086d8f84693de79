import math

import pytest
import torch
from torch.nn import functional as F

from mmlib import losses

MARGIN, SCALE = 0.5, 30.0


def at(theta, other=0.3, dtype=torch.float64):
    """One clip at an angle to its identity (column 0), with another identity beside it."""
    return torch.tensor([[math.cos(theta), other]], dtype=dtype), torch.tensor([0])


# Additive angular margin


@pytest.mark.parametrize("theta", [0.2, 1.0, math.pi / 2, 2.0, math.pi - MARGIN - 0.01])
def test_margin_adds_to_the_angle(theta):
    cosine, label = at(theta)
    expected = torch.tensor([[30 * math.cos(theta + 0.5), 9.0]], dtype=torch.float64)
    torch.testing.assert_close(
        losses.margin_logits(cosine, label, margin=MARGIN, scale=SCALE), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("theta", [math.pi - MARGIN + 0.01, math.pi])
def test_margin_falls_back_to_a_shift_beyond_pi(theta):
    cosine, label = at(theta)
    found = losses.margin_logits(cosine, label, margin=MARGIN, scale=SCALE)
    assert found[0, 0].item() == pytest.approx(30 * (math.cos(theta) - 0.5 * math.sin(0.5)), rel=1e-12)


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0, math.pi / 2])
def test_margin_logit_falls_with_the_angle(margin):
    cosine = torch.cos(torch.linspace(0, math.pi, 2001, dtype=torch.float64))[:, None]
    found = losses.margin_logits(cosine, torch.zeros(2001, dtype=torch.long), margin=margin, scale=1.0)
    # The clamp flattens the first angles by less than sqrt(eps).
    assert (found.diff(dim=0) < 1.5e-8).all()


def test_no_margin_only_scales():
    cosine = torch.tensor([[1.0, -1.0, 0.4]])
    for label in range(3):
        found = losses.margin_logits(cosine, torch.tensor([label]), margin=0.0, scale=8.0)
        torch.testing.assert_close(found, 8 * cosine)


@pytest.mark.parametrize("theta", [0.3, 1.2, 2.9])
def test_margin_gradient_agrees_with_finite_differences(theta):
    cosine, label = at(theta)
    cosine.requires_grad_()

    def loss(value):
        return F.cross_entropy(losses.margin_logits(value, label, margin=MARGIN, scale=SCALE), label)

    assert torch.autograd.gradcheck(loss, cosine)


def test_margin_leaves_its_input_alone():
    cosine, label = at(1.0)
    before = cosine.clone()
    losses.margin_logits(cosine, label, margin=MARGIN, scale=SCALE)
    assert torch.equal(cosine, before)


def test_aligned_and_opposite_embeddings_have_finite_gradients(device):
    generator = torch.Generator().manual_seed(0)
    centre = F.normalize(torch.randn(512, 64, generator=generator), dim=1)
    feature = (torch.cat([centre, -centre]) * 22).to(device).requires_grad_()
    label = torch.arange(512, device=device).repeat(2)
    cosine = F.normalize(feature, dim=1) @ centre.to(device).T
    assert (cosine.detach().abs() >= 1).any()  # rounding really reaches, and passes, 1
    F.cross_entropy(losses.margin_logits(cosine, label, margin=MARGIN, scale=SCALE), label).backward()
    assert torch.isfinite(feature.grad).all()


@pytest.mark.parametrize("value", [1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6])
def test_extreme_cosines_have_finite_gradients(value):
    cosine = torch.tensor([[value, 0.0]], requires_grad=True)
    losses.margin_logits(cosine, torch.tensor([0]), margin=MARGIN, scale=SCALE).sum().backward()
    assert torch.isfinite(cosine.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_cosines_are_computed_in_float32(dtype, device):
    cosine = torch.tensor([[0.75, 0.25]], dtype=dtype, device=device)
    label = torch.tensor([0], device=device)
    with torch.autocast(device, dtype=dtype):
        found = losses.margin_logits(cosine, label, margin=MARGIN, scale=SCALE)
    assert found.dtype == torch.float32
    expected = [30 * math.cos(math.acos(0.75) + 0.5), 7.5]
    torch.testing.assert_close(found.cpu(), torch.tensor([expected]), rtol=1e-6, atol=0)


# Focal terms


PROBABILITY = [0.75, 0.25]  # of the true identity, clip by clip


def focal_case(dtype=torch.float64):
    logits = torch.tensor([[math.log(p), math.log(1 - p)] for p in PROBABILITY], dtype=dtype)
    return logits, torch.zeros(2, dtype=torch.long)


def test_focal_loss_by_hand():
    expected = (0.25**2 * -math.log(0.75) + 0.75**2 * -math.log(0.25)) / 2
    assert losses.focal_loss(*focal_case(), gamma=2.0).item() == pytest.approx(expected, rel=1e-12)


def test_batch_focal_loss_by_hand():
    mean = (-math.log(0.75) - math.log(0.25)) / 2
    expected = (1 - math.sqrt(0.75 * 0.25)) ** 2 * mean
    assert losses.batch_focal_loss(*focal_case(), gamma=2.0).item() == pytest.approx(expected, rel=1e-12)


def test_one_clip_makes_both_focal_losses_equal():
    logits, label = focal_case()
    found = [loss(logits[:1], label[:1], gamma=2.0) for loss in (losses.focal_loss, losses.batch_focal_loss)]
    torch.testing.assert_close(*found)


def test_batch_focal_loss_scales_the_gradient_of_every_logit_alike():
    logits = 2 * torch.randn(64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label = torch.arange(64) % 10

    def gradient(loss):
        (found,) = torch.autograd.grad(loss(logits.requires_grad_(), label), logits)
        return found

    plain = gradient(F.cross_entropy)
    batch = gradient(lambda value, label: losses.batch_focal_loss(value, label, gamma=2.0)) / plain
    clip = gradient(lambda value, label: losses.focal_loss(value, label, gamma=2.0)) / plain
    # d/dCE of (1 - exp(-CE))^2 CE, one number for the whole batch
    ce = F.cross_entropy(logits, label).item()
    easy = 1 - math.exp(-ce)
    torch.testing.assert_close(batch, torch.full_like(batch, easy**2 + 2 * ce * easy * math.exp(-ce)))
    assert clip.min() < 0.5 and clip.max() > 1.1


@pytest.mark.parametrize("loss", [losses.focal_loss, losses.batch_focal_loss])
def test_focal_loss_without_gamma_is_cross_entropy(loss):
    logits, label = focal_case()
    assert loss(logits, label, gamma=0.0).item() == pytest.approx((-math.log(0.75) - math.log(0.25)) / 2, rel=1e-12)


@pytest.mark.parametrize("loss", [losses.focal_loss, losses.batch_focal_loss])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_gradient_agrees_with_finite_differences(loss, gamma):
    logits, label = focal_case()
    assert torch.autograd.gradcheck(lambda value: loss(value, label, gamma=gamma), logits.requires_grad_())


@pytest.mark.parametrize("loss", [losses.focal_loss, losses.batch_focal_loss])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("true", [200.0, -200.0])
def test_focal_loss_is_finite_for_certain_clips(loss, gamma, true):
    logits = torch.tensor([[true, 0.0]], requires_grad=True)
    value = loss(logits, torch.tensor([0]), gamma=gamma)
    value.backward()
    assert value.item() == pytest.approx(max(-true, 0.0), abs=1e-6)
    assert torch.isfinite(logits.grad).all()


def test_half_precision_logits_give_a_float32_loss():
    logits, label = focal_case(torch.float16)
    for loss in (losses.focal_loss(logits, label, gamma=0.0), losses.focal_loss(logits, label, gamma=2.0)):
        assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"margin": 28.6, "scale": 30.0}, "radians and scale positive, got 28.6"),
        ({"margin": -0.1, "scale": 30.0}, "radians"),
        ({"margin": 1.6, "scale": 30.0}, "got 1.6"),
        ({"margin": 0.5, "scale": 0.0}, "scale positive, got 0.5 and 0.0"),
    ],
)
def test_degrees_and_other_meaningless_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        losses.margin_logits(*at(1.0), **setting)


def test_focal_loss_refuses_a_negative_gamma():
    with pytest.raises(ValueError, match="gamma must not be negative, got -1"):
        losses.focal_loss(*focal_case(), gamma=-1)
