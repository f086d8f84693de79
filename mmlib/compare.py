"""Compare arms by their records: pairs, intervals, and the one place that decides what an interval says.

What every chapter uses stands here, what one of them needs in its module of ``mmlib.studies``.  Nothing here decides a
number of a record, so an edit here makes no record stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from mmlib import metrics
from mmlib.experiment import arm_key
from mmlib.records import LENGTH_EDGES, WRONG_EDGES, Record, library_hash, read_results
from mmlib.systems import SEARCH_SEEDS


def as_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row a record: the fields of its experiment and its measures."""
    return pd.DataFrame([record.row() for record in records])


def breakdown_frame(records: Iterable[Record], by: str, *, names: Iterable[str] | None = None) -> pd.DataFrame:
    """Return the breakdowns of records, averaged over seeds: ``by``, group, range, clips, top1, precision.

    names: as for ``compare_arms``.
    """
    rows = [
        (name, group, f"{low:g}–{high:g}" if group == "quality" else _range(group, low, high), clips, top1, precision)
        for name, record in _named(records, by, names)
        for group, parts in record.breakdown.items()
        for low, high, clips, top1, precision in parts
    ]
    frame = pd.DataFrame(rows, columns=[by, "group", "range", "clips", "top1", "precision"])
    return frame.groupby([by, "group", "range"], sort=False)[["clips", "top1", "precision"]].mean().reset_index()


def _range(group: str, low: float, high: float) -> str:
    if group == "frames":
        return f"{low:g}" if high == low + 1 else f"{low:g}+" if high == LENGTH_EDGES[-1] else f"{low:g}–{high - 1:g}"
    return "none" if high == WRONG_EDGES[1] else f"{low:.2g}–{min(high, 1):.2g}" if low > 1e-6 else f"to {high:.2g}"


def _named(records: Iterable[Record], by: str, names: Iterable[str] | None) -> list[tuple[str, Record]]:
    """Put the name of its arm before each record: its value of field ``by`` unless ``names`` are given."""
    records = list(records)
    names = [record.experiment[by] for record in records] if names is None else list(names)
    if len(names) != len(records):
        raise ValueError(f"names has {len(names)} entries for {len(records)} records")
    return list(zip(names, records))


def compare_arms(
    records: Iterable[Record], by: str, baseline: str, *, names: Iterable[str] | None = None
) -> pd.DataFrame:
    """Compare every value of field ``by`` with ``baseline``, pair by pair, in points of MAP@100.

    Records that differ in ``by`` and the seed only.  names: the arm of each record, for arms that differ in several
    fields; ``by`` is then only what their column is called.  Returns, sorted by MAP: map_at_100 (mean over seeds), difference,
    low and high (95 %), sd (of the difference over worlds), n, and ``interval``: over worlds by a t interval where
    each seed is a world of its own, else over identities by a bootstrap of APs averaged over seeds.
    """
    groups: dict[str, dict[int, Record]] = {}
    for name, record in _named(records, by, names):
        seed = record.experiment["seed"]
        if groups.setdefault(name, {}).setdefault(seed, record).key != record.key:
            raise ValueError(f"two different experiments have {by} = {name!r} and seed {seed}")
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
        rows.append(
            (
                name,
                np.mean([a.mean() for a in here]),
                *(100 * x for x in found[:4]),
                found[4],
                "worlds" if worlds else "identities",
            )
        )
    columns = [by, "map_at_100", "difference", "low", "high", "sd", "n", "interval"]
    return pd.DataFrame(rows, columns=columns).sort_values("map_at_100", ascending=False, ignore_index=True)


# -- what an interval says ------------------------------------------------------------------------------------------


def sign(row: Mapping, bound: float = 0.0) -> int | None:
    """Return 1 where the interval low..high of a row lies above ``bound``, -1 below, 0 where it holds it, None without one."""
    if not (np.isfinite(row["low"]) and np.isfinite(row["high"])):
        return None
    return int(row["low"] > bound) - int(row["high"] < bound)


def verdict(
    row: Mapping,
    gain: str = "gains",
    open_: str = "cannot be told apart",
    loss: str = "loses",
    unknown: str = "is not judged, for want of an interval",
    *,
    bound: float = 0.0,
) -> str:
    """Choose the word that the interval of a difference supports: the only place where a sentence gets its sign.

    >>> verdict({"low": 0.1, "high": 0.4}), verdict({"low": -0.1, "high": 0.4}, "is ahead of", "is level with", "is behind")
    ('gains', 'is level with')
    """
    return {1: gain, 0: open_, -1: loss, None: unknown}[sign(row, bound)]


def interval_text(row: Mapping, digits: int = 2) -> str:
    """Write the interval of a difference.

    >>> interval_text({"low": -0.001, "high": 0.5}), interval_text({"low": np.nan, "high": np.nan})
    ('[0.00, +0.50]', 'no interval')
    """
    if sign(row) is None:
        return "no interval"
    return f"[{signed(row['low'], digits)}, {signed(row['high'], digits)}]"


def signed(value: float, digits: int = 2) -> str:
    """Write a difference with its sign; one that rounds to nothing has none.

    >>> signed(0.123), signed(-0.001)
    ('+0.12', '0.00')
    """
    rounded = round(value, digits) + 0.0
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


# -- words ----------------------------------------------------------------------------------------------------------


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
    return (
        f"{len(records)} records on {kind} clips, made {' to '.join(dict.fromkeys((days[0], days[-1])))} on "
        f"{', '.join(sorted({record.device for record in records}))}, commit {', '.join(commits)}, "
        + ("by the code that built this page." if fresh else "by an earlier version of the code than this page.")
    )


def listed(names: Iterable[str], word: str = "and") -> str:
    """Write names as in a sentence.

    >>> listed(["face", "scene", "head"])
    'face, scene and head'
    """
    *most, last = names
    return f"{', '.join(most)} {word} {last}" if most else last


KEPT = "full.jsonl.gz"  # written by ``mmlib keep``


def beside(records: Iterable[Record], names: Iterable[str], baseline: str) -> pd.DataFrame:
    """Compare arms with ``baseline`` in the worlds of a page and again in the kept ones of the challenge's size.

    names: the arm of each record.  An arm is found again by all that decides it but the world.  Arms that were not run in
    every kept world of the baseline are left out, so are the worlds of searches, and all where the records are not of
    simulated worlds.  Of two names of one arm the first counts.

    Columns: arm, map_at_100, difference, low and high (points), n (worlds), and the same of the kept worlds with "large "
    before.
    """
    records, names = list(records), list(names)
    arm_of: dict[str, str] = {}
    for record, name in zip(records, names, strict=True):
        if record.experiment["data"] == "simulated":
            arm_of.setdefault(arm_key(record.experiment), name)
    kept = [
        (arm_of[arm], record)
        for record in read_results(KEPT)
        if (arm := arm_key(record.experiment)) in arm_of and record.experiment["seed"] not in SEARCH_SEEDS
    ]
    worlds: dict[str, set[int]] = {}
    for name, record in kept:
        worlds.setdefault(name, set()).add(record.experiment["seed"])
    whole = {name for name in worlds if worlds[name] == worlds.get(baseline)}
    columns = ["arm", "map_at_100", "difference", "low", "high", "n"]
    found = []
    for pairs in (zip(names, records), kept):
        pairs = [(name, record) for name, record in pairs if name in whole]
        found.append(
            compare_arms(
                [record for _, record in pairs], by="arm", baseline=baseline, names=[name for name, _ in pairs]
            )[columns]
            if pairs
            else pd.DataFrame(columns=columns)
        )
    own, large = found
    return large.rename(columns=lambda name: name if name == "arm" else f"large {name}").merge(own, on="arm")


def sentence(frame: pd.DataFrame, baseline: str, data: str) -> str:
    """Say how far the differences of ``beside`` hold at the larger size, and where its records come from.

    data: the parameter of the page.
    """
    if data != "simulated":
        return "The clips of this page were given to it, and have one size."
    if frame.empty:
        return (
            "No records of this comparison in simulated worlds of the challenge's size are kept with the book. "
            "The command mmlib rerun makes them with profile=full, best on a GPU, and mmlib keep keeps them."
        )
    rows = frame[frame["arm"] != baseline]
    small, large = (_sign(rows, before) for before in ("", "large "))
    told = {
        "have the same sign at both sizes": (small == large) & (small != 0),
        "have opposite signs": small * large < 0,
        "are told from zero at the larger size alone": (small == 0) & (large != 0),
        "are told from zero at the smaller size alone": (small != 0) & (large == 0),
        "are told from zero at neither": (small == 0) & (large == 0),
    }
    parts = [f"{int(which.sum())} {what}" for what, which in told.items() if which.any()]
    return (
        f"Of {len(rows)} differences from {baseline}, by their intervals, {listed(parts)}. "
        f"The larger worlds: {provenance(read_results(KEPT))}"
    )


def _sign(rows: pd.DataFrame, before: str) -> pd.Series:
    """Return 1 where an interval lies above 0, -1 where below, else 0."""
    return (rows[f"{before}low"] > 0).astype(int) - (rows[f"{before}high"] < 0).astype(int)


def shown(frame: pd.DataFrame) -> Styler | None:
    """Return the frame of ``beside`` as a page shows it; nothing if it is empty."""
    if frame.empty:
        return None
    out = frame[["arm"]].copy()
    for before, where in (("", "here"), ("large ", "at full size")):
        out[f"MAP@100 {where}"] = frame[f"{before}map_at_100"]
        out[f"difference {where}"] = [
            f"{d:+.2f} ({low:+.2f} to {high:+.2f})"
            for d, low, high in zip(*(frame[f"{before}{name}"] for name in ("difference", "low", "high")))
        ]
        out[f"worlds {where}"] = frame[f"{before}n"]
    return out.style.hide(axis="index").format(precision=4)
