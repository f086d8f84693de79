"""Choose frames of many clips at once, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SAMPLES = ("all", "first", "random", "replace", "draw")


def sample_rows(start: Tensor, count: Tensor, sample: str = "all", frames: int | None = None,
                generator: torch.Generator | None = None) -> Tensor:
    """Choose frames of B clips that lie at ``start`` (B,) and number ``count`` (B,): rows (B, T), -1 as padding.

    - all: every frame in stored order; T is the longest clip, at least 1.
    - first: the first ``frames`` in stored order; T is ``frames`` here and below.
    - random: uniform without replacement, in random order; short clips are padded.
    - replace: uniform with replacement; only clips without a frame are padded.
    - draw: as random, but clips with fewer than ``frames`` as replace: what the 2019 code does with 40.

    generator: on the device of ``start`` and ``count``.

    >>> sample_rows(torch.tensor([0, 3]), torch.tensor([3, 1]), "first", 2)
    tensor([[ 0,  1],
            [ 3, -1]])
    """
    if sample not in SAMPLES:
        raise ValueError(f"sample: {sample!r} is none of {', '.join(SAMPLES)}")
    if (frames is None) != (sample == "all") or (frames is not None and frames < 1):
        raise ValueError(f"frames: {frames!r} with sample={sample!r}; 'all' takes none, others at least 1")
    if generator is None and sample not in ("all", "first"):
        raise ValueError(f"generator: None; sample={sample!r} needs one")
    if sample == "all":
        frames = max(1, int(count.max())) if len(count) else 1
    step = torch.arange(frames, device=start.device).expand(len(start), -1)
    start, count = start[:, None], count[:, None]
    within, there = step, step < count
    if sample in ("random", "draw"):
        within = _shuffled(count, frames, generator)
    if sample in ("replace", "draw"):
        key = torch.rand(step.shape, generator=generator, device=start.device, dtype=torch.float64)
        drawn = torch.minimum((key * count).long(), count - 1)
        within = drawn if sample == "replace" else torch.where(count >= frames, within, drawn)
        there = (count > 0).expand_as(step)
    return torch.where(there, start + within, -1)


def _shuffled(count: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Return the first ``frames`` of every clip's frames (B, 1) in random order; beyond its number, anything."""
    # One sort for all clips, by clip and a random key within it.
    owner = torch.repeat_interleave(count[:, 0])
    key = torch.rand(len(owner), generator=generator, device=count.device, dtype=torch.float64)
    order = F.pad(torch.argsort(owner + key), (0, frames))
    offset = count.cumsum(0) - count
    return order[offset + torch.arange(frames, device=count.device)] - offset
