"""What chapter 10 reads: the ladder of the system as experiments, its steps, the distractors, and the claims."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from mmlib import metrics
from mmlib.compare import compare_arms
from mmlib.data.simulate import settings_for
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment, arm_key
from mmlib.records import Record
from mmlib.systems import BUDGET, ONE_NAME, ONE_NAME_AS_CODED, climb, with_members

STEPS = ("baseline", "aggregation and loss", "scene", "ensemble", "fallback")
LADDERS = {"described": ONE_NAME, "as coded": ONE_NAME_AS_CODED}
# Slides of the One Name team, 2019: MAP of the baseline, and the points that each step adds; none is given for the last.
PUBLISHED_LADDER = {"baseline": 0.87, "aggregation and loss": 2.0, "scene": 0.5, "ensemble": 0.3}
ATTENTION, NO_MARGIN = "attention for quality weights", "baseline without a margin"
HELD_OUT, CLASS = "held out", "class"
SIDES = {"face": "baseline", "face and scene": "scene"}  # rung of the described ladder by name

# -- the experiments ------------------------------------------------------------------------------------------------


def plan(
    *, members: int = 16, scene: bool = True, scores: bool = True, distractors: bool = True
) -> dict[str, Experiment]:
    """Name every experiment of the chapter: ``described: scene``, ``as coded: scene``, …, the arms beside the ladders.

    members: at most so many of an ensemble.  scene, scores, distractors: what the clips have.
    """
    out = {
        f"{name}: {step}": experiment
        for name, system in LADDERS.items()
        for step, experiment in climb(with_members(system, members), scene=scene, scores=scores).items()
    }
    start, attention = out["described: baseline"], "attention + scores" if scores else "attention"
    out |= {
        ATTENTION: replace(start, aggregator=attention),
        NO_MARGIN: replace(start, training=replace(BUDGET, margin=0.0)),
    }
    sides = {name: out[f"described: {step}"] for name, step in SIDES.items() if f"described: {step}" in out}
    return out | {
        f"{name}, {kind}": replace(experiment, distractors=kind)
        for name, experiment in sides.items()
        if distractors
        for kind in (HELD_OUT, CLASS)
    }


def settings(profile: str, identities: int) -> tuple:
    """Return the overrides that make a world of ``identities``, none if the profile's has no more (or for 0)."""
    return (("identities", identities),) if 0 < identities < settings_for(profile).identities else ()


def has(store: ClipStore) -> dict[str, bool]:
    """Say what of the system's needs a store has, as ``plan`` takes it."""
    return {
        "scene": "scene" in store.modalities,
        "scores": {"quality", "det"} <= set(store.modalities["face"].columns),
        "distractors": len(store.select("val", labelled=False)) > 1,
    }


def missing_sentence(scene: bool, scores: bool, distractors: bool) -> str:
    """Say what is left out for what a store lacks; empty if nothing is."""
    out = []
    if not scene:
        out.append("These clips have no scene feature, so the steps scene and fallback are left out.")
    if not scores:
        out.append(
            "These clips have no quality and det scores, so norms stand in for them, and the coded attention, which "
            "needs them, is left out."
        )
    if not distractors:
        out.append("These clips have fewer than two distractors, so none are trained on.")
    return " ".join(out)


def named(records: Iterable[Record], planned: Mapping[str, Experiment]) -> list[Record]:
    """Return records labelled with the name of their experiment in a plan, whatever its world and its number of members."""
    known = {arm_key(experiment, "members", "fallback.members"): name for name, experiment in planned.items()}
    out = []
    for record in records:
        shape = arm_key(record.experiment, "members", "fallback.members")
        if shape not in known:
            raise ValueError(f"record {record.key} is of no experiment of this ladder")
        out.append(replace(record, experiment=record.experiment | {"name": known[shape]}))
    return out


# -- what was found -------------------------------------------------------------------------------------------------


def difference(records: Iterable[Record], one: str, other: str) -> dict:
    """Compare two names, one minus other, in points: the columns of ``compare_arms``, and the interval over identities.

    within_low, within_high: a bootstrap over the identities of all worlds together, which are different persons in each;
    on a given store over its identities, with APs averaged over seeds.  It says how far the result hangs on who is asked
    for in these worlds, the interval over worlds how far on the worlds and the training too.
    """
    two = [record for record in records if record.experiment["name"] in (one, other)]
    row = compare_arms(two, by="name", baseline=other).set_index("name").loc[one].to_dict()
    ap = {
        name: [np.array(r.ap) for r in sorted(two, key=lambda r: r.experiment["seed"]) if r.experiment["name"] == name]
        for name in (one, other)
    }
    joined = np.concatenate if two[0].experiment["data"] == "simulated" else lambda parts: np.mean(parts, 0)
    pair = metrics.paired_test(joined(ap[one]), joined(ap[other]))
    return row | {"within_low": 100 * pair.low, "within_high": 100 * pair.high}


def step_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return the steps of both ladders: ladder, step, map_at_100, the columns of ``difference`` from the rung before, and
    ``published`` points; a row ``all steps`` compares the last rung with the first.
    """
    records = list(records)
    there = {record.experiment["name"] for record in records}
    rows = []
    for ladder in LADDERS:
        steps = [step for step in STEPS if f"{ladder}: {step}" in there]
        pairs = [*zip(steps[1:], steps), *([("all steps", steps[0])] if len(steps) > 1 else [])]
        if steps:
            start = [r.measures["map_at_100"] for r in records if r.experiment["name"] == f"{ladder}: {steps[0]}"]
            rows.append({"ladder": ladder, "step": steps[0], "map_at_100": np.mean(start)})
        for step, before in pairs:
            last = steps[-1] if step == "all steps" else step
            published = sum(list(PUBLISHED_LADDER.values())[1:]) if step == "all steps" else PUBLISHED_LADDER.get(step)
            rows.append(
                {"ladder": ladder, "step": step, "published": published}
                | difference(records, f"{ladder}: {last}", f"{ladder}: {before}")
            )
    columns = [
        "ladder",
        "step",
        "map_at_100",
        "difference",
        "low",
        "high",
        "within_low",
        "within_high",
        "n",
        "interval",
        "published",
    ]
    return pd.DataFrame(rows, columns=columns).astype({"published": float})


def heights(steps: pd.DataFrame) -> pd.DataFrame:
    """Return MAP@100 by rung of each ladder and of the published one: ladder, step, map_at_100."""
    here = steps.loc[steps["step"] != "all steps", ["ladder", "step", "map_at_100"]]
    gains = list(PUBLISHED_LADDER.values())
    total = gains[0] + np.cumsum([0.0, *gains[1:]]) / 100
    published = pd.DataFrame({"ladder": "published", "step": list(PUBLISHED_LADDER), "map_at_100": total})
    return _in_order(pd.concat([here, published]))


def gains(steps: pd.DataFrame) -> pd.DataFrame:
    """Return the gain of each step with its interval, the published one without: ladder, step, difference, low, high."""
    here = steps.loc[
        steps["difference"].notna() & (steps["step"] != "all steps"), ["ladder", "step", "difference", "low", "high"]
    ]
    published = [
        ("published", step, value, np.nan, np.nan) for step, value in PUBLISHED_LADDER.items() if step != "baseline"
    ]
    return _in_order(pd.concat([here, pd.DataFrame(published, columns=here.columns)]))


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by step, where a ladder may lack some."""
    return frame.sort_values("step", key=lambda step: step.map(STEPS.index), kind="stable", ignore_index=True)


def most_members(records: Iterable[Record]) -> int:
    """Return the largest number of members of an experiment."""
    return max(len(record.experiment["members"]) for record in records)


def distractor_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Compare training with half of the distractors as a class and without, the same other half in the gallery."""
    records = list(records)
    there = {record.experiment["name"] for record in records}
    rows = [
        {"system": name} | difference(records, f"{name}, {CLASS}", f"{name}, {HELD_OUT}")
        for name in SIDES
        if f"{name}, {CLASS}" in there
    ]
    columns = ["system", "map_at_100", "difference", "low", "high", "within_low", "within_high", "n", "interval"]
    return pd.DataFrame(rows, columns=columns)


def views_against_bagging(records: Iterable[Record]) -> dict | None:
    """Compare views with bagging, the most members that both have and everything else equal, by the ranking of the
    described ladder; None without such records.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        e = record.experiment
        same_rule = (e["combine"], e["scale"]) == (ONE_NAME.combine, ONE_NAME.scale)
        if e["ensemble"] in ("views", "bagging") and len(e["members"]) > 1 and same_rule:
            shape = arm_key(e, "members", "fallback.members", "ensemble", "regions")
            groups.setdefault((len(e["members"]), shape), []).append(
                replace(record, experiment=e | {"name": e["ensemble"]})
            )
    both = {key: part for key, part in groups.items() if len({r.experiment["name"] for r in part}) == 2}
    if not both:
        return None
    most = max(size for size, _ in both)
    return difference(next(part for (size, _), part in both.items() if size == most), "views", "bagging")


# -- the claims -----------------------------------------------------------------------------------------------------


def claims(records: Iterable[Record], ensembles: Iterable[Record]) -> pd.DataFrame:
    """Hold each claim against its difference here: claim, whose, published, here (points), low, high, verdict, size.

    verdict: ``supported`` where the interval lies above 0, ``contradicted`` where it lies below, ``open`` where it holds
    0; ``not in these records`` where nobody ran it.  size: whether the interval lies below the published points
    (``smaller``), above (``larger``), or is ``compatible`` with them.
    """
    records = list(records)
    there = {record.experiment["name"] for record in records}
    start, aggregated, scene, ensemble, fallback = (f"described: {step}" for step in STEPS)
    before = {"scene": aggregated if aggregated in there else start}
    before["ensemble"] = scene if scene in there else before["scene"]
    published = PUBLISHED_LADDER
    asked = [
        ("attention beats quality weights", "One Name", None, ATTENTION, start),
        ("aggregation with the loss adds", "One Name", published["aggregation and loss"], aggregated, start),
        (
            "the same, from a baseline without a margin",
            "One Name",
            published["aggregation and loss"],
            aggregated,
            NO_MARGIN,
        ),
        ("the scene adds", "One Name", published["scene"], scene, before["scene"]),
        ("the ensemble adds", "One Name", published["ensemble"], ensemble, before["ensemble"]),
        ("views beat bagging", "One Name", None, "views", "bagging"),
        ("the fallback adds", "One Name", None, fallback, ensemble),
        *(
            (f"training on distractors adds, {name}", "other teams", None, f"{name}, {CLASS}", f"{name}, {HELD_OUT}")
            for name in SIDES
        ),
    ]
    rows = []
    for claim, whose, size, one, other in asked:
        row = (
            views_against_bagging(ensembles)
            if one == "views"
            else difference(records, one, other)
            if {one, other} <= there
            else None
        )
        here = (row["difference"], row["low"], row["high"]) if row else (np.nan,) * 3
        rows.append((claim, whose, size, *here, verdict(row), _size(row, size)))
    columns = ["claim", "whose", "published", "here", "low", "high", "verdict", "size"]
    return pd.DataFrame(rows, columns=columns).astype({"published": float})


def verdict(row: Mapping | None) -> str:
    """Read a claim of a gain off the interval of its difference."""
    if row is None:
        return "not in these records"
    return "supported" if row["low"] > 0 else "contradicted" if row["high"] < 0 else "open"


def _size(row: Mapping | None, published: float | None) -> str:
    if row is None or published is None or not np.isfinite(row["low"]):
        return ""
    return "smaller" if row["high"] < published else "larger" if row["low"] > published else "compatible"


# -- sentences ------------------------------------------------------------------------------------------------------


def answer(steps: pd.DataFrame, where: str) -> str:
    """Say what the described ladder is worth in all, and step by step."""
    rows = steps[(steps["ladder"] == "described") & steps["difference"].notna()].set_index("step")
    total = rows.loc["all steps"]
    parts = "; ".join(f"{step} {worth(row)}" for step, row in rows.drop("all steps").iterrows())
    first = steps[(steps["ladder"] == "described")].iloc[0]
    return (
        f"On {where}, the system as described stands at {total['map_at_100']:.4f}, {worth(total)} from its baseline of "
        f"{first['map_at_100']:.4f}, over {total['n']:.0f} {total['interval']}: {parts}."
    )


def worth(row: Mapping) -> str:
    """Write a difference with its interval, and say if it is a loss or open."""
    says = "" if row["low"] > 0 else ", a loss" if row["high"] < 0 else ", open"
    return f"{row['difference']:+.2f} points ({row['low']:+.2f} to {row['high']:+.2f}{says})"


def coded_sentence(records: Iterable[Record], steps: pd.DataFrame) -> str:
    """Set the last rungs of the two ladders beside each other."""
    records = list(records)
    there = {record.experiment["name"] for record in records}
    last = [
        next((f"{ladder}: {step}" for step in reversed(STEPS) if f"{ladder}: {step}" in there), "")
        for ladder in ("as coded", "described")
    ]
    top = steps[(steps["ladder"] == "as coded") & (steps["step"] == "all steps")]
    if not all(last) or top.empty:
        return "The coded ladder was not run on these clips."
    row = difference(records, *last)
    says = "ahead of" if row["low"] > 0 else "behind" if row["high"] < 0 else "not told apart from"
    return (
        f"From its own baseline the coded ladder is worth {worth(top.iloc[0])}; at its end it is {says} the described "
        f"one, {worth(row)}."
    )


def distractor_sentence(frame: pd.DataFrame) -> str:
    """Say what training on distractors is worth."""
    parts = [f"{worth(row)} for {row['system']}" for row in frame.to_dict("records")]
    return (
        f"Training on half of the distractors is worth {' and '.join(parts)}." if parts else "These clips have too few."
    )


def scope_sentence(simulated: bool, identities: int) -> str:
    """Say for what the verdicts hold."""
    clips = "simulated clips, a stand-in for the challenge's" if simulated else "the clips of this store"
    return f"The verdicts hold for {clips}, and for {identities:.0f} identities, where the challenge had 10,034."


def own_sentence(committed: bool, members: int, identities: int) -> str:
    """Say what the page's own run is beside the committed records."""
    text = f"These rungs were run for this page, with up to {members} members and {identities:.0f} identities a world"
    return text + (
        ", where the committed records have all members and larger worlds; they show that the commands work."
        if committed
        else "; there are no committed records of these clips, so all of the page is read off them."
    )


def claims_sentence(frame: pd.DataFrame) -> str:
    """Count the verdicts and name the claims of each."""
    out = []
    for name in ("supported", "contradicted", "open", "not in these records"):
        rows = frame[frame["verdict"] == name]
        if len(rows):
            size = [
                f"{row['claim']} ({row['size']} than published)"
                if row["size"] in ("smaller", "larger")
                else row["claim"]
                for row in rows.to_dict("records")
            ]
            out.append(f"{len(rows)} {name}: {'; '.join(size)}.")
    return " ".join(f"{line[0].upper()}{line[1:]}" for line in out)


# -- the released code ----------------------------------------------------------------------------------------------

_AS_CODED = 'system "one-name-as-coded"'
RELEASED = [  # topic, what the released code does, where it is here or why it is not
    ("frames", "40 random frames a clip, also at test", 'aggregator "as coded", which draws 40 at test too'),
    ("quality inputs", "appended to every raw frame, no normalisation", 'concat "frames"'),
    (
        "channel attention",
        "frames as channels, 1x1 convolutions 40 to 20, batch norm, residual",
        'aggregator "as coded"',
    ),
    ("query", "one attention block, query at 0", 'aggregator "as coded"'),
    (
        "scene branch",
        "D to D/4 to D/16, batch norm, PReLU, dropout",
        "context_dim 120; a clip without a scene gets a learned vector, since here some have none",
    ),
    (
        "fusion MLP",
        "602 to 964 to 602, residual, cosine classifier",
        "hidden 964; the last batch norm starts at 0, so that the start from class means is one",
    ),
    (
        "views",
        "1 of 16 blocks of face and scene dropped, 1 of 32 for the scene alone",
        'ensemble "views", regions 16 and twice as many for the fallback\'s model',
    ),
    ("members", "eleven of sixteen each, by hand", "members, the same eleven"),
    (
        "margin loss",
        "scale 30, margin .5, linear beyond pi - m, no clamp of the root",
        "the same; the root is clamped, since its gradient may be infinite otherwise",
    ),
    ("focal term", "gamma 2 on the mean cross-entropy of the batch", 'focal "batch"'),
    (
        "optimiser",
        "SGD .1, momentum .9, cosine over 100 epochs, batch 4096",
        f"options of the training, in {_AS_CODED}; not "
        "on this page, where both ladders share epochs, batches and optimiser",
    ),
    ("start", "random", f'start "random", in {_AS_CODED}; not on this page, for the same reason'),
    (
        "scene fine-tuning",
        "SE-ResNeXt-50, 20 epochs, three images a clip",
        "not reproduced here: the simulated clips have scene features and no pictures",
    ),
    ("scene extraction", "batch norm in training mode", "not reproduced: a defect that needs pictures to show"),
    (
        "distractors",
        "an output of their own, of 10,035, but dropped from training",
        'distractors "all", without the output that no clip trains; the arm "class" is on this page',
    ),
    (
        "clips without a face",
        "dropped from face+scene training and test",
        "the same: such clips are not trained on, and the fallback ranks them",
    ),
    ("test score", "softmax of bare cosines, averaged over members", 'combine "softmax", scale 1'),
    (
        "fallback",
        ".95 x scene without a face; norm below 8.867: .2 and .8",
        'fallback by "norm", threshold, low, absent',
    ),
    ("ranking", "top 100 clips for each identity, no threshold", "the same"),
    (
        "validation",
        "none, trained on train and val",
        "not reproduced: without clips held out there is nothing to report",
    ),
]


def released_frame() -> pd.DataFrame:
    """Return what of the released code is an option here, and what is not reproduced and why: topic, code, here."""
    return pd.DataFrame(RELEASED, columns=["topic", "released code", "here"])
