"""What chapter 10 reads: the ladders and what stands beside them, their steps, and the claims held against them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from mmlib import compare, metrics, retrieve
from mmlib.data.store import ClipStore
from mmlib.experiment import TRAINED_ON, Experiment, arm_key
from mmlib.records import Record
from mmlib.systems import BUDGET, CHOSEN, LADDERS, ONE_NAME, SIDES, STEPS, climb, distractor_arms

ALL = "all steps"
NUMBERED = "all before the fallback"  # the steps whose sizes were published
# Slides of the One Name team, 2019: MAP of the baseline and the points of each step; none is given for the last.
PUBLISHED_LADDER = {"baseline": 0.87, "aggregation and loss": 2.0, "scene": 0.5, "ensemble": 0.3}
PUBLISHED = dict(list(PUBLISHED_LADDER.items())[1:])
NO_MARGIN, AGGREGATED = "baseline without a margin", f"described: {STEPS[1]}"
FIRST = {"as coded, alive": "as coded: baseline"}  # the rung that a ladder shares with the one before
Pairs = dict[str, tuple[str, str]]  # what a comparison is called: an arm, and what it is held against
FORMS = {  # of training on distractors, in words
    "class": "one class with the margin",
    "class, no margin": "one class without margin",
    "class, down-weighted": "one class with the margin, down-weighted",
    "negatives": "negatives only",
}
PRACTISED = tuple(FORMS[form] for form in ("class, no margin", "negatives"))  # by other teams, without a margin
DISTRACTORS: Pairs = {
    f"{side}: {FORMS[form]}": (f"{side}, {form}", f"{side}, held out") for side in SIDES for form in TRAINED_ON
}
SCALED: Pairs = {  # the scale of the cosines before the softmax of the test, 30 against 1; a rung has one of the two
    **{f"described: {step}": (f"described: {step}", f"described: {step}, scale 1") for step in ("scene", "ensemble")},
    **{f"as coded: {step}": (f"as coded: {step}, scale 30", f"as coded: {step}") for step in ("scene", "ensemble")},
}
MAPS: Pairs = {
    "the released map, brought to life": ("as coded, alive: aggregation and loss", "as coded: aggregation and loss"),
    "the same, with the scene": ("as coded, alive: scene", "as coded: scene"),
}
ENDS: Pairs = {
    f"{one} against {other}": (f"{one}: fallback", f"{other}: fallback")
    for one, other in (("as coded", "described"), ("as coded", "described, random start"))
    + (("described, random start", "described"),)
}
VIEWS = "views beat bagging"
ATTENTION, AS_CODED = "attention beats quality weights", "the attention of the released code beats quality weights"
AGGREGATIONS: Pairs = {ATTENTION: ("attention + scores", "quality"), AS_CODED: ("as coded", "quality")}


def plan(
    *, members: int = 16, scene: bool = True, scores: bool = True, distractors: bool = True
) -> dict[str, Experiment]:
    """Name every experiment of the chapter: ``described: scene``, ``as coded: scene``, …, the arms beside the ladders.

    members: at most so many of an ensemble.  scene, scores, distractors: what the clips have.
    """
    have: dict = {"members": members, "scene": scene, "scores": scores}
    out: dict[str, Experiment] = {}
    for ladder in LADDERS if scores else [name for name in LADDERS if name not in FIRST]:  # whose map needs scores
        rungs = climb(ladder, **have)
        out |= {f"{ladder}: {step}": arm for step, arm in rungs.items() if step != STEPS[0] or ladder not in FIRST}
    out[NO_MARGIN] = replace(
        out["described: baseline"], training=replace(BUDGET, margin=0.0, lr=CHOSEN["cosine softmax"])
    )
    for name, pair in SCALED.items():
        if name in out:
            (other,) = {*pair} - {name}
            out[other] = replace(out[name], scale=float(other.rpartition(" ")[2]))
    return out | (distractor_arms(**have) if distractors else {})


def has(store: ClipStore) -> dict[str, bool]:
    """Say what of the system's needs a store has, as ``plan`` takes it."""
    scores = {"quality", "det"} <= set(store.modalities["face"].columns)
    distractors = len(store.select("val", labelled=False)) > 1
    return {"scene": "scene" in store.modalities, "scores": scores, "distractors": distractors}


def names_of(records: Iterable[Record], planned: Mapping[str, Experiment]) -> list[str]:
    """Name records by the experiments of a plan, whatever their world and their number of members."""
    free, records = ("members", "fallback.members"), list(records)
    known = {arm_key(experiment, *free): name for name, experiment in planned.items()}
    names = [known.get(arm_key(record.experiment, *free), "") for record in records]
    if "" in names:
        raise ValueError(f"record {records[names.index('')].key} is of no experiment of this ladder")
    return names


def differences(pairs: Pairs, records: Iterable[Record], names: Iterable[str]) -> pd.DataFrame:
    """Compare the arms of each pair that was run: the columns of ``compare.steps_frame``, within_low and within_high.

    The last two are a bootstrap over the identities of all worlds together, different persons in each; on a given store
    over its identities, with APs averaged over seeds.  It says how far the result hangs on who is asked for in these
    worlds, the interval over worlds how far on the worlds and the training too.
    """
    records, names, within = list(records), list(names), []
    frame = compare.steps_frame(pairs, records, names)
    aps = pd.DataFrame({"arm": names, "seed": [r.experiment["seed"] for r in records], "ap": [r.ap for r in records]})
    arms = aps.sort_values("seed", kind="stable").groupby("arm")["ap"].agg(list)
    worlds = all(record.experiment["data"] == "simulated" for record in records)
    for pair in zip(frame["arm"], frame["against"]):
        one, other = (np.concatenate(arms[arm]) if worlds else np.mean(arms[arm], axis=0) for arm in pair)
        found = metrics.paired_test(one, other)
        within.append((100 * found.low, 100 * found.high))
    frame[["within_low", "within_high"]] = np.reshape(within, (-1, 2))
    return frame


def taken_for_nobody(arms: Mapping[str, Experiment], store: ClipStore, **options) -> pd.DataFrame:
    """Train the arms with a class of distractors and say how it lies among the identities, by the gallery of one world.

    Returns arm, of identities and of strangers (the shares of labelled clips, and of distractors that were not trained
    on, whose highest cosine is that of nobody), own and nobody (mean cosines of labelled clips with their identity and
    with nobody).  options: as for ``retrieve.fit``.
    """
    rows = []
    for name, arm in arms.items():
        gallery = retrieve.gallery_of(arm, store)
        identity = store.identity_of(gallery)
        cosines = retrieve.fit(arm, store, **options).cosines(gallery).cpu().numpy()
        nobody, known = cosines.argmax(1) == len(store.identities), identity >= 0
        own = cosines[known, identity[known]]
        rows.append((name, nobody[known].mean(), nobody[~known].mean(), own.mean(), cosines[known, -1].mean()))
    return pd.DataFrame(rows, columns=["arm", "of identities", "of strangers", "own", "nobody"])


def steps_of(names: Iterable[str]) -> Pairs:
    """Pair every rung that was run with the one before, by its name, and the last of a ladder with its first.

    So is the last but one of a ladder that ends with the fallback.
    """
    names = set(names)
    pairs: Pairs = {}
    for ladder in LADDERS:
        first = FIRST.get(ladder, f"{ladder}: {STEPS[0]}")
        rungs = [rung for rung in (first, *(f"{ladder}: {step}" for step in STEPS[1:])) if rung in names]
        pairs |= {rung: (rung, before) for before, rung in pairwise(rungs)}
        if len(rungs) > 2 and rungs[-1].endswith(STEPS[-1]):
            pairs[f"{ladder}: {NUMBERED}"] = rungs[-2], rungs[0]
        if len(rungs) > 1:
            pairs[f"{ladder}: {ALL}"] = rungs[-1], rungs[0]
    return pairs


def step_frame(records: Iterable[Record], names: Iterable[str]) -> pd.DataFrame:
    """Return the steps of every ladder: ladder, step, before (MAP@100), as ``differences``, and published (points).

    Rows ``all before the fallback``, of a ladder that has one, and ``all steps`` compare two of its rungs with the
    first; the sum of what was published, nothing of a fallback, stands with the first of the two that there is.
    """
    frame = differences(steps_of(names), records, names)
    frame.insert(0, "ladder", frame["step"].str.split(": ").str[0])
    frame["step"] = frame["step"].str.split(": ").str[1]
    frame.insert(frame.columns.get_loc("map_at_100"), "before", frame["map_at_100"] - frame["difference"] / 100)
    sums = frame["step"].map(PUBLISHED).groupby(frame["ladder"]).sum()
    sides = frame.loc[frame["step"].isin([NUMBERED, ALL]), "ladder"].drop_duplicates()
    whole = sides.map(sums)
    frame["published"] = frame["step"].map(PUBLISHED).fillna(whole)
    return frame


def heights(steps: pd.DataFrame) -> pd.DataFrame:
    """Return MAP@100 by rung of each ladder and of the published one: ladder, step, map_at_100."""
    base = steps[steps["step"] == ALL].assign(step=STEPS[0], map_at_100=steps["before"])
    here = pd.concat([base, steps[steps["step"].isin(STEPS)]])
    total = PUBLISHED_LADDER["baseline"] + np.cumsum([0.0, *PUBLISHED.values()]) / 100
    return _beside_published(here[["ladder", "step", "map_at_100"]], dict(zip(PUBLISHED_LADDER, total)))


def gains(steps: pd.DataFrame) -> pd.DataFrame:
    """Return the gain of each step, the published one without an interval: ladder, step, difference, low, high."""
    here = steps.loc[steps["step"].isin(STEPS), ["ladder", "step", "difference", "low", "high"]]
    return _beside_published(here, PUBLISHED)


def _beside_published(here: pd.DataFrame, values: Mapping[str, float]) -> pd.DataFrame:
    """Add the published values of steps to the third column, and sort rows by step."""
    published = pd.DataFrame([("published", *pair) for pair in values.items()], columns=here.columns[:3])
    every = pd.concat([here, published])
    every.attrs = here.attrs
    return every.sort_values("step", key=lambda step: step.map(STEPS.index), kind="stable", ignore_index=True)


def views_against_bagging(records: Iterable[Record], members: int = 0) -> pd.DataFrame:
    """Compare views with bagging, so many members, or the most that both have, everything else equal, by the ranking of
    the described ladder: ``compare.steps_frame`` with one row, none without such records.
    """
    groups: dict[tuple[int, str], list[Record]] = {(0, ""): []}
    for record in records:
        e = record.experiment
        wanted = len(e["members"]) == members if members else len(e["members"]) > 1
        if wanted and (e["combine"], e["scale"]) == (ONE_NAME.combine, ONE_NAME.scale):
            shape = arm_key(e, "members", "fallback.members", "ensemble", "regions")
            groups.setdefault((len(e["members"]), shape), []).append(record)
    found = {}
    for key, part in groups.items():
        kinds = [record.experiment["ensemble"] for record in part]
        found[key] = compare.steps_frame({VIEWS: ("views", "bagging")}, part, kinds)
    return found[max(found, key=lambda key: (len(found[key]), key[0]))]


def other_claims() -> Pairs:
    """Name what nobody of the team claimed: the arm that does it, and the one that does not."""
    trained = {f"distractors help {name.replace(': ', ' as ')}": pair for name, pair in DISTRACTORS.items()}
    return trained | {f"scaled cosines at test help {_models(name)}": pair for name, pair in SCALED.items()}


def claims(
    records: Iterable[Record], names: Iterable[str], aggregations: Iterable[Record], ensembles: Iterable[Record]
) -> pd.DataFrame:
    """Hold each claim against its difference here: claim, whose, published (points), as ``compare.steps_frame``, and

    told: the smallest difference that as many worlds would tell from zero four times in five; verdict: ``supported``
    where the interval lies above 0, ``contradicted`` below, ``open`` where it holds 0 or there is none, ``not in these
    records`` where nobody ran it; size: where the interval lies beside the published points, ``smaller``, ``larger`` or
    ``compatible``.  aggregations, ensembles: the records of chapters 04 and 08, which have the arms of two claims.
    """
    names = list(names)
    adds = {step: steps_of(names).get(f"described: {step}", ("", "")) for step in STEPS}
    asked = {  # the step whose size was published, and the two arms
        ATTENTION: ("", ("", "")),  # in other records
        "aggregation with the loss adds": (STEPS[1], adds[STEPS[1]]),
        "aggregation with the loss adds to a baseline without a margin": (STEPS[1], (AGGREGATED, NO_MARGIN)),
        "the scene adds": ("scene", adds["scene"]),
        "the ensemble adds": ("ensemble", adds["ensemble"]),
        VIEWS: ("", ("", "")),
        "the fallback adds": ("", adds["fallback"]),
    }
    others = {AS_CODED: ("", ("", ""))} | {claim: ("", pair) for claim, pair in other_claims().items()}
    rows = [(claim, "One Name", PUBLISHED.get(step, np.nan)) for claim, (step, _) in asked.items()]
    rows += [(claim, "other teams" if claim.endswith(PRACTISED) else "nobody's", np.nan) for claim in others]
    pairs = {claim: pair for claim, (_, pair) in (asked | others).items()}
    aggregations = [record for record in aggregations if record.experiment["classifier"] == "mlp"]
    pooled = [record.experiment["aggregator"] for record in aggregations]
    against = compare.steps_frame(AGGREGATIONS, aggregations, pooled)
    found = pd.concat([compare.steps_frame(pairs, records, names), against, views_against_bagging(ensembles)])
    frame = pd.DataFrame(rows, columns=["claim", "whose", "published"]).join(found.set_index("step"), on="claim")
    rows = frame.to_dict("records")
    unknown = np.where(frame["difference"].isna(), "not in these records", "open")
    says, sizes = ("supported", "open", "contradicted"), ("larger", "compatible", "smaller", "")
    frame["told"] = compare.smallest_told(frame["sd"].astype(float), frame["n"].astype(float))
    frame["verdict"] = [compare.verdict(row, *says, str(other)) for row, other in zip(rows, unknown)]
    frame["size"] = [compare.verdict(row, *sizes, bound=row["published"]) for row in rows]
    frame.loc[frame["published"].isna(), "size"] = ""
    return frame


def _models(rung: str) -> str:
    """Name the models of a rung, as in ``described: ensemble``."""
    ladder, step = rung.split(": ")
    return f"the {ladder.removeprefix('as ')} {'ensemble' if step == 'ensemble' else 'single model'}"


def table(frame: pd.DataFrame, within: bool = False) -> Styler | None:
    """Return differences or claims that were run as a page shows them; within: with the interval over identities."""
    shown = frame[frame["difference"].notna()].drop(columns=["arm", "against", "sd", "before"], errors="ignore")
    if "within_low" in shown:
        pairs = zip(shown.pop("within_low"), shown.pop("within_high"))
        if within:
            texts = [compare.interval_text({"low": low, "high": high}) for low, high in pairs]
            shown["over identities alone"] = [compare.whole(text) for text in texts]
    if "published" in shown:
        shown["published"] = [None if np.isnan(points) else compare.signed(points, 1) for points in shown["published"]]
    if "verdict" in shown:
        shown = shown.drop(columns="map_at_100")  # the heights stand with the steps
        shown = shown if shown["whose"].nunique() > 1 else shown.drop(columns="whose")
        beside = shown.pop("size").map(lambda size: f", {size}" if size else "")
        shown["verdict"] = [*(shown["verdict"] + beside)]
        shown = shown.drop(columns="told")
    return compare.table(shown.rename(columns={"published": "published, points"}))
