"""What chapter 01 reads out of a store: how close it comes to what is published, its norms and its cosines."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mmlib.data.calibration import targets
from mmlib.data.store import ClipStore

QUALITY_GROUPS = ("worst fifth", "middle", "best fifth")


def calibration_table(store: ClipStore) -> pd.DataFrame:
    """Compare a store with every target it can be held against: as ``targets``, achieved, within (bool)."""
    table = targets().join(pd.Series(marginals(store), name="achieved"), on="fact", how="inner").reset_index(drop=True)
    return table.assign(within=(table["achieved"] - table["target"]).abs() <= table["tolerance"])


def marginals(store: ClipStore, pairs: int = 20_000, seed: int = 0) -> dict[str, float]:
    """Measure the facts of ``targets`` on a store, those of a score only where it has that score."""
    clips, face = store.clips, store.modalities["face"]
    identity = clips["identity"].to_numpy()
    train, val = ((clips["split"] == name).to_numpy() for name in ("train", "val"))
    listed = (identity[rows & (identity >= 0)] for rows in (train, val))
    per_train, per_val = (np.bincount(of, minlength=len(store.identities)) for of in listed)
    count = face.count[face.count > 0]
    norm, mean = _norms_and_means(store)
    having = np.flatnonzero(face.count > 0)
    one, two = _pairs(identity[having], pairs, np.random.default_rng(seed))
    genuine, impostor = _cosines(mean[having], *one), _cosines(mean[having], *two)
    with np.errstate(invalid="ignore"):  # as many clips of everybody have no correlation
        together = np.corrcoef(per_train, per_val)[0, 1]
    out = {
        "train clips an identity, mean": per_train.mean(),
        "train clips an identity, median": np.median(per_train),
        "identities with at most 2 train clips": np.mean(per_train <= 2),
        "labelled val clips an identity, mean": per_val.mean(),
        "correlation of train and val clips an identity": together,
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
    out |= {f"mean norm of a clip, {name}": np.quantile(norm[having], share) for name, share in shares.items()}
    if "quality" in face.columns:
        quality = face.columns["quality"]
        out |= {"quality score, mean": quality.mean(), "quality score, standard deviation": quality.std()}
        shares = {"5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95}
        out |= {f"quality score, {name}": np.quantile(quality, share) for name, share in shares.items()}
    if "det" in face.columns:
        det = face.columns["det"]
        out |= {"det score at least .8": np.mean(det >= 0.8), "det score above .9": np.mean(det > 0.9)}
    return {name: float(value) for name, value in out.items()}


def clip_norms(store: ClipStore) -> np.ndarray:
    """Return the mean norm of the face embeddings of every clip with a face, (n,)."""
    norm, _ = _norms_and_means(store)
    return norm[np.isfinite(norm)]


def cosines_by_quality(store: ClipStore, pairs: int = 20_000, seed: int = 0) -> pd.DataFrame:
    """Draw pairs of labelled clips: pair (``one identity``, ``two identities``), quality, cosine of their unit means.

    quality: the group, by percentile, of the lower of their two mean norms.
    """
    norm, mean = _norms_and_means(store)
    having = np.flatnonzero(np.isfinite(norm))
    percentile = norm[having].argsort().argsort() / len(having)
    drawn = _pairs(store.clips["identity"].to_numpy()[having], pairs, np.random.default_rng(seed))
    parts = []
    for name, (left, right) in zip(("one identity", "two identities"), drawn, strict=True):
        group = np.digitize(np.minimum(percentile[left], percentile[right]), [0.2, 0.8])
        parts.append(pd.DataFrame({"pair": name, "quality": group, "cosine": _cosines(mean[having], left, right)}))
    out = pd.concat(parts).sort_values("quality", kind="stable", ignore_index=True)
    return out.assign(quality=out["quality"].map(dict(enumerate(QUALITY_GROUPS))))


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
