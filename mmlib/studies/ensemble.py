"""What chapter 08 reads: the partition of the feature space, identities lost by resampling, members and their scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy import stats

from mmlib import metrics
from mmlib.compare import compare_arms
from mmlib.data.calibration import clips_per_identity
from mmlib.data.simulate import PROFILES, World, settings_for
from mmlib.data.store import ClipStore
from mmlib.ensemble import KINDS, member_clips
from mmlib.experiment import Experiment
from mmlib.models import region
from mmlib.records import Record

# -- the runs -------------------------------------------------------------------------------------------------------

MAIN, PLAIN = "softmax", "seeds, 1"
RULES = {  # how the scores of members are averaged: combine and scale of an experiment
    MAIN: ("softmax", 30.0),
    "softmax, temperature 1": ("softmax", 1.0),
    "cosine": ("cosine", 30.0),
    "log softmax": ("log softmax", 30.0),
    "ranks": ("ranks", 30.0),
}


def as_sizes(sizes: str | Iterable[int]) -> list[int]:
    """Read the ``sizes`` parameter, numbers of members; in ascending order, with 1 whether asked for or not."""
    if isinstance(sizes, str):
        try:
            sizes = json.loads(sizes)
        except ValueError:
            raise ValueError(f"sizes must be a list of integers such as [1, 2, 4], got {sizes!r}") from None
    sizes = list(sizes) if isinstance(sizes, Iterable) else [sizes]
    if not all(type(size) is int and size >= 1 for size in sizes) or len(sizes) < 1 or max(sizes) < 2:
        raise ValueError(f"sizes must be integers >= 1, one of them at least 2, got {sizes!r}")
    return sorted({1, *sizes})


def in_smaller_worlds(base: Experiment, identities: int) -> Experiment:
    """Return the experiment in worlds of fewer identities, if those of its profile have more; a given store stays."""
    if base.simulated and identities < settings_for(base.profile).identities:
        return replace(base, settings=(("identities", identities),))
    return base


def plan(
    base: Experiment, kinds: Sequence[str], sizes: Sequence[int], seeds: Sequence[int], rules: Iterable[str] = RULES
) -> list[Experiment]:
    """List the experiments: every size by the rule ``MAIN``; by the other rules the plain model and the most members.

    Those of one kind and seed share their trained members.
    """
    asked = [
        (kind, seed, size, rule)
        for kind in kinds
        for seed in seeds
        for size in sizes
        for rule in rules
        if rule == MAIN or size == max(sizes) or (size == 1 and kind == "seeds")
    ]
    return [
        replace(
            base, seed=seed, ensemble=kind, members=tuple(range(size)), combine=RULES[rule][0], scale=RULES[rule][1]
        )
        for kind, seed, size, rule in asked
    ]


def by_system(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group records by what their members are, in the order in which they come."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        e = record.experiment
        name = (
            "scene alone"
            if e["modality"] is None
            else "random start"
            if e["start"] == "random"
            else "face and scene"
            if e["context"]
            else "face alone"
        )
        groups.setdefault(name, []).append(record)
    return groups


def _rule(record: Record) -> str:
    said = record.experiment["combine"], record.experiment["scale"]
    return next(name for name, rule in RULES.items() if rule == said)


def _size(record: Record) -> int:
    return len(record.experiment["members"])


def largest(records: Iterable[Record]) -> int:
    """Return the largest number of members."""
    return max(map(_size, records))


# -- the partition --------------------------------------------------------------------------------------------------


def partition(width: int, regions: int, members: int) -> pd.DataFrame:
    """Return what each of the first members discards of ``width`` dimensions: member, start, stop (exclusive), width."""
    gaps = [region(width, member, regions) for member in range(members)]
    return pd.DataFrame(
        [(i, gap.start, gap.stop, width) for i, gap in enumerate(gaps)], columns=["member", "start", "stop", "width"]
    )


def block_variance(store: ClipStore, modality: str, regions: int, frames: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return the share of the variance of unit frame features that lies in each of ``regions`` blocks.

    The blocks are of the dimensions as they are stored, and of the principal axes in their order, in which a block
    would be anything but arbitrary.  Columns: block (from 1), axes, share.
    """
    feature = store.modalities[modality].feature
    rows = np.sort(np.random.default_rng(seed).permutation(len(feature))[:frames])
    x = np.asarray(feature[rows], np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    x = x - x.mean(0)
    stored = (x**2).sum(0)
    principal = np.zeros_like(stored)
    values = np.linalg.svd(x, compute_uv=False) ** 2
    principal[: len(values)] = values
    rows = [
        (block + 1, axes, float(variance[region(len(variance), block, regions)].sum() / variance.sum()))
        for axes, variance in (("as stored", stored), ("principal axes", principal))
        for block in range(regions)
    ]
    return pd.DataFrame(rows, columns=["block", "axes", "share"])


def partition_sentence(shares: dict[str, pd.DataFrame]) -> str:
    """Say how uneven the blocks are, for the frames of ``block_variance`` by modality."""
    parts = []
    for name, frame in shares.items():
        share = frame.groupby("axes")["share"]
        low, high, first = share.min()["as stored"], share.max()["as stored"], share.max()["principal axes"]
        parts.append(
            f"a block of the {name} dimensions as stored holds {low:.3f} to {high:.3f} of the variance, "
            f"the first block of principal axes {first:.3f}"
        )
    return _sentence("; ".join(parts))


# -- identities lost ------------------------------------------------------------------------------------------------

PROCEDURES = ("bootstrap", "80 % subsample", "stratified bootstrap")


def expected_lost(count: np.ndarray, procedure: str) -> float:
    """Return the exact share of identities that a procedure loses; count (C,) clips of each, at least 1.

    Of N clips, an identity of n is lost by a bootstrap with probability (1 - n/N)^N, by a subsample of m clips with
    C(N - n, m) / C(N, m), by a bootstrap within identities never.

    >>> expected_lost(np.array([1, 1]), "bootstrap")
    0.25
    """
    total = int(count.sum())
    if procedure == "bootstrap":
        return float(np.mean((1 - count / total) ** total))
    if procedure == "80 % subsample":
        return float(np.mean(stats.hypergeom.pmf(0, total, count, round(0.8 * total))))
    if procedure == "stratified bootstrap":
        return 0.0
    raise ValueError(f"procedure must be one of {', '.join(PROCEDURES)}, got {procedure!r}")


def drawn_lost(identity: np.ndarray, procedure: str, draws: int = 200, seed: int = 0) -> np.ndarray:
    """Return the share of identities that each of ``draws`` draws loses; identity (n,) of the clips drawn from.

    The bootstraps are those of ``ensemble.member_clips``, a draw a member.
    """
    code = np.unique(identity, return_inverse=True)[1]
    clips, rng = np.arange(len(code)), np.random.default_rng([seed, 8])
    kind = {"bootstrap": "bagging", "stratified bootstrap": "stratified"}.get(procedure)
    lost = np.empty(draws)
    for draw in range(draws):
        kept = (
            member_clips(kind, clips, code, seed=seed, member=draw)
            if kind
            else rng.permutation(clips)[: round(0.8 * len(clips))]
        )
        lost[draw] = np.mean(np.bincount(code[kept], minlength=code.max() + 1) == 0)
    return lost


def lost_table(store: ClipStore, modality: str = "face", draws: int = 200) -> pd.DataFrame:
    """Return the shares of identities lost, of this store and of the challenge: clips, procedure, challenge, expected,
    mean, sd, low, high.

    The challenge's are exact, from the published numbers of clips of its identities; expected is exact for this store;
    the rest are mean, spread, least and most over draws.  Of the store, labelled clips that have the modality count.
    """
    every = clips_per_identity(PROFILES["full"], np.random.default_rng(0))  # all of them, in some order
    rows = []
    for name, splits, published in (
        ("train", ["train"], every[:, 0]),
        ("train and val", ["train", "val"], every.sum(1)),
    ):
        clips = np.concatenate([store.select(split, labelled=True, having=modality) for split in splits])
        identity = store.identity_of(clips)
        count = np.unique(identity, return_counts=True)[1]
        for procedure in PROCEDURES:
            lost = drawn_lost(identity, procedure, draws)
            rows.append(
                (
                    name,
                    procedure,
                    expected_lost(published, procedure),
                    expected_lost(count, procedure),
                    lost.mean(),
                    lost.std(ddof=1),
                    lost.min(),
                    lost.max(),
                )
            )
    return pd.DataFrame(rows, columns=["clips", "procedure", "challenge", "expected", "mean", "sd", "low", "high"])


@lru_cache(maxsize=8)
def _cast(data: str, profile: str, settings: tuple, seed: int, sources: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    """Return the clips that can be trained on, their identities, and the queries in the order of a record's APs."""
    if data == "simulated":  # who is in which clip is known without drawing a frame
        world = World(settings_for(profile, **dict(settings)), seed)
        table, counts = world.clips, {name: count for name, (_, count) in world.spans.items()}
    else:
        store = ClipStore.open(data)
        table, counts = store.clips, {name: source.count for name, source in store.modalities.items()}
    identity, split = table["identity"].to_numpy(), table["split"].to_numpy()
    having = np.any([counts[name] > 0 for name in sources], axis=0)
    clips = np.flatnonzero((split == "train") & (identity >= 0) & having)
    return clips, identity[clips], np.unique(identity[(split == "val") & (identity >= 0)])


def lost_by(record: Record, other: Record) -> pd.DataFrame | None:
    """Say of every query how many members have no clip of it: identity, clips (to train on), lost, ap, other (AP there).

    Recomputed from the clips and the seed.  None where that does not give the numbers of clips and of lost identities
    that the record has: then its clips are not those of today.  Identities that nobody could train on are left out.
    """
    e = record.experiment
    sources = (e["modality"],) if e["modality"] else tuple(e["context"])
    settings = tuple(map(tuple, e["settings"]))  # lists in a record that was read
    clips, identity, queries = _cast(e["data"], e["profile"], settings, e["seed"], sources)
    known, count = np.unique(identity, return_counts=True)
    lost = np.zeros(len(known), int)
    for member in e["members"]:
        kept = member_clips(e["ensemble"], clips, identity, seed=e["seed"], member=member)
        lost += ~np.isin(known, identity[np.searchsorted(clips, kept)])
    said = record.measures
    if not (
        len(queries) == len(record.ap) == len(other.ap)
        and len(clips) == said.get("train_clips", len(clips))
        and np.isclose(lost.sum() / _size(record), said.get("lost_identities", lost.sum() / _size(record)))
    ):
        return None
    ap = pd.DataFrame({"identity": queries, "ap": record.ap, "other": other.ap})
    return pd.DataFrame({"identity": known, "clips": count, "lost": lost}).merge(ap, on="identity")


LOST_GROUPS = ("no member", "up to a quarter", "more than a quarter")


def lost_ap(records: Iterable[Record], kind: str = "bagging", other: str = "seeds") -> pd.DataFrame:
    """Compare a kind with another on the same identities, grouped by the share of members that lost them.

    One member and the most, by the rule ``MAIN``.  Columns: members, lost by, identities (a seed), clips (mean), the MAP
    of either kind, difference, low, high (points, 95 %: a t interval over worlds where there are several, else a
    bootstrap over identities).  Empty where the records do not fit today's clips.
    """
    found = {(r.experiment["ensemble"], _size(r), r.experiment["seed"]): r for r in records if _rule(r) == MAIN}
    seeds = sorted({seed for _, _, seed in found})
    columns = ["members", "lost by", "identities", "clips", kind, other, "difference", "low", "high"]
    rows = []
    for size in (1, max(size for _, size, _ in found)):
        frames = {seed: lost_by(found[kind, size, seed], found[other, size, seed]) for seed in seeds}
        if any(frame is None for frame in frames.values()):
            return pd.DataFrame(columns=columns)
        every = pd.concat([frame.assign(seed=seed) for seed, frame in frames.items()])
        share = every["lost"] / size
        group = np.select([share == 0, share <= 0.25], LOST_GROUPS[:2], LOST_GROUPS[2])
        worlds = found[kind, size, seeds[0]].experiment["data"] == "simulated"
        for name in LOST_GROUPS:
            part = every[group == name]
            if len(part):
                rows.append((size, name, len(part) / len(seeds), part["clips"].mean(), *_gain(part, worlds)))
    return pd.DataFrame(rows, columns=columns)


def _gain(part: pd.DataFrame, worlds: bool) -> tuple[float, ...]:
    """Return the MAP of both kinds, and their difference with its interval in points."""
    mean = part.groupby("seed" if worlds and part["seed"].nunique() > 1 else "identity")[["ap", "other"]].mean()
    gain = (mean["ap"] - mean["other"]).to_numpy()
    if mean.index.name == "seed":
        over = metrics.over_worlds(gain)
        low, high = over.low, over.high
    else:
        low, high = metrics.bootstrap_interval(gain) if len(gain) > 1 else (np.nan, np.nan)
    return (*mean.mean(), *(100 * x for x in (gain.mean(), low, high)))


# -- members, kinds, rules ------------------------------------------------------------------------------------------


def _compare(records: Iterable[Record], name, baseline) -> pd.DataFrame:
    """Do what ``compare.compare_arms`` does, for arms named by a function of a record."""
    named = [replace(record, experiment=record.experiment | {"arm": name(record)}) for record in records]
    return compare_arms(named, by="arm", baseline=baseline)


def by_members(records: Iterable[Record]) -> pd.DataFrame:
    """Compare every kind and number of members with one plain model, by the rule ``MAIN``.

    Columns: kind, members, and those of ``compare_arms``; the plain model is the first member of ``seeds``.
    """
    frame = _compare(
        [r for r in records if _rule(r) == MAIN], lambda r: (r.experiment["ensemble"], _size(r)), ("seeds", 1)
    )
    frame.insert(0, "kind", [kind for kind, _ in frame["arm"]])
    frame.insert(1, "members", [size for _, size in frame.pop("arm")])
    order = frame["kind"].map(KINDS.index)
    return frame.assign(order=order).sort_values(["order", "members"], ignore_index=True).drop(columns="order")


def by_system_and_members(systems: dict[str, list[Record]]) -> pd.DataFrame:
    """Return ``by_members`` of several systems, each against its own plain model: system and the columns there."""
    parts = [by_members(records).assign(system=name) for name, records in systems.items()]
    columns = ["system", "kind", "members", "map_at_100", "difference", "low", "high", "n"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def ends(records: Iterable[Record]) -> list[tuple[str, Record]]:
    """Return the plain model's records and those of every kind with the most members, by the rule ``MAIN``, with names."""
    records = [record for record in records if _rule(record) == MAIN]
    most = largest(records)
    named = [(f"{record.experiment['ensemble']}, {_size(record)}", record) for record in records]
    return [(name, record) for name, record in named if name == PLAIN or (_size(record) == most > 1)]


def between_kinds(records: Iterable[Record], baseline: str = "seeds") -> pd.DataFrame:
    """Compare the kinds with each other at the largest number of members, by the rule ``MAIN``; as ``compare_arms``."""
    records = list(records)
    chosen = [r for r in records if _rule(r) == MAIN and _size(r) == largest(records)]
    return _compare(chosen, lambda r: r.experiment["ensemble"], baseline).rename(columns={"arm": "kind"})


def by_rule(records: Iterable[Record]) -> pd.DataFrame:
    """Return MAP@100 by rule (rows) for one plain model and for the most members of every kind (columns)."""
    records = list(records)
    frame = pd.DataFrame(
        [
            (_rule(r), "one model" if _size(r) == 1 else r.experiment["ensemble"], r.measures["map_at_100"])
            for r in records
            if _size(r) == largest(records) or (_size(r) == 1 and r.experiment["ensemble"] == "seeds")
        ],
        columns=["rule", "kind", "map"],
    )
    table = frame.pivot_table(index="rule", columns="kind", values="map")
    kinds = [name for name in ("one model", *KINDS) if name in table]
    return table.loc[[rule for rule in RULES if rule in table.index], kinds].rename_axis(columns=None)


def between_rules(records: Iterable[Record], kind: str = "views", baseline: str = MAIN) -> pd.DataFrame:
    """Compare the rules with each other for the most members of a kind; as ``compare_arms``, column rule."""
    records = list(records)
    chosen = [r for r in records if r.experiment["ensemble"] == kind and _size(r) == largest(records)]
    return _compare(chosen, _rule, baseline).rename(columns={"arm": "rule"})


def diversity(records: Iterable[Record]) -> pd.DataFrame:
    """Return what the most members of each kind are, mean over worlds, best MAP first.

    Columns: kind, map_at_100, member_top1 (labelled clips that a member recognises, on average), clip_top1 (that they
    recognise together), disagreement (of two members, a share of labelled clips), lost_identities (a member),
    parameters (millions, all members), fit (seconds, all members).
    """
    records = list(records)
    rows = [
        (
            r.experiment["ensemble"],
            r.measures["map_at_100"],
            r.measures["member_clip_top1"],
            r.measures["clip_top1"],
            r.measures["disagreement"],
            r.measures["lost_identities"],
            r.measures["parameters"] * _size(r) / 1e6,
            r.seconds["fit"],
        )
        for r in records
        if _rule(r) == MAIN and _size(r) == largest(records)
    ]
    frame = pd.DataFrame(
        rows,
        columns=[
            "kind",
            "map_at_100",
            "member_top1",
            "clip_top1",
            "disagreement",
            "lost_identities",
            "parameters",
            "fit",
        ],
    )
    return frame.groupby("kind").mean().sort_values("map_at_100", ascending=False).reset_index()


# -- sentences ------------------------------------------------------------------------------------------------------


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _interval(row: dict, unit: str = " points") -> str:
    known = f" ({row['low']:+.2f} to {row['high']:+.2f})" if np.isfinite(row["low"]) else ""
    return f"{row['difference']:+.2f}{unit}{known}"


def _span(frame: pd.DataFrame) -> str:
    row = frame.iloc[0]
    return f"95 % intervals over {row['n']:.0f} {row['interval']}"


_NAMES = {
    "seeds": "seeds are",
    "views": "views are",
    "bagging": "bagging is",
    "stratified": "class-stratified bagging is",
}


def kinds_sentence(records: Iterable[Record]) -> str:
    """Say how the most members of every kind stand to as many seeds, and what views and seeds are worth over one model."""
    records = list(records)
    table, size = between_kinds(records), largest(records)
    rows = {row["kind"]: row for row in table.to_dict("records")}
    said = []
    for kind in ("views", "bagging", "stratified"):
        if kind in rows:
            low, high = rows[kind]["low"], rows[kind]["high"]
            verdict = "ahead of" if low > 0 else "behind" if high < 0 else "not to be told apart from"
            said.append(f"{_NAMES[kind]} {verdict} plain seeds, {_interval(rows[kind])}")
    worth = {row["kind"]: row for row in by_members(records).to_dict("records") if row["members"] == size}
    over = " and ".join(f"{kind} {_interval(worth[kind])}" for kind in ("views", "seeds") if kind in worth)
    return f"With {size} members, {'; '.join(said)}; over one plain model, {over}; {_span(table)}."


def gain_sentence(records: Iterable[Record]) -> str:
    """Say what the most members of each kind are worth over one plain model."""
    records = list(records)
    table = by_members(records)
    last = table[table["members"] == largest(records)].sort_values("map_at_100", ascending=False)
    said = "; ".join(f"{row['kind']} {_interval(row, '')}" for row in last.to_dict("records"))
    return (
        f"Against one plain model, {largest(records)} members change MAP@100 by so many points: {said}; {_span(table)}."
    )


def start_sentence(means: Sequence[Record], random: Sequence[Record], kind: str = "views") -> str:
    """Say how an ensemble whose members start at random stands to one from class means; empty if there is none."""
    if not random:
        return ""
    plain = [r for r in (*means, *random) if _rule(r) == MAIN]
    size = min(largest(means), largest(random))
    most = [r for r in plain if _size(r) == size and r.experiment["ensemble"] == kind]
    one = [r for r in plain if _size(r) == 1 and r.experiment["ensemble"] == "seeds"]
    tables = [_compare(records, lambda r: r.experiment["start"], "class means") for records in (most, one)]
    many, single = (table.set_index("arm").loc["random"] for table in tables)
    apart = {
        start: 100 * np.mean([r.measures["disagreement"] for r in most if r.experiment["start"] == start])
        for start in ("random", "class means")
    }
    return (
        f"{size} {kind} that start at random change MAP@100 by {_interval(many)} against as many that start at class "
        f"means, where one model that starts at random changes it by {_interval(single)}; two of these {kind} name "
        f"{apart['random']:.1f} % of the clips differently, two from class means {apart['class means']:.1f} %; "
        f"{_span(tables[0])}."
    )


def lost_sentence(table: pd.DataFrame) -> str:
    """Say what ``lost_ap`` says of the identities that one bag lost, and that more than a quarter of all members lost."""
    rows = [row for row in table.to_dict("records") if row["lost by"] == LOST_GROUPS[-1]]
    if not rows:
        return "Which member lost which identity cannot be said of these records."
    said = []
    for row in rows:
        who = "one bag loses" if row["members"] == 1 else f"more than a quarter of {row['members']} bags lose"
        said.append(
            f"{who} {row['identities']:.1f} identities (mean over seeds), which are found with MAP@100 "
            f"{row['bagging']:.3f} there and {row['seeds']:.3f} with as many seeds, {_interval(row)}"
        )
    return _sentence("; ".join(said))


def rules_sentence(records: Iterable[Record], kind: str = "views") -> str:
    """Say how the rules stand to ``MAIN`` for the most members of a kind."""
    records = list(records)
    table = between_rules(records, kind)
    said = "; ".join(f"{row['rule']} {_interval(row, '')}" for row in table.to_dict("records") if row["rule"] != MAIN)
    return (
        f"For {largest(records)} {kind}, the other rules change MAP@100 by so many points against the scaled softmax: "
        f"{said}; {_span(table)}."
    )


def flat_sentence(records: Iterable[Record], kind: str = "views") -> str:
    """Say how near softmax at temperature 1 is to an average of cosines, and how much of its cost one model has too."""
    table = by_rule(records)
    flat, cosine = (table.loc[rule] for rule in ("softmax, temperature 1", "cosine"))
    apart = 100 * (flat - table.loc[MAIN])
    return (
        f"Softmax at temperature 1 reaches {flat[kind]:.4f}, the average of cosines {cosine[kind]:.4f}; against the "
        f"scaled softmax the former changes MAP@100 by {apart[kind]:+.2f} points with all {kind}, and by "
        f"{apart['one model']:+.2f} with one model, where nothing is averaged."
    )


def loss_sentence(table: pd.DataFrame) -> str:
    """Say what ``lost_table`` says of the bootstrap: of the challenge's identities, and of these clips."""
    rows = table.set_index(["clips", "procedure"])
    said = [
        f"drawn from {clips}, {rows.loc[clips, 'bootstrap']['challenge']:.1%} of the challenge's identities and "
        f"{rows.loc[clips, 'bootstrap']['mean']:.1%} of these (standard deviation {rows.loc[clips, 'bootstrap']['sd']:.1%})"
        for clips in table["clips"].unique()
    ]
    return f"A bootstrap loses, {'; '.join(said)}.".replace("%", " %")


def diversity_sentence(table: pd.DataFrame) -> str:
    """Say how different the members of each kind are, and what they are worth alone and together."""
    order = table.sort_values("disagreement", ascending=False).to_dict("records")
    said = "; ".join(
        f"{row['kind']} {row['disagreement']:.2%}, {row['member_top1']:.4f} alone and {row['clip_top1']:.4f} together"
        for row in order
    )
    return f"Two members name so many clips differently, and recognise such a share: {said}.".replace("%", " %")
