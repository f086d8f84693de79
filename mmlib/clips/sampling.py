"""Choose frames of many clips at once."""

import numpy as np

SAMPLES = ("all", "first", "random", "replace", "draw")


def sample_rows(start: np.ndarray, count: np.ndarray, sample: str = "all", frames: int | None = None,
                rng: np.random.Generator | None = None) -> np.ndarray:
    """Choose frames of B clips that lie at `start` (B,) and number `count` (B,): rows (B, T), -1 as padding.

    - all: every frame in stored order; T is the longest clip, at least 1.
    - first: the first `frames` in stored order; T is `frames` here and below.
    - random: uniform without replacement, in random order; short clips are padded.
    - replace: uniform with replacement; only clips without a frame are padded.
    - draw: as random, but clips with fewer than `frames` as replace: what the 2019 code does with 40.

    >>> sample_rows(np.array([0, 3]), np.array([3, 1]), "first", 2)
    array([[ 0,  1],
           [ 3, -1]])
    """
    start, count = np.asarray(start, np.int64), np.asarray(count, np.int64)
    if sample not in SAMPLES:
        raise ValueError(f"sample: {sample!r} is none of {', '.join(SAMPLES)}")
    if (frames is None) != (sample == "all") or (frames is not None and frames < 1):
        raise ValueError(f"frames: {frames!r} with sample={sample!r}; 'all' takes none, others at least 1")
    if sample in ("all", "first"):
        within = np.arange(frames or max(1, count.max(initial=0)))
        return np.where(within < count[:, None], start[:, None] + within, -1)
    if rng is None:
        raise ValueError(f"rng: None; sample={sample!r} needs a numpy Generator")
    if sample == "random":
        return _shuffled(start, count, frames, rng)
    if sample == "replace":
        return _drawn(start, count, frames, rng)
    return np.where(count[:, None] >= frames, _shuffled(start, count, frames, rng),
                    _drawn(start, count, frames, rng))


def _drawn(start: np.ndarray, count: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    within = rng.integers(0, np.maximum(count, 1)[:, None], (len(count), frames))
    return np.where(count[:, None] > 0, start[:, None] + within, -1)


def _shuffled(start: np.ndarray, count: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    # a random key for every frame of every clip; the smallest keys of a clip are its sample
    owner = np.repeat(np.arange(len(count)), count)
    offset = np.cumsum(count) - count
    order = np.lexsort((rng.random(len(owner)), owner))
    rank = np.arange(len(owner)) - offset[owner]
    chosen = rank < frames
    rows = np.full((len(count), frames), -1, np.int64)
    rows[owner[chosen], rank[chosen]] = (order - offset[owner] + start[owner])[chosen]
    return rows
