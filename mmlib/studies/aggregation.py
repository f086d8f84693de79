"""What chapter 04 reads: attention weights, the search for learning rates, the sensitivity grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import torch

from mmlib.compare import as_frame, compare_arms
from mmlib.data.simulate import Settings
from mmlib.data.store import ClipStore
from mmlib.experiment import Training
from mmlib.models import IdentityModel
from mmlib.records import Record
from mmlib.systems import tuned

# -- attention ------------------------------------------------------------------------------------------------------


def mixed_clips(store: ClipStore, n: int) -> np.ndarray:
    """Choose n val clips of 12 to 30 faces of which .2 to .6 are of another person, in the order of the store.

    Where the store does not know, or has too few of them, the val clips with the most faces fill up.
    """
    face = store.modalities["face"]
    val = store.select("val", labelled=True, having="face")
    chosen = val[:0]
    if "wrong" in face.columns:
        share, count = store.clip_means("face", "wrong")[val], face.count[val]
        chosen = val[(share >= 0.2) & (share <= 0.6) & (count >= 12) & (count <= 30)]
    longest = val[np.argsort(-face.count[val], kind="stable")]
    return np.concatenate([chosen, longest[~np.isin(longest, chosen)]])[:n]


def frame_weights(models: dict[str, IdentityModel], store: ClipStore, clips: np.ndarray) -> pd.DataFrame:
    """Return the share of its clip's weight that each frame gets: clip, frame, method, weight, wrong."""
    wrong = store.modalities["face"].columns.get("wrong")
    names = store.clips["clip"].to_numpy()
    parts = []
    for method, model in models.items():
        weight, mask, rows = _weights(model, store, clips)
        at, frame = np.nonzero(mask)
        parts.append(
            pd.DataFrame(
                {
                    "clip": names[clips][at],
                    "frame": frame,
                    "method": method,
                    "weight": weight[at, frame],
                    "wrong": wrong[rows[at, frame]] if wrong is not None else False,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def weight_on_wrong(models: dict[str, IdentityModel], store: ClipStore) -> pd.DataFrame:
    """Return the mean share of wrong frames in labelled val clips that have some right and some wrong ones, and the mean
    share of weight on them: aggregator, clips, share of frames, weight on wrong frames; empty where nobody knows.
    """
    columns = ["aggregator", "clips", "share of frames", "weight on wrong frames"]
    face = store.modalities["face"]
    if "wrong" not in face.columns:
        return pd.DataFrame(columns=columns)
    val = store.select("val", labelled=True, having="face")
    share = store.clip_means("face", "wrong")[val]
    mixed = val[(share > 0) & (share < 1)]
    rows = []
    for name, model in models.items():
        weight, mask, at = _weights(model, store, mixed)
        wrong = np.where(mask, face.columns["wrong"][np.maximum(at, 0)], False)
        rows.append((name, len(mixed), share[(share > 0) & (share < 1)].mean(), (weight * wrong).sum(1).mean()))
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def _weights(model: IdentityModel, store: ClipStore, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights (B, T) that sum to 1 a clip, the mask and the rows."""
    batch = store.batch(clips)
    device = model.prototype.device
    inputs = [None if x is None else x.to(device) for x in batch[:4]]
    weight = model.eval().aggregator.weights(*inputs).cpu()
    return (weight / weight.sum(1, keepdim=True)).numpy(), batch.mask.numpy(), batch.rows.numpy()


# -- the search for learning rates ----------------------------------------------------------------------------------


def tuning_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return the search, best first within an arm: aggregator, epochs, lr, aggregator_lr, map_at_100 (mean), chosen."""
    frame = as_frame(records).rename(columns=lambda name: name.removeprefix("training."))
    keys = ["aggregator", "epochs", "lr", "aggregator_lr"]
    if frame.empty:
        return pd.DataFrame(columns=[*keys, "map_at_100", "chosen"])
    mean = frame.groupby(keys, sort=False)["map_at_100"].mean().reset_index()
    mean["chosen"] = [
        tuned(row["aggregator"]) == replace(Training(), **{key: row[key] for key in keys[1:]})
        for row in mean.to_dict("records")
    ]
    return mean.sort_values(["aggregator", "map_at_100"], ascending=[True, False], ignore_index=True)


def longer_is_worth(trials: pd.DataFrame, by: str = "aggregator") -> dict[str, float]:
    """Return by how many points of MAP@100 the best long training of each arm, a value of ``by``, beats its best short one."""
    best = trials.groupby([by, "epochs"])["map_at_100"].max().unstack()
    return (100 * (best.iloc[:, -1] - best.iloc[:, 0])).to_dict()


# -- the sensitivity grid -------------------------------------------------------------------------------------------

GRID_AXES = ("share", "wrong quality", "reliability")
GRIDS = {  # (factor on the shares of contaminated clips, mean latent quality of wrong faces, reliability of the scores)
    "none": [],
    "coarse": [(2.0, -1.0, 0.95), (1.0, 0.0, 0.95), (1.0, -1.0, 0.6)],
    "fine": list(product((0.5, 1.0, 2.0), (-2.0, -1.0, 0.0), (0.6, 0.8, 0.95))),
}
GRID_REFERENCE = "quality"
GRID_LEARNED = ("learned scores", "NAN + scores", "attention + scores")
GRID_ARMS = (GRID_REFERENCE, *GRID_LEARNED)


def grid_settings(share: float, wrong_quality: float, reliability: float, identities: int) -> tuple:
    """Return the overrides of the simulator's settings at a point of the grid, as ``Experiment`` takes them."""
    default = Settings()
    return (
        ("identities", identities),
        ("contaminated", share * default.contaminated),
        ("mostly_wrong", share * default.mostly_wrong),
        ("wrong_quality", wrong_quality),
        ("reliability", reliability),
    )


def grid_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Compare the learned arms with quality weights in every cell.

    Columns: ``GRID_AXES``, aggregator, and those of ``compare_arms``.
    """
    cells: dict[tuple, list[Record]] = {}
    for record in records:
        said = dict(record.experiment["settings"])
        cell = (round(said["contaminated"] / Settings().contaminated, 3), said["wrong_quality"], said["reliability"])
        cells.setdefault(cell, []).append(record)
    parts = [
        compare_arms(members, by="aggregator", baseline=GRID_REFERENCE).assign(**dict(zip(GRID_AXES, cell)))
        for cell, members in sorted(cells.items())
    ]
    columns = [*GRID_AXES, "aggregator", "map_at_100", "difference", "low", "high", "sd", "n", "interval"]
    if not parts:
        return pd.DataFrame(columns=columns)
    frame = pd.concat(parts, ignore_index=True)
    return frame.loc[frame["aggregator"] != GRID_REFERENCE, columns]


def grid_verdicts(cells: pd.DataFrame) -> pd.DataFrame:
    """Count the cells where each learned arm is ahead, behind, or neither: the interval of its difference decides."""
    rows = [
        (name, len(part), int((part["low"] > 0).sum()), int((part["high"] < 0).sum()))
        for name, part in cells.groupby("aggregator", sort=False)
    ]
    frame = pd.DataFrame(rows, columns=["aggregator", "cells", "ahead", "behind"])
    return frame.assign(open=frame["cells"] - frame["ahead"] - frame["behind"])


def grid_sentences(cells: pd.DataFrame) -> list[str]:
    """Say what the grid says: a sentence on the counts, and one on each axis."""
    if cells.empty:
        return []
    total = grid_verdicts(cells)
    out = [
        "On the sensitivity grid, "
        + "; ".join(
            f"{row['aggregator']} is ahead of quality weights in {row['ahead']} of {row['cells']} cells, behind in "
            f"{row['behind']}, and {row['open']} are open"
            for row in total.to_dict("records")
        )
        + "."
    ]
    for axis in GRID_AXES:
        mean = cells.groupby(axis)["difference"].mean()
        if len(mean) > 1:
            out.append(
                f"As {_AXIS_NAMES[axis]} goes from {mean.index[0]:g} to {mean.index[-1]:g}, the mean difference goes "
                f"from {mean.iloc[0]:+.2f} to {mean.iloc[-1]:+.2f} points."
            )
    return out


_AXIS_NAMES = {
    "share": "the share of wrong frames (factor)",
    "wrong quality": "the quality of wrong faces",
    "reliability": "the reliability of the scores",
}
