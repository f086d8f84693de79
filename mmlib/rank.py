"""Rank the gallery for every identity, block by block: clips x identities are never held at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_PIECE = 5_200_000  # scores looked at in one go
_CROWD = 500_000  # scores above the bars that are sorted in one go: it bounds the memory of the worst order of clips
_LOW = 2**32 - 1  # the half of a key that holds the row
_NOTHING = torch.iinfo(torch.int64).min  # the key of an empty place: below that of every score, -inf included


class Ranking(NamedTuple):
    """Hold each identity's best clips: clip (C, k) gallery rows, score (C, k); -1 and -inf beyond the end."""

    clip: Tensor
    score: Tensor


def _sum(x: Tensor) -> Tensor:
    """Sum rows (n, D), which are overwritten, in an order that is the same on every device."""
    width = x.shape[1]
    while width > 1:
        half = (width + 1) // 2
        x[:, : width - half] += x[:, half:width]
        width = half
    return x[:, 0]


def _length(x: Tensor, owner: str, first: int = 0) -> Tensor:
    """Return what to divide vectors (n, D) by: their lengths in float32, inf for zero vectors, which stay zero.

    owner: of a vector, for messages.  first: the number of the first of them.
    """
    length = _sum(x.double().square()).sqrt().float()
    if not length.isfinite().all():
        place = int((~length.isfinite()).nonzero()[0])
        raise ValueError(f"{owner} {first + place} has a vector of length {float(length[place])}")
    # Lengths that float32 holds with fewer digits would give vectors of other lengths than 1.
    return torch.where(length >= torch.finfo(torch.float32).tiny, length, torch.inf)


@torch.no_grad()
def cosine_scores(
    feature: Tensor, prototype: Tensor, *, scale: float | None = None, block: int = 512
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (gallery rows (n,), scores (n, C)) for blocks of clips, as `top_k` takes them.

    feature (N, D) of the clips, prototype (C, D) of the identities, any length: both are normalised here, and
    a zero vector has cosine 0 with everything; NaN and inf are refused. scale None yields cosines, which `rank_cosines`
    ranks sooner. A number yields log softmax over the identities of scale * cosine: within a clip the same order, but
    comparable between clips, which is what a ranking of clips needs.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block!r}")
    prototype = (prototype.float() / _length(prototype, "identity")[:, None]).T.contiguous()
    for start in range(0, len(feature), block):
        part = feature[start : start + block]
        cosine = (part.float() / _length(part, "clip", start)[:, None]) @ prototype
        row = torch.arange(start, start + len(cosine), device=cosine.device)
        yield row, cosine if scale is None else torch.log_softmax(cosine.mul_(scale), dim=1)


@torch.no_grad()
def top_k(score_blocks: Iterable[tuple[Tensor, Tensor]], *, k: int = 100) -> Ranking:
    """Keep the k best clips of each identity from blocks of (gallery rows (n,), scores (n, C)), best first.

    Exact in float32 and independent of how the clips are cut into blocks or ordered: equal scores rank by the
    lower gallery row. NaN has no place in an order and is refused. Each gallery row may come once.

    Only scores that reach a bar are looked at: the k-th best of the identity when it was last worked out.
    """
    _require_k(k)
    pool = None
    for rows, scores in score_blocks:
        if scores.dim() != 2 or not scores.shape[1] or len(rows) != len(scores):
            raise ValueError(f"{len(rows)} gallery rows came with scores of shape {tuple(scores.shape)}")
        if pool is None:
            identities = scores.shape[1]
            pool = _Pool(identities, k, scores.device)
            pool.foresee(scores.T)
        if scores.shape[1] != identities:
            raise ValueError(f"a block has scores for {scores.shape[1]} identities, the first had {identities}")
        step = max(1, _PIECE // identities)
        for row, part in zip(rows.split(step), scores.float().contiguous().split(step), strict=True):
            for place in _reaching(part, pool.bar):
                clip, identity = row[place // identities], place % identities
                score = part.view(-1)[place]
                if torch.isnan(score).any():
                    raise ValueError(f"clip {int(clip[torch.isnan(score)][0])} has a NaN score")
                identity, order = identity.sort()
                pool.add(identity, _key(score, clip)[order])
    if pool is None:
        raise ValueError("score_blocks is empty: there is no clip to rank")
    return _unpacked(pool.best())


@torch.no_grad()
def rank_cosines(feature: Tensor, prototype: Tensor, *, k: int = 100, offset: int = 0) -> Ranking:
    """Rank clips by their cosine with each identity, exactly, without computing every cosine exactly.

    feature (N, D) of clips, the gallery rows from offset on; prototype (C, D) of the identities. Both are normalised
    here, and a zero vector has cosine 0 with everything; NaN and inf are refused. Equal cosines rank by the lower row.

    The score is float32, and so are its parts: both vectors are divided by their lengths and multiplied; of the D
    products the later half is added to the earlier half, until one number is left. This fixes every rounding: a pair
    has the same score in any part of a gallery and on any device, and rankings of parts that several workers made
    `merge` into the ranking of the whole, bit for bit.

    Vectors rounded to bfloat16 are multiplied first. By the inequality of Cauchy and Schwarz, these cosines are wrong
    by |f - f'| |p'| + |f| |p - p'| at most, f' and p' being the rounded vectors, and the lengths of the differences
    are known. Only pairs that this leaves in doubt get their score: some two for each that is ranked, but all copies
    of a clip that is among the best, which is slow if there are thousands.
    """
    _require_k(k)
    if feature.dim() != 2 or prototype.dim() != 2 or feature.shape[1] != prototype.shape[1] or not prototype.numel():
        raise ValueError(
            f"feature has shape {tuple(feature.shape)} and prototype {tuple(prototype.shape)}: "
            "they must be (N, D) and (C, D)"
        )
    if not 0 <= offset <= _LOW - len(feature):
        raise ValueError(f"offset must lie in [0, {_LOW - len(feature)}], got {offset}")
    pool = _RoughPool(feature, prototype, k, offset)
    # The first bar is the better the more clips it is of.
    identities, dim = prototype.shape
    step, first = (max(1, size * _PIECE // max(identities, size * dim)) for size in (1, 8))
    edges = [0, *range(first, len(feature), step), len(feature)] if len(feature) else []
    for start, stop in pairwise(edges):
        cosine = pool.multiply(start, stop)  # (C, n)
        if start == 0:
            pool.foresee(cosine)
        for place in _reaching(cosine, pool.bar[:, None].to(cosine.dtype)):
            identity = place // cosine.shape[1]
            row = place - identity * cosine.shape[1] + (start + offset)
            pool.add(identity, _key(cosine.view(-1)[place].float(), row))
    return _unpacked(pool.best())


@torch.no_grad()
def merge(rankings: Iterable[Ranking], *, k: int = 100) -> Ranking:
    """Merge rankings of parts of a gallery into the ranking of the whole, best first.

    Each ranking has the rows of the whole gallery in clip, the same identities, and k clips or more of each unless its
    part has no more. Equal scores rank by the lower row, so neither the order of the parts nor their cuts matter, and
    merged rankings can be merged again.

    >>> one, two = (Ranking(torch.tensor([[clip]]), torch.tensor([[0.5]])) for clip in (7, 3))
    >>> merge([one, two], k=1).clip
    tensor([[3]])
    """
    _require_k(k)
    rankings = list(rankings)
    if not rankings:
        raise ValueError("rankings is empty: there is nothing to merge")
    for place, (clip, score) in enumerate(rankings):
        if clip.dim() != 2 or clip.shape != score.shape:
            raise ValueError(f"ranking {place} has clip of shape {tuple(clip.shape)} and score of {tuple(score.shape)}")
        if len(clip) != len(rankings[0].clip):
            raise ValueError(f"ranking {place} is of {len(clip)} identities, the first of {len(rankings[0].clip)}")
        if clip.shape[1] < k and (clip[:, -1:] >= 0).any():
            raise ValueError(f"ranking {place} is cut after {clip.shape[1]} clips of an identity: k cannot be {k}")
    best, step = [], max(1, _PIECE // sum(ranking.clip.shape[1] for ranking in rankings))
    for part in range(0, len(rankings[0].clip), step):
        clip, score = (
            torch.cat([tensor[part : part + step] for tensor in column], dim=1)
            for column in zip(*rankings, strict=True)
        )
        ordered = clip.sort(dim=1).values
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
        if len(twice):
            identity, place = twice[0].tolist()
            raise ValueError(f"clip {int(ordered[identity, place])} comes twice for identity {part + identity}")
        if (score.isnan() & (clip >= 0)).any():
            raise ValueError(f"clip {int(clip[score.isnan()][0])} has a NaN score")
        key = F.pad(torch.where(clip >= 0, _key(score.float(), clip), _NOTHING), (0, k), value=_NOTHING)
        best.append(key.topk(k, dim=1).values)
    return _unpacked(torch.cat(best))


def _require_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")


def _reaching(score: Tensor, bar: Tensor) -> Iterator[Tensor]:
    """Yield, in ascending pieces, the places in the flattened scores of those not below the bar; NaN is not below."""
    below = torch.empty(-(-score.numel() // 8) * 8, dtype=torch.bool, device=score.device)
    below[score.numel() :] = True
    torch.lt(score, bar, out=below[: score.numel()].view(score.shape))
    # Few scores reach the bar, so eight are dismissed at a time.
    for word in (below.view(torch.int64) != 0x0101010101010101).nonzero()[:, 0].split(_CROWD // 8):
        which, byte = below.view(-1, 8)[word].logical_not().nonzero(as_tuple=True)
        yield word[which] * 8 + byte


class _Pool:
    """Collect the keys of each identity that may be among its k best: key (C, width), the first count (C,) of a row."""

    def __init__(self, identities: int, k: int, device: torch.device, *, spare: int = 0):
        self.k, self.keep = k, k + spare
        self.room = 2 * k + 64
        self.key = torch.full((identities, self.keep + self.room), _NOTHING, device=device)
        self.count = torch.zeros(identities, dtype=torch.int64, device=device)
        self.kth = torch.full_like(self.count, _NOTHING)
        self.fresh = 0  # keys since the floors were raised

    @property
    def floor(self) -> Tensor:
        """The keys (C,) below which nothing is wanted."""
        return self.kth

    @property
    def bar(self) -> Tensor:
        return _score(self.floor)

    def add(self, identity: Tensor, key: Tensor) -> None:
        """Add keys (m,) of identities (m,) in ascending order."""
        wanted = key >= self.floor[identity]
        if wanted.sum() < 0.9 * len(key):  # to keep a few that are not wanted is faster
            identity, key = identity[wanted], key[wanted]
        if not len(key):
            return
        new = torch.bincount(identity, minlength=len(self.count))
        place = torch.arange(len(key), device=key.device) - (new.cumsum(0) - new)[identity]
        most = int(new.max())
        for start in range(0, most, self.room):
            now = (new - start).clamp(0, self.room)
            if (self.count + now > self.key.shape[1]).any():
                self._shrink((self.count > self.keep + self.room // 2) | (self.count + now > self.key.shape[1]))
            at = slice(None) if most <= self.room else (place >= start) & (place < start + self.room)
            self.key[identity[at], (self.count - start)[identity[at]] + place[at]] = key[at]
            self.count += now
        self.fresh += len(key)
        if self.fresh > self.k * len(self.key):
            self._shrink(torch.ones_like(self.count, dtype=torch.bool))
            self.fresh = 0

    def foresee(self, score: Tensor) -> None:
        """Raise the floor before the first scores (C, n) are added, so that most of them need not be.

        The k-th best of the maxima of groups of clips is a score that k clips have or pass.
        """
        size = max(1, score.shape[1] // (4 * self.k))
        groups = score.shape[1] // size
        if groups >= self.k:
            best = score[:, : size * groups].unflatten(1, (size, groups)).amax(1)
            kth = best.float().topk(self.k, dim=1, sorted=False).values.amin(1)
            self.kth = _key(kth, torch.full_like(self.kth, _LOW))

    def best(self) -> Tensor:
        """Return the k best keys of each identity, (C, k), best first."""
        self._shrink(torch.ones_like(self.count, dtype=torch.bool))
        return self.key[:, : self.k]

    def _shrink(self, which: Tensor) -> None:
        """Keep the best keys of some identities, (C,) bool."""
        identity = which.nonzero()[:, 0]
        best = self._chosen(identity)
        best[best < self.floor[identity, None]] = _NOTHING
        self.key[identity] = F.pad(best, (0, self.room), value=_NOTHING)
        self.count[identity] = (best != _NOTHING).sum(1)

    def _chosen(self, identity: Tensor) -> Tensor:
        """Return the best keys of identities (m,), (m, keep), best first, and raise their floors."""
        width = max(self.keep, int(self.count[identity].max()))
        best = self.key[identity, :width].topk(self.keep, dim=1).values
        self.kth[identity] = torch.maximum(self.kth[identity], best[:, self.k - 1])
        return best


class _RoughPool(_Pool):
    """Collect keys by the cosines of rounded vectors, as many as could be among the k best by the exact ones."""

    def __init__(self, feature: Tensor, prototype: Tensor, k: int, offset: int):
        super().__init__(len(prototype), k, prototype.device, spare=k + 32)
        self.feature, self.offset = feature, offset
        self.prototype = prototype.float() / _length(prototype, "identity")[:, None]
        self.length = torch.ones(len(feature), device=feature.device)
        self.dtype = _product_dtype(prototype.device)
        rounded = self.prototype.bfloat16()
        self.rounded = rounded.to(self.dtype)
        self.distance = (self.prototype - rounded).norm(dim=1)
        self.size = rounded.float().norm(dim=1)
        self.furthest = self.distance.new_zeros(())  # of the clips so far from their rounded features

    def multiply(self, start: int, stop: int) -> Tensor:
        """Return the cosines of the rounded vectors for some of the clips, (C, stop - start)."""
        feature = self.feature[start:stop]
        self.length[start:stop] = length = _length(feature, "clip", self.offset + start)
        unit = feature.float() / length[:, None]
        rounded = unit.bfloat16()
        self.furthest = torch.maximum(self.furthest, (unit - rounded).norm(dim=1).max())
        with torch.autocast(unit.device.type, enabled=False):
            return self.rounded @ rounded.to(self.dtype).T

    @property
    def floor(self) -> Tensor:
        """The keys (C,) of pairs that are below the k-th best, even if both are as wrong as can be."""
        return self._below(self.kth, 2)

    def _below(self, key: Tensor, cosines: int) -> Tensor:
        """Lower keys (C,) by what one or both of two cosines can be wrong."""
        # Besides the vectors, float32 sums of D products are rounded: within 2**-22 a product, on tensor cores too.
        wrong = 1.01 * (self.furthest * self.size + self.distance) + self.feature.shape[1] * 2.0**-22 * self.size
        score = _score(key)
        # A cosine is rounded once more when it is written; 1.02 pays for taking the size of another in its place.
        margin = 1.02 * cosines * (wrong + torch.finfo(self.dtype).eps / 2 * score.abs())
        # Cosines with a zero vector are not wrong, and all tie.
        return torch.where(margin == 0, key, _key(score - margin, torch.full_like(key, _LOW)))

    def best(self) -> Tensor:
        everyone = torch.arange(len(self.key), device=self.key.device)
        best = self._exact(everyone, super().best())
        rest = self.key[:, self.k : self.keep]
        rest = torch.where(rest >= self._below(best[:, -1], 1)[:, None], rest, _NOTHING)
        return torch.cat([best, self._exact(everyone, rest)], dim=1).topk(self.k, dim=1).values

    def _chosen(self, identity: Tensor) -> Tensor:
        best = super()._chosen(identity)
        crowded = best[:, -1] >= self.floor[identity]
        if crowded.any():
            # More are in doubt than are kept. An exact cosine does as the cosine of the rounded vectors.
            exact = self._exact(identity[crowded], self.key[identity[crowded]])
            best[crowded] = F.pad(exact, (0, self.keep - self.k), value=_NOTHING)
        return best

    def _exact(self, identity: Tensor, key: Tensor) -> Tensor:
        """Return the k best of keys (m, n) of identities (m,) by their exact cosines."""
        at = key != _NOTHING
        row, order = (_LOW - (key[at] & _LOW)).sort()  # features lie far apart in memory: each is fetched once
        clip, owner = row - self.offset, identity[at.nonzero()[:, 0]][order]
        found = torch.empty_like(row)
        step = max(1, 2**20 // self.feature.shape[1])  # of which the products fit into a cache
        for c, i, place, r in zip(*(column.split(step) for column in (clip, owner, order, row)), strict=True):
            product = self.feature.index_select(0, c).float().div_(self.length[c, None])
            found[place] = _key(_sum(product.mul_(self.prototype.index_select(0, i))), r)
        exact = torch.full_like(key, _NOTHING)
        exact[at] = found
        return exact.topk(min(self.k, exact.shape[1]), dim=1).values


def _product_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where a processor multiplies it faster than float32, else float32, in which it is as good."""
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    fast = device.type == "cpu" and torch.backends.mkldnn.is_available() and has_bf16 is not None and has_bf16()
    return torch.bfloat16 if fast else torch.float32


def _key(score: Tensor, row: Tensor) -> Tensor:
    """Pack a float32 score and a gallery row into one int64 that sorts by score, then by the lower row."""
    bits = (score + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    # As integers, the bits of positive floats are in order already and those of negative ones are reversed.
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.long() * (_LOW + 1) + (_LOW - row)


def _score(key: Tensor) -> Tensor:
    """Unpack the scores of `_key`; -inf for an empty place."""
    bits = key >> 32
    score = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)
    return torch.where(key == _NOTHING, -torch.inf, score)


def _unpacked(best: Tensor) -> Ranking:
    return Ranking(torch.where(best == _NOTHING, -1, _LOW - (best & _LOW)), _score(best))


COMBINE = ("log softmax", "softmax", "cosine", "ranks")


@torch.no_grad()
def combine_scores(cosines: Iterable[Tensor], how: str, *, scale: float) -> Tensor:
    """Average what the members of an ensemble say of the same clips, (n, C) each.

    how: ``"log softmax"`` or ``"softmax"`` of scale * cosine over the identities, ``"cosine"``. The released code of
    2019 averages softmax at scale 1, which is nearly flat and so nearly an average of cosines.

    >>> combine_scores([torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])], "cosine", scale=1.0)
    tensor([[0.5000, 0.0000]])
    """
    if how not in COMBINE[:3]:
        raise ValueError(f"how must be one of {', '.join(COMBINE[:3])}, got {how!r}")
    total, members = None, 0
    for cosine in cosines:
        score = cosine.float()
        if how != "cosine":
            score = (torch.log_softmax if how == "log softmax" else torch.softmax)(scale * score, dim=1)
        total, members = score if total is None else total + score, members + 1
    if total is None:
        raise ValueError("there is no member whose scores could be averaged")
    return total if members == 1 else total / members


def fuse_ranks(rankings: Iterable[Ranking], *, k: int = 100, constant: int = 60) -> Ranking:
    """Fuse rankings by the reciprocal of the rank: score of a clip = sum over rankings of 1 / (constant + rank).

    A clip that a ranking does not list gets nothing from it. Equal scores rank by the lower gallery row. Source:
    Cormack et al., SIGIR 2009, where the constant is 60.

    >>> one, two = (Ranking(torch.tensor([clips]), torch.zeros(1, 2)) for clips in ([7, 3], [3, 5]))
    >>> fuse_ranks([one, two], k=2).clip
    tensor([[3, 7]])
    """
    rankings = list(rankings)
    clip = torch.cat([ranking.clip for ranking in rankings], dim=1)
    share = torch.cat(
        [
            (1 / (constant + 1 + torch.arange(r.clip.shape[1], dtype=torch.float64, device=r.clip.device))).expand(
                r.clip.shape
            )
            for r in rankings
        ],
        dim=1,
    )
    clip, order = clip.sort(dim=1)
    share = torch.where(clip >= 0, share.gather(1, order), 0.0)
    # Sums within runs of one clip: the difference of a running total at the ends of the run.
    last = F.pad(clip[:, 1:] != clip[:, :-1], (0, 1), value=True)
    total = share.cumsum(1)
    ends = torch.where(last, total, 0.0).cummax(1).values
    score = torch.where(last & (clip >= 0), total - F.pad(ends[:, :-1], (1, 0)), -torch.inf)
    # Rounded, so that equal sums are equal, and sorted stably, as clips stand in ascending order.
    best, place = score.mul(2.0**40).round().sort(dim=1, descending=True, stable=True)
    best, place = best[:, :k] / 2.0**40, place[:, :k]
    return Ranking(torch.where(best > 0, clip.gather(1, place), -1), torch.where(best > 0, best, -torch.inf).float())


@dataclass(frozen=True)
class Fallback:
    """Say when the scores of a second model count: for every clip, for clips of low quality, for clips without a face.

    context: the modalities of the second model.  weight: its share in the score of every other clip (score-level
    fusion; 0 is none).  share: of the clips that count as of low quality, the lowest by ``by``: mean ``"quality"``
    score or mean raw ``"norm"`` of the embeddings.  threshold: a value of ``by`` below which a clip is of low quality,
    instead of a share; the released code has norm 8.867.  low: its share in their score.  absent: the factor on its
    score for clips without the first modality; None leaves such clips out.  members: of the second model.  lr: of its
    training, None for that of the first.
    """

    context: tuple[str, ...] = ("scene",)
    weight: float = 0.0
    by: str = "quality"
    share: float = 0.01
    threshold: float | None = None
    low: float = 0.8
    absent: float | None = 1.0
    members: tuple[int, ...] = (0,)
    lr: float | None = None

    def __post_init__(self):
        if self.by not in ("quality", "norm"):
            raise ValueError(f"by must be quality or norm, got {self.by!r}")
        for name in ("weight", "share", "low"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("absent", "lr"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive or None, got {getattr(self, name)}")

    def weights(self, value: np.ndarray) -> np.ndarray:
        """Return the weight of the second model for clips that have the first modality, by their ``by`` (n,).

        >>> Fallback(share=0.5, low=0.8).weights(np.array([3.0, 1.0, 2.0, 9.0]))
        array([0. , 0.8, 0.8, 0. ])
        """
        if self.threshold is None:
            low = np.argsort(value, kind="stable")[: int(self.share * len(value) + 1e-9)]
        else:
            low = value < self.threshold
        weight = np.full(len(value), self.weight)
        weight[low] = self.low
        return weight
