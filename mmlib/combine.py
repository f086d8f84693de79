"""Combine what several models say of the same clips: average scores, fuse rankings, fall back on a second model."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmlib.rank import Ranking

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
