"""What chapter 09 reads: the fallback rules as arms, their sweeps, and where the points are lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from mmlib import metrics, systems
from mmlib.compare import breakdown_frame, compare_arms
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.rank import Fallback
from mmlib.records import Record
from mmlib.retrieve import Retrieval

THRESHOLD = 8.867  # mean raw norm of the face embeddings of a clip, in the released code
DESCRIBED = Fallback(by="quality", share=0.01, low=0.8, absent=1.0)
CODED = Fallback(by="norm, float16", threshold=THRESHOLD, low=0.8, absent=0.95)
NONE, NONE_FLAT = "no fallback", "no fallback, scale 1"


def base(store: ClipStore, **fields) -> Experiment:
    """Return the system whose scores the rules mix: face by hand-made weights, scene if there is one; fields of it."""
    fused = systems.arms(systems.FUSIONS)["scene 128"]
    scores = {"quality", "det"} <= set(store.modalities["face"].columns)
    context = tuple(name for name in fused.context if name in store.modalities)
    fields |= {"aggregator": "quality" if scores else "norm", "context": context, "combine": "softmax"}
    return replace(fused, **fields)


def rules(base: Experiment) -> dict[str, Experiment]:
    """Name the rules, all on the trained members of ``base``; without a scene there is no rule but none.

    ``coded`` has the constants and the flat softmax of the released code, so it has a baseline of its own.
    """
    flat, coded = replace(base, scale=systems.ONE_NAME_AS_CODED.scale), replace(base, fallback=CODED)
    every = {"clips without a face": with_rule(base, share=0.0), "described": with_rule(base), NONE_FLAT: flat}
    every |= {"coded": replace(flat, fallback=CODED), "coded, scale 30": coded}
    return {NONE: base} | (every if base.context else {})


def with_rule(base: Experiment, **changed) -> Experiment:
    """Return the experiment with the described rule, by the scores that it has, and what is ``changed`` in the rule."""
    rule = replace(DESCRIBED, **{"by": base.aggregator} | changed)
    if not (rule.share and rule.low):  # one rule, whatever it goes by
        rule = replace(rule, by=base.aggregator, share=0.0, low=DESCRIBED.low)
    return replace(base, fallback=rule)


def sweeps(base: Experiment) -> pd.DataFrame:
    """List the points of the sweeps: sweep (``share``, ``low`` or ``absent``), line, x, experiment."""
    shares, weights = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1), (0.0, 0.2, 0.5, 0.8, 1.0)
    lines: list[tuple[str, str, tuple[float, ...], dict]]
    lines = [("share", by, shares, {"by": by}) for by in dict.fromkeys([base.aggregator, "norm"])]
    lines += [("low", f"lowest {100 * share:g}%", weights, {"share": share}) for share in (0.01, 0.05)]
    lines += [("absent", "described", (0.5, 0.8, 0.95, 1.0, 1.2), {})]
    rows: list[tuple] = []
    for sweep, line, values, fixed in lines if base.context else ():
        rows += [(sweep, line, x, with_rule(base, **fixed, **{sweep: x})) for x in values]
    return pd.DataFrame(rows, columns=["sweep", "line", "x", "experiment"])


def pick(found: Mapping[Experiment, Record], named: Mapping) -> tuple[list[Record], list[str]]:
    """Return the records of experiments by name, one for every seed that was run, and the name of each."""
    seeds = dict.fromkeys(experiment.seed for experiment in found)
    records = [found[replace(experiment, seed=seed)] for experiment in named.values() for seed in seeds]
    return records, [name for name in named for _ in seeds]


def baselines(records: Iterable[Record], names: Iterable[str]) -> pd.Series:
    """Name the baseline of each rule: scores of the same scale, without a rule."""
    return pd.Series({n: NONE_FLAT if r.experiment["scale"] == 1 else NONE for r, n in zip(records, names)})


def rule_frame(records: Iterable[Record], names: Iterable[str]) -> pd.DataFrame:
    """Compare every rule with its baseline, best first: rule, baseline and the columns of ``compare_arms``."""
    of = baselines(records, names)
    parts = [compare_arms(records, "rule", name, names=names, arms=of.index[of == name]) for name in of.unique()]
    frame = pd.concat(parts).sort_values("map_at_100", ascending=False, ignore_index=True)
    frame.insert(1, "baseline", frame["rule"].map(of))
    return frame


def sweep_frame(found: Mapping[Experiment, Record], points: pd.DataFrame, base: Experiment) -> pd.DataFrame:
    """Compare every point of the sweeps with no fallback: sweep, line, x and the columns of ``compare_arms``."""
    records, names = pick(found, {NONE: base} | dict(enumerate(points["experiment"])))
    frame = compare_arms(records, "point", NONE, names=names).set_index("point")
    return points.drop(columns="experiment").join(frame)


def extremes(curve: pd.DataFrame) -> pd.DataFrame:
    """Return where each line of ``sweep_frame`` is best and worst: sweep, line, best, worst (x), apart (points)."""
    at = curve.groupby(["sweep", "line"], sort=False)["difference"].agg(["idxmax", "idxmin"])
    best, worst = (curve.loc[at[name]].reset_index(drop=True) for name in at)
    apart = best["difference"] - worst["difference"]
    return best[["sweep", "line"]].assign(best=best["x"], worst=worst["x"], apart=apart)


def breakdown_gain(records: Iterable[Record], names: Iterable[str]) -> pd.DataFrame:
    """Return the gain of each rule in precision, points, by percentile of quality: rule, range, clips, gain."""
    frame = breakdown_frame(records, "rule", names=names).query("group == 'quality'").reset_index(drop=True)
    precision = frame.set_index(["rule", "range"])["precision"]
    before = precision.reindex(zip(frame["rule"].map(baselines(records, names)), frame["range"]))
    return frame[["rule", "range", "clips"]].assign(gain=100 * (frame["precision"] - before.to_numpy()))


def ceiling(store: ClipStore, threshold: float = THRESHOLD) -> dict[str, float]:
    """Measure what a system of faces cannot find: relevant val clips, those without a face, the MAP@100 of a perfect
    ranking of the others, ranked clips without a face, and the share of those with one whose norm is below a threshold.
    """
    clips, val = store.select("val", labelled=True), store.select("val")
    identity, has = store.identity_of(clips), store.modalities["face"].count > 0
    relevant, found = np.bincount(identity), np.bincount(identity, weights=has[clips])
    best = np.minimum(found, 100)[relevant > 0] / relevant[relevant > 0]
    below = store.clip_means("face", CODED.by)[val][has[val]] < threshold
    counts = {"relevant": len(clips), "without": int((~has[clips]).sum()), "map_at_100": float(best.mean())}
    return counts | {"gallery_without": int((~has[val]).sum()), "below": float(below.mean())}


def quality_groups(store: ClipStore, by: str, shares: Iterable[float] = (0.01, 0.05)) -> pd.Categorical:
    """Return the group of every clip (N,), in the order of the groups; none for clips outside val.

    ``no face``, the lowest by ``by`` cut at the shares, such as ``lowest 1 %`` and ``1–5 %``, among all val clips with
    a face as the rule has it, and ``the rest``.
    """
    val, has = store.select("val"), store.select("val", having="face")
    value, shares = store.clip_means("face", by)[has], sorted(shares)
    names = [f"{100 * a:g}–{100 * b:g} %" if a else f"lowest {100 * b:g} %" for a, b in zip([0.0, *shares], shares)]
    out = np.full(len(store), None)
    out[val], out[has] = "no face", "the rest"
    for share, name in reversed(list(zip(shares, names))):  # the smaller share within the larger
        out[has[Fallback(by=by, share=share, low=1.0).weights(value) == 1]] = name
    return pd.Categorical(out, ["no face", *names, "the rest"], ordered=True)


def lost_points(found: Retrieval, store: ClipStore, group: pd.Categorical) -> pd.DataFrame:
    """Return the points of MAP@100 that each group of clips loses, in their order: group, clips, precision, lost.

    MAP is a mean over queries and their clips of a precision, so all that is lost adds up to what is missing to 100.
    """
    precision = np.zeros(len(store))
    precision[found.gallery] = metrics.clip_precision(found.ranking, found.hits, len(found.gallery))
    clips = store.select("val", labelled=True)
    identity = store.identity_of(clips)
    weight = 1 / np.bincount(identity)[identity] / len(found.queries)
    frame = pd.DataFrame({"group": group[clips], "clips": 1, "precision": precision[clips]})
    frame["lost"] = 100 * weight * (1 - frame["precision"])
    measures = {"clips": "sum", "precision": "mean", "lost": "sum"}
    return frame.groupby("group", observed=True).agg(measures).reset_index().astype({"group": str})
