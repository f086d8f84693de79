"""What chapter 07 reads: which clips have which modality, arms by name, the weight of a second score, what an arm costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from mmlib.compare import breakdown_frame, compare_arms, listed
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.rank import Fallback
from mmlib.records import Record
from mmlib.retrieve import missing_scores
from mmlib.systems import CHOSEN

WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # share of the scene model in the score of a clip
WIDTHS = (32, 64, 128, 256)  # dimensions that a scene is reduced to
NETWORK = ("face", *(f"scene {width}" for width in WIDTHS), "scene 128, gated")
OTHERS = ("face", "head", "body", "audio", "scene 128", "all")
SCORE = "score fusion"
QUALITY_POOLS = (0, 4, 8, 20, 40, 60, 80, 100)  # percentiles of quality
FEW = ("1–4", "5–9")  # ranges of face frames that count as few
PUBLISHED_STEP = 0.5  # points of MAP@100 for scene in the ladder of Dong et al., ACM MM 2019


# -- the arms -------------------------------------------------------------------------------------------------------


def possible(group: dict[str, Experiment], store: ClipStore) -> dict[str, Experiment]:
    """Leave out the arms whose modalities the store lacks; without scores of the faces none of them sees scores."""
    out = {}
    for name, arm in group.items():
        if any(asked not in store.modalities for asked in (arm.modality, *arm.context) if asked is not None):
            continue
        out[name] = replace(arm, aggregator="attention") if missing_scores(arm, store) else arm
    return out


def left_out(group: dict[str, Experiment], store: ClipStore) -> str:
    """Say which arms the store leaves out and why; empty if none."""
    if not (gone := [name for name in group if name not in possible(group, store)]):
        return ""
    lacking = dict.fromkeys(name for arm in group.values() for name in arm.context if name not in store.modalities)
    if not any(arm.context for arm in possible(group, store).values()):
        return (
            "These clips have faces and nothing else, so there is nothing to fuse: this page shows the face arm alone."
        )
    return f"These clips have no {listed(lacking)}, so these arms are not run: {', '.join(gone)}."


def weighted(face: Experiment, store: ClipStore) -> dict[str, Experiment]:
    """Return score-level fusion of the face arm with the scene arm, at every weight; empty without a scene.

    The score of a clip is (1 - weight) times the softmax of the face arm plus weight times that of the scene model.  All
    weights share both models, each trained at the rate that was chosen for its arm.
    """
    if "scene" not in store.modalities:
        return {}
    rule = Fallback(
        by="quality" if "quality" in store.modalities[face.modality].columns else "norm",
        share=0.0,
        absent=None,
        lr=CHOSEN["scene"],
    )
    return {
        weight_name(weight): replace(face, combine="softmax", fallback=replace(rule, weight=weight))
        for weight in WEIGHTS
    }


def weight_name(weight: float) -> str:
    """Name the arm of a weight."""
    return f"weight {weight:g}"


def by_name(names: Sequence[str], records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group records by the names of their arms; as many records a name, in the order of the names."""
    each = len(records) // len(names)
    return {name: list(records[i * each : (i + 1) * each]) for i, name in enumerate(names)}


def against(found: dict[str, list[Record]], chosen: Iterable[str], baseline: str) -> pd.DataFrame:
    """Compare those of the chosen arms that were run with ``baseline``, which is added; column ``arm``, else as ``compare_arms``."""
    chosen = [name for name in dict.fromkeys((baseline, *chosen)) if name in found]
    flat = [(name, record) for name in chosen for record in found[name]]
    return compare_arms([record for _, record in flat], by="arm", baseline=baseline, names=[name for name, _ in flat])


def gains(found: dict[str, list[Record]], chosen: Iterable[str], baseline: str = "face") -> pd.DataFrame:
    """Return the breakdown of the chosen arms that were run with the gain over ``baseline`` in points of precision.

    Columns: arm, group, range, clips, precision, gain.  The percentiles of quality are pooled at ``QUALITY_POOLS``, since
    a single one holds too few clips for a difference of two arms; precisions are then means over clips.
    """
    flat = [(name, record) for name in dict.fromkeys((baseline, *chosen)) if name in found for record in found[name]]
    frame = breakdown_frame([record for _, record in flat], "arm", names=[name for name, _ in flat])
    pooled = [_pool(line) if group == "quality" else line for group, line in zip(frame["group"], frame["range"])]
    frame = _over_clips(frame.assign(range=pooled), ["arm", "group", "range"])
    start = frame[frame["arm"] == baseline].set_index(["group", "range"])["precision"]
    place = pd.MultiIndex.from_frame(frame[["group", "range"]])
    return frame.assign(gain=100 * (frame["precision"] - start.reindex(place).to_numpy()))


def _pool(line: str) -> str:
    """Name the pool of a range of percentiles.

    >>> _pool("12–16")
    '8–20'
    """
    place = int(np.searchsorted(QUALITY_POOLS, float(line.split("–")[0]), side="right"))
    return f"{QUALITY_POOLS[place - 1]}–{QUALITY_POOLS[place]}"


def _over_clips(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Average precision within groups, every clip alike; columns ``by``, clips, precision."""
    total = (
        frame.assign(precision=frame["precision"] * frame["clips"])
        .groupby(by, sort=False)[["clips", "precision"]]
        .sum()
    )
    return total.assign(precision=total["precision"] / total["clips"]).reset_index()


def costs(found: dict[str, list[Record]]) -> pd.DataFrame:
    """Return what arms cost, mean over seeds: arm, parameters, seconds (of training, both models), gallery (clips).

    A record counts the parameters of its first model; those of a second one are added from the arm ``scene``.
    """
    scene = {record.experiment["seed"]: record.measures["parameters"] for record in found.get("scene", [])}
    rows = []
    for name, records in found.items():
        own = [
            r.measures["parameters"] + (scene.get(r.experiment["seed"], np.nan) if r.experiment["fallback"] else 0)
            for r in records
        ]
        rows.append(
            (
                name,
                np.mean(own),
                np.mean([r.seconds["fit"] for r in records]),
                np.mean([r.measures["gallery_clips"] for r in records]),
            )
        )
    return pd.DataFrame(rows, columns=["arm", "parameters", "seconds", "gallery"])


# -- what a clip has ------------------------------------------------------------------------------------------------


def coverage(store: ClipStore) -> pd.DataFrame:
    """Count clips by split and by whether they have a face, with the share of them that have each other modality.

    Columns: split, face (``yes`` or ``no``), clips, then one a modality, named with its width.
    """
    face = store.modalities["face"].count > 0
    others = {
        f"{name} ({source.feature.shape[1]})": source.count > 0
        for name, source in store.modalities.items()
        if name != "face"
    }
    rows = []
    for split in ("train", "val"):
        inside = store.clips["split"].to_numpy() == split
        for says, has in (("yes", face), ("no", ~face)):
            group = inside & has
            rows.append(
                {
                    "split": split,
                    "face": says,
                    "clips": int(group.sum()),
                    **{name: there[group].mean() if group.any() else np.nan for name, there in others.items()},
                }
            )
    return pd.DataFrame(rows)


def absent_sentence(found: dict[str, list[Record]]) -> str:
    """Say how many of the clips that the arms train on and rank lack a context; empty if no arm has one."""
    rows: dict[str, tuple[float, float]] = {}
    for records in found.values():
        for record in records[:1]:
            for name in record.experiment["context"] if record.experiment["modality"] else ():
                rows[name] = tuple(record.measures[f"{part}_without_{name}"] for part in ("train", "gallery"))
    if not rows:
        return ""
    if not any(sum(pair) for pair in rows.values()):
        return (
            f"Of the clips with a face, in training and in the gallery, none lacks its {listed(rows, 'or')}: on these "
            "clips the learned vector is never used, and nothing on this page says what it is worth."
        )
    return (
        "Of the clips with a face, "
        + "; ".join(
            f"{train:,.0f} in training and {gallery:,.0f} in the gallery have no {name}"
            for name, (train, gallery) in rows.items()
        )
        + "."
    )


# -- the weight of a second score -----------------------------------------------------------------------------------


def held_out(found: dict[str, list[Record]]) -> tuple[list[Record], pd.DataFrame]:
    """Return score-level fusion at a weight that was not chosen on what it is judged by, and that weight.

    With several simulated worlds the weight for a world is the best mean of the others.  Otherwise the identities are
    halved, every second one, and the weight for a half is the best of the other half: the AP of a record then comes from
    two weights, and its breakdown from the weight that is best on all identities.  Of equal weights the lowest is taken.
    Returns a record a seed and the columns judged, weight; nothing if no weights were run.
    """
    weights = [weight for weight in WEIGHTS if weight_name(weight) in found]
    table = [found[weight_name(weight)] for weight in weights]  # (weights, seeds)
    if not table:
        return [], pd.DataFrame(columns=["judged", "weight"])
    worlds = table[0][0].experiment["data"] == "simulated" and len(table[0]) > 1
    if worlds:
        score = np.array([[np.mean(record.ap) for record in line] for line in table])
        best = [int(np.delete(score, i, axis=1).mean(1).argmax()) for i in range(score.shape[1])]
        rows = [(f"world {record.experiment['seed']}", weights[w]) for record, w in zip(table[0], best)]
        return [table[w][i] for i, w in enumerate(best)], pd.DataFrame(rows, columns=["judged", "weight"])
    ap = np.array([[record.ap for record in line] for line in table])  # (weights, seeds, identities)
    best = [int(ap[:, :, 1 - half :: 2].mean((1, 2)).argmax()) if ap.shape[2] > 1 else 0 for half in (0, 1)]
    whole = int(ap.mean((1, 2)).argmax())
    chosen = np.take(best, np.arange(ap.shape[2]) % 2)
    records = [
        replace(table[whole][i], ap=one.tolist(), measures=table[whole][i].measures | {"map_at_100": float(one.mean())})
        for i, one in enumerate(np.take_along_axis(ap, chosen[None, None], axis=0)[0])
    ]
    judged = ["identities 0, 2, …", "identities 1, 3, …"]
    return records, pd.DataFrame({"judged": judged, "weight": [weights[w] for w in best]})


def weight_frame(found: dict[str, list[Record]]) -> pd.DataFrame:
    """Compare every weight with weight 0: weight (in order) for arm, else as ``compare_arms``; without weights the face arm."""
    names = {weight_name(weight): weight for weight in WEIGHTS if weight_name(weight) in found} or {"face": 0.0}
    frame = against(found, names, baseline=next(iter(names))).rename(columns={"arm": "weight"})
    return frame.assign(weight=frame["weight"].map(names)).sort_values("weight", ignore_index=True)


def weight_lines(found: dict[str, list[Record]]) -> pd.DataFrame:
    """Return the difference of every weight from weight 0 seed by seed, in points: seed, weight, difference."""
    start = [np.mean(record.ap) for record in found.get(weight_name(0.0), [])]
    rows = [
        (record.experiment["seed"], weight, 100 * (np.mean(record.ap) - zero))
        for weight in WEIGHTS
        for record, zero in zip(found.get(weight_name(weight), []), start)
    ]
    return pd.DataFrame(rows, columns=["seed", "weight", "difference"])


def largest_gap(found: dict[str, list[Record]]) -> float:
    """Return the largest difference in AP between the face arm ranked by log softmax and, at weight 0, by softmax."""
    pairs = zip(found["face"], found.get(weight_name(0.0), found["face"]), strict=True)
    return max(float(np.abs(np.subtract(a.ap, b.ap)).max()) for a, b in pairs)


# -- the search for learning rates ----------------------------------------------------------------------------------


# -- sentences ------------------------------------------------------------------------------------------------------


def interval(row) -> str:
    """Write a row of ``compare_arms`` as a difference with its interval.

    >>> interval({"difference": 0.5, "low": -0.25, "high": 1.25})
    '+0.50 points (95 % interval -0.25 to +1.25)'
    """
    return f"{row['difference']:+.2f} points (95 % interval {row['low']:+.2f} to {row['high']:+.2f})"


def verdict(found: dict[str, list[Record]], arm: str, baseline: str) -> str:
    """Say in a clause how an arm stands to another; that it was not run if so."""
    if arm not in found or baseline not in found:
        return f"{arm} against {baseline} was not run"
    row = against(found, [arm], baseline).set_index("arm").loc[arm]
    word = "is ahead of" if row["low"] > 0 else "is behind" if row["high"] < 0 else "cannot be told apart from"
    return f"{arm} {word} {baseline}, {interval(row)}"


def sample(found: dict[str, list[Record]]) -> str:
    """Say what intervals are over: ``3 worlds`` or ``60 identities``."""
    row = against(found, ["face"], "face").iloc[0]
    return f"{row['n']:.0f} {row['interval']}"


def width_sentence(found: dict[str, list[Record]]) -> str:
    """Say what it costs to reduce a scene to 128 dimensions, against twice as many and against a quarter."""
    if "scene 128" not in found:
        return "No scene was reduced."
    table = costs(found).set_index("arm")
    size, wide = table["parameters"]["scene 128"], table["parameters"]["scene 256"]
    up, down = verdict(found, "scene 128", "scene 256"), verdict(found, "scene 32", "scene 128")
    return (
        f"Reduced to 128 dimensions instead of 256, the model has {size:,.0f} parameters instead of {wide:,.0f}, and {up}. "
        f"At a quarter of the width, {down}."
    )


def published_sentence(found: dict[str, list[Record]], simulated: bool) -> str:
    """Hold the step from face to scene 128 against the published one."""
    if "scene 128" not in found:
        return "There is no step to hold against it here."
    row = against(found, ["scene 128"], "face").set_index("arm").loc["scene 128"]
    above, below = row["low"] > PUBLISHED_STEP, row["high"] < PUBLISHED_STEP
    says = "is larger than" if above else "is smaller than" if below else "cannot be told apart from"
    out = f"Our step, {interval(row)}, {says} the published one."
    if simulated and row["interval"] == "worlds" and (above or below):
        out += (
            f" Read as it stands, the scene of the stand-in is too {'strong' if above else 'weak'} beside its faces: a "
            "weakness of the stand-in, and no finding about fusion."
        )
    return out


def gallery_sentence(found: dict[str, list[Record]]) -> str:
    """Say how many clips the arm of scenes alone learns from and ranks, against the others."""
    if "scene" not in found:
        return ""
    keys = ("train_clips", "gallery_clips", "map_at_100")
    face, scene = ({key: np.mean([r.measures[key] for r in found[name]]) for key in keys} for name in ("face", "scene"))
    out = (
        f"The arm of scenes alone needs no face, so it learns from {scene['train_clips']:,.0f} clips instead of "
        f"{face['train_clips']:,.0f} and ranks {scene['gallery_clips']:,.0f} instead of {face['gallery_clips']:,.0f}: its "
        f"MAP@100 is {scene['map_at_100']:.4f}."
    )
    if _have_scenes(found):
        inside = np.mean([r.measures["map_at_100"] for r in found[weight_name(1.0)]])
        out += (
            f" Over the gallery of the others a scene model reaches {inside:.4f}, since a clip without a face then counts "
            "as not found."
        )
    return out


def _have_scenes(found: dict[str, list[Record]]) -> bool:
    """Say whether every clip with a face has a scene too, so that a weight of 1 is the scene model and nothing else."""
    return not any(record.measures["gallery_without_scene"] for record in found["scene 128"])


def where_sentence(groups: pd.DataFrame) -> str:
    """Say what fusion gains over the face arm among clips of bad quality and of few frames, and among the others.

    groups: as of ``gains``.
    """
    bad = (f"the worst {QUALITY_POOLS[2]} % by quality", ("0–4", "4–8"))
    parts = []
    for arm in ("scene 128", SCORE):
        for group, (what, low) in {"quality": bad, "frames": ("clips of fewer than ten face frames", FEW)}.items():
            frame = groups[groups["group"] == group].assign(low=lambda f: f["range"].isin(low))
            mean = _over_clips(frame[frame["arm"].isin(("face", arm))], ["arm", "low"]).set_index(["low", "arm"])
            if len(mean) == 4:  # both arms, both kinds of clips
                gain = {
                    kind: 100 * (mean["precision"][kind, arm] - mean["precision"][kind, "face"])
                    for kind in (True, False)
                }
                parts.append(
                    f"{arm} gains {gain[True]:+.2f} points of precision among {what} ({mean['clips'][True, arm]:.0f} "
                    f"clips), {gain[False]:+.2f} among the others"
                )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if parts else "There is nothing to break down beside the face arm."


def answer(found: dict[str, list[Record]], simulated: bool) -> str:
    """Answer the question of the chapter in a sentence."""
    if "scene 128" not in found:
        return "These clips have no scene, so the question has no answer here."
    pairs = (("scene 128", "face"), (SCORE, "scene 128"), ("scene 128", "scene 256"))
    clauses = "; ".join(verdict(found, *pair) for pair in pairs)
    return f"On {'the simulated' if simulated else 'these'} clips, over {sample(found)}, {clauses}."
