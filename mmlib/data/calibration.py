"""What is published about iQIYI-VID-2019.

The numbers come from the challenge's files, the slides of the One Name team (2019) and the repositories of other
teams; the column ``source`` of `targets` says which and how directly.  Only marginals and the scores of single systems
are here: no constant of the simulator may follow from a comparison of methods.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pandas as pd

# (faces, share of clips with a face that have at least as many): read off a histogram in the slides.
_FACES = [1, 11, 16, 21, 25, 30, 40, 50, 75, 100, 150, 240]
_SHARES = [1.0, 0.84, 0.64, 0.50, 0.38, 0.28, 0.20, 0.15, 0.08, 0.05, 0.02, 0.002]
FRAME_SURVIVAL = [*zip(_FACES, _SHARES, strict=True)]
# Quantiles (share, value).  Norm of a face feature: 1-4 % from constants of the released code, the rest a fit to
# published ArcFace norms.
_NORMS_BELOW = [0.0003, 0.001, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999]
_NORMS = [2, 3.6, 8.0, 11.7, 14.8, 16.9, 17.6, 18.9, 20.4, 22, 23.7, 25.2, 27.8, 31]
NORM_KNOTS = [*zip(_NORMS_BELOW, _NORMS, strict=True)]
# Quality score of a frame.
_QUALITIES_BELOW = [0.0002, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.9999]
_QUALITIES = [-20, 1, 11, 17, 32, 59, 95, 128, 148, 185, 260]
QUALITY_KNOTS = [*zip(_QUALITIES_BELOW, _QUALITIES, strict=True)]
# Top-1 accuracy (share) of faces by percentile of clip quality, from the slides; the edges are read as percentiles.
QUALITY_EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20]
TOP1_BY_QUALITY = [0.057, 0.249, 0.422, 0.543, 0.647, 0.633, 0.687, 0.787, 0.789, 0.808, 0.867]


def clips_per_identity(identities: int, rng: np.random.Generator) -> np.ndarray:
    """Return (train clips, labelled val clips) of ``identities`` identities, (C, 2), from the exact joint table.

    With fewer than all 10,034 identities, one is drawn from each of ``identities`` equal strata of the sorted table.
    """
    rows = _every_identity()
    if identities > len(rows):
        raise ValueError(f"identities must be at most {len(rows)}, got {identities}")
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    stratum = (np.arange(identities) + rng.random(identities)) * len(rows) / identities
    return rng.permutation(rows[stratum.astype(int)] if identities < len(rows) else rows)


def clips_survival() -> list[tuple[int, float]]:
    """Return (n, share of identities with at least n train clips) at some n, from the exact table."""
    train = _every_identity()[:, 0]
    return [(n, float(np.mean(train >= n))) for n in (1, 2, 3, 5, 10, 20, 40, 80)]


def _every_identity() -> np.ndarray:
    table = pd.read_csv(files("mmlib.data") / "clips_per_identity_joint.csv")
    return np.repeat(table[["train_clips", "val_labelled_clips"]].to_numpy(), table["identities"], axis=0)


def targets() -> pd.DataFrame:
    """Return what a store is held against: fact, target, the tolerance that a world must meet, source.

    Tolerances leave room for one draw of 500 identities: their correlation of train and val clips varies by .06.
    """
    return pd.read_csv(files("mmlib.data") / "targets.csv")


def published_top1() -> pd.DataFrame:
    """Return the published top-1 accuracy by percentile of clip quality: range, top1, kind."""
    ranges = [f"{low}–{high}" for low, high in zip(QUALITY_EDGES, QUALITY_EDGES[1:])]
    return pd.DataFrame({"range": ranges, "top1": TOP1_BY_QUALITY, "kind": "published"})


def published_systems() -> pd.DataFrame:
    """Return published scores of single systems: modality, measure, low, high, source."""
    return pd.read_csv(files("mmlib.data") / "published_systems.csv")
