"""What chapter 08 reads: the partition of the features, identities lost by resampling, members and their scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mmlib.compare import as_frame, compare_arms, with_source
from mmlib.data.calibration import clips_per_identity
from mmlib.data.simulate import PROFILES, World, settings_for
from mmlib.data.store import ClipStore
from mmlib.ensemble import KINDS, member_clips
from mmlib.experiment import Experiment
from mmlib.models import gap
from mmlib.records import Record

MAIN, PLAIN = "softmax", "seeds, 1"
RULES: dict[str, dict[str, Any]] = {  # how the scores of members are averaged
    MAIN: {"combine": "softmax", "scale": 30.0},
    "softmax, temperature 1": {"combine": "softmax", "scale": 1.0},
    "cosine": {"combine": "cosine", "scale": 30.0},
    "log softmax": {"combine": "log softmax", "scale": 30.0},
    "ranks": {"combine": "ranks", "scale": 30.0},
}


def plan(
    base: Experiment, kinds: Iterable[str], sizes: Iterable[int], seeds: list[int], rules=RULES
) -> list[Experiment]:
    """List the experiments: every size by the rule ``MAIN``; by the other rules the plain model and the most members.

    sizes: numbers of members, one at least 2; one member is always run.
    """
    sizes = sorted({1, *sizes})
    if sizes[0] < 1 or sizes[-1] < 2:
        raise ValueError(f"sizes must be integers >= 1, one of them at least 2, got {sizes!r}")
    return [
        replace(base, ensemble=kind, seed=seed, members=tuple(range(size)), **RULES[rule])
        for kind, seed, size, rule in product(kinds, seeds, sizes, rules)
        if rule == MAIN or size == sizes[-1] or (size == 1 and kind == "seeds")
    ]


def as_runs(records: Iterable[Record]) -> pd.DataFrame:
    """Return a row a record: system, kind, members (how many), rule, arm (kind and members), record, its measures."""
    records = list(records)
    frame = as_frame(records).rename(columns={"ensemble": "kind"})
    frame["members"] = frame["members"].map(len)
    frame["arm"] = frame["kind"] + ", " + frame["members"].astype(str)
    rules = {tuple(rule.values()): name for name, rule in RULES.items()}
    frame["rule"] = [rules[rule] for rule in zip(frame["combine"], frame["scale"])]
    cases = [frame["modality"].isna(), frame["start"] == "random", frame["context"].map(len) > 0]
    frame["system"] = np.select(cases, ["scene alone", "random start", "face and scene"], "face alone")
    return frame.assign(record=records, fit=[record.seconds["fit"] for record in records])


def most(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the most members of each system by the rule ``MAIN``."""
    return runs[(runs["members"] == runs.groupby("system")["members"].transform("max")) & (runs["rule"] == MAIN)]


def against(runs: pd.DataFrame, by: str, baseline: str) -> pd.DataFrame:
    """Compare the values of a column with ``baseline`` within each system: system, and as ``compare_arms``."""
    systems = runs.groupby("system", sort=False)
    parts = {name: compare_arms(part["record"], by, baseline, names=part[by]) for name, part in systems}
    frame = pd.concat(parts, names=["system", None]).reset_index("system").reset_index(drop=True)
    return with_source(frame, runs["record"])


def partition(width: int, regions: int, members: int) -> pd.DataFrame:
    """Return what each of the first members discards of ``width`` dimensions: member, start, stop (exclusive)."""
    gaps = [gap(width, (member, regions)) for member in range(members)]
    rows = [(member, gap.start, gap.stop, width) for member, gap in enumerate(gaps)]
    return pd.DataFrame(rows, columns=["member", "start", "stop", "width"])


def block_variance(store: ClipStore, modality: str, regions: int, frames: int = 1000) -> pd.DataFrame:
    """Return the share of the variance of unit frame features in each of ``regions`` blocks: block, axes, share.

    Blocks, from 1, of the dimensions as stored, and of the principal axes, where they would be anything but arbitrary.
    """
    feature = store.modalities[modality].feature
    rows = np.sort(np.random.default_rng(0).permutation(len(feature))[:frames])
    x = np.asarray(feature[rows], np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    x = x - x.mean(0)
    principal = np.zeros(x.shape[1], np.float32)
    found = np.linalg.svd(x, compute_uv=False) ** 2
    principal[: len(found)] = found
    blocks = [
        (block + 1, axes, float(variance[gap(len(variance), (block, regions))].sum() / variance.sum()))
        for axes, variance in (("as stored", (x**2).sum(0)), ("principal axes", principal))
        for block in range(regions)
    ]
    return pd.DataFrame(blocks, columns=["block", "axes", "share"])


PROCEDURES = {"bootstrap": "bagging", "80 % subsample": "", "stratified bootstrap": "stratified"}  # kinds of members


def expected_lost(count: np.ndarray) -> dict[str, float]:
    """Return the exact share of identities that each procedure loses; count (C,) clips of each, at least 1.

    Of N clips, an identity of n is lost by a bootstrap with probability (1 - n/N)^N, by a subsample of m clips with
    C(N - n, m) / C(N, m), by a bootstrap within identities never.

    >>> expected_lost(np.array([1, 1]))["bootstrap"]
    0.25
    """
    total = int(count.sum())
    subsample = stats.hypergeom.pmf(0, total, count, round(0.8 * total))
    every = np.mean((1 - count / total) ** total), np.mean(subsample), 0.0
    return dict(zip(PROCEDURES, map(float, every)))


def drawn_lost(identity: np.ndarray, procedure: str, draws: int = 200) -> np.ndarray:
    """Return the share of identities (n,) that each draw loses, bootstraps those of ``ensemble.member_clips``."""
    clips, kind, rng = np.arange(len(identity)), PROCEDURES[procedure], np.random.default_rng([0, 8])
    if kind:
        kept = [member_clips(kind, clips, identity, seed=0, member=draw) for draw in range(draws)]
    else:
        kept = [rng.permutation(clips)[: round(0.8 * len(clips))] for _ in range(draws)]
    return np.array([len(np.setdiff1d(identity, identity[each])) for each in kept]) / len(np.unique(identity))


def lost_table(store: ClipStore, draws: int = 200) -> pd.DataFrame:
    """Return the shares of identities lost: clips, procedure, challenge, expected, and mean, std, min, max of draws.

    Exact for the challenge, by its published numbers, and expected for the labelled clips with a face, drawn from.
    """
    every = clips_per_identity(PROFILES["full"], np.random.default_rng(0))  # all of them, in some order
    published = {"train": every[:, 0], "train and val": every.sum(1)}
    told, rows = ["mean", "std", "min", "max"], []
    for name, challenge in published.items():
        clips = [store.select(split, labelled=True, having="face") for split in name.split(" and ")]
        identity = store.identity_of(np.concatenate(clips))
        exact = [expected_lost(n) for n in (challenge, np.unique(identity, return_counts=True)[1])]
        for procedure in PROCEDURES:
            drawn = pd.Series(drawn_lost(identity, procedure, draws)).agg(told)
            rows.append((name, procedure, *(each[procedure] for each in exact), *drawn))
    return pd.DataFrame(rows, columns=["clips", "procedure", "challenge", "expected", *told])


@lru_cache(maxsize=4)
def _world(profile: str, settings: tuple, seed: int) -> World:
    """Draw who is in which clip, and no frame."""
    return World(settings_for(profile, **dict(settings)), seed)


def lost_by(record: Record, other: Record) -> pd.DataFrame | None:
    """Say of every query to train on how many members have no clip of it: identity, clips, lost, and the two APs.

    Recomputed from clips and seed.  None where that does not give the counts of the record, of other clips then.
    """
    e, said = record.experiment, record.measures
    if e["data"] == "simulated":
        world = _world(e["profile"], tuple(map(tuple, e["settings"])), e["seed"])
        table, counts = world.clips, {name: count for name, (_, count) in world.spans.items()}
    else:
        store = ClipStore.open(e["data"])
        table, counts = store.clips, {name: source.count for name, source in store.modalities.items()}
    having = np.any([counts[name] > 0 for name in ([e["modality"]] if e["modality"] else e["context"])], axis=0)
    split, who = table["split"], table["identity"].where(table["identity"] >= 0)
    train, queries = who[(split == "train") & having].dropna().astype(int), np.unique(who[split == "val"].dropna())
    frame = train.value_counts().sort_index().rename_axis("identity").reset_index(name="clips").assign(lost=0)
    for member in e["members"]:
        kept = member_clips(e["ensemble"], train.index.to_numpy(), train.to_numpy(), seed=e["seed"], member=member)
        frame["lost"] += ~frame["identity"].isin(train[kept])
    fits = len(queries) == len(record.ap) == len(other.ap) and len(train) == said.get("train_clips", len(train))
    mean = frame["lost"].sum() / len(e["members"])
    if not fits or not np.isclose(mean, said.get("lost_identities", mean)):
        return None
    ap = {e["ensemble"]: record.ap, other.experiment["ensemble"]: other.ap}
    return frame.merge(pd.DataFrame({"identity": queries} | ap), on="identity")


def lost_ap(runs: pd.DataFrame, kind: str = "bagging", other: str = "seeds") -> pd.DataFrame:
    """Compare a kind with another on the same identities, grouped by the share of members that lost them.

    One member and the most, by the rule ``MAIN``: members, lost by, identities (a seed), clips (mean), the MAP of each,
    and the difference as of ``compare_arms``.  Empty where the records do not fit today's clips.
    """
    columns = ["members", "lost by", "identities", "clips", kind, other, "difference", "low", "high", "n", "interval"]
    groups, rows = ["no member", "up to a quarter", "more than a quarter"], []
    for size in (1, runs["members"].max()):
        main = runs[(runs["rule"] == MAIN) & (runs["members"] == size)]
        sides = {name: main[main["kind"] == name].set_index("seed")["record"] for name in (kind, other)}
        parts = {seed: lost_by(record, sides[other][seed]) for seed, record in sides[kind].items()}
        if any(part is None for part in parts.values()):
            return pd.DataFrame(columns=columns)
        every = pd.concat(parts, names=["seed"]).reset_index("seed")
        every["lost by"] = pd.cut(every["lost"] / size, [-1, 0, 0.25, 1], labels=groups)
        for name, part in every.groupby("lost by", observed=True):
            table = _on_identities(part, sides, other)
            means = (len(part) / len(parts), part["clips"].mean(), *table.loc[[kind, other], "map_at_100"])
            rows.append((size, name, *means, *table.loc[kind, columns[6:]]))
    return pd.DataFrame(rows, columns=columns)


def _on_identities(part: pd.DataFrame, sides: dict[str, pd.Series], baseline: str) -> pd.DataFrame:
    """Compare records on some identities alone; on a given store APs are averaged over seeds, identity by identity."""
    if sides[baseline].iloc[0].experiment["data"] != "simulated":
        part = part.assign(seed=part["seed"].min())
    ap = part.groupby(["seed", "identity"])[list(sides)].mean().groupby("seed").agg(list)
    pairs = [(name, replace(sides[name][seed], ap=each)) for name in sides for seed, each in ap[name].items()]
    names, records = zip(*pairs)
    return compare_arms(records, "kind", baseline, names=names).set_index("kind")


def by_members(runs: pd.DataFrame) -> pd.DataFrame:
    """Compare every kind and number of members with the first of ``seeds`` in its system, by the rule ``MAIN``."""
    frame = against(runs[runs["rule"] == MAIN], "arm", PLAIN)
    arm = frame.pop("arm").str.split(", ")
    frame.insert(1, "kind", arm.str[0])
    frame.insert(2, "members", arm.str[1].astype(int))
    places = {"system": list(frame["system"].unique()).index, "kind": KINDS.index, "members": int}
    return frame.sort_values(list(places), key=lambda column: column.map(places[column.name]), ignore_index=True)


def by_rule(runs: pd.DataFrame) -> pd.DataFrame:
    """Return MAP@100 by rule (rows) for one plain model and for the most members of every kind (columns)."""
    whole = runs["members"] == runs["members"].max()
    chosen = runs[whole | (runs["arm"] == PLAIN)].assign(kind=runs["kind"].where(whole, "one model"))
    table = chosen.pivot_table(index="rule", columns="kind", values="map_at_100").rename_axis(columns=None)
    return table.reindex(index=RULES, columns=["one model", *KINDS]).dropna(how="all").dropna(axis=1, how="all")


def starts(runs: pd.DataFrame, kind: str = "views") -> pd.DataFrame:
    """Compare a start at random with one at class means, for one model and for as many of a kind as both have."""
    size, parts = runs.groupby("start")["members"].max().min(), {}
    for models, arm in (("one model", PLAIN), (f"{size} {kind}", f"{kind}, {size}")):
        part = runs[(runs["arm"] == arm) & (runs["rule"] == MAIN)]
        table = compare_arms(part["record"], "start", "class means").set_index("start")
        parts[models] = table.assign(disagreement=part.groupby("start")["disagreement"].mean())
    return pd.concat(parts, names=["models"]).reset_index()


def diversity(runs: pd.DataFrame) -> pd.DataFrame:
    """Return measures of the most members of each kind, best MAP first; millions of parameters and seconds of all."""
    columns = ["map_at_100", "member_clip_top1", "clip_top1", "disagreement", "lost_identities", "parameters", "fit"]
    last = most(runs).assign(parameters=lambda frame: frame["parameters"] * frame["members"] / 1e6)
    return last.groupby("kind")[columns].mean().sort_values("map_at_100", ascending=False).reset_index()
