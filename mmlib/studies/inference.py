"""What chapter 09 reads: the fallback rules as arms, their sweeps, and where the points are lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from mmlib import metrics, systems
from mmlib.compare import compare_arms
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.rank import Fallback
from mmlib.records import Record
from mmlib.retrieve import Retrieval

THRESHOLD = 8.867  # mean raw norm of the face embeddings of a clip, in the released code
SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
WEIGHTS = (0.0, 0.2, 0.5, 0.8, 1.0)
FACTORS = (0.5, 0.8, 0.95, 1.0, 1.2)
NONE, NONE_FLAT = "no fallback", "no fallback, scale 1"


def base(store: ClipStore, **fields) -> Experiment:
    """Return the system whose scores the rules mix: face by hand-made weights, and scene; what the store lacks is left out.

    fields: of the experiment, such as data, profile and seed.
    """
    out = replace(systems.arms(systems.FUSIONS)["scene 128"], aggregator="quality", combine="softmax", **fields)
    scores = {"quality", "det"} <= set(store.modalities["face"].columns)
    return replace(
        out,
        aggregator="quality" if scores else "norm",
        context=tuple(name for name in out.context if name in store.modalities),
    )


def _criteria(base: Experiment) -> tuple[str, ...]:
    return ("quality", "norm") if base.aggregator == "quality" else ("norm",)


def rules(base: Experiment) -> dict[str, Experiment]:
    """Name the rules, all on the trained members of ``base``; without a scene there is no rule but none.

    ``coded`` has the constants and the flat softmax of the released code, so it has a baseline of its own.
    """
    out = {NONE: base}
    if base.context:
        coded = Fallback(by="norm", threshold=THRESHOLD, low=0.8, absent=0.95)
        out |= {
            "clips without a face": with_rule(base, share=0.0),
            "described": with_rule(base),
            NONE_FLAT: replace(base, scale=1.0),
            "coded": replace(base, scale=1.0, fallback=coded),
            "coded, scale 30": replace(base, fallback=coded),
        }
    return out


def with_rule(
    base: Experiment, *, by: str = "", share: float = 0.01, low: float = 0.8, absent: float = 1.0
) -> Experiment:
    """Return the experiment with a fallback; a share or a weight of 0 is one and the same rule."""
    by = by or _criteria(base)[0]
    if not share or not low:
        by, share, low = _criteria(base)[0], 0.0, 0.8
    return replace(base, fallback=Fallback(by=by, share=share, low=low, absent=absent))


def sweeps(base: Experiment) -> pd.DataFrame:
    """List the points of the sweeps: sweep (``share``, ``low`` or ``absent``), line, x, experiment."""
    points = []
    if base.context:
        points += [("share", by, x, with_rule(base, by=by, share=x)) for by in _criteria(base) for x in SHARES]
        points += [
            ("low", f"lowest {share:.0%}", x, with_rule(base, share=share, low=x))
            for share in (0.01, 0.05)
            for x in WEIGHTS
        ]
        points += [("absent", "described", x, with_rule(base, absent=x)) for x in FACTORS]
    return pd.DataFrame(points, columns=["sweep", "line", "x", "experiment"])


# -- what the rules are worth ---------------------------------------------------------------------------------------


def labelled(records: Iterable[Record], names: Iterable[str], by: str = "rule") -> list[Record]:
    """Return the records with their names as one more field of their experiments, so that ``compare_arms`` can group by it."""
    return [
        replace(record, experiment=record.experiment | {by: name}) for record, name in zip(records, names, strict=True)
    ]


def pick(found: Mapping[Experiment, Record], named: Mapping[str, Experiment]) -> list[Record]:
    """Return the records of named experiments over all seeds that were run, labelled by name."""
    seeds = dict.fromkeys(experiment.seed for experiment in found)
    pairs = [(found[replace(e, seed=seed)], name) for name, e in named.items() for seed in seeds]
    return labelled(*zip(*pairs)) if pairs else []


def rule_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Compare every rule with the same scores without one: the columns of ``compare_arms`` by rule, and ``baseline``.

    records: labelled by ``rules``.  A rule at the flat scale has the baseline of that scale.
    """
    records = list(records)
    flat = {r.experiment["rule"] for r in records if r.experiment["scale"] == 1}
    parts = []
    for baseline, chosen in ((NONE, lambda name: name not in flat), (NONE_FLAT, lambda name: name in flat)):
        if mine := [r for r in records if chosen(r.experiment["rule"])]:
            parts.append(compare_arms(mine, by="rule", baseline=baseline).assign(baseline=baseline))
    frame = pd.concat(parts, ignore_index=True).sort_values("map_at_100", ascending=False, ignore_index=True)
    return frame[["rule", "baseline", *[name for name in frame if name not in ("rule", "baseline")]]]


def sweep_frame(found: Mapping[Experiment, Record], points: pd.DataFrame, base: Experiment) -> pd.DataFrame:
    """Compare every point of the sweeps with no fallback: sweep, line, x and the columns of ``compare_arms``."""
    named = {str(place): experiment for place, experiment in enumerate(points["experiment"])}
    frame = compare_arms(pick(found, {NONE: base} | named), by="rule", baseline=NONE).set_index("rule").loc[list(named)]
    return pd.concat([points.drop(columns="experiment"), frame.reset_index(drop=True)], axis=1)


def breakdown_gain(records: Iterable[Record]) -> pd.DataFrame:
    """Return what each rule changes in the precision of clips by percentile of quality: rule, range, clips, gain (points).

    records: labelled by ``rules``; the gain is over the same scores without a rule, the mean over seeds.
    """
    rows = [
        (
            r.experiment["rule"],
            NONE_FLAT if r.experiment["scale"] == 1 else NONE,
            r.experiment["seed"],
            f"{low:g}–{high:g}",
            clips,
            precision,
        )
        for r in records
        for low, high, clips, _, precision in r.breakdown.get("quality", [])
    ]
    frame = pd.DataFrame(rows, columns=["rule", "baseline", "seed", "range", "clips", "precision"])
    before = frame[frame["rule"] == frame["baseline"]].set_index(["rule", "seed", "range"])["precision"]
    at = pd.MultiIndex.from_frame(frame[["baseline", "seed", "range"]])
    frame["gain"] = 100 * (frame["precision"] - before.reindex(at).to_numpy()) if len(frame) else []
    return frame.groupby(["rule", "range"], sort=False)[["clips", "gain"]].mean().reset_index()


# -- where the points are lost --------------------------------------------------------------------------------------


def ceiling(store: ClipStore) -> dict[str, float]:
    """Measure what a system of faces cannot find: relevant val clips, those without a face, the MAP@100 of a perfect
    ranking of the others, and the ranked clips without a face, distractors included.
    """
    clips = store.select("val", labelled=True)
    identity, has = store.identity_of(clips), store.modalities["face"].count[clips] > 0
    relevant, found = np.bincount(identity), np.bincount(identity, weights=has)
    best = (np.minimum(found, 100) / np.maximum(relevant, 1))[relevant > 0]
    return {
        "relevant": len(clips),
        "without": int((~has).sum()),
        "map_at_100": float(best.mean()),
        "gallery_without": int((store.modalities["face"].count[store.select("val")] == 0).sum()),
    }


def share_below(store: ClipStore, threshold: float = THRESHOLD) -> float:
    """Return the share of val clips with a face whose mean raw norm lies under a threshold."""
    return float((store.clip_means("face", "norm")[store.select("val", having="face")] < threshold).mean())


def quality_groups(store: ClipStore, by: str, shares: Iterable[float] = (0.01, 0.05)) -> np.ndarray:
    """Return the group of every clip (N,): ``no face``, ``lowest 1 %``, ``1–5 %``, ``the rest``; empty outside val.

    The lowest are counted as the rule counts them, among all val clips with a face, distractors included.
    """
    out = np.full(len(store), "", object)
    val, has = store.select("val"), store.select("val", having="face")
    out[val], out[has] = "no face", "the rest"
    order = has[np.argsort(store.clip_means("face", by)[has], kind="stable")]
    before = 0.0
    for share in shares:
        name = f"{100 * before:g}–{100 * share:g} %" if before else f"lowest {100 * share:g} %"
        out[order[int(before * len(has) + 1e-9) : int(share * len(has) + 1e-9)]] = name
        before = share
    return out


def lost_points(found: Retrieval, store: ClipStore, group: np.ndarray) -> pd.DataFrame:
    """Return the points of MAP@100 that each group of clips loses: group, clips, precision, lost.

    MAP is a mean over queries of a mean over their clips of the precision at which each is found, so the points lost of
    all groups add up to what is missing to 100.
    """
    precision = np.zeros(len(store))
    precision[found.gallery] = metrics.clip_precision(found.ranking, found.hits, len(found.gallery))
    clips = store.select("val", labelled=True)
    identity = store.identity_of(clips)
    weight = 1 / np.bincount(identity)[identity] / len(found.queries)
    frame = pd.DataFrame(
        {
            "group": group[clips],
            "clips": 1,
            "precision": precision[clips],
            "lost": 100 * weight * (1 - precision[clips]),
        }
    )
    order = [name for name in ("no face", "lowest 1 %", "1–5 %", "the rest") if (frame["group"] == name).any()]
    out = frame.groupby("group").agg({"clips": "sum", "precision": "mean", "lost": "sum"})
    return out.reindex(order).reset_index()


# -- sentences ------------------------------------------------------------------------------------------------------


def worth(row: Mapping) -> str:
    """Write a difference with its interval, and what the interval supports."""
    says = (
        "nothing"
        if row["low"] == row["high"] == 0
        else "a gain"
        if row["low"] > 0
        else "a loss"
        if row["high"] < 0
        else "not told apart from nothing"
    )
    return f"{row['difference']:+.2f} points (95 % interval {row['low']:+.2f} to {row['high']:+.2f}, {says})"


def on_top(records: Iterable[Record], rule: str, baseline: str) -> pd.Series:
    """Compare a rule with another one: a row of ``compare_arms``."""
    two = [record for record in records if record.experiment["rule"] in (rule, baseline)]
    return compare_arms(two, by="rule", baseline=baseline).set_index("rule").loc[rule]


def answer(records: list[Record], where: str) -> str:
    """Say what the described rules are worth, and which of the two earns it."""
    rules = rule_frame(records).set_index("rule")
    if "described" not in rules.index:
        return f"On {where} no fallback can be run, because they have no scene feature."
    row, first = rules.loc["described"], rules.loc["clips without a face"]
    second = on_top(records, "described", "clips without a face")
    return (
        f"On {where}, the described rules are worth {worth(row)}, over {row['n']:.0f} {row['interval']}: to rank clips "
        f"without a face by the scene alone {worth(first)}, and to mix the scene into the lowest percent by "
        f"{_criterion(records)} {worth(second)} on top."
    )


def _criterion(records: Iterable[Record]) -> str:
    return next(r.experiment["fallback"]["by"] for r in records if r.experiment["rule"] == "described")


def coded_sentence(records: list[Record]) -> str:
    """Set the coded rules beside the described ones, on the scores of each and on the same scores."""
    rules = rule_frame(records).set_index("rule")
    if "coded" not in rules.index:
        return "Neither the described nor the coded rules can be run on these clips."
    same = on_top(records, "coded, scale 30", "described")
    flat = on_top(records, NONE_FLAT, NONE)
    return (
        f"On their own flat scores the coded rules are worth {worth(rules.loc['coded'])}; on the scores of the described "
        f"system they differ from the described rules by {worth(same)}. "
        f"The flat scores themselves differ from those at scale 30 by {worth(flat)}."
    )


def sweep_sentences(curve: pd.DataFrame) -> str:
    """Say of each sweep where it is best and worst, and what lies between."""
    out = []
    for (sweep, line), part in curve.groupby(["sweep", "line"], sort=False):
        best, worst = part.loc[part["difference"].idxmax()], part.loc[part["difference"].idxmin()]
        name = {
            "share": f"the share of low clips by {line}",
            "low": f"the weight of the scene in the {line}",
            "absent": "the factor on clips without a face",
        }[sweep]
        out.append(
            f"Over {name}, MAP@100 is best at {best['x']:g} and worst at {worst['x']:g}, "
            f"{best['difference'] - worst['difference']:.2f} points apart."
        )
    return " ".join(out) or "Without a scene feature there is nothing to vary."


def where_sentence(lost: pd.DataFrame) -> str:
    """Say how many points each group of clips loses without a rule and under the described one."""
    table = lost.pivot_table(index="group", columns="rule", values="lost", sort=False)
    count = lost.drop_duplicates("group").set_index("group")["clips"]
    if "described" not in table:
        return (
            "Without a rule, "
            + ", ".join(f"{name} ({count[name]} clips) loses {table[NONE][name]:.2f} points" for name in table.index)
            + "."
        )
    return (
        "From no fallback to the described rules, the points lost go "
        + ", ".join(
            f"from {table[NONE][name]:.2f} to {table['described'][name]:.2f} for {_PHRASES.get(name, name)} ({count[name]} clips)"
            for name in table.index
        )
        + "."
    )


_PHRASES = {"no face": "clips without a face", "lowest 1 %": "the lowest percent", "1–5 %": "the next four percent"}
