"""Rank the gallery for every identity, block by block: clips x identities are never held at once."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from pandas import Interval
from torch import Tensor
from torch.nn import functional as F

from mmlib.threads import one_thread

COMBINE = ("log softmax", "softmax", "cosine", "ranks")
_PIECE = 1_000_000  # scores looked at in one go
_THREADS = 4  # more would wait for each other's Python
_LOW = 2**32 - 1  # the half of a key that holds the row
_NOTHING = torch.iinfo(torch.int64).min  # the key of an empty place: below that of every score, -inf included


class Ranking(NamedTuple):
    """Hold each identity's best clips: clip (C, k) gallery rows < 2**31, score (C, k); -1 and -inf beyond the end."""

    clip: Tensor
    score: Tensor


@torch.no_grad()
def top_k(score_blocks: Iterable[tuple[Tensor, Tensor]], *, k: int = 100) -> Ranking:
    """Keep the k best clips of each identity from blocks of (gallery rows (n,), scores (n, C)), best first.

    Exact in float32 and independent of how the clips are cut into blocks or ordered: equal scores rank by the
    lower gallery row. NaN has no place in an order and is refused. Each gallery row may come once.
    """
    best = None
    for rows, scores in score_blocks:
        if best is None:
            best = torch.full((scores.shape[1], k), _NOTHING, device=scores.device)
        # Threads of our own wait once a block, those of torch in every operation, and that is long on busy cores.
        threads = min(torch.get_num_threads(), _THREADS) if best.device.type == "cpu" else 1
        step = max(1, _PIECE // threads // max(1, len(rows)))
        parts = best.split(step), scores.split(step, dim=1), repeat(rows)
        with one_thread(best.device), ThreadPoolExecutor(threads) as pool:
            for _ in (pool.map if threads > 1 else map)(_keep_best, *parts):
                pass  # an error of a part is raised here
    if best is None:
        raise ValueError("score_blocks is empty: there is no clip to rank")
    with one_thread(best.device):
        return _unpacked(best.sort(dim=1, descending=True).values)


@torch.no_grad()
def _keep_best(best: Tensor, scores: Tensor, rows: Tensor) -> None:
    """Let the scores (n, C) compete with the best keys so far (C, k), which are in no order."""
    new = _candidates(scores.float(), rows, bar=_score(best.amin(1)))
    best.copy_(torch.cat([best, new], dim=1).topk(best.shape[1], dim=1, sorted=False).values)


def _candidates(scores: Tensor, rows: Tensor, bar: Tensor) -> Tensor:
    """Return the keys (C, w) of the scores (n, C) that reach the bar (C,), and perhaps of others."""
    place, identity = (scores < bar).logical_not_().nonzero(as_tuple=True)  # so that NaN is looked at
    if len(place) > scores.numel() // 4:
        return _key(scores.T, rows)
    # After some blocks few reach it, and to set them apart is faster than to look for the best of all.
    identity, order = identity.sort()
    place, number = place[order], torch.bincount(identity, minlength=len(bar))
    key = torch.full((len(bar), int(number.max())), _NOTHING, device=bar.device)
    column = torch.arange(len(place), device=bar.device) - (number.cumsum(0) - number)[identity]
    key[identity, column] = _key(scores[place, identity], rows[place])
    return key


@torch.no_grad()
def merge(rankings: Iterable[Ranking], *, k: int = 100) -> Ranking:
    """Merge rankings of parts of a gallery, with k clips or more where there are, into that of the whole, best first.

    Equal scores rank by the lower row of the whole gallery, so neither the order of the parts nor their cuts matter,
    and merged rankings can be merged again.
    """
    keys = [torch.where(clip >= 0, _key(score, clip), _NOTHING) for clip, score in rankings]
    return _unpacked(F.pad(torch.cat(keys, dim=1), (0, k), value=_NOTHING).topk(k, dim=1).values)


def _key(score: Tensor, row: Tensor) -> Tensor:
    """Pack a float32 score and a gallery row into one int64 that sorts by score, then by the lower row."""
    if score.isnan().any():
        raise ValueError(f"clip {int(row.expand(score.shape)[score.isnan()][0])} has a NaN score")
    bits = (score + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    # As integers, the bits of positive floats are in order already and those of negative ones are reversed.
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.long() * (_LOW + 1) + (_LOW - row)


def _score(key: Tensor) -> Tensor:
    """Unpack the scores of `_key`; -inf for an empty place."""
    bits = (key >> 32).int()
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return torch.where(key == _NOTHING, -torch.inf, score)


def _unpacked(best: Tensor) -> Ranking:
    return Ranking(torch.where(best == _NOTHING, -1, _LOW - (best & _LOW)), _score(best))


@torch.no_grad()
def combine_scores(cosines: Iterable[Tensor], how: str, *, scale: float) -> Tensor:
    """Average what the members of an ensemble say of the same clips, (n, C) each.

    how: ``"log softmax"`` or ``"softmax"`` of scale * cosine over the identities, ``"cosine"``. The released code of
    2019 averages softmax at scale 1, which is nearly flat and so nearly an average of cosines.
    """
    total, members = torch.zeros(0), 0
    for cosine in cosines:
        scores = cosine if cosine.dtype == torch.float64 else cosine.float()
        total = total if members else torch.zeros_like(scores)
        members += 1
        # In pieces whose memory is used again: new pages for every result take longer than what is computed.
        step = len(scores) if scores.is_cuda else max(1, _PIECE // scores.shape[1])
        for score, out in zip(scores.split(step), total.split(step)):
            if how != "cosine":
                score = (torch.log_softmax if how == "log softmax" else torch.softmax)(scale * score, dim=1)
            out += score
    return total.div_(members)


@torch.no_grad()
def fuse_ranks(rankings: Iterable[Ranking], *, k: int = 100) -> Ranking:
    """Fuse rankings by the reciprocal of the rank: score of a clip = sum over rankings of 1 / (60 + rank).

    A clip that a ranking does not list gets nothing from it. Equal scores rank by the lower gallery row. Of the
    rankings, which may be made one after another, only the rows are held. Source: Cormack et al., SIGIR 2009.
    """
    clips = [ranking.clip.int() for ranking in rankings]  # half of what the members' rankings would hold together
    rank = torch.cat([torch.arange(1.0, 1 + clip.shape[1], dtype=torch.float64, device=clip.device) for clip in clips])
    share, step = 1 / (60 + rank), max(1, _PIECE // len(rank))
    parts = [_fused(torch.cat(part, dim=1), share, k) for part in zip(*(clip.split(step) for clip in clips))]
    clip, score = (torch.cat(column) for column in zip(*parts))
    return Ranking(clip.long(), score)


def _fused(clip: Tensor, share: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k rows of each identity with the largest sums of shares, and the sums; clip (C, W), share (W,)."""
    clip, order = clip.sort(dim=1)
    share = torch.where(clip >= 0, share[order], 0.0)
    # Sums within runs of one clip: the difference of a running total at the ends of the run.
    last = F.pad(clip[:, 1:] != clip[:, :-1], (0, 1), value=True)
    total = share.cumsum(1)
    ends = torch.where(last, total, 0.0).cummax(1).values
    score = torch.where(last & (clip >= 0), total - F.pad(ends[:, :-1], (1, 0)), -torch.inf)
    # Rounded, so that equal sums are equal, and sorted stably, as clips stand in ascending order.
    best, place = score.mul(2.0**40).round().sort(dim=1, descending=True, stable=True)
    best, place = best[:, :k] / 2.0**40, place[:, :k]
    return torch.where(best > 0, clip.gather(1, place), -1), torch.where(best > 0, best, -torch.inf).float()


def refuse_other(owner: object, **choices: tuple[str, ...]) -> None:
    """Refuse fields of ``owner`` that are none of their choices, by name and value."""
    for name, known in choices.items():
        if getattr(owner, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(owner, name)!r}")


def refuse_outside(owner: object, interval: Interval, *names: str, whole: bool = False) -> None:
    """Refuse fields of ``owner`` that are no (whole) number in the interval, by name and value."""
    for name in names:
        value = getattr(owner, name)
        number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if not number or value not in interval:
            raise ValueError(f"{name} must be a {'whole ' * whole}number in {interval}, got {value!r}")


@dataclass(frozen=True)
class Fallback:
    """Say when the scores of a second model count: for every clip, for clips of low quality, for clips without a face.

    context: the modalities of the second model.  weight: its share in the score of every other clip (score-level
    fusion; 0 is none).  share: of the clips that count as of low quality, the lowest by ``by``: mean ``"quality"``
    score or mean raw ``"norm"`` of the embeddings.  threshold: a value of ``by`` below which a clip is of low quality,
    instead of a share; the released code has norm 8.867, of norms in float16 (``"norm, float16"``), whose mean is
    below it where it is rounded to 8.859, so up to 8.863.  low: its share in their score.  absent: the factor on its
    score for clips without the first modality; None leaves such clips out.  members: of the second model.  lr: of its
    training; context_dim, hidden: of its network; None for those of the first.
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
    context_dim: int | None = None
    hidden: int | None = None

    def __post_init__(self):
        refuse_other(self, by=("quality", "norm", "norm, float16"))
        refuse_outside(self, Interval(0, 1, "both"), "weight", "share", "low")
        for name, low in (("absent", 0), ("lr", 0), ("threshold", -np.inf)):
            if getattr(self, name) is not None:
                refuse_outside(self, Interval(low, np.inf, "neither"), name)

    def weights(self, value: np.ndarray) -> np.ndarray:
        """Return the weight of the second model for clips that have the first modality, by their ``by`` (n,)."""
        weight = np.full(len(value), self.weight)
        if self.threshold is None:
            weight[np.argsort(value, kind="stable")[: int(self.share * len(value) + 1e-9)]] = self.low
        else:
            weight[value < self.threshold] = self.low
        return weight
