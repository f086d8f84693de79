"""Rank the gallery for every identity, block by block: clips x identities are never held at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_PIECE = 2_000_000  # scores looked at in one go: it bounds the memory that the worst order of clips can take
_CROWD = 8  # times k: clips waiting for one identity before a merge, since a merge gives all as much room
_LOW = 2**32 - 1  # the half of a key that holds the row
_NOTHING = torch.iinfo(torch.int64).min  # the key of an empty place: below that of every score, -inf included


class Ranking(NamedTuple):
    """Hold each identity's best clips: clip (C, k) gallery rows, score (C, k); -1 and -inf beyond the end."""

    clip: Tensor
    score: Tensor


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


@torch.no_grad()
def cosine_scores(
    feature: Tensor, prototype: Tensor, *, scale: float | None = None, block: int = 2048
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (gallery rows (n,), scores (n, C)) for blocks of clips, as `top_k` takes them.

    feature (N, D) of the clips, prototype (C, D) of the identities, any length: both are normalised here, and
    a zero vector has cosine 0 with everything. scale None yields cosines. A number yields log softmax over
    the identities of scale * cosine: within a clip the same order, but comparable between clips, which is
    what a ranking of clips needs.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block!r}")
    prototype = _unit(prototype).T.contiguous()
    for start in range(0, len(feature), block):
        cosine = _unit(feature[start : start + block]) @ prototype
        row = torch.arange(start, start + len(cosine), device=cosine.device)
        yield row, cosine if scale is None else torch.log_softmax(cosine.mul_(scale), dim=1)


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


def fuse_ranks(rankings: Iterable["Ranking"], *, k: int = 100, constant: int = 60) -> "Ranking":
    """Fuse rankings by the reciprocal of the rank: score of a clip = sum over rankings of 1 / (constant + rank).

    A clip that a ranking does not list gets nothing from it. Equal scores rank by the lower gallery row. Source:
    Cormack et al., SIGIR 2009, where the constant is 60.

    >>> one, two = (Ranking(torch.tensor([clips]), torch.zeros(1, 2)) for clips in ([7, 3], [3, 5]))
    >>> fuse_ranks([one, two], k=2).clip
    tensor([[3, 7]])
    """
    rankings = list(rankings)
    clip = torch.cat([ranking.clip for ranking in rankings], dim=1)
    share = torch.cat([(1 / (constant + 1 + torch.arange(r.clip.shape[1], dtype=torch.float64, device=r.clip.device)))
                       .expand(r.clip.shape) for r in rankings], dim=1)
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
    score for clips without the first modality; None leaves such clips out.  members: of the second model.
    """

    context: tuple[str, ...] = ("scene",)
    weight: float = 0.0
    by: str = "quality"
    share: float = 0.01
    threshold: float | None = None
    low: float = 0.8
    absent: float | None = 1.0
    members: tuple[int, ...] = (0,)

    def __post_init__(self):
        if self.by not in ("quality", "norm"):
            raise ValueError(f"by must be quality or norm, got {self.by!r}")
        for name in ("weight", "share", "low"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.absent is not None and not self.absent > 0:
            raise ValueError(f"absent must be positive or None, got {self.absent}")

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


@torch.no_grad()
def top_k(score_blocks: Iterable[tuple[Tensor, Tensor]], *, k: int = 100) -> Ranking:
    """Keep the k best clips of each identity from blocks of (gallery rows (n,), scores (n, C)), best first.

    Exact in float32 and independent of how the clips are cut into blocks or ordered: equal scores rank by the
    lower gallery row. NaN has no place in an order and is refused. Each gallery row may come once.

    Only scores that reach an identity's present k-th best are collected, and merged when there are as many as
    are kept, or many for one identity.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    best, waiting = None, []
    for rows, scores in score_blocks:
        if scores.dim() != 2 or len(rows) != len(scores):
            raise ValueError(f"{len(rows)} gallery rows came with scores of shape {tuple(scores.shape)}")
        if best is None:
            identities = scores.shape[1]
            best = torch.full((identities, k), _NOTHING, device=scores.device)
            bar, count = _score(best[:, -1]), torch.zeros_like(best[:, 0])
        if scores.shape[1] != identities:
            raise ValueError(
                f"a block has scores for {scores.shape[1]} identities, the first had {identities}"
            )
        step = max(1, _PIECE // max(identities, 1))
        for row, part in zip(rows.split(step), scores.float().split(step), strict=True):
            if torch.isnan(part).any():
                raise ValueError(f"clip {int(row[torch.isnan(part).any(dim=1)][0])} has a NaN score")
            clip, identity = (part >= bar).nonzero(as_tuple=True)
            waiting.append((identity, _key(part[clip, identity], row[clip])))
            count += torch.bincount(identity, minlength=identities)
            if count.sum() >= best.numel() or count.max() >= _CROWD * k:
                best = _merge(best, waiting)
                bar, waiting = _score(best[:, -1]), []
                count.zero_()
    if best is None:
        raise ValueError("score_blocks is empty: there is no clip to rank")
    best = _merge(best, waiting)
    row = _LOW - (best & _LOW)
    return Ranking(torch.where(best == _NOTHING, -1, row), _score(best))


def _merge(best: Tensor, waiting: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Take the k highest keys of each identity from those kept (C, k) and those waiting, highest first."""
    if not waiting:
        return best
    identity, key = (torch.cat(column) for column in zip(*waiting, strict=True))
    identity, order = identity.sort()
    count = torch.bincount(identity, minlength=len(best))
    place = torch.arange(len(identity), device=best.device) - (count.cumsum(0) - count)[identity]
    fresh = best.new_full((len(best), int(count.max())), _NOTHING)
    fresh[identity, place] = key[order]
    return torch.cat([best, fresh], dim=1).topk(best.shape[1], dim=1).values


def _key(score: Tensor, row: Tensor) -> Tensor:
    """Pack a float32 score and a gallery row into one int64 that sorts by score, then by the lower row."""
    bits = (score + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    # As integers, the bits of positive floats are in order already and those of negative ones are reversed.
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) * (_LOW + 1) + (_LOW - row)


def _score(key: Tensor) -> Tensor:
    """Unpack the scores of `_key`; -inf for an empty place."""
    bits = key >> 32
    score = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)
    return torch.where(key == _NOTHING, -torch.inf, score)
