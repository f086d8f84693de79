"""The identity model: aggregate the frames of a clip, transform the clip feature, compare it with every identity.

``IdentityModel`` is the One Name network (Dong et al., ACM MM 2019) read from its released code: an aggregator, an
optional branch a context (scene, head, body, audio), a residual MLP, and a cosine classifier as its last layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlib.aggregate import QUALITY_UNIT, Aggregator, Maybe

Discard = tuple[int, int] | None  # a block, and of how many
Contexts = dict[str, tuple[Tensor, Tensor]] | None  # by name the feature (B, D) and whether a clip has it (B,)


@contextmanager
def seeded(seed: int | list[int]) -> Iterator[None]:
    """Draw the weights of new layers from ``seed``, and leave torch's own generator as it was."""
    number = seed if isinstance(seed, int) else int(np.random.SeedSequence(seed).generate_state(1)[0])
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(number)
        yield


class Dropout(nn.Module):
    """Zero each of ``width`` inputs with probability p in training, and scale the others by 1 / (1 - p).

    keep: what the inputs (B, width) are multiplied by. A training loop draws it before every pass, so that a model sees
    the same masks trained alone or beside others; left empty, every pass draws its own from torch's generator.
    """

    def __init__(self, width: int, p: float):
        super().__init__()
        self.width, self.p = width, p
        self.register_buffer("keep", torch.empty(0), persistent=False)

    def draw(self, clips: int, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask (clips, width)."""
        # Uniform numbers, because a CPU draws Bernoulli ones four times slower.
        mask = torch.rand(clips, self.width, generator=generator, device=self.keep.device)
        return mask.ge_(self.p).div_(1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (self.keep if self.keep.numel() else self.draw(len(x)))


class MaskedBatchNorm(nn.BatchNorm1d):
    """Normalise the rows of (B, D) that are ``present`` (B,) by their own statistics; the others become anything.

    As ``BatchNorm1d`` of those rows, with no work that depends on how many there are.  Statistics need two rows: with
    fewer, nothing is learned and the running ones stay.
    """

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            weight = present.to(mean.dtype)
            count = weight.sum()
            share = weight / count.clamp(min=1)
            with torch.autocast(x.device.type, enabled=False):
                x = x.to(mean.dtype)
                mean = share @ x
                variance = share @ (x - mean).square()
            with torch.no_grad():
                momentum = self.momentum * (count > 1).to(mean.dtype)
                self.running_mean += momentum * (mean - self.running_mean)
                self.running_var += momentum * (variance * count / (count - 1).clamp(min=1) - self.running_var)
                self.num_batches_tracked += count > 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale + (self.bias - mean * scale)


def _linear(width: int, out: int, released: bool) -> nn.Linear:
    """Return a linear layer without bias, which the batch norm behind it would take out."""
    layer = nn.Linear(width, out, bias=False)
    if released:
        nn.init.kaiming_normal_(layer.weight)
    return layer


class ResidualMLP(nn.Module):
    """Add a two-layer transform to the input (B, D): D -> hidden -> D, each with batch norm.

    Departure from the released code: the last batch norm starts at 0, so that an untrained network passes its input
    through and a classifier can start from class means.  released: it starts at 1 and a PReLU follows, and the linear
    layers start Kaiming-normal.
    """

    def __init__(self, dim: int, hidden: int, dropout: float, released: bool = False):
        super().__init__()
        first = [_linear(dim, hidden, released), nn.BatchNorm1d(hidden), nn.PReLU(), Dropout(hidden, dropout)]
        last = [_linear(hidden, dim, released), nn.BatchNorm1d(dim), *([nn.PReLU()] if released else [])]
        if not released:
            nn.init.zeros_(last[1].weight)
        self.layers = nn.Sequential(*first, *last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ContextBranch(nn.Module):
    """Reduce a context feature, D -> D/4 -> out (2048 -> 512 -> 128 for a scene), as in the released code.

    A clip without that context gets a learned vector, which starts at 0, and takes no part in the batch statistics.
    out: 0 for the feature as it is.  released: the linear layers start Kaiming-normal.
    """

    def __init__(self, dim: int, out: int, dropout: float, released: bool = False):
        super().__init__()
        width = max(1, dim // 4)
        first = [_linear(dim, width, released), MaskedBatchNorm(width), nn.PReLU(), Dropout(width, dropout)]
        last = [_linear(width, out, released), MaskedBatchNorm(out), nn.PReLU()] if out else []
        self.layers = nn.ModuleList([*first, *last] if out else [])
        self.out_dim = out or dim
        self.absent = nn.Parameter(torch.zeros(self.out_dim))

    def forward(self, feature: Tensor, present: Tensor) -> Tensor:
        """Return (B, out_dim); feature (B, D), present (B,) True where the clip has it."""
        for layer in self.layers:
            feature = layer(feature, present) if isinstance(layer, MaskedBatchNorm) else layer(feature)
        known = present & (present.sum() > 1) if self.training and self.layers else present  # statistics need two
        return torch.where(known[:, None], feature, self.absent.to(feature.dtype))


def gap(width: int, discard: Discard) -> slice:
    """Return which of ``width`` dimensions a model does not see that discards a contiguous block, or nothing."""
    block, blocks = discard or (0, 1)
    if not 0 <= block < blocks <= width:
        raise ValueError(f"block {block} of {blocks} does not exist in {width} dimensions")
    return slice(block * width // blocks, (block + 1) * width // blocks) if discard else slice(0, 0)


def kept_width(width: int, discard: Discard) -> int:
    """Return how many of ``width`` dimensions are left without the discarded block."""
    return width - len(range(width)[gap(width, discard)])


class IdentityModel(nn.Module):
    """Score clips against identities by the cosine between a transformed clip feature and one vector an identity.

    aggregator: a module of ``mmlib.aggregate``, or None for a model of contexts alone.  identities: C.  hidden: width
    of the residual MLP, 0 for none (a linear cosine classifier).  concat: ``"none"`` normalises the clip feature;
    ``"normalised"``, as the One Name paper describes, and ``"raw"`` then append the clip's mean quality / 100 and det
    score, ``"raw"`` without normalising: magnitude carries quality, and a cosine divides it out; ``"frames"`` leaves
    the feature as it is, for an aggregator that has appended the scores to every frame, as in the released code.
    contexts: width by name of the context features that join through a ``ContextBranch`` of ``context_dim`` outputs
    each, 0 for as many as inputs.  raw_contexts: whether they come as they are, or scaled to entries of order 1.
    layers: ``"study"``, or ``"released"`` as in ``ResidualMLP`` and ``ContextBranch``.  start: of the identities'
    vectors, ``"xavier"`` as released (of length about .34 at the size of the challenge, which one rate of SGD turns
    some nine times as fast), else random ones of length 1.  gated: multiply each context by a gate in (0, 1) that
    sees it and the clip feature.  head: ``"cosine"``, or ``"dot"`` for inner products.  discard: the block of the
    embeddings and of every context that the model does not see.
    """

    def __init__(
        self,
        aggregator: Aggregator | None,
        identities: int,
        *,
        hidden: int,
        dropout: float = 0.5,
        concat: str = "none",
        contexts: dict[str, int] | None = None,
        context_dim: int = 128,
        raw_contexts: bool = False,
        layers: str = "study",
        start: str = "random",
        gated: bool = False,
        head: str = "cosine",
        discard: Discard = None,
    ):
        super().__init__()
        self.aggregator, self.concat, self.head, self.discard = aggregator, concat, head, discard
        self.raw_contexts, released = raw_contexts, layers == "released"
        own = 0 if aggregator is None else aggregator.out_dim + 2 * (concat in ("normalised", "raw"))
        kept = {name: kept_width(width, discard) for name, width in (contexts or {}).items()}
        branches = {name: ContextBranch(dim, context_dim, dropout, released) for name, dim in kept.items()}
        outs = {name: branch.out_dim for name, branch in branches.items()}
        self.branches = nn.ModuleDict(branches)
        self.gates = nn.ModuleDict({name: nn.Linear(own + out, 1) for name, out in outs.items()} if gated else {})
        self.dim = own + sum(outs.values())
        self.mlp = ResidualMLP(self.dim, hidden, dropout, released) if hidden else nn.Identity()
        self.prototype = nn.Parameter(F.normalize(torch.randn(identities, self.dim), dim=1))
        if start == "xavier":
            nn.init.xavier_uniform_(self.prototype)
        # A given linear map of the clip feature, e.g. whitening; the identity unless set.
        self.register_buffer("centre", torch.zeros(0 if aggregator is None else aggregator.out_dim))
        self.register_buffer("whitening", None)

    def pool(
        self, x: Maybe = None, mask: Maybe = None, quality: Maybe = None, det: Maybe = None, contexts: Contexts = None
    ) -> Tensor:
        """Return what enters the MLP, (B, dim), entries of order 1; x (B, T, D), contexts: without what is left out."""
        parts = [] if self.aggregator is None else [self._clip_feature(self.aggregator, x, mask, quality, det)]
        for name, branch in self.branches.items():
            reduced = branch(*(contexts or {})[name])
            if name in self.gates:
                reduced = reduced * torch.sigmoid(self.gates[name](torch.cat([*parts[:1], reduced], 1)))
            parts.append(reduced)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _clip_feature(self, aggregator: Aggregator, x: Maybe, mask: Any, quality: Maybe, det: Maybe) -> Tensor:
        feature = aggregator(x, mask, quality, det)
        if self.whitening is not None:
            feature = (F.normalize(feature, dim=1) - self.centre) @ self.whitening
        if self.concat == "normalised":
            norm = feature.norm(dim=1, keepdim=True)
            feature = feature / torch.where(norm > 0, norm, 1.0)  # F.normalize has a slope of 1e12 at a zero feature
        if self.concat in ("normalised", "raw"):
            weight = mask / mask.sum(1, keepdim=True).clamp(min=1)
            scores = torch.stack([(quality * weight).sum(1) / QUALITY_UNIT, (det * weight).sum(1)], 1)
            feature = torch.cat([feature, scores.to(feature.dtype)], dim=1)
        return feature if self.concat in ("raw", "frames") else F.normalize(feature, dim=1) * feature.shape[1] ** 0.5

    def embed(self, pooled: Tensor) -> Tensor:
        """Return the embedding that is compared with the identities, (B, dim), of length 1 under a cosine."""
        embedded = self.mlp(pooled)
        return F.normalize(embedded, dim=1) if self.head == "cosine" else embedded

    def compare(self, embedded: Tensor) -> Tensor:
        """Return cosines, or inner products under ``head="dot"``, with every identity, (B, C)."""
        return embedded @ (F.normalize(self.prototype, dim=1) if self.head == "cosine" else self.prototype).T

    def forward(self, *inputs, **named) -> Tensor:
        """Return cosines (B, C); arguments as for ``pool``."""
        return self.compare(self.embed(self.pool(*inputs, **named)))

    @torch.no_grad()
    def start_from_class_means(self, pooled: Tensor, label: Tensor) -> None:
        """Set the vector of every identity that has clips to the mean of their pooled features (n, dim), label (n,).

        Clips of nobody, of the label C, count where the model has a vector for them.
        """
        known = label < len(self.prototype)
        mean = class_means(F.normalize(pooled[known], dim=1), label[known], len(self.prototype))
        seen = mean.norm(dim=1) > 0
        self.prototype[seen] = F.normalize(mean[seen], dim=1)


def class_means(feature: Tensor, label: Tensor, identities: int) -> Tensor:
    """Average features (n, D) by label (n,) in [0, C): (C, D); zeros for an identity without any."""
    total = torch.zeros(identities, feature.shape[1], dtype=feature.dtype, device=feature.device)
    total.index_add_(0, label, feature)
    return total / torch.bincount(label, minlength=identities).clamp(min=1)[:, None].to(feature.dtype)


def within_class_whitening(feature: Tensor, label: Tensor, *, shrinkage: float) -> Tensor:
    """Return W (D, D) such that x @ W has unit within-class covariance: WCCN (Hatch et al., Interspeech 2006).

    W is the symmetric inverse square root of the pooled covariance of the deviations of feature (n, D) from the means
    by label (n,), shrunk towards its average variance by ``shrinkage`` in [0, 1].
    """
    x = feature.double()
    deviation = x - class_means(x, label, int(label.max()) + 1)[label]
    freedom = max(1, len(x) - len(torch.unique(label)))  # one mean an identity is estimated
    covariance = deviation.T @ deviation / freedom
    variance = covariance.diagonal().mean()
    if not variance > 0:
        raise ValueError("no identity has two different clips, so there is no within-class covariance to whiten")
    covariance = (1 - shrinkage) * covariance + shrinkage * variance * torch.eye(len(covariance)).to(covariance)
    value, vector = torch.linalg.eigh(covariance)
    return ((vector * value.clamp(min=1e-6 * variance).rsqrt()) @ vector.T).to(feature.dtype)
