"""Members of an ensemble: what each of them sees, what it never sees, and how much they differ.

Four kinds.  ``views``: every member discards one contiguous block of the feature space and keeps the rest, the proposal of
One Name (Dong et al., ACM MM 2019).  ``bagging``: a bootstrap of the training clips (Breiman 1996), which loses
identities of few clips.  ``stratified``: a bootstrap within every identity, which loses none.  ``seeds``: the same clips
and features, another order, other frames and other dropout.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

KINDS = ("seeds", "views", "bagging", "stratified")


def member_clips(kind: str, clips: np.ndarray, identity: np.ndarray, *, seed: int, member: int) -> np.ndarray:
    """Return the training clips of a member, with repeats under bagging; clips (n,) and their identities (n,).

    >>> member_clips("stratified", np.array([4, 5, 9]), np.array([0, 0, 1]), seed=0, member=1)
    array([4, 4, 9])
    """
    if kind not in KINDS:
        raise ValueError(f"ensemble must be one of {', '.join(KINDS)}, got {kind!r}")
    rng = np.random.default_rng([seed, member, 4])
    if kind == "bagging":
        return np.sort(clips[rng.integers(len(clips), size=len(clips))])
    if kind == "stratified":
        order = np.argsort(identity, kind="stable")
        _, first, count = np.unique(identity[order], return_index=True, return_counts=True)
        draw = np.repeat(first, count) + (rng.random(len(clips)) * np.repeat(count, count)).astype(int)
        return np.sort(clips[order[draw]])
    return clips


def member_seed(seed: int, member: int) -> int | list[int]:
    """Return the seed of a member's training; that of the first is the seed itself, so that it is the plain model."""
    return seed if member == 0 else [seed, member]


def lost_identities(identity: np.ndarray, kept: np.ndarray) -> int:
    """Count the identities among ``identity`` (n,) that are not among ``kept`` (m,)."""
    return len(np.setdiff1d(identity, kept))


def disagreement(predicted: np.ndarray) -> float:
    """Average over pairs of members the share of clips that they name differently; predicted (M, n), 0 for one member.

    >>> disagreement(np.array([[1, 2], [1, 3], [1, 3]]))
    0.3333333333333333
    """
    pairs = [float(np.mean(a != b)) for a, b in combinations(predicted, 2)]
    return float(np.mean(pairs)) if pairs else 0.0
