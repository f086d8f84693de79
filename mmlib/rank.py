"""Rank the gallery for every identity, block by block: clips x identities are never held at once."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

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
