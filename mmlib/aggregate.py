"""Turn the frames of a clip into one clip feature.

Throughout: `x` (B, T, D) raw embeddings, of norms near 22, not normalised, as NAN was published to work on them;
`mask` (B, T), True where a frame exists; `quality` (B, T) about -20..260 and `det` (B, T) 0..1; `scores` (B, T, S),
further coordinates of every frame, apart from x. A weight (B, T) is always such that the clip feature is
sum_i weight_i x_i. What stands in padding never changes an output as long as it is finite (a clip store pads with
zeros), a clip without a frame gives zeros, and the order of frames does not matter (CodedAttention excepted). Frames
are read and never copied: they are most of the bytes.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QUALITY_UNIT = 100.0  # the 2019 system divides quality by this before appending it
NORM_UNIT = 20.0  # about the norm of an embedding
CONCATS = ("none", "normalised", "raw", "frames")  # ways to append scores, see `models.IdentityModel`
_MAP = 2**24  # numbers of a channel map that are held at once; that of a clip of 20,000 frames has 4e8

Maybe = Tensor | None


def _masked_softmax(logit: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis within the mask; rows without any True give zeros, with finite gradients."""
    # finfo.min and not -inf: a row of -inf would be NaN, and where() does not stop NaN in the backward pass.
    weight = torch.softmax(torch.where(mask, logit, torch.finfo(logit.dtype).min), dim=-1)
    return torch.where(mask, weight, 0.0)


def _einsum(equation: str, *operands: Tensor) -> Tensor:
    """Contract outside autocast: logits reach hundreds, where a step of bfloat16 is a whole unit."""
    with torch.autocast(operands[0].device.type, enabled=False):
        return torch.einsum(equation, *operands)


def mean_pool(x: Tensor, mask: Tensor) -> Tensor:
    """Average the L2-normalised embeddings, so that every frame has one vote; not renormalised."""
    norm = x.norm(dim=-1)
    weight = torch.where(mask, 1 / torch.where(norm > 0, norm, 1.0), 0.0)
    return _einsum("bt,btd->bd", weight, x) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def norm_pool(x: Tensor, weight: Tensor) -> Tensor:
    """Average the raw embeddings with the mask, or another weight (B, T) that is 0 where padded.

    By the mask it is along sum |x_i| u_i, the norm-weighted mean of MagFace and AdaFace.
    """
    weight = weight.to(x.dtype)
    total = weight.sum(dim=1)
    return _einsum("bt,btd->bd", weight, x) / torch.where(total > 0, total, 1.0)[:, None]


def _required(*scores: Maybe) -> None:
    if any(score is None for score in scores):
        raise ValueError("these clips lack the quality or det scores that this way of aggregation needs")


def seefun_weight(quality: Tensor, det: Tensor) -> Tensor:
    """Weigh frames by hand: quality * det * W(quality), (B, T), >= 0.

    W = 0 for quality <= 0, .2 up to 20, .3 up to 30, .6 up to 60, 1 above (each edge inclusive). Source: the poster of
    seefun (2019, MAP .8983, faces only). Their report and code say 40 for 60, and the code has each edge in the step
    above it.
    """
    _required(quality, det)
    edge = torch.tensor([0.0, 20.0, 30.0, 60.0], device=quality.device, dtype=quality.dtype)
    level = torch.tensor([0.0, 0.2, 0.3, 0.6, 1.0], device=quality.device, dtype=quality.dtype)
    return quality * det * level[torch.bucketize(quality.contiguous(), edge)]


def quality_pool(x: Tensor, mask: Tensor, quality: Tensor, det: Tensor) -> Tensor:
    """Average raw embeddings with `seefun_weight`; a clip whose weights are all 0 has frames, and gets `norm_pool`."""
    weight = torch.where(mask, seefun_weight(quality, det).to(x.dtype), 0.0)
    none = (weight.sum(dim=1, keepdim=True) <= 0) & mask
    return norm_pool(x, torch.where(none, 1.0, weight))


def best_half_pool(x: Tensor, mask: Tensor, quality: Tensor) -> Tensor:
    """Average the raw embeddings of the floor(n / 2) frames of highest quality, with ties, of all n where n < 8.

    Source: the 2019 solution of zheey, which averages not the embeddings but the predictions, with weight quality where
    that is positive, else 1.
    """
    _required(quality)
    quality = torch.where(mask, quality, -torch.inf)
    ordered = F.pad(quality.sort(dim=1, descending=True).values, (0, 1))  # padded, so that T may be 0
    count = mask.sum(dim=1, keepdim=True)
    last = torch.where(count < 8, count, count // 2).clamp(min=1) - 1
    return norm_pool(x, mask & (quality >= ordered.gather(1, last)))


def frame_scores(quality: Tensor, det: Tensor) -> Tensor:
    """Return quality / 100 and det of each frame, (B, T, 2), what the 2019 code appends to the raw embeddings."""
    _required(quality, det)
    return torch.stack([quality / QUALITY_UNIT, det], dim=-1)


def nan_pool(x: Tensor, mask: Tensor, query: Tensor, scores: Maybe = None) -> tuple[Tensor, Tensor]:
    """Pool by one attention block: a = softmax_i(query . x_i), r = sum_i a_i x_i; r (B, D + S) and a (B, T).

    query: (D + S,), or (B, D + S) for one a clip. Source: Yang et al., Neural Aggregation Network, CVPR 2017, eqs. 1-3.
    """
    weight = _masked_softmax(_dot(x, scores, query), mask)
    return _sum(x, scores, weight), weight


def channel_map(
    x: Tensor, mask: Tensor, temperature: Tensor | float, scores: Maybe, invert: bool, rows: slice = slice(None)
) -> Tensor:
    """Attend from frame to frame: A = softmax_j(S / temperature), S = x x^T, (B, T, T) or some ``rows`` of it.

    So frames that agree strengthen each other, as the One Name paper says. invert: softmax_j((max_j S - S) /
    temperature) = softmax_j(-S / temperature), the map of DANet (Fu et al., CVPR 2019, released code) with frames in
    the place of channels: every frame looks at those least like it.
    """
    similarity = _gram(x, scores, rows) / temperature
    return _masked_softmax(-similarity if invert else similarity, mask[:, rows, None] & mask[:, None, :])


def _dot(x: Tensor, scores: Maybe, query: Tensor) -> Tensor:
    """Multiply every frame by `query` (D + S,) or (B, D + S): (B, T)."""
    # One query for all clips is written as one a clip: a batched product passes over x once, one product does not.
    query = query.to(x.dtype).expand(len(x), -1)
    own = _einsum("bd,btd->bt", query[:, : x.shape[-1]], x)
    return own if scores is None else own + _einsum("bd,btd->bt", query[:, x.shape[-1] :], scores.to(x.dtype))


def _sum(x: Tensor, scores: Maybe, weight: Tensor) -> Tensor:
    """Add the frames with `weight` (B, T): (B, D + S)."""
    total = _einsum("bt,btd->bd", weight, x)
    return total if scores is None else torch.cat([total, _einsum("bt,btd->bd", weight, scores.to(x.dtype))], dim=1)


def _gram(x: Tensor, scores: Maybe, rows: slice = slice(None)) -> Tensor:
    """Multiply frames, all or some ``rows``, by every frame of their clip: (B, T, T)."""
    gram = _einsum("bid,bjd->bij", x[:, rows], x)
    return gram if scores is None else gram + _gram(scores.to(x.dtype), None, rows)


class Aggregator(nn.Module):
    """Pool the frames of clips with weights: ``_pool`` returns the clip feature (B, out_dim) and the weights (B, T)."""

    out_dim: int

    def forward(self, x: Tensor, mask: Tensor, quality: Maybe = None, det: Maybe = None) -> Tensor:
        return self._pool(x, mask, quality, det)[0]

    def weights(self, x: Tensor, mask: Tensor, quality: Maybe = None, det: Maybe = None) -> Tensor:
        """Return the weight of each frame (B, T) in the clip feature."""
        return self._pool(x, mask, quality, det)[1]


class ScoreAttention(Aggregator):
    """Learn weights from the scores alone: softmax over a clip's frames of w . (quality / 100, det, norm / 20).

    The learned counterpart of a hand-made quality weight; w starts at 0, which is `norm_pool`.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.out_dim = dim
        self.weight = nn.Parameter(torch.zeros(3))

    def _pool(self, x, mask, quality, det) -> tuple[Tensor, Tensor]:
        scores = torch.cat([frame_scores(quality, det), x.norm(dim=-1, keepdim=True) / NORM_UNIT], dim=-1)
        weight = _masked_softmax(_einsum("btk,k->bt", scores.to(x.dtype), self.weight.to(x.dtype)), mask)
        return _sum(x, None, weight), weight


class NAN(Aggregator):
    """Pool by one or two attention blocks: r0 from `query`, then, of two, q1 = tanh(weight r0 + bias) and r from q1.

    All parameters start at 0, so an untrained NAN is `norm_pool`. scores: append quality and det to every frame first;
    the clip feature keeps their pooled values as its last two dimensions (512 + 2), as in the 2019 code. Source: NAN,
    CVPR 2017, eq. 4.
    """

    def __init__(self, dim: int, *, two_blocks: bool = False, scores: bool = False):
        super().__init__()
        self.scores = scores
        self.out_dim = dim + 2 * scores
        self.query = nn.Parameter(torch.zeros(self.out_dim))
        self.weight = nn.Parameter(torch.zeros(self.out_dim, self.out_dim)) if two_blocks else None
        self.bias = nn.Parameter(torch.zeros(self.out_dim)) if two_blocks else None

    def _pool(self, x, mask, quality, det) -> tuple[Tensor, Tensor]:
        scores = frame_scores(quality, det) if self.scores else None
        found = nan_pool(x, mask, self.query, scores)
        if self.weight is None:
            return found
        query = torch.tanh(_einsum("bd,ed->be", found[0], self.weight) + self.bias)
        return nan_pool(x, mask, query, scores)


class ChannelAttention(Aggregator):
    """Mix frames, x' = gamma A x + x, A from `channel_map`, then pool them by one NAN block, as One Name describes.

    gamma and the query start at 0, so the untrained module is `norm_pool`. The learned temperature starts at 100: DANet
    has none (1), but on raw embeddings, with S near 480 on the diagonal, A would be one-hot. scores: as in `NAN`.
    """

    def __init__(self, dim: int, *, invert: bool = False, scores: bool = False):
        super().__init__()
        self.invert, self.scores = invert, scores
        self.out_dim = dim + 2 * scores
        self.gamma = nn.Parameter(torch.zeros(()))
        self.log_temperature = nn.Parameter(torch.tensor(100.0).log())
        self.query = nn.Parameter(torch.zeros(self.out_dim))

    def _pool(self, x, mask, quality, det) -> tuple[Tensor, Tensor]:
        """Pool without forming the mixed frames: the weight of an original one is a_j + gamma sum_i a_i A_ij."""
        scores, temperature = frame_scores(quality, det) if self.scores else None, self.log_temperature.exp()
        step = max(1, _MAP // max(1, mask.numel()))
        blocks = [slice(first, first + step) for first in range(0, x.shape[1], step)] or [slice(None)]

        @lru_cache(maxsize=1)  # of one block, the usual case, the second loop below finds it made
        def mixing(block: int) -> Tensor:
            return self.gamma * channel_map(x, mask, temperature, scores, self.invert, blocks[block])

        own = _dot(x, scores, self.query)
        mixed = torch.cat([_einsum("bij,bj->bi", mixing(i), own) for i in range(len(blocks))], dim=1)
        attention = _masked_softmax(mixed + own, mask)
        back = (_einsum("bi,bij->bj", attention[:, rows], mixing(i)) for i, rows in enumerate(blocks))
        weight = sum(back, attention)
        return _sum(x, scores, weight), weight


class CodedAttention(Aggregator):
    """Aggregate a fixed number of frames as the released One Name code does, frames being the channels.

    With X the frames (T, D), scores appended as in `NAN`, and h = T/2: A = softmax_j of the h x h affinity
    BN(theta X) BN(phi X)^T, X' = X + BN(z A g X), one NAN block on X'; theta, phi, g (h, T) and z (T, h) are 1x1
    convolutions without bias. Hence it depends on the order of the frames and needs exactly `frames` of them: draw with
    replacement from shorter clips.

    In the released code theta and phi start at 0, and so do the shifts of their batch norms. Then both factors of the
    affinity are 0, the gradient of each is a product with the other, and they stay 0: A is 1 / h for ever, whatever the
    clips, and A g X is h times one average of the frames. So theta and phi are left out. alive: let them start at
    random, as layers usually do, and the map learns. z starts at 0 and the weight of its batch norm at 1, as released.

    Every step up to the NAN block is, given A, a sum of frames plus a constant, so it is a matrix over the frames and a
    row of ones, and the batch statistics come from products of frames: the same numbers as layer by layer, without any
    tensor of the size of the input.
    """

    def __init__(self, dim: int, *, frames: int = 40, alive: bool = False):
        super().__init__()
        if frames < 2:
            raise ValueError(f"frames must be at least 2, got {frames!r}")
        half = frames // 2
        self.frames, self.alive = frames, alive
        self.out_dim = dim + 2
        self.g, self.z = nn.Linear(frames, half, bias=False), nn.Linear(half, frames, bias=False)
        self.norm = nn.BatchNorm1d(frames)
        nn.init.zeros_(self.z.weight)
        if alive:
            self.theta, self.phi = (nn.Linear(frames, half, bias=False) for _ in range(2))
            self.theta_norm, self.phi_norm = nn.BatchNorm1d(half), nn.BatchNorm1d(half)
        self.query = nn.Parameter(torch.zeros(self.out_dim))

    def forward(self, x: Tensor, mask: Tensor, quality: Maybe = None, det: Maybe = None) -> Tensor:
        scores = self._scores(x, quality, det)
        with torch.autocast(x.device.type, enabled=False):
            own, total = _dot(x, scores, self.query), self.query.sum().expand(len(x), 1)
            mixing, z, moments = self._mixing(x, scores)
            last = _normalised(self.norm, F.pad(z, (0, 1)), moments, len(x), self.out_dim)  # (T, k + 1), of ones too
            # What the query says of the mixed frames and of ones, then of the frames that the last layer adds to.
            mixed = torch.cat([_einsum("bkt,bt->bk", mixing, own), total], dim=1)
            frames = torch.softmax(mixed @ last.T + own, dim=1)
            back = frames @ last
            weight = frames + _einsum("bk,bkt->bt", back[:, :-1], mixing)
            return _sum(x, scores, weight) + back[:, -1:]

    def _scores(self, x: Tensor, quality: Maybe, det: Maybe) -> Tensor:
        if x.shape[1] != self.frames:
            raise ValueError(f"CodedAttention needs exactly {self.frames} frames a clip, got T = {x.shape[1]}")
        return frame_scores(quality, det)  # type: ignore[arg-type]

    def _mixing(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return A g as a matrix on the frames, (B, k, T), z on its k rows, (T, k), and the products of A g X and ones.

        The k = h rows of a dead map are equal, and stand as one.  Products (k + 1, k + 1), averaged over clips.
        """
        if self.alive:
            gram = self._gram(x, scores)
            mixing, z = self._attention(gram) @ self.g.weight, self.z.weight
            both = torch.cat([mixing @ gram[:, :-1, :-1] @ mixing.mT, mixing @ gram[:, :-1, -1:]], dim=2)
            square, total = both.mean(dim=0).split([len(both[0]), 1], dim=1)
        else:
            mixing, z = self.g.weight.mean(dim=0).expand(len(x), 1, -1), self.z.weight.sum(dim=1, keepdim=True)
            average = _sum(x, scores, mixing[:, 0])
            square, total = average.square().sum(dim=1).mean()[None, None], average.sum(dim=1).mean()[None, None]
        last = torch.cat([total.mT, total.new_full((1, 1), self.out_dim)], dim=1)
        return mixing, z, torch.cat([torch.cat([square, total], dim=1), last])

    def _gram(self, x: Tensor, scores: Tensor) -> Tensor:
        """Multiply the frames and a row of ones by each other: (B, T + 1, T + 1)."""
        gram = F.pad(_gram(x, scores), (0, 1, 0, 1))
        gram[:, -1, :-1] = gram[:, :-1, -1] = x.sum(dim=-1) + scores.sum(dim=-1)
        gram[:, -1, -1] = self.out_dim
        return gram

    def _attention(self, gram: Tensor) -> Tensor:
        average = gram.mean(dim=0)
        theta, phi = (
            _normalised(norm, F.pad(layer.weight, (0, 1)), average, len(gram), self.out_dim)
            for layer, norm in ((self.theta, self.theta_norm), (self.phi, self.phi_norm))
        )
        return torch.softmax(theta.expand(len(gram), -1, -1) @ (gram @ phi.T), dim=-1)

    @torch.no_grad()
    def attention(self, x: Tensor, mask: Tensor, quality: Maybe = None, det: Maybe = None) -> Tensor:
        """Return the map A of each clip, (B, T/2, T/2), in eval mode."""
        scores, half = self._scores(x, quality, det), self.frames // 2
        return self._attention(self._gram(x, scores)) if self.alive else x.new_full((len(x), half, half), 1 / half)


def _normalised(norm: Any, rows: Tensor, gram: Any, clips: int, dim: int) -> Tensor:
    """Follow rows (C, n) by batch norm; gram (n, n): products of what they add up, over dim, averaged over clips."""
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean = rows @ gram[:, -1] / dim
        variance = (((rows @ gram) * rows).sum(dim=1) / dim - mean.square()).clamp_min(0)
        count = clips * dim
        with torch.no_grad():
            norm.running_mean += norm.momentum * (mean - norm.running_mean)
            norm.running_var += norm.momentum * (variance * count / (count - 1) - norm.running_var)
            norm.num_batches_tracked += 1
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    return scale[:, None] * rows + F.pad(shift[:, None], (rows.shape[-1] - 1, 0))


class FixedPool(Aggregator):
    """Give a pooling function without parameters the call signature of the learned aggregators."""

    def __init__(self, dim: int, pool: Callable[..., Tensor]):
        super().__init__()
        self.out_dim = dim
        self.pool = pool

    def forward(self, *frames: Maybe) -> Tensor:
        return self.pool(*frames)

    def weights(self, x: Tensor, *known: Maybe) -> Tensor:
        """Return the weight of each frame (B, T): of raw embeddings, or of unit ones where the pool averages those."""
        # Embeddings of length 1, orthogonal to each other, come out with the weights of the raw ones as coordinates.
        return self.pool(torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1), *known)


# Name in the book -> constructor from the width D of an embedding.
AGGREGATORS: dict[str, Callable[[int], Aggregator]] = {
    "mean": lambda dim: FixedPool(dim, lambda x, mask, q, d: mean_pool(x, mask)),
    "norm": lambda dim: FixedPool(dim, lambda x, mask, q, d: norm_pool(x, mask)),
    "quality": lambda dim: FixedPool(dim, quality_pool),
    "best half": lambda dim: FixedPool(dim, lambda x, mask, q, d: best_half_pool(x, mask, q)),
    "learned scores": ScoreAttention,
    "NAN": NAN,
    "NAN, two blocks": lambda dim: NAN(dim, two_blocks=True),
    "NAN + scores": lambda dim: NAN(dim, scores=True),
    "attention": ChannelAttention,
    "attention + scores": lambda dim: ChannelAttention(dim, scores=True),
    "DANet + scores": lambda dim: ChannelAttention(dim, scores=True, invert=True),
    "as coded": CodedAttention,
    "as coded, alive": lambda dim: CodedAttention(dim, alive=True),
}
LEARNED = {name for name in AGGREGATORS if name not in ("mean", "norm", "quality", "best half")}
NEEDS_SCORES = {name for name in AGGREGATORS if "scores" in name} | {"quality", "best half"}
NEEDS_SCORES |= {name for name in AGGREGATORS if "as coded" in name}
