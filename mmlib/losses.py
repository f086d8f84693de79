"""Losses of the study: additive angular margin and focal terms.

Angles are in radians. Every function returns new tensors, computes in float32 (or float64 if given) also
under autocast, and has finite gradients for every finite input.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _full(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def margin_logits(cosine: Tensor, label: Tensor, margin: float, scale: float) -> Tensor:
    """Add a margin to the true angle: s cos(theta + m) at the label, s cos(theta) elsewhere, (B, C).

    cosine (B, C) in [-1, 1]; label (B,) int in [0, C); margin m in [0, pi/2] radians; scale s > 0. Source: ArcFace,
    Deng et al., CVPR 2019, eq. 3. Where theta > pi - m that would rise again, so cos theta - m sin m stands there, as
    in the released code of 2019 (and of most others).

    Departures: sin theta = sqrt(1 - cos^2) has an infinite slope at cos = +-1, so the root is taken of at least the
    float's epsilon. And the result is a new tensor: to write the margin into `cosine`, as widely copied code does,
    gives the right loss and wrong gradients.

    >>> margin_logits(torch.tensor([[0.0, 0.5]]), torch.tensor([0]), margin=torch.pi / 6, scale=10.0)
    tensor([[-5.,  5.]])
    """
    if not (0 <= margin <= math.pi / 2 and scale > 0):
        raise ValueError(f"margin must be in [0, pi/2] radians and scale positive, got {margin!r} and {scale!r}")
    cosine = _full(cosine)
    target = cosine.gather(1, label[:, None])
    sine = (1.0 - target.square()).clamp_min(torch.finfo(target.dtype).eps).sqrt()
    moved = target * math.cos(margin) - sine * math.sin(margin)
    # theta > pi - m, that is cos theta < -cos m
    moved = torch.where(target < -math.cos(margin), target - margin * math.sin(margin), moved)
    return scale * cosine.scatter(1, label[:, None], moved)


def focal_loss(logits: Tensor, label: Tensor, *, gamma: float) -> Tensor:
    """Average (1 - p)^gamma * -log p over the batch, p = softmax(logits)[label] clip by clip.

    logits (B, C); label (B,); gamma >= 0, and 0 is the cross-entropy. Source: Lin et al., ICCV 2017, eq. 4, without
    the class weight alpha.
    """
    return _modulated(F.cross_entropy(_full(logits), label, reduction="none"), gamma).mean()


def batch_focal_loss(logits: Tensor, label: Tensor, *, gamma: float) -> Tensor:
    """Modulate the batch-mean cross-entropy: (1 - exp(-CE))^gamma * CE, as the 2019 code does (gamma = 2).

    All clips of a batch share one factor, so it scales the learning rate and does not single out hard clips.
    """
    return _modulated(F.cross_entropy(_full(logits), label), gamma)


def _modulated(loss: Tensor, gamma: float) -> Tensor:
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma!r}")
    # -expm1 keeps 1 - p exact where p is near 1; the clamp keeps the slope of its power finite for gamma < 1.
    easy = -torch.expm1(-loss)
    return easy.clamp_min(torch.finfo(loss.dtype).tiny).pow(gamma) * loss


def margin_focal_loss(cosine, label, *, margin, scale, gamma, batch=False, weight=None):
    """TEMPORARY."""
    cosine = _full(cosine)
    m = torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device)
    target = cosine.gather(1, label[:, None])[:, 0]
    sine = (1.0 - target.square()).clamp_min(torch.finfo(target.dtype).eps).sqrt()
    moved = target * m.cos() - sine * m.sin()
    moved = torch.where(target < -m.cos(), target - m * m.sin(), moved)
    moved = torch.where(m > 0, moved, target)
    logits = scale * cosine.scatter(1, label[:, None], moved[:, None])
    ce = F.cross_entropy(logits, label, reduction="none")
    w = torch.ones_like(ce) if weight is None else weight
    w = w / w.sum().clamp(min=torch.finfo(ce.dtype).tiny)
    return _modulated((w * ce).sum(), gamma) if batch else (w * _modulated(ce, gamma)).sum()
