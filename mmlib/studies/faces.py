"""What chapter 12 reads: records of real faces as they may be kept, and the claims of the study held against them.

They have nothing of a single person: one MAP@100 an arm and split, and intervals over people.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from mmlib import compare, metrics, systems
from mmlib.aggregate import AGGREGATORS
from mmlib.data.public import NETWORKS
from mmlib.data.store import ClipStore
from mmlib.experiment import KINDS, TRAINED, Experiment, Training
from mmlib.records import RESULTS, Record, fetch, open_store, read_results
from mmlib.studies import ensemble, fusion, ladder
from mmlib.studies.ladder import Pairs
from mmlib.studies.materials import (
    CLEAN,
    LENDING,
    MATERIALS,
    OTHERS,
    STRANGERS,
    alike,
    frozen,
    of_halves,
    quality_between,
    store_of,
)

SPLITS = {"ytf": 10, "cfp": 3, "lfw": 3}
TRAINED_SPLITS, HARDER_SPLITS = 10, 3  # of arms that are trained, on clips as they are and on harder ones
TITLES = {"edgeface": "EdgeFace", "mobilefacenet": "MobileFaceNet", "ytf": "YTF", "cfp": "CFP", "lfw": "LFW"}
# Of a tenth of the clips as many steps as in the worlds of chapter 04, some ninety.
BUDGET: dict[str, Any] = {"epochs": 16, "batch": 64}
MEMBERS = 4
BASE, BETWEEN = "mean, class means", "quality_between_clips"
WHITENING = "whitening adds to class means"
QUALITY, NORMS = "quality weights beat the plain mean", "norm weights beat the plain mean"
LEARNED, MARGIN = "learned weights of the scores beat quality weights", "an angular margin adds to the baseline"
TRAINING, VIEWS = "training adds to class means", f"{ladder.VIEWS}, {MEMBERS} members"
POOLINGS: Pairs = {  # what chapter 04 can say of the simulator
    QUALITY: ("quality", "mean"),
    NORMS: ("norm", "mean"),
    LEARNED: ("learned scores", "quality"),
    "NAN beats the plain mean": ("NAN", "mean"),
    **ladder.AGGREGATIONS,
    WHITENING: ("quality, whitened means", "quality, class means"),
    TRAINING: ("quality", "quality, class means"),
}
WEIGHTED: Pairs = {name: (f"{name}, class means", "mean, class means") for name in ("norm", "quality")}
GRID = WEIGHTED | {name: (name, "mean") for name in ("learned scores", "NAN", "attention + scores")}  # of figures
LOSSES: Pairs = {name: (name, "margin") for name in systems.LOSSES if name != "margin"}
ENSEMBLES: Pairs = {f"{kind}, {MEMBERS}": (f"{kind}, {MEMBERS}", "seeds, 1") for kind in KINDS}
STARTS: Pairs = {
    f"a start at random beats class means, {models}": (arm + systems.RANDOM, arm)
    for models, arm in (("one model", "seeds, 1"), (f"{MEMBERS} views", f"views, {MEMBERS}"))
}
FUSED: Pairs = {
    "score fusion beats the face alone": (fusion.SCORE, "face"),
    "score fusion beats network fusion": (fusion.SCORE, "scene 128"),
}
LONGER = f"seeds, 1{systems.RANDOM}, longer"  # tried after the claim was judged, as set on a split that no number uses
LONGER_BUDGET = {"epochs": 4 * BUDGET["epochs"], "lr": 1e-2}
WHOLE = "the whole system, against one model on faces"
BESIDE: Pairs = {  # no claims
    WHOLE: ("described: fallback", "described: baseline"),
    "network fusion, against the face alone": ("scene 128", "face"),
    "one model at random, longer and at a higher rate": (LONGER, "seeds, 1"),
}
BY_WEIGHT: Pairs = {name: (name, "weight 0") for name in fusion.WEIGHTS if name != "weight 0"}
CHOSEN = ("weight_even", "weight_odd")  # of the scene in the score of clips, for people of even and of odd places
LENT: Pairs = {  # whitening, by what its covariance is of, beside class means in the same ranking
    of: (f"quality, whitened means, {of}", f"quality, class means, {of}") for of in LENDING
}
RULES: Pairs = {
    f"rule: {name}": (f"rule: {name}", "rule: no fallback") for name in ("described", "coded, scale 30")
} | {"rule: coded": ("rule: coded", "rule: no fallback, scale 1")}
CLASS_MEANS: Pairs = {
    name: (f"{name} means", "mean, class means")
    for name in ("quality, class", "norm, class", "mean, whitened", "quality, whitened")
}
# Aggregators that other sets' people train and that then pool clips of YTF, as `materials` says.
FROZEN, FROZEN_ON = ", others' people", (CLEAN, *(f"20 % wrong, {who}" for who in STRANGERS))
FROZEN_ARMS = ("learned scores", "NAN", "attention + scores")
POOLS: dict[str, Pairs] = {  # what they are held against
    pool: {name: (name + FROZEN, f"{pool}, class means") for name in FROZEN_ARMS} for pool in ("mean", "quality")
}
SIGN = {"gains": 1, "cannot be told apart": 0, "loses": -1}  # of the words of a verdict
# Arms of `benchmarks.pipeline`, and what a page calls them.
DEGRADED = {"norm": "norm", "score": "the score itself", "quality": "quality", "oracle": "oracle"}


def rungs(scene: bool = True) -> Pairs:
    """Pair the rungs of the described ladder, and the arms beside it, as chapter 10 does; without a scene two fewer."""
    steps = ["baseline", "aggregation and loss", *["scene"] * scene, "ensemble", *["fallback"] * scene]
    names = [f"described: {step}" for step in steps]
    said = {"aggregation and loss": "aggregation with the loss adds"}
    pairs = {said.get(step, f"the {step} adds"): pair for step, pair in zip(steps[1:], zip(names[1:], names))}
    return {MARGIN: (names[0], ladder.NO_MARGIN)} | pairs


# What the landing page shows: what the team claims, and the rest of what a reader may build on.
LEADING = (*rungs(), ladder.ATTENTION, VIEWS, QUALITY, WHITENING, next(iter(FUSED)))


def claims_of(scene: bool = True) -> Pairs:
    """Name the claims that real faces are held against: the arm that takes the step, and the one that does not."""
    views = {VIEWS: (f"views, {MEMBERS}", f"bagging, {MEMBERS}")}
    return POOLINGS | rungs(scene) | views | (FUSED | STARTS if scene else {}) | ladder.other_claims()


def measure(
    plan: Callable[[str, str, ClipStore], Mapping[str, Experiment]],
    tables: str | Path,
    name: str,
    network: str,
    material: str,
    splits: Iterable[int],
    **options,
) -> list[Record]:
    """Make the records of a plan on some splits of a material of a set, as they are kept; see `kept`.

    plan: of a set, a material and its store; options: as for `fetch`.  Trained arms have the first splits alone, of
    clips as they are ``TRAINED_SPLITS``, of harder ones ``HARDER_SPLITS``.  Those of other sets' people are left out
    where `tables` are `lacking` one of the sets.  Where a plan has the weights of score fusion, their records are
    followed by those of the fusion at a weight chosen on other people, whose measures say which (`CHOSEN`).
    """
    lend = {arm: LENDING[of] for of, pair in LENT.items() for arm in pair}
    stores = {split: store_of(name, tables, network, split, material) for split in splits}
    arms = plan(name, material, next(iter(stores.values())))
    few = TRAINED_SPLITS if material == CLEAN else HARDER_SPLITS
    asked = [
        (arm, replace(e, data=str(stores[split].path), seed=split))
        for arm, e in arms.items()
        if not (arm.endswith(FROZEN) and lacking(tables))
        for split in [*stores][: few if e.classifier in TRAINED else None]
    ]
    runs, more = [e for _, e in asked], [dict[str, float]() for _ in asked]
    for at, (arm, e) in enumerate(asked):
        if arm == BASE:
            more[at] = {BETWEEN: quality_between(stores[e.seed])}
        if arm.endswith(FROZEN):
            others = store_of("others", tables, network, e.seed, material)
            pooled = frozen(replace(e, data=str(others.path)), stores[e.seed], **options)
            runs[at] = replace(e, data=str(pooled.path), aggregator="mean", classifier="class means")
            more[at] = pooled.meta["provenance"]
    made = [
        replace(r, experiment=r.experiment if run is e else asdict(e), measures=r.measures | found)
        for (_, e), run, r, found in zip(asked, runs, fetch(runs, **options), more)
    ]
    for at, (arm, e) in enumerate(asked):
        if arm in lend:
            halves = of_halves(e, stores[e.seed], lend[arm], **options)
            made[at] = replace(made[at], key=f"{e.key()}, {arm}", ap=halves.ap, measures=halves.measures)
    names = [arm for arm, _ in asked]
    for split in stores:
        of_split = pd.Series([r for r in made if r.experiment["seed"] == split], dtype=object)
        of_split.index = [arm for arm, e in asked if e.seed == split]
        mixed, weights = fusion.held_out(of_split)
        said = dict(zip(CHOSEN, weights["weight"]))
        made += [replace(r, key=f"{r.key}, {fusion.SCORE}", measures=r.measures | said) for r in mixed]
        names += [fusion.SCORE] * len(mixed)
    return kept(names, made, stores, {"set": name, "network": network, "material": material})


def lacking(tables: str | Path) -> list[str]:
    """Name the sets of other people whose table is not in a folder."""
    return [name for name in OTHERS if not (Path(tables) / name / "frames.parquet").exists()]


def kept(arms: Sequence[str], records: Iterable[Record], stores: Mapping[int, ClipStore], said: dict) -> list[Record]:
    """Return records as they may be kept: of no person, and of no place.

    In the place of the APs stands their mean.  Where both arms of one of `pairs_of` are there, the record of the one
    that takes the step has, in its first split, the interval of their difference over people, whose APs are averaged
    over the splits of both.  What the experiment says is what differs from its defaults, ``said``, and the arm's name;
    where other sets' people train an aggregator, it is what trains it.
    """
    by_arm: dict[str, dict[int, Record]] = {}
    for arm, record in zip(arms, records, strict=True):
        by_arm.setdefault(arm, {})[record.experiment["seed"]] = record
    people = {  # a row a person, a column a split
        arm: pd.DataFrame({split: pd.Series(r.ap, stores[split].identities) for split, r in of.items()})
        for arm, of in by_arm.items()
    }
    default, out = json.loads(json.dumps(asdict(Experiment()))), []
    training = asdict(Training())
    for arm, of in by_arm.items():
        within: dict[str, float] = {}
        for against in dict.fromkeys(against for one, against in pairs_of(by_arm) if one == arm):
            gain = (people[arm] - people[against]).dropna(axis=1, how="all").mean(axis=1).dropna().to_numpy()
            found = metrics.paired_test(gain, np.zeros(len(gain)))
            within |= {f"{against}: low": 100 * found.low, f"{against}: high": 100 * found.high}
        for split, record in of.items():
            e = json.loads(json.dumps(record.experiment))
            e = {key: value for key, value in e.items() if value != default[key] or key in ("seed", "settings")}
            e["training"] = {k: v for k, v in record.experiment["training"].items() if v != training[k]}
            e |= said | {"arm": arm, "data": f"{', '.join(said.values())}, split {split}"}
            rounded = {key: round(value, 6) for key, value in (record.measures | within).items()}
            cleared: dict[str, Any] = {"ap": [rounded["map_at_100"]], "breakdown": {}, "losses": []}
            out.append(replace(record, experiment=e, measures=rounded, **cleared))
            within = {}
    return out


def pairs_of(arms: Collection[str]) -> list[tuple[str, str]]:
    """List the comparisons of the page whose arms were run."""
    pairs = [*claims_of().values(), *claims_of(scene=False).values()]
    pairs += [(name, "mean") for name in AGGREGATORS if name != "mean"] + [*CLASS_MEANS.values()]
    pairs += [pair for of in POOLS.values() for pair in of.values()]
    pairs += [*LOSSES.values(), *ENSEMBLES.values(), *RULES.values()]
    pairs += [*BESIDE.values(), *BY_WEIGHT.values(), *LENT.values()]
    return [pair for pair in dict.fromkeys(pairs) if {*pair} <= {*arms} and pair[0] != pair[1]]


def differences(pairs: Pairs, records: Iterable[Record]) -> pd.DataFrame:
    """Compare the arms of pairs in every set, network and material: these, and the columns of `compare.steps_frame`.

    low and high are the wider on each side of two intervals, over splits and over people: splits share people, so that
    the first alone would be too narrow.
    """
    records = list(records)
    parts = [pd.DataFrame(columns=["set", "network", "material", "step", "arm", "against", *compare.COMPARED])]
    for keys, part in _grouped(records):
        frame = pd.concat(
            [compare.steps_frame({step: pair}, *_on_splits_of_both(pair, part)) for step, pair in pairs.items()]
        )
        within = {(r.experiment["arm"], key): value for r in part for key, value in r.measures.items() if ": " in key}
        pair = list(zip(frame["arm"], frame["against"]))
        for end, widest in (("low", np.fmin), ("high", np.fmax)):
            over = np.array([within.get((arm, f"{against}: {end}"), np.nan) for arm, against in pair])
            frame[end] = widest(frame[end].astype(float), over)
        parts.append(frame.assign(**dict(zip(("set", "network", "material"), keys))))
    return compare.with_source(pd.concat(parts[1:] or parts, ignore_index=True), records)


def _on_splits_of_both(pair: tuple[str, str], records: list[Record]) -> tuple[list[Record], list[str]]:
    """Return the records of two arms on the splits that both have, and the arm of each."""
    named = [(r.experiment["arm"], r.experiment["seed"], r) for r in records if r.experiment["arm"] in pair]
    splits = set.intersection(*({split for arm, split, _ in named if arm == one} for one in pair))
    kept_here = [(r, arm) for arm, split, r in named if split in splits]
    return [r for r, _ in kept_here], [arm for _, arm in kept_here]


def _grouped(records: Iterable[Record]) -> Iterator[tuple[tuple[str, str, str], list[Record]]]:
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        e = record.experiment
        groups.setdefault((e["set"], e["network"], e["material"]), []).append(record)
    yield from groups.items()


def verdicts(frame: pd.DataFrame, by: Sequence[str] = ("set", "step")) -> pd.Series:
    """Say of each claim ``gains``, ``loses`` or ``cannot be told apart``: what both networks say, else the last."""

    def word(part: pd.DataFrame) -> str:
        signs = {compare.sign(row) for row in part.to_dict("records")}
        both = {*part["network"]} == {*NETWORKS} and len(signs) == 1
        return {1: "gains", -1: "loses"}.get(signs.pop() or 0 if both else 0, "cannot be told apart")

    return frame.groupby([*by], sort=False)[[*frame.columns]].apply(word)


def tally(frame: pd.DataFrame) -> str:
    """Say in how many comparisons, by their steps, both networks gain and lose, and in which where it is one."""
    said = verdicts(frame, ["step"]) if len(frame) else pd.Series(dtype=object)
    counts = []
    for word in ("gains", "loses"):
        (steps,) = np.where(said == word)
        counts.append(f"{len(steps)}" + (f" ({said.index[steps[0]]})" if len(steps) == 1 else ""))
    return f"gain in {counts[0]} and lose in {counts[1]} of {len(said)} comparisons"


def simulated() -> pd.DataFrame:
    """Return what the kept records of simulated clips say of the same claims, as `compare.steps_frame`."""
    kept = [read_results(f"{name}.jsonl.gz") for name in ("04_arms", "10_ladder", "08_ensemble", "07_arms")]
    pooled, ladders, ensembles, fusions = kept
    kinds = [(r.experiment["aggregator"], r.experiment["classifier"]) for r in pooled]
    names = [aggregator + f", {kind}" * (kind != "mlp") for aggregator, kind in kinds]
    rest = {claim: pair for claim, pair in claims_of().items() if claim not in POOLINGS | STARTS | FUSED}
    arms = systems.arms(systems.FUSIONS)
    fused = fusion.named(fusions, arms | fusion.at_every_weight(arms["face"]))
    fused = pd.concat([fused, fusion.held_out(fused)[0]])
    parts = [
        compare.steps_frame(POOLINGS, pooled, names),
        compare.steps_frame(rest, ladders, ladder.names_of(ladders, ladder.plan())),
        ladder.views_against_bagging(ensembles, MEMBERS).assign(step=VIEWS),
        compare.steps_frame(STARTS, *_members(ensembles)),
        compare.steps_frame(FUSED, fused, fused.index),
    ]
    return compare.with_source(pd.concat([part for part in parts if len(part)]), sum(kept, []))


def _members(records: list[Record]) -> tuple[pd.Series, pd.Series]:
    """Return the records of chapter 08 on face and scene, by its main rule, and what the arm of each is called here."""
    runs = ensemble.as_runs(records)
    runs = runs[(runs["rule"] == ensemble.MAIN) & (runs["system"] != "scene alone")]
    return runs["record"], runs["arm"] + (runs["start"] == "random").map({True: systems.RANDOM, False: ""})


def held(records: Iterable[Record]) -> pd.DataFrame:
    """Hold the claims against clips as they are: `differences` for every set, and the simulated ones as a set."""
    records = [record for record in records if record.experiment["material"] == CLEAN]
    of = {name: [r for r in records if r.experiment["set"] == name] for name in SPLITS}
    parts = [differences(claims_of(scene=name == "ytf"), part) for name, part in of.items()]
    world = simulated().assign(set="simulated", network="")
    every = pd.concat([world, *parts], ignore_index=True)
    every.attrs = {"made": " ".join([compare.provenance(records), world.attrs["made"]])}
    return every


def pictured(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what a picture of `held` has: claims of the team, of pooling and of fusion, simulated and on real video.

    A start at random is left out, as what one network loses by it would flatten the rest.  A column ``clips`` says
    whose a mark is; rows from the largest gain on simulated clips to the largest loss.
    """
    shown = frame[frame["set"].isin(["simulated", "ytf"]) & ~frame["step"].isin([*STARTS, *ladder.other_claims()])]
    shown = shown.assign(clips=shown["network"].map(lambda name: f"YTF, {TITLES[name]}" if name else "simulated clips"))
    world = shown[shown["set"] == "simulated"].set_index("step")["difference"].astype(float)
    order = shown["step"].map(world).rank(method="dense", ascending=False)
    return shown.iloc[np.lexsort((shown["clips"] != "simulated clips", order))]


def words(frame: pd.DataFrame) -> pd.DataFrame:
    """Say by claim (rows) and set (columns) what `held` says: a word, one of `WORDS`, or none where nobody ran it."""
    said = verdicts(frame[frame["set"] != "simulated"])
    world = frame[frame["set"] == "simulated"].set_index("step")
    said = pd.concat([pd.Series({("simulated", step): compare.verdict(row) for step, row in world.iterrows()}), said])
    order = [claim for claim in claims_of() if claim in {*frame["step"]}]
    return said.unstack(0).reindex(index=order, columns=["simulated", *SPLITS])


def agreement(said: pd.DataFrame) -> pd.Series:
    """Say of each claim of `words` how YTF answers the simulator.

    ``same`` and ``opposite`` where both tell a gain or a loss, else ``simulated only``, ``real only`` or ``neither``;
    empty where one of them was not asked.
    """
    one, two = (said[name].map(SIGN) for name in ("simulated", "ytf"))
    kinds = [one.isna() | two.isna(), (one == two) & (one != 0), one * two < 0, (one != 0) & (two == 0)]
    kinds.append((one == 0) & (two != 0))
    return pd.Series(np.select(kinds, ["", "same", "opposite", "simulated only", "real only"], "neither"), said.index)


def of_other_size(frame: pd.DataFrame) -> pd.Series:
    """Say of each claim of `held` whether both its intervals on YTF lie apart from that of simulated clips (bool)."""
    world = frame[frame["set"] == "simulated"].set_index("step")[["low", "high"]].add_prefix("world_")
    found = frame[frame["set"] == "ytf"].join(world, on="step")
    outside = (found["low"] > found["world_high"]) | (found["high"] < found["world_low"])
    return outside.groupby(found["step"]).agg(lambda part: part.all() and len(part) == len(NETWORKS))


def both(frame: pd.DataFrame) -> tuple[str, str]:
    """Return what `verdicts` says of one comparison, a row a network, and the effects as a sentence has them.

    Where the networks do not agree, the sentence says which of them tells a gain or a loss.
    """
    said = verdicts(frame.assign(all=0), ["all"]).get(0, "was not run")
    effects = f"{compare.listed(map(compare.signed, frame['difference']))} points" if len(frame) else "no numbers"
    alone = [f"a {word} by {network}" for network, word in _told(frame).items()]
    return said, ", ".join([effects, *(alone if said == "cannot be told apart" else [])])


def _told(frame: pd.DataFrame) -> dict[str, str]:
    """Return which networks tell a gain or a loss of one comparison, and which, by their titles."""
    signs = zip(frame["network"], map(compare.sign, frame.to_dict("records")))
    return {TITLES[network]: {1: "gain", -1: "loss"}[sign] for network, sign in signs if sign}


def lending(worlds: Iterable[Experiment], people: int) -> list[Record]:
    """Make the records of the arms of `LENT` in worlds cut to so many people (`alike`), as they are kept."""
    out = []
    for world in worlds:
        cut = alike(open_store(world), people)
        for of, pair in LENT.items():
            for arm, kind in zip(pair, ("whitened means", "class means")):
                r = of_halves(replace(world, classifier=kind), cut, LENDING[of], device="cpu")
                e, ap = r.experiment | {"arm": arm}, [r.measures["map_at_100"]]
                out.append(replace(r, key=f"{r.key}, {arm}, {people}", experiment=e, ap=ap, breakdown={}))
    return out


def reasons(alone: str, lent: str, simulated: str) -> tuple[str, str]:
    """Say whether few clips, and people who vary in different directions, are why whitening loses on YTF.

    alone, lent: the verdict on YTF without and with clips lent; simulated: with them.  `materials` has the rule.
    """
    ytf = SIGN.get(lent, np.nan)
    few = "are a reason" if ytf > SIGN.get(alone, np.nan) else "are not shown to be a reason"
    if ytf == 1:
        return few, "are not needed as one"
    return few, "are a reason" if simulated == "gains" and ytf < 1 else "are neither shown nor ruled out"


def grid(records: Iterable[Record], pairs: Pairs = GRID) -> pd.DataFrame:
    """Return `differences` by the share of wrong frames, per cent, and whose they are: share, strangers; 0 for both."""
    shown = {
        name: asked for name, asked in MATERIALS.items() if asked == asked._replace(frames=0, score="", suspects=True)
    }
    frame = differences(pairs, [record for record in records if record.experiment["material"] in shown])
    frame = frame[frame["set"] == "ytf"]
    said = [shown[name] for name in frame["material"]]
    frame = frame.assign(share=[100 * asked.share for asked in said], strangers=[asked.strangers for asked in said])
    other = frame[frame["material"] == CLEAN].assign(strangers=STRANGERS[1])
    return pd.concat([frame, other]).sort_values(["strangers", "network", "share"], kind="stable", ignore_index=True)


def in_materials(pairs: Pairs, records: Iterable[Record], chosen: Iterable[str]) -> pd.DataFrame:
    """Return `differences` on clips of YTF in the chosen materials, in their order, which the step names too."""
    by_name: dict[str, list[Record]] = {name: [] for name in chosen}
    for record in records:
        if record.experiment["set"] == "ytf" and record.experiment["material"] in by_name:
            by_name[record.experiment["material"]].append(record)
    frame = differences(pairs, [record for part in by_name.values() for record in part])
    return frame.assign(step=frame["step"] + ", " + frame["material"])


def table(frame: pd.DataFrame, heading: str = "arm", by: str = "step") -> Styler | None:
    """Show differences as a page does: a row a value of ``by``, each network's with its interval, and the verdict."""
    if frame.empty:
        return None
    said = verdicts(frame, [by])
    rows: dict[str, dict[str, str]] = {}
    for (key, network), row in frame.groupby([by, "network"], sort=False).first().iterrows():
        rows.setdefault(key, {})[f"{TITLES[network]}: MAP@100"] = f"{row['map_at_100']:.4f}"
        rows[key][f"{TITLES[network]}: gain, points"] = _text(row)
    shown = pd.DataFrame(rows).T.rename_axis(heading).reset_index()
    return compare.table(shown.assign(**{"both networks": shown[heading].map(said)}))


def claims_table(frame: pd.DataFrame) -> Styler | None:
    """Show the `words` of `held` as a page does: a row a claim, a column a set, ``open`` where nothing is told.

    Where one network alone tells a gain or a loss, or each another one, that stands beside ``open``.
    """
    said = words(frame).replace("cannot be told apart", "open")
    cells = said.astype(object).where(said.notna(), "")
    for (name, step), part in frame[frame["set"] != "simulated"].groupby(["set", "step"], sort=False):
        told = [f"a {word} by {network}" for network, word in _told(part).items()]
        if cells.at[step, name] == "open" and told:
            cells.at[step, name] = f"open; {compare.listed(told)}"
    cells = cells.rename(columns=TITLES)
    return compare.table(cells.rename_axis("claim").reset_index())


def effects_table(frame: pd.DataFrame, sets: Sequence[str]) -> Styler | None:
    """Show the effects of `held` in some sets, points with their intervals: a row a claim, a column a network."""
    shown = frame[frame["set"].isin(sets)]
    heads = [f"{TITLES.get(a, a)} {TITLES.get(b, b)}".strip() for a, b in zip(shown["set"], shown["network"])]
    texts = [_text(row) for row in shown.to_dict("records")]
    cells = shown.assign(head=heads, text=texts).pivot(index="step", columns="head", values="text")
    cells = cells.reindex(index=shown["step"].unique(), columns=dict.fromkeys(heads)).fillna("")
    return compare.table(cells.rename_axis("claim, effect in points").reset_index()) if len(cells) else None


def read_degraded(path: Path = RESULTS / "12_degraded.jsonl.gz") -> tuple[dict, pd.DataFrame]:
    """Read what `benchmarks.pipeline` wrote of degraded frames: when and by what it was made, and its rows."""
    made, *rows = map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
    return made, pd.DataFrame(rows)


def degraded_frame(made: Mapping, rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows of degraded frames with their share in per cent and, in points, the columns of a comparison.

    Of the arms those of `DEGRADED`, under the name that it has.
    """
    shown = rows[rows["arm"].isin([*DEGRADED])]
    points = {"difference": "gain", "low": "gain_low", "high": "gain_high"}
    numbers = {name: 100 * shown[of] for name, of in ({"share": "share"} | points).items()}
    shown = shown.assign(map_at_100=shown["map"], step=shown["arm"].map(DEGRADED), **numbers)
    people = f"{shown['clips'].iloc[0]} real clips of {shown['identities'].iloc[0]} people of YTF"
    shown.attrs["made"] = f"{people}, embedded {made['made']}, commit {made['commit']}."
    return shown


def read_decisions() -> pd.DataFrame:
    """Read the committed result of `benchmarks.pipeline`."""
    return pd.read_csv(RESULTS / "12_pipeline.csv")


def decisions_table(rows: pd.DataFrame) -> Styler | None:
    """Show what `benchmarks.pipeline` found, a row a comparison, a column a network.

    A value has its interval; of two ways it is the first's, with its difference from the second, in points of a MAP or
    an accuracy.
    """
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows[rows["value_a"].notna()].to_dict("records"):
        two, whole = isinstance(row["b"], str), row["measure"].startswith(("MAP", "verification"))
        scale, digits = (100, 2) if whole else (1, 3)
        found = {name: scale * row[name] for name in ("difference", "low", "high")}
        said = [f"{row['value_a']:.3f}", f"{compare.signed(found['difference'], digits)} " if two else ""]
        said.append(compare.interval_text(found, digits) if two else f"[{row['low']:.3f}, {row['high']:.3f}]")
        key = f"{row['decision']}: {row['measure']}", row["a"] + f", against {row['b']}" * two, row["photographs"]
        text = f"{said[0]} {compare.whole(said[1] + said[2])}"
        cells.setdefault(key, {})[TITLES[row["network"]]] = text
    heads = ("decision: measure", "compared", "photographs")
    table = [
        dict(zip(heads[:2], key))
        | {TITLES[n]: found.get(TITLES[n], "") for n in NETWORKS}
        | {heads[2]: f"{key[2]:.0f}"}
        for key, found in cells.items()
    ]
    return compare.table(pd.DataFrame(table))


def _text(row: Mapping) -> str:
    """Write a difference with its interval; arms that are the same, as all weights of one frame are, have a dash."""
    return (
        "—"
        if compare.is_same(row)
        else f"{compare.signed(row['difference'])} {compare.whole(compare.interval_text(row))}"
    )
