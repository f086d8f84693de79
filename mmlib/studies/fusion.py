"""What chapter 07 reads: which clips have which modality, pairs of arms, the weight of a second score, what arms cost.

``found`` is everywhere a series of records, indexed by the names of their arms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd

from mmlib.compare import as_frame, breakdown_frame, compare_arms, with_source
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment, arm_key
from mmlib.rank import Fallback
from mmlib.records import Record
from mmlib.retrieve import missing_scores
from mmlib.systems import CHOSEN, RANDOM

# Arms by the share of the scene model in the score of a clip.
WEIGHTS = {f"weight {share:g}": share for share in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)}
WIDTHS = ("face", "scene 32", "scene 64", "scene 128", "scene 256")
OTHERS = ("head", "body", "audio", "scene 128", "all")
SCORE = "score fusion"
PAIRS = {  # what the chapter speaks of: an arm and what it is held against
    "step": ("scene 128", "face"),
    "gate": ("scene 128, gated", "scene 128"),
    "score": (SCORE, "face"),
    "ways": (SCORE, "scene 128"),
    "width": ("scene 128", "scene 256"),
    "narrow": ("scene 32", "scene 128"),
    **{name: (name, "face") for name in ("head", "body", "audio")},
    "all": ("all", "scene 128"),
}
FROM_RANDOM = {
    f"random-{key}": (f"{PAIRS[key][0]}{RANDOM}", f"{PAIRS[key][1]}{RANDOM}") for key in ("step", "score", "ways")
}
FROM_RANDOM |= {"random-best": (SCORE + RANDOM, SCORE), "random-across": (SCORE, f"scene 128{RANDOM}")}
POOLS = (0, 4, 8, 20, 40, 60, 80, 100)  # percentiles of quality
LOW = {"quality": ("0–4", "4–8"), "frames": ("1–4", "5–9")}  # ranges of bad quality and of few face frames
PUBLISHED_STEP = 0.5  # points of MAP@100 for scene in the ladder of Dong et al., ACM MM 2019


def possible(group: dict[str, Experiment], store: ClipStore) -> dict[str, Experiment]:
    """Leave out the arms whose modalities the store lacks; without scores of the faces none of them sees scores."""
    can = {name: arm for name, arm in group.items() if {arm.modality, *arm.context} <= {None, *store.modalities}}
    return {n: replace(arm, aggregator="attention") if missing_scores(arm, store) else arm for n, arm in can.items()}


def weighted(face: Experiment, store: ClipStore) -> dict[str, Experiment]:
    """Return score-level fusion of the face arm with the scene arm, at every weight; empty without a scene.

    Score: (1 - weight) softmax of faces + weight softmax of scenes, two models that all weights share.
    """
    by = "quality" if "quality" in store.modalities["face"].columns else "norm"
    return at_every_weight(face, by) if "scene" in store.modalities else {}


def at_every_weight(face: Experiment, by: str = "quality") -> dict[str, Experiment]:
    """Return the arms of `weighted`, whatever the store; by: a column that its faces have.

    The scene model starts as the face's does, which their names say.
    """
    start = RANDOM * (face.start == "random")
    rule = Fallback(by=by, share=0.0, absent=None, lr=CHOSEN[f"scene{start}"])
    arm = replace(face, combine="softmax")
    return {name + start: replace(arm, fallback=replace(rule, weight=share)) for name, share in WEIGHTS.items()}


def named(records: Iterable[Record], plan: Mapping[str, Experiment]) -> pd.Series:
    """Index records by the names of their arms, whatever their world."""
    known = {arm_key(arm): name for name, arm in plan.items()}
    records = list(records)
    names = [known.get(arm_key(record.experiment), "") for record in records]
    if "" in names:
        raise ValueError(f"record {records[names.index('')].key} is of no arm of this page")
    return pd.Series(records, index=names, dtype=object)


def against(found: pd.Series, chosen: Iterable[str], baseline: str) -> pd.DataFrame:
    """Compare those of the chosen arms that were run with ``baseline``, which is added; as ``compare_arms``."""
    return compare_arms(found, "arm", baseline, names=found.index, arms={baseline, *chosen})


def costs(found: pd.Series) -> pd.DataFrame:
    """Return what arms cost and see, mean over seeds: arm, parameters, training, s, clips trained on, clips ranked."""
    # A record counts the parameters of its first model; a second one is that of the arm ``scene``.
    frame = as_frame(found).assign(arm=found.index, seconds=[record.seconds["fit"] for record in found])
    alone = frame[frame["arm"] == "scene"].set_index("seed")["parameters"]
    frame["parameters"] += frame["seed"].map(alone).where(frame["fallback"].notna(), 0)
    words = {"seconds": "training, s", "train_clips": "clips trained on", "gallery_clips": "clips ranked"}
    return frame.groupby("arm", sort=False)[["parameters", *words]].mean().rename(columns=words).reset_index()


def coverage(store: ClipStore) -> pd.DataFrame:
    """Count clips by split and face (yes or no), with the share of them that have each other modality (width)."""
    others = {name: source for name, source in store.modalities.items() if name != "face"}
    has = {f"{name} ({source.feature.shape[1]})": source.count > 0 for name, source in others.items()}
    face = np.where(store.modalities["face"].count > 0, "yes", "no")
    groups = pd.DataFrame(has, index=range(len(store))).groupby([store.clips["split"].to_numpy(), face])
    order = pd.MultiIndex.from_product([("train", "val"), ("yes", "no")], names=["split", "face"])
    clips = groups.size().reindex(order, fill_value=0).rename("clips")
    return pd.concat([clips, groups.mean().reindex(order)], axis=1).reset_index()


def absent(found: pd.Series) -> pd.DataFrame:
    """Count the clips with a face, of the first seed, that lack a context: context, train, gallery."""
    frame = as_frame(record for record in found if record.experiment["modality"]).filter(like="_without_")
    first = frame.bfill().iloc[0]
    counts = {part: first.filter(like=part).rename(lambda name: name.split("_")[-1]) for part in ("train", "gallery")}
    return pd.DataFrame(counts).rename_axis("context").reset_index()


def gains(found: pd.Series, chosen: Iterable[str], baseline: str = "face") -> pd.DataFrame:
    """Return the gain of the chosen arms over ``baseline``, points: arm, group, range, clips, precision, gain.

    The percentiles of quality are pooled by ``POOLS``, since a single one holds too few clips for a difference.
    """
    part = found[found.index.isin([baseline, *chosen])]
    frame = breakdown_frame(part, "arm", names=part.index)
    quality, names = frame["group"] == "quality", [f"{low}–{high}" for low, high in pairwise(POOLS)]
    low = frame.loc[quality, "range"].str.split("–").str[0].astype(float)
    frame.loc[quality, "range"] = pd.cut(low, POOLS, right=False, labels=names).astype(str)
    frame = _over_clips(frame, ["arm", "group", "range"], "precision")
    start = frame[frame["arm"] == baseline].set_index(["group", "range"])["precision"].rename("start")
    frame = frame.join(start, on=["group", "range"])
    return with_source(frame.assign(gain=100 * (frame["precision"] - frame.pop("start"))), part)


def low_and_rest(groups: pd.DataFrame) -> pd.DataFrame:
    """Sum the gains of ``gains`` up in the ranges ``LOW`` and outside of them: group, arm, side, clips, gain."""
    known = groups[groups["group"].isin(LOW)]
    side = ["low" if line in LOW[group] else "rest" for group, line in zip(known["group"], known["range"])]
    return _over_clips(known.assign(side=side), ["group", "arm", "side"], "gain")


def _over_clips(frame: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Average ``value`` within groups, every clip alike; columns ``by``, clips, ``value``."""
    total = frame.assign(**{value: frame[value] * frame["clips"]}).groupby(by, sort=False)[["clips", value]].sum()
    return total.assign(**{value: total[value] / total["clips"]}).reset_index()


def held_out(found: pd.Series, start: str = "") -> tuple[pd.Series, pd.DataFrame]:
    """Return score-level fusion at a weight that was not chosen on what it is judged by, and that weight.

    That of a world is best in the mean of the others.  Of one world or data set, either half of the identities, every
    second one, has the weight that is best on the other; the breakdown is that of the best on all.  Of equal weights
    the lowest counts.  start: `RANDOM`, or class means.  Returns a record a seed, named ``SCORE`` and the start, and
    columns judged, weight; nothing without weights.
    """
    names = [name for name in WEIGHTS if name + start in found.index]
    if not names:
        return found[:0], pd.DataFrame(columns=["judged", "weight"])
    table = [list(found.loc[[name + start]]) for name in names]  # (weights, seeds)
    if table[0][0].experiment["data"] == "simulated" and len(table[0]) > 1:
        judged = [f"world {record.experiment['seed']}" for record in table[0]]
        best = _best_of_others([[np.mean(record.ap) for record in line] for line in table])
        records = [table[weight][world] for world, weight in enumerate(best)]
    else:
        judged = ["identities 0, 2, …", "identities 1, 3, …"]
        ap = np.array([[record.ap for record in line] for line in table])  # (weights, seeds, identities)
        half = np.arange(ap.shape[2]) % 2
        best = _best_of_others([[line[:, half == side].sum() for side in (0, 1)] for line in ap])
        mixed = np.where(half, ap[best[1]], ap[best[0]])
        records = [
            replace(record, ap=one.tolist(), measures=record.measures | {"map_at_100": float(one.mean())})
            for record, one in zip(table[ap.mean((1, 2)).argmax()], mixed)
        ]
    chosen = pd.DataFrame({"judged": judged, "weight": [WEIGHTS[names[weight]] for weight in best]})
    return pd.Series(records, index=[SCORE + start] * len(records)), chosen


def _best_of_others(score: list) -> list[int]:
    """Return for each column of scores (weights, parts) the weight with the best mean of the other columns."""
    return [int(np.delete(score, part, axis=1).mean(1).argmax()) for part in range(len(score[0]))]


def weight_frame(found: pd.Series) -> pd.DataFrame:
    """Compare every weight with weight 0: weight, else as ``compare_arms``; without weights the face arm."""
    names = {name: share for name, share in WEIGHTS.items() if name in found.index} or {"face": 0.0}
    frame = against(found, names, baseline=next(iter(names))).rename(columns={"arm": "weight"})
    return frame.assign(weight=frame["weight"].map(names)).sort_values("weight", ignore_index=True)


def weight_lines(found: pd.Series) -> pd.DataFrame:
    """Return the difference of every weight from weight 0 seed by seed, in points: seed, weight, difference."""
    part = found[found.index.isin(WEIGHTS)]
    rows = [(record.experiment["seed"], WEIGHTS[name], 100 * np.mean(record.ap)) for name, record in part.items()]
    frame = pd.DataFrame(rows, columns=["seed", "weight", "difference"]).sort_values("weight", kind="stable")
    frame["difference"] -= frame.groupby("seed")["difference"].transform("first")
    return with_source(frame, part)


def largest_gap(found: pd.Series) -> float:
    """Return the largest difference in AP between the face arm ranked by log softmax and, at weight 0, by softmax."""
    both = zip(found.loc[["face"]], found.loc[["weight 0" if "weight 0" in found.index else "face"]], strict=True)
    return max(float(np.abs(np.subtract(a.ap, b.ap)).max()) for a, b in both)
