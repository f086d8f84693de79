"""Losses of the study: additive angular margin and focal terms.

Angles are in radians. Every function returns new tensors, computes in float32 (or float64 if given) also
under autocast, and has finite gradients for every finite input.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmlib.threads import one_thread

# Logits that are held at a time: what the cache of a core has room for; a GPU wants them many.
_PIECE = {"cpu": 2**18, "cuda": 2**24}


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
    cosine = _full(cosine)
    target = cosine.gather(1, label[:, None])
    moved, _ = _moved(target, torch.tensor(margin, dtype=torch.float64), scale)
    return cosine.mul(scale).scatter(1, label[:, None], moved)


def _moved(target: Tensor, margin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the logit of the true identity and its derivative with respect to the cosine."""
    wrong = ~((margin >= 0) & (margin <= math.pi / 2))
    # Margins of clips on a GPU come from one that was checked, and to look at them would make the host wait.
    if (margin.device.type == "cpu" and wrong.any()) or not scale > 0:
        first = (margin[wrong].tolist() or margin.flatten().tolist())[0]
        raise ValueError(f"margin must be in [0, pi/2] radians and scale positive, got {first!r} and {scale!r}")
    square, eps = 1.0 - target.square(), torch.finfo(target.dtype).eps
    cos, sin, margin = (value.to(target.dtype) for value in (margin.cos(), margin.sin(), margin))
    sine = square.clamp_min(eps).sqrt()
    beyond = target < -cos  # theta > pi - m
    moved = torch.where(beyond, target - margin * sin, target * cos - sine * sin)
    slope = torch.where(beyond, 1.0, cos + sin * torch.where(square < eps, 0.0, target) / sine)
    return scale * moved, scale * slope


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


def margin_focal_loss(
    cosine: Tensor,
    label: Tensor,
    *,
    margin: float | Tensor,
    scale: float,
    gamma: float,
    batch: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """Average the focal loss of the margin logits over clips, as one operation that holds no logits.

    cosine (B, C), or inner products of any size if the margin is 0; label (B,), scale and gamma as above; margin of all
    clips, or of each (B,); batch: modulate the mean, as ``batch_focal_loss``; weight (B,) >= 0 of clips in the mean,
    not all 0.  It can be differentiated once, which writes the gradient (B, C) and holds nothing else of that size.
    """
    margin = margin.double()[:, None] if isinstance(margin, Tensor) else torch.tensor(margin, dtype=torch.float64)
    loss = _MarginCrossEntropy.apply(cosine, label, margin, scale)[0]

    def mean(value: Tensor) -> Tensor:
        return value.mean() if weight is None else (weight * value).sum() / weight.sum()

    return _modulated(mean(loss), gamma) if batch else mean(_modulated(loss, gamma))


class _MarginCrossEntropy(torch.autograd.Function):
    """Cross-entropy (...) of the margin logits of cosine (..., C) at label (...); margin (..., 1) or ()."""

    @staticmethod
    def forward(cosine: Tensor, label: Tensor, margin: Tensor, scale: float) -> tuple[Tensor, ...]:
        label = label[..., None]
        logit, slope = _moved(_full(cosine.gather(-1, label)), margin, scale)
        most, total, scales = torch.empty_like(logit), torch.empty_like(logit), torch.full_like(logit, scale)
        step = max(1, _PIECE[cosine.device.type] // cosine.shape[-1])
        held = logit.new_empty(min(step, label.numel()), cosine.shape[-1])
        parts = [part.flatten(0, -2).split(step) for part in (cosine, scales, label, logit, most, total)]
        with one_thread(cosine.device):
            for row, by, at, true, top, mass in zip(*parts):
                piece = torch.mul(row, by, out=held[: len(row)])  # as tensors, half times full precision is full
                torch.amax(piece.scatter_(1, at, true), 1, keepdim=True, out=top)
                torch.sum(piece.sub_(top).exp_(), 1, keepdim=True, out=mass)
        loss = total.log() + (most - logit)  # so it is never negative: the bracket is 0 where the label is the top
        return loss[..., 0], total.log() + most, slope * torch.expm1(-loss)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        cosine, label, _, ctx.scale = inputs
        ctx.save_for_backward(cosine, label[..., None], *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor, None, None, None]:
        cosine, label, partition, pull = ctx.saved_tensors
        grad = grad[..., None]
        # Product and difference round one after the other, so that no logit exceeds its log partition.
        with one_thread(cosine.device):
            out = (cosine * torch.full_like(partition, ctx.scale)).sub_(partition).exp_().mul_(grad * ctx.scale)
            return out.scatter_(-1, label, grad * pull).to(cosine.dtype), None, None, None

    @staticmethod
    def vmap(info, in_dims: tuple, cosine: Tensor, label: Tensor, margin: Tensor, scale: float) -> tuple:
        many = [
            part.expand(info.batch_size, *part.shape) if dim is None and part.dim() else part.movedim(dim or 0, 0)
            for part, dim in zip((cosine, label, margin), in_dims)
        ]
        return _MarginCrossEntropy.apply(*many, scale), (0, 0, 0)
