"""What the chapters read out of records, models and stores: comparisons, tidy frames and computed sentences.

Nothing here decides a number of a record, so an edit here makes no record stale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import torch

from mmlib import metrics
from mmlib.clips.simulate import Settings
from mmlib.clips.store import ClipStore
from mmlib.models import LEARNED, IdentityModel
from mmlib.runs import LENGTH_EDGES, WRONG_EDGES, Record, library_hash
from mmlib.train import Training


def as_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row a record: the fields of its experiment and its measures."""
    return pd.DataFrame([record.row() for record in records])


def breakdown_frame(records: Iterable[Record], by: str) -> pd.DataFrame:
    """Return the breakdowns of records, averaged over seeds: ``by``, group, range, clips, top1, precision."""
    rows = [(record.experiment[by], group, f"{low:g}–{high:g}" if group == "quality" else _range(group, low, high),
             clips, top1, precision)
            for record in records for group, parts in record.breakdown.items()
            for low, high, clips, top1, precision in parts]
    frame = pd.DataFrame(rows, columns=[by, "group", "range", "clips", "top1", "precision"])
    return frame.groupby([by, "group", "range"], sort=False)[["clips", "top1", "precision"]].mean().reset_index()


def _range(group: str, low: float, high: float) -> str:
    if group == "frames":
        return f"{low:g}" if high == low + 1 else f"{low:g}+" if high == LENGTH_EDGES[-1] else f"{low:g}–{high - 1:g}"
    return "none" if high == WRONG_EDGES[1] else f"{low:.2g}–{min(high, 1):.2g}" if low > 1e-6 else f"to {high:.2g}"


def compare(records: Iterable[Record], by: str, baseline: str) -> pd.DataFrame:
    """Compare every value of field ``by`` with ``baseline``, pair by pair, in points of MAP@100.

    Records that differ in ``by`` and the seed only.  Returns, sorted by MAP: map_at_100 (mean over seeds), difference,
    low and high (95 %), sd (of the difference over worlds), n, and ``interval``: over worlds by a t interval where
    each seed is a world of its own, else over identities by a bootstrap of APs averaged over seeds.
    """
    groups: dict[str, dict[int, Record]] = {}
    for record in records:
        seed = record.experiment["seed"]
        if groups.setdefault(record.experiment[by], {}).setdefault(seed, record).key != record.key:
            raise ValueError(f"two different experiments have {by} = {record.experiment[by]!r} and seed {seed}")
    if baseline not in groups:
        raise ValueError(f"no record has {by} = {baseline!r}, only {', '.join(map(str, groups))}")
    rows = []
    for name, members in groups.items():
        seeds = sorted(members.keys() & groups[baseline].keys())
        if len(seeds) < len(groups[baseline]) or len(members) > len(seeds):
            raise ValueError(f"{by} = {name!r} has seeds {sorted(members)}, the baseline {sorted(groups[baseline])}")
        here, there = ([np.array(group[s].ap) for s in seeds] for group in (members, groups[baseline]))
        worlds = members[seeds[0]].experiment["data"] == "simulated" and len(seeds) > 1
        if worlds:
            over = metrics.over_worlds(np.array([(a - b).mean() for a, b in zip(here, there)]))
            found = (over.mean, over.low, over.high, over.sd, over.n)
        else:
            pair = metrics.paired_test(np.mean(here, 0), np.mean(there, 0))
            found = (pair.difference, pair.low, pair.high, np.nan, pair.n)
        rows.append((name, np.mean([a.mean() for a in here]), *(100 * x for x in found[:4]), found[4],
                     "worlds" if worlds else "identities"))
    columns = [by, "map_at_100", "difference", "low", "high", "sd", "n", "interval"]
    return pd.DataFrame(rows, columns=columns).sort_values("map_at_100", ascending=False, ignore_index=True)


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
        chosen = val[(share >= .2) & (share <= .6) & (count >= 12) & (count <= 30)]
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
        parts.append(pd.DataFrame({
            "clip": names[clips][at], "frame": frame, "method": method, "weight": weight[at, frame],
            "wrong": wrong[rows[at, frame]] if wrong is not None else False}))
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

TUNING_SEEDS = (100, 101)  # worlds that no comparison uses
# The learning rates of each arm with the best mean MAP@100 in ``tuning_grid`` on those worlds, at the shorter length for
# all arms, so that all take the same steps; ``tuning_frame`` shows the search and ``longer_is_worth`` the other length.
_NETWORK = {"lr": 1e-3}
TUNED: dict[str, dict] = {
    "mean": {"lr": 5e-4}, "norm": _NETWORK, "quality": _NETWORK, "best half": _NETWORK,
    "learned scores": _NETWORK | {"aggregator_lr": 3.0},
    "NAN": _NETWORK | {"aggregator_lr": 1e-3}, "NAN, two blocks": _NETWORK | {"aggregator_lr": 3e-4},
    "NAN + scores": _NETWORK | {"aggregator_lr": 1e-3}, "attention": _NETWORK | {"aggregator_lr": 1e-3},
    "attention + scores": _NETWORK | {"aggregator_lr": 1e-3}, "DANet + scores": _NETWORK | {"aggregator_lr": 1e-3},
    "as coded": _NETWORK | {"aggregator_lr": 3e-4},
}


def tuned(aggregator: str) -> Training:
    """Return the training chosen for an arm."""
    return Training(**TUNED.get(aggregator, {}))


def tuning_grid(aggregator: str) -> list[Training]:
    """List the trainings tried for an arm, eight for every arm: two lengths times four learning rates.

    An arm with parameters tries four rates of its own, the others four of the rest of the network.
    """
    if aggregator not in LEARNED:
        rates = [{"lr": rate} for rate in (5e-4, 1e-3, 1e-2, 3e-2)]
    else:  # three weights of scores need longer steps than a query over hundreds of dimensions
        own = (1e-1, 3e-1, 1.0, 3.0) if aggregator == "learned scores" else (3e-4, 1e-3, 3e-3, 1e-2)
        rates = [{"lr": 1e-3, "aggregator_lr": rate} for rate in own]
    return [Training(epochs=epochs, **rate) for epochs in (8, 16) for rate in rates]


def tuning_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return the search, best first within an arm: aggregator, epochs, lr, aggregator_lr, map_at_100 (mean), chosen."""
    frame = as_frame(records).rename(columns=lambda name: name.removeprefix("training."))
    keys = ["aggregator", "epochs", "lr", "aggregator_lr"]
    if frame.empty:
        return pd.DataFrame(columns=[*keys, "map_at_100", "chosen"])
    mean = frame.groupby(keys, sort=False)["map_at_100"].mean().reset_index()
    mean["chosen"] = [tuned(row["aggregator"]) == replace(Training(), **{key: row[key] for key in keys[1:]})
                      for row in mean.to_dict("records")]
    return mean.sort_values(["aggregator", "map_at_100"], ascending=[True, False], ignore_index=True)


def longer_is_worth(trials: pd.DataFrame) -> dict[str, float]:
    """Return by how many points of MAP@100 the best long training of each arm beats its best short one."""
    best = trials.groupby(["aggregator", "epochs"])["map_at_100"].max().unstack()
    return (100 * (best.iloc[:, -1] - best.iloc[:, 0])).to_dict()


# -- the sensitivity grid -------------------------------------------------------------------------------------------

GRID_AXES = ("share", "wrong quality", "reliability")
GRIDS = {  # (factor on the shares of contaminated clips, mean latent quality of wrong faces, reliability of the scores)
    "none": [],
    "coarse": [(2.0, -1.0, .95), (1.0, 0.0, .95), (1.0, -1.0, .6)],
    "fine": list(product((.5, 1.0, 2.0), (-2.0, -1.0, 0.0), (.6, .8, .95))),
}
GRID_REFERENCE = "quality"
GRID_LEARNED = ("learned scores", "NAN + scores", "attention + scores")
GRID_ARMS = (GRID_REFERENCE, *GRID_LEARNED)


def grid_settings(share: float, wrong_quality: float, reliability: float, identities: int) -> tuple:
    """Return the overrides of the simulator's settings at a point of the grid, as ``Experiment`` takes them."""
    default = Settings()
    return (("identities", identities), ("contaminated", share * default.contaminated),
            ("mostly_wrong", share * default.mostly_wrong), ("wrong_quality", wrong_quality),
            ("reliability", reliability))


def grid_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Compare the learned arms with quality weights in every cell.

    Columns: ``GRID_AXES``, aggregator, and those of ``compare``.
    """
    cells: dict[tuple, list[Record]] = {}
    for record in records:
        said = dict(record.experiment["settings"])
        cell = (round(said["contaminated"] / Settings().contaminated, 3), said["wrong_quality"], said["reliability"])
        cells.setdefault(cell, []).append(record)
    parts = [compare(members, by="aggregator", baseline=GRID_REFERENCE).assign(**dict(zip(GRID_AXES, cell)))
             for cell, members in sorted(cells.items())]
    columns = [*GRID_AXES, "aggregator", "map_at_100", "difference", "low", "high", "sd", "n", "interval"]
    if not parts:
        return pd.DataFrame(columns=columns)
    frame = pd.concat(parts, ignore_index=True)
    return frame.loc[frame["aggregator"] != GRID_REFERENCE, columns]


def grid_verdicts(cells: pd.DataFrame) -> pd.DataFrame:
    """Count the cells where each learned arm is ahead, behind, or neither: the interval of its difference decides."""
    rows = [(name, len(part), int((part["low"] > 0).sum()), int((part["high"] < 0).sum()))
            for name, part in cells.groupby("aggregator", sort=False)]
    frame = pd.DataFrame(rows, columns=["aggregator", "cells", "ahead", "behind"])
    return frame.assign(open=frame["cells"] - frame["ahead"] - frame["behind"])


def grid_sentences(cells: pd.DataFrame) -> list[str]:
    """Say what the grid says: a sentence on the counts, and one on each axis."""
    if cells.empty:
        return []
    total = grid_verdicts(cells)
    out = ["On the sensitivity grid, " + "; ".join(
        f"{row['aggregator']} is ahead of quality weights in {row['ahead']} of {row['cells']} cells, behind in "
        f"{row['behind']}, and {row['open']} are open" for row in total.to_dict("records")) + "."]
    for axis in GRID_AXES:
        mean = cells.groupby(axis)["difference"].mean()
        if len(mean) > 1:
            out.append(f"As {_AXIS_NAMES[axis]} goes from {mean.index[0]:g} to {mean.index[-1]:g}, the mean difference goes "
                       f"from {mean.iloc[0]:+.2f} to {mean.iloc[-1]:+.2f} points.")
    return out


_AXIS_NAMES = {"share": "the share of wrong frames (factor)", "wrong quality": "the quality of wrong faces",
               "reliability": "the reliability of the scores"}


# -- sentences ------------------------------------------------------------------------------------------------------


def scores_sentence(missing: list[str]) -> str:
    """Say which scores a store lacks and what follows; empty if none."""
    return f"These clips have no {' and no '.join(missing)} score, so what needs one is not run." if missing else ""


def provenance(records: list[Record]) -> str:
    """Say in a sentence where records come from, and whether this library would make the same."""
    if not records:
        return "There are no such records."
    days = sorted({record.made[:10] for record in records})
    commits = sorted({record.commit for record in records})
    fresh = all(record.library == library_hash() for record in records)
    kind = "simulated" if all(record.simulated for record in records) else "real"
    if kind == "real" and any(record.simulated for record in records):
        kind = "partly simulated"
    return (f"{len(records)} records on {kind} clips, made {' to '.join(dict.fromkeys((days[0], days[-1])))} on "
            f"{', '.join(sorted({record.device for record in records}))}, commit {', '.join(commits)}, "
            + ("by the code that built this page." if fresh else "by an earlier version of the code than this page."))
