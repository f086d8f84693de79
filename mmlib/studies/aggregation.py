"""What chapter 04 reads: single steps between arms, attention weights, the sensitivity grid."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from mmlib.aggregate import CodedAttention, channel_map, frame_scores
from mmlib.compare import COMPARED, compare_arms, counts, interval_text, signed, verdict, with_source
from mmlib.data.simulate import Settings
from mmlib.data.store import Batch, ClipStore
from mmlib.experiment import FEWEST
from mmlib.models import IdentityModel, seeded
from mmlib.records import Record
from mmlib.systems import ONE_NAME_AS_CODED

STEPS = {  # one change each: the arm with it, and the arm without
    "norm weights in place of the plain mean": ("norm", "mean"),
    "showing NAN the scores": ("NAN + scores", "NAN"),
    "mixing frames before NAN": ("attention", "NAN"),
    "mixing frames before NAN, with scores": ("attention + scores", "NAN + scores"),
    "the released network for NAN with scores": ("as coded", "NAN + scores"),
    "bringing its map to life": ("as coded, alive", "as coded"),
}
WATCHED = (8, 24)  # faces of a clip that can be looked at frame by frame, on a phone too
AT_ONCE = 500  # clips whose persons are ranked
# Clips that tell arms apart, by the ranks of the right person (a row a clip, a column an arm) and the share of frames
# of another person: the first clip with the largest value is shown, of those that have one.
TELLING = {
    "found by quality, not by the mean": lambda rank, wrong: rank["mean"].where(
        (rank["quality"] == 1) & (rank["mean"] > 1)
    ),
    "found by the mean, not by quality": lambda rank, wrong: rank["quality"].where(
        (rank["mean"] == 1) & (rank["quality"] > 1)
    ),
    "ranks lie furthest apart": lambda rank, wrong: (rank.max(axis=1) - rank.min(axis=1)).replace(0, np.nan),
    "found by every arm": lambda rank, wrong: wrong.where(rank.max(axis=1) == 1),
    "found by no arm": lambda rank, wrong: rank.min(axis=1).where(rank.min(axis=1) > 1),
}
MAPS = ("as coded", "as coded, alive", "attention + scores")  # arms with a map from frame to frame


def mixed_clips(store: ClipStore, n: int) -> np.ndarray:
    """Choose n val clips of 12 to 30 faces of which .2 to .6 are of another person, then those with the most faces."""
    face, val = store.modalities["face"], store.select("val", labelled=True, having="face")
    count = face.count[val]
    share = store.clip_means("face", "wrong")[val] if "wrong" in face.columns else np.zeros(len(val))
    other = ~((share >= 0.2) & (share <= 0.6) & (count >= 12) & (count <= 30))
    return val[np.lexsort((np.where(other, -count, 0), other))][:n]


def frame_weights(models: dict[str, IdentityModel], store: ClipStore, clips: np.ndarray) -> pd.DataFrame:
    """Return the share of its clip's weight that each frame gets: clip, frame, method, weight, wrong."""
    names, parts = store.clips["clip"].to_numpy()[clips], []
    for method, model in models.items():
        weight, mask, wrong = _weights(model, store, clips)
        at, frame = np.nonzero(mask)
        columns = {"weight": weight[at, frame], "wrong": wrong[at, frame]}
        parts.append(pd.DataFrame({"clip": names[at], "frame": frame, "method": method} | columns))
    return pd.concat(parts, ignore_index=True)


def watched_clips(store: ClipStore) -> np.ndarray:
    """Return the labelled val clips of as many faces as WATCHED says; none where frames are not marked and scored."""
    face, val = store.modalities["face"], store.select("val", labelled=True, having="face")
    least, most = WATCHED
    known = {"wrong", "quality", "det"} <= set(face.columns)
    return val[(face.count[val] >= least) & (face.count[val] <= most) & known]


def person_ranks(
    models: dict[str, IdentityModel], means: IdentityModel, store: ClipStore, clips: np.ndarray
) -> pd.DataFrame:
    """Return the rank of the right person in each clip (row) by each arm (column); 1 is found.

    means: a model of raw embeddings without an MLP, whose vectors all arms are held against.
    """
    parts = []
    for some in np.array_split(clips, -(-len(clips) // AT_ONCE)) if len(clips) else ():
        found = {arm: _standing(model, means, store, some)[0] for arm, model in models.items()}
        parts.append(pd.DataFrame(found, index=some))
    return pd.concat(parts) if parts else pd.DataFrame(columns=[*models], dtype=int)


def found_counts(ranks: pd.DataFrame) -> dict[str, int]:
    """Count clips by the arms that find their person: of all ``clips`` those of ``every`` arm, ``no`` and ``some``."""
    found = (ranks == 1).mean(axis=1)
    every, none = int((found == 1).sum()), int((found == 0).sum())
    return {"clips": len(ranks), "every": every, "no": none, "some": len(ranks) - every - none}


def telling_clips(ranks: pd.DataFrame, store: ClipStore) -> dict[str, int]:
    """Choose a clip of each kind of TELLING that there is; ranks: as of ``person_ranks``, of quality and mean too."""
    if ranks.empty:
        return {}
    wrong = pd.Series(store.clip_means("face", "wrong")[ranks.index], ranks.index)
    values = {kind: value(ranks, wrong) for kind, value in TELLING.items()}
    return {kind: int(value.idxmax()) for kind, value in values.items() if value.notna().any()}


def watched_frames(
    models: dict[str, IdentityModel], means: IdentityModel, store: ClipStore, clips: dict[str, int]
) -> pd.DataFrame:
    """Return what each arm makes of clips, one row a frame and arm: kind, arm, frame, quality, wrong, weight.

    clips: by kind.  rank and cosine: of the right person among the ``identities`` vectors of means, as in
    ``person_ranks``, so that arms differ in weights alone.
    """
    if not clips:
        return pd.DataFrame()
    at, names, parts = np.array([*clips.values()]), np.array([*clips], object), []
    rows, quality = store.batch(at).rows.numpy(), store.modalities["face"].columns["quality"]
    for arm, model in models.items():
        weight, mask, wrong = _weights(model, store, at)
        rank, cosine = _standing(model, means, store, at)
        clip, frame = np.nonzero(mask)
        columns = {"kind": names[clip], "arm": arm, "frame": frame, "quality": quality[rows[clip, frame]]}
        columns |= {"wrong": wrong[clip, frame], "weight": weight[clip, frame], "cosine": cosine[clip]}
        parts.append(pd.DataFrame(columns | {"rank": rank[clip], "identities": len(means.prototype)}))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def _standing(
    model: IdentityModel, means: IdentityModel, store: ClipStore, clips: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank of the right person of each clip among the vectors of means, and the cosine of theirs."""
    vectors, right = F.normalize(means.prototype.cpu(), dim=1), torch.from_numpy(store.identity_of(clips))
    pooled = model.eval().aggregator(*_inputs(model, store.batch(clips)))  # type: ignore[misc]
    cosine = F.normalize(pooled[:, : vectors.shape[1]].cpu(), dim=1) @ vectors.T
    own = cosine.gather(1, right[:, None])
    return 1 + (cosine > own).sum(1).numpy(), own[:, 0].numpy()


def weight_on_wrong(models: dict[str, IdentityModel], store: ClipStore) -> pd.DataFrame:
    """Return how much weight lies on wrong frames in labelled val clips with some right and some wrong ones, if any.

    Least first: arm, clips, share of frames and share of weight (means over clips of what is wrong).
    """
    rows = []
    if "wrong" in store.modalities["face"].columns:
        val = store.select("val", labelled=True, having="face")
        share = store.clip_means("face", "wrong")[val]
        mixed = (share > 0) & (share < 1)
        for name, model in models.items() if mixed.any() else ():
            weight, _, wrong = _weights(model, store, val[mixed])
            rows.append((name, mixed.sum(), share[mixed].mean(), (weight * wrong).sum(1).mean()))
    frame = pd.DataFrame(rows, columns=["arm", "clips", "share of frames", "share of weight"])
    return frame.sort_values("share of weight", ignore_index=True)


def forty(store: ClipStore, clips: np.ndarray, *, frames: int = 40, seed: int = 0) -> tuple:
    """Draw forty frames of clips as the released code does: features (B, 40, D), mask, quality and det (B, 40)."""
    batch = store.batch(clips, sample="draw", frames=frames, generator=torch.Generator().manual_seed(seed))
    return batch.feature, batch.mask, batch.quality, batch.det


@torch.no_grad()
def attention_map(model: IdentityModel, inputs: tuple) -> np.ndarray:
    """Return the map of each clip, rows that sum to 1: (B, 20, 20) of the coded arms, else (B, 40, 40)."""
    module: Any = model.eval().aggregator
    x, mask, *scores = (part.to(model.prototype.device) for part in inputs)
    if isinstance(module, CodedAttention):
        return module.attention(x, mask, *scores).cpu().numpy()
    known = frame_scores(*scores) if module.scores else None
    return channel_map(x, mask, module.log_temperature.exp(), known, module.invert).cpu().numpy()


def untrained_map(inputs: tuple) -> np.ndarray:
    """Return the living map of each clip, (B, 20, 20), as it starts, with the statistics of these clips."""
    with seeded(0):
        module = CodedAttention(inputs[0].shape[2], alive=True)
    return module.train().attention(*inputs).numpy()


def sharpness(maps: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return the mean largest entry of a row of each map, and what it would be if all were equal: arm, largest, equal.

    maps: (B, n, n) by arm.
    """
    rows = [(arm, found.max(axis=2).mean(), 1 / found.shape[2]) for arm, found in maps.items()]
    return pd.DataFrame(rows, columns=["arm", "largest", "equal"])


def from_released_start(store: ClipStore, clips: np.ndarray, *, steps: int = 20) -> dict[str, float]:
    """Train the living map from the released start, by the released optimiser, on the mean of squares of its features.

    Returns the largest gradient, and the largest weight afterwards, of theta and phi with their batch norms' shifts
    (``gradient``, ``weight``) and of all else (``other-gradient``), how far the map comes from equal entries (``away``)
    and the steps.  Clips without scores have ones.
    """
    x, mask, *scores = forty(store, clips)
    inputs = (x, mask, *(torch.ones(mask.shape) if score is None else score for score in scores))
    with seeded(0):
        module = CodedAttention(x.shape[2], alive=True)
    factors = [module.theta.weight, module.phi.weight, module.theta_norm.bias, module.phi_norm.bias]
    for value in factors:
        torch.nn.init.zeros_(value)
    asked = ONE_NAME_AS_CODED.training
    optimiser = torch.optim.SGD(module.parameters(), lr=asked.lr, momentum=0.9, weight_decay=asked.weight_decay)
    said = {"gradient": 0.0, "other-gradient": 0.0}
    for _ in range(steps):
        optimiser.zero_grad()
        module.train()(*inputs).square().mean().backward()
        for value in module.parameters():
            name = "gradient" if any(value is factor for factor in factors) else "other-gradient"
            said[name] = max(said[name], float(torch.as_tensor(value.grad).abs().max()))
        optimiser.step()
    away = float((module.eval().attention(*inputs) - 2 / module.frames).abs().max())
    weight = max(float(value.detach().abs().max()) for value in factors)
    return said | {"weight": weight, "away": away, "steps": steps}


def _inputs(model: IdentityModel, batch: Batch) -> list[torch.Tensor | None]:
    return [None if x is None else x.to(model.prototype.device) for x in batch[:4]]


@torch.no_grad()
def _weights(model: IdentityModel, store: ClipStore, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights that sum to 1 a clip, the mask, and which frames are known to be wrong; all (B, T)."""
    batch = store.batch(clips)
    weight = model.eval().aggregator.weights(*_inputs(model, batch)).cpu()  # type: ignore[union-attr, operator, arg-type]
    mask, wrong = batch.mask.numpy(), store.modalities["face"].columns.get("wrong")
    known = np.zeros_like(mask) if wrong is None else mask & (wrong[np.maximum(batch.rows.numpy(), 0)] > 0)
    return (weight / weight.sum(1, keepdim=True)).numpy(), mask, known


GRID_AXES = {
    "share": "share of wrong frames (factor)",
    "wrong quality": "quality of wrong faces",
    "reliability": "reliability of the scores",
}
GRIDS = {  # (factor on the shares of contaminated clips, mean latent quality of wrong faces, reliability of the scores)
    "none": [],
    "coarse": [(2.0, -1.0, 0.95), (1.0, 0.0, 0.95), (1.0, -1.0, 0.6)],
    "fine": list(product((0.5, 1.0, 2.0), (-2.0, -1.0, 0.0), (0.6, 0.8, 0.95))),
}
GRID_REFERENCE = "quality"
GRID_LEARNED = ("learned scores", "NAN + scores", "attention + scores")
GRID_ARMS = (GRID_REFERENCE, *GRID_LEARNED)


def grid_points(name: str, identities: int) -> list[tuple[float, float, float]]:
    """Return the points of a grid, of worlds of so many identities."""
    if name not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {name!r}")
    if identities < FEWEST:
        raise ValueError(f"grid_identities must be {FEWEST} at least, got {identities}")
    return GRIDS[name]


def grid_settings(share: float, wrong_quality: float, reliability: float, identities: int) -> tuple:
    """Return the overrides of the simulator's settings at a point of the grid, as ``Experiment`` takes them."""
    clips = [(name, share * getattr(Settings, name)) for name in ("contaminated", "mostly_wrong")]
    return ("identities", identities), *clips, ("wrong_quality", wrong_quality), ("reliability", reliability)


def grid_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Compare the learned arms with quality weights in every cell: ``GRID_AXES``, aggregator, as ``compare_arms``."""
    cells: dict[tuple, list[Record]] = {}
    for record in records:
        said = dict(record.experiment["settings"])
        cell = (round(said["contaminated"] / Settings().contaminated, 3), said["wrong_quality"], said["reliability"])
        cells.setdefault(cell, []).append(record)
    parts = [pd.DataFrame(columns=[*GRID_AXES, "aggregator", *COMPARED])]
    for cell, members in sorted(cells.items()):
        frame = compare_arms(members, by="aggregator", baseline=GRID_REFERENCE).assign(**dict(zip(GRID_AXES, cell)))
        parts.append(frame.loc[frame["aggregator"] != GRID_REFERENCE, parts[0].columns])
    every = (record for members in cells.values() for record in members)
    return with_source(pd.concat(parts[1:] or parts, ignore_index=True), every)


def grid_words(cells: pd.DataFrame) -> pd.DataFrame:
    """Return cells with their axes by their names, gain, interval and verdict in words, and which are calibrated."""
    words = ("beats", "cannot be told apart from", "loses to", "is not judged against")
    rows, world = cells.to_dict("records"), Settings()
    said = {
        "gain": [signed(row["difference"]) for row in rows],
        "interval": [f"{interval_text(row)} over {row['n']:.0f} {row['interval']}" for row in rows],
        "verdict": [verdict(row, *words) for row in rows],
        "calibrated": (cells[[*GRID_AXES]] == [1.0, world.wrong_quality, world.reliability]).all(axis=1),
    }
    kept = cells[[*GRID_AXES, "aggregator", "difference", "low", "high"]]
    return kept.assign(**said).rename(columns=GRID_AXES)


def grid_verdicts(cells: pd.DataFrame) -> pd.DataFrame:
    """Count the cells where each learned arm is ahead, behind, or neither: the interval of its difference decides."""
    rows = [(name, *counts(part).values()) for name, part in cells.groupby("aggregator", sort=False)]
    return pd.DataFrame(rows, columns=["aggregator", "cells", "ahead", "behind", "open"])


def grid_axes(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the mean difference at both ends of every axis that varies: axis, from, to, gain from, gain to."""
    means = {name: cells.groupby(axis)["difference"].mean() for axis, name in GRID_AXES.items()}
    rows = [(name, *mean.index[[0, -1]], *mean.iloc[[0, -1]]) for name, mean in means.items() if len(mean) > 1]
    return pd.DataFrame(rows, columns=["axis", "from", "to", "gain from", "gain to"])
