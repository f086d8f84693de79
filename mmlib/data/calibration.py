"""What is published about iQIYI-VID-2019, and how close a store comes to it.

The numbers come from the challenge's files, the slides of the One Name team (2019) and the repositories of other
teams; ``Target.source`` says which and how directly.  Only marginals and the scores of single systems are here: no
constant of the simulator may follow from a comparison of methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd

from mmlib.data.store import ClipStore

# (faces, share of clips with a face that have at least as many): read off a histogram in the slides.
FRAME_SURVIVAL = [
    (1, 1.0),
    (11, 0.84),
    (16, 0.64),
    (21, 0.50),
    (25, 0.38),
    (30, 0.28),
    (40, 0.20),
    (50, 0.15),
    (75, 0.08),
    (100, 0.05),
    (150, 0.02),
    (240, 0.002),
]
# Norm of a face feature: 1-4 % from constants of the released code, the rest a fit to published ArcFace norms.
NORM_KNOTS = [
    (0.0003, 2),
    (0.001, 3.6),
    (0.01, 8.0),
    (0.02, 11.7),
    (0.03, 14.8),
    (0.04, 16.9),
    (0.05, 17.6),
    (0.1, 18.9),
    (0.25, 20.4),
    (0.5, 22),
    (0.75, 23.7),
    (0.9, 25.2),
    (0.99, 27.8),
    (0.9999, 31),
]
QUALITY_KNOTS = [
    (0.0002, -20),
    (0.01, 1),
    (0.05, 11),
    (0.1, 17),
    (0.25, 32),
    (0.5, 59),
    (0.75, 95),
    (0.9, 128),
    (0.95, 148),
    (0.99, 185),
    (0.9999, 260),
]
# Top-1 accuracy (share) of faces by percentile of clip quality, from the slides; the edges are read as percentiles.
QUALITY_EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20]
QUALITY_GROUPS = ("worst fifth", "middle", "best fifth")
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


@dataclass(frozen=True)
class Target:
    """One published fact: its value, the tolerance a world must meet, and where it comes from."""

    fact: str
    value: float
    tolerance: float
    source: str


DERIVED, STATED, INFERRED = "derived from the files", "stated by a team", "inferred"
TARGETS = [
    Target("train clips an identity, mean", 6.04, 0.15, DERIVED),
    Target("train clips an identity, median", 4, 0, DERIVED),
    Target("identities with at most 2 train clips", 0.298, 0.02, DERIVED),
    Target("labelled val clips an identity, mean", 4.53, 0.15, DERIVED),
    Target("correlation of train and val clips an identity", 0.87, 0.13, DERIVED),  # one draw of 500 varies by .06
    Target("val clips that are distractors", 0.402, 0.002, DERIVED),
    Target("clips without a face", 0.044, 0.008, INFERRED),
    Target("faces a clip, mean", 31.5, 2.5, DERIVED),
    Target("faces a clip, median", 21, 1.5, DERIVED),
    Target("clips with at least 40 faces", 0.20, 0.015, DERIVED),
    Target("quality score, 5 %", 11, 4, DERIVED),
    Target("quality score, 25 %", 32, 4, DERIVED),
    Target("quality score, median", 59, 4, DERIVED),
    Target("quality score, 75 %", 95, 5, DERIVED),
    Target("quality score, 95 %", 148, 6, DERIVED),
    Target("quality score, mean", 67, 5, DERIVED),
    Target("quality score, standard deviation", 43, 4, DERIVED),
    Target("det score at least .8", 0.995, 0.005, STATED),
    Target("det score above .9", 0.98, 0.02, STATED),
    Target("mean norm of a clip, 1 %", 8.867, 1.5, STATED),
    Target("mean norm of a clip, 2 %", 11.992, 1.5, INFERRED),
    Target("mean norm of a clip, 4 %", 16.359, 1.2, INFERRED),
    Target("mean norm of a clip, median", 22, 0.7, INFERRED),
    Target("cosine of two clips of one identity, mean", 0.50, 0.08, INFERRED),
    Target("cosine of two clips of two identities, mean", 0.0, 0.02, INFERRED),
    Target("cosine of two clips of two identities, standard deviation", 0.075, 0.025, INFERRED),
]


def published_top1() -> pd.DataFrame:
    """Return the published top-1 accuracy by percentile of clip quality: range, top1, kind."""
    ranges = [f"{low}–{high}" for low, high in zip(QUALITY_EDGES, QUALITY_EDGES[1:])]
    return pd.DataFrame({"range": ranges, "top1": TOP1_BY_QUALITY, "kind": "published"})


def published_systems() -> pd.DataFrame:
    """Return published scores of single systems: modality, measure, low, high, source."""
    return pd.DataFrame(
        [
            ("face", "map_at_100", 0.8293, 0.8447, "seefun 2019, with quality weights, trained on train only"),
            ("head", "map_at_100", 0.52, 0.54, "stated by a team and from memory"),
            ("scene", "clip_top1", 0.45, 0.45, "a team of 2018"),
            ("audio", "map_at_100", 0.12, 0.12, "from memory"),
            ("body", "map_at_100", 0.05, 0.05, "from memory"),
        ],
        columns=["modality", "measure", "low", "high", "source"],
    )


def calibration_table(store: ClipStore) -> pd.DataFrame:
    """Compare a store with every target it can be held against.

    Columns: fact, target, tolerance, achieved, within (bool), source.  A store without a score lacks its facts.
    """
    measured = marginals(store)
    rows = [
        (t.fact, t.value, t.tolerance, measured[t.fact], abs(measured[t.fact] - t.value) <= t.tolerance, t.source)
        for t in TARGETS
        if t.fact in measured
    ]
    return pd.DataFrame(rows, columns=["fact", "target", "tolerance", "achieved", "within", "source"])


def marginals(store: ClipStore, pairs: int = 20_000, seed: int = 0) -> dict[str, float]:
    """Measure the facts of ``TARGETS`` on a store, those of a score only where it has that score."""
    clips, face = store.clips, store.modalities["face"]
    identity = clips["identity"].to_numpy()
    train, val = ((clips["split"] == name).to_numpy() for name in ("train", "val"))
    per_train, per_val = (
        np.bincount(identity[rows & (identity >= 0)], minlength=len(store.identities)) for rows in (train, val)
    )
    count = face.count[face.count > 0]
    norm, mean = _norms_and_means(store)
    having = np.flatnonzero(face.count > 0)
    one, two = _pairs(identity[having], pairs, np.random.default_rng(seed))
    genuine, impostor = _cosines(mean[having], *one), _cosines(mean[having], *two)
    out = {
        "train clips an identity, mean": per_train.mean(),
        "train clips an identity, median": np.median(per_train),
        "identities with at most 2 train clips": np.mean(per_train <= 2),
        "labelled val clips an identity, mean": per_val.mean(),
        "correlation of train and val clips an identity": np.corrcoef(per_train, per_val)[0, 1],
        "val clips that are distractors": np.mean(identity[val] < 0),
        "clips without a face": np.mean(face.count == 0),
        "faces a clip, mean": count.mean(),
        "faces a clip, median": np.median(count),
        "clips with at least 40 faces": np.mean(count >= 40),
        "cosine of two clips of one identity, mean": genuine.mean(),
        "cosine of two clips of two identities, mean": impostor.mean(),
        "cosine of two clips of two identities, standard deviation": impostor.std(),
    }
    shares = {"1 %": 0.01, "2 %": 0.02, "4 %": 0.04, "median": 0.5}
    out |= _quantiles("mean norm of a clip", norm[having], shares)
    if "quality" in face.columns:
        quality = face.columns["quality"]
        out |= {"quality score, mean": quality.mean(), "quality score, standard deviation": quality.std()}
        out |= _quantiles(
            "quality score", quality, {"5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95}
        )
    if "det" in face.columns:
        det = face.columns["det"]
        out |= {"det score at least .8": np.mean(det >= 0.8), "det score above .9": np.mean(det > 0.9)}
    return {name: float(value) for name, value in out.items()}


def clip_norms(store: ClipStore) -> np.ndarray:
    """Return the mean norm of the face embeddings of every clip with a face, (n,)."""
    norm, _ = _norms_and_means(store)
    return norm[np.isfinite(norm)]


def cosines_by_quality(store: ClipStore, pairs: int = 20_000, seed: int = 0) -> pd.DataFrame:
    """Draw pairs of labelled clips of one identity and of two, grouped by the lower of their two mean norms.

    Columns: pair (``one identity`` or ``two identities``), quality (three groups by percentile), cosine of the means
    of their normalised embeddings.
    """
    norm, mean = _norms_and_means(store)
    having = np.flatnonzero(np.isfinite(norm))
    percentile = norm[having].argsort().argsort() / len(having)
    drawn = _pairs(store.clips["identity"].to_numpy()[having], pairs, np.random.default_rng(seed))
    parts = []
    for name, (left, right) in zip(("one identity", "two identities"), drawn, strict=True):
        worse = np.minimum(percentile[left], percentile[right])
        group = np.array(QUALITY_GROUPS)[np.digitize(worse, [0.2, 0.8])]
        parts.append(pd.DataFrame({"pair": name, "quality": group, "cosine": _cosines(mean[having], left, right)}))
    out = pd.concat(parts)
    return pd.concat([out[out["quality"] == name] for name in QUALITY_GROUPS], ignore_index=True)


def _quantiles(fact: str, values: np.ndarray, shares: dict[str, float]) -> dict[str, float]:
    found = np.quantile(values, list(shares.values()))
    return {f"{fact}, {name}": value for name, value in zip(shares, found, strict=True)}


def _norms_and_means(store: ClipStore, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Return of every clip the mean norm (N,) and the unit mean (N, D) of its first 40 faces; NaN without a face."""
    having = store.select(having="face")
    norms = np.full(len(store), np.nan)
    means = np.full((len(store), store.modalities["face"].feature.shape[1]), np.nan, np.float32)
    for first in range(0, len(having), block):
        clips = having[first : first + block]
        batch = store.batch(clips, sample="first", frames=40)
        length = batch.feature.norm(dim=2)  # (B, T)
        norms[clips] = (length.sum(1) / batch.mask.sum(1)).numpy()
        mean = (batch.feature / length.clamp(min=1e-6)[..., None]).sum(1)
        means[clips] = (mean / mean.norm(dim=1, keepdim=True)).numpy()
    return norms, means


def _pairs(identity: np.ndarray, pairs: int, rng: np.random.Generator):
    """Draw (left, right) positions of random pairs of labelled clips: of one identity, and of two."""
    order = np.argsort(identity, kind="stable")
    order = order[identity[order] >= 0]
    _, first, size = np.unique(identity[order], return_index=True, return_counts=True)
    # Every pair of clips is as likely as any other: identities in proportion to their number of pairs.
    weight = size * (size - 1.0)
    if not weight.any():
        raise ValueError("no identity has two clips with a face, so there is no pair to compare")
    chosen = rng.choice(len(size), pairs, p=weight / weight.sum())
    a = (rng.random(pairs) * size[chosen]).astype(int)
    b = (a + 1 + (rng.random(pairs) * (size[chosen] - 1)).astype(int)) % size[chosen]
    left, right = rng.choice(order, pairs), rng.choice(order, pairs)
    differ = identity[left] != identity[right]
    return (order[first[chosen] + a], order[first[chosen] + b]), (left[differ], right[differ])


def _cosines(mean: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", mean[left], mean[right])
