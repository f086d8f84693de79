"""The identity model: aggregate the frames of a clip, transform the clip feature, compare it with every identity.

``IdentityModel`` is the One Name network (Dong et al., ACM MM 2019) read from its released code: an aggregator, an
optional context branch (scene), a residual MLP, and a cosine classifier as its last layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlib import aggregate
from mmlib.losses import concat_scores


class FixedPool(nn.Module):
    """Give a pooling function without parameters the call signature of the learned aggregators."""

    def __init__(self, dim: int, pool: Callable[..., Tensor]):
        super().__init__()
        self.out_dim = dim
        self.pool = pool

    def forward(self, x: Tensor, mask: Tensor, quality: Tensor | None = None, det: Tensor | None = None) -> Tensor:
        return self.pool(x, mask, quality, det)

    def weights(self, x: Tensor, mask: Tensor, quality: Tensor | None = None, det: Tensor | None = None) -> Tensor:
        """Return the weight of each frame (B, T), read off the pool itself.

        It is the weight of the raw embeddings, or of the unit ones where the pool averages those (``mean``).
        """
        frames = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        # Embeddings of length 1, orthogonal to each other, come out with the weights of the raw ones as coordinates.
        return self.pool(frames, mask, quality, det)


# Name in the book -> constructor from the width D of an embedding.
AGGREGATORS: dict[str, Callable[[int], nn.Module]] = {
    "mean": lambda dim: FixedPool(dim, lambda x, mask, q, d: aggregate.mean_pool(x, mask)),
    "norm": lambda dim: FixedPool(dim, lambda x, mask, q, d: aggregate.norm_pool(x, mask)),
    "quality": lambda dim: FixedPool(dim, aggregate.quality_pool),
    "best half": lambda dim: FixedPool(dim, lambda x, mask, q, d: aggregate.best_k_pool(x, mask, q, .5)),
    "learned scores": aggregate.ScoreAttention,
    "NAN": aggregate.NAN,
    "NAN, two blocks": lambda dim: aggregate.NAN(dim, blocks=2),
    "NAN + scores": lambda dim: aggregate.NAN(dim, scores=True),
    "attention": aggregate.ChannelAttention,
    "attention + scores": lambda dim: aggregate.ChannelAttention(dim, scores=True),
    "DANet + scores": lambda dim: aggregate.ChannelAttention(dim, scores=True, invert=True),
    "as coded": aggregate.CodedAttention,
}
NEEDS_SCORES = {"quality", "best half", "learned scores", "NAN + scores", "attention + scores", "DANet + scores", "as coded"}
LEARNED = {name for name in AGGREGATORS if name not in ("mean", "norm", "quality", "best half")}


def make_aggregator(name: str, dim: int) -> nn.Module:
    """Build an aggregator of ``AGGREGATORS`` for embeddings of width ``dim``."""
    if name not in AGGREGATORS:
        raise ValueError(f"aggregator must be one of {', '.join(AGGREGATORS)}, got {name!r}")
    return AGGREGATORS[name](dim)


class Dropout(nn.Dropout):
    """Do what ``nn.Dropout`` does; on a CPU that draws its mask four times slower than uniform numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x).ge_(self.p).div_(1 - self.p or 1) if self.training else x


class ResidualMLP(nn.Module):
    """Add a two-layer transform to the input: D -> hidden -> D, each with batch norm, (B, D) -> (B, D).

    The released code has hidden = 1.6 D, PReLU and dropout .5.  Departure: the last batch norm starts at 0, so that
    an untrained network passes its input through and a classifier can start from class means.
    """

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.PReLU(), Dropout(dropout),
            nn.Linear(hidden, dim, bias=False), nn.BatchNorm1d(dim))
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ContextBranch(nn.Sequential):
    """Reduce a context feature, D -> D/4 -> D/16 (2048 -> 512 -> 128 for a scene), as in the released code."""

    def __init__(self, dim: int, dropout: float):
        super().__init__(
            nn.Linear(dim, dim // 4, bias=False), nn.BatchNorm1d(dim // 4), nn.PReLU(), Dropout(dropout),
            nn.Linear(dim // 4, dim // 16, bias=False), nn.BatchNorm1d(dim // 16), nn.PReLU())
        self.out_dim = dim // 16


class IdentityModel(nn.Module):
    """Score clips against identities by the cosine between a transformed clip feature and one vector an identity.

    aggregator: a module of ``mmlib.aggregate`` or ``FixedPool``.  identities: C.  hidden: width of the residual MLP, 0
    for none (a linear cosine classifier).  concat: ``"none"``, ``"normalised"`` or ``"raw"`` appends the clip's mean
    quality / 100 and det score to its feature, normalised first or not (``losses.concat_scores``).  context: width of
    a context feature that joins through ``ContextBranch``, 0 for none.
    """

    def __init__(self, aggregator: nn.Module, identities: int, *, hidden: int, dropout: float = .5,
                 concat: str = "none", context: int = 0):
        super().__init__()
        if concat not in ("none", "normalised", "raw"):
            raise ValueError(f"concat must be none, normalised or raw, got {concat!r}")
        self.aggregator = aggregator
        self.concat = concat
        self.branch = ContextBranch(context, dropout) if context else None
        self.dim = aggregator.out_dim + 2 * (concat != "none") + (self.branch.out_dim if context else 0)
        self.mlp = ResidualMLP(self.dim, hidden, dropout) if hidden else nn.Identity()
        self.prototype = nn.Parameter(F.normalize(torch.randn(identities, self.dim), dim=1))
        # A given linear map of the clip feature, e.g. whitening; the identity unless set.
        self.register_buffer("centre", torch.zeros(aggregator.out_dim))
        self.register_buffer("whitening", None)

    def pool(self, x: Tensor, mask: Tensor, quality: Tensor | None, det: Tensor | None,
             context: Tensor | None = None) -> Tensor:
        """Return what enters the MLP, (B, dim), entries of order 1."""
        feature = self.aggregator(x, mask, quality, det)
        if self.whitening is not None:
            feature = (F.normalize(feature, dim=1) - self.centre) @ self.whitening
        if self.concat != "none":
            aggregate._require("concat", quality=quality, det=det)
            weight = mask / mask.sum(1, keepdim=True).clamp(min=1)
            scores = torch.stack([(quality * weight).sum(1) / aggregate.QUALITY_UNIT, (det * weight).sum(1)], 1)
            feature = concat_scores(feature, scores, normalise=self.concat == "normalised")
        if self.concat != "raw":
            feature = F.normalize(feature, dim=1) * feature.shape[1] ** .5
        return feature if self.branch is None else torch.cat([feature, self.branch(context)], 1)

    def embed(self, pooled: Tensor) -> Tensor:
        """Return the embedding of length 1 that is compared with the identities, (B, dim)."""
        return F.normalize(self.mlp(pooled), dim=1)

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """Return cosines (B, C); arguments as for ``pool``."""
        return self.embed(self.pool(*inputs)) @ F.normalize(self.prototype, dim=1).T

    @torch.no_grad()
    def start_from_class_means(self, pooled: Tensor, label: Tensor) -> None:
        """Set every identity's vector to the mean of its clips' pooled features (n, dim), label (n,).

        Identities without a clip keep their random direction.
        """
        mean = class_means(F.normalize(pooled, dim=1), label, len(self.prototype))
        seen = mean.norm(dim=1) > 0
        self.prototype[seen] = F.normalize(mean[seen], dim=1)


def class_means(feature: Tensor, label: Tensor, identities: int) -> Tensor:
    """Average features (n, D) by label (n,) in [0, C): (C, D); zeros for an identity without any."""
    total = torch.zeros(identities, feature.shape[1], dtype=feature.dtype, device=feature.device)
    total.index_add_(0, label, feature)
    return total / torch.bincount(label, minlength=identities).clamp(min=1)[:, None].to(feature.dtype)


def within_class_whitening(feature: Tensor, label: Tensor, *, shrinkage: float) -> Tensor:
    """Return W (D, D) such that x @ W has unit within-class covariance: WCCN (Hatch et al., Interspeech 2006).

    feature (n, D), label (n,).  The pooled covariance of deviations from the class mean is shrunk towards its
    average variance by ``shrinkage`` in [0, 1] before it is inverted; W is its symmetric inverse square root.
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
    identities = int(label.max()) + 1
    x = feature.double()
    deviation = x - class_means(x, label, identities)[label]
    freedom = max(1, len(x) - len(torch.unique(label)))  # one mean an identity is estimated
    covariance = deviation.T @ deviation / freedom
    variance = covariance.diagonal().mean()
    if not variance > 0:
        raise ValueError("no identity has two different clips, so there is no within-class covariance to whiten")
    covariance = (1 - shrinkage) * covariance + shrinkage * variance * torch.eye(len(covariance)).to(covariance)
    value, vector = torch.linalg.eigh(covariance)
    return ((vector * value.clamp(min=1e-6 * variance).rsqrt()) @ vector.T).to(feature.dtype)
