"""What the chapters read out of records, models and stores: comparisons, tidy frames and computed sentences.

What every chapter uses stands here, what one of them needs in a module of its topic.  Nothing here decides a number of a
record, so an edit here makes no record stale.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from mmlib import metrics
from mmlib.runs import LENGTH_EDGES, WRONG_EDGES, Record, library_hash


def as_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row a record: the fields of its experiment and its measures."""
    return pd.DataFrame([record.row() for record in records])


def breakdown_frame(records: Iterable[Record], by: str, *, names: Iterable[str] | None = None) -> pd.DataFrame:
    """Return the breakdowns of records, averaged over seeds: ``by``, group, range, clips, top1, precision.

    names: as for ``compare``.
    """
    rows = [(name, group, f"{low:g}–{high:g}" if group == "quality" else _range(group, low, high),
             clips, top1, precision)
            for name, record in _named(records, by, names) for group, parts in record.breakdown.items()
            for low, high, clips, top1, precision in parts]
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


def compare(records: Iterable[Record], by: str, baseline: str, *, names: Iterable[str] | None = None) -> pd.DataFrame:
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
        rows.append((name, np.mean([a.mean() for a in here]), *(100 * x for x in found[:4]), found[4],
                     "worlds" if worlds else "identities"))
    columns = [by, "map_at_100", "difference", "low", "high", "sd", "n", "interval"]
    return pd.DataFrame(rows, columns=columns).sort_values("map_at_100", ascending=False, ignore_index=True)


# -- sentences ------------------------------------------------------------------------------------------------------


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
    return (f"{len(records)} records on {kind} clips, made {' to '.join(dict.fromkeys((days[0], days[-1])))} on "
            f"{', '.join(sorted({record.device for record in records}))}, commit {', '.join(commits)}, "
            + ("by the code that built this page." if fresh else "by an earlier version of the code than this page."))


def listed(names: Iterable[str], word: str = "and") -> str:
    """Write names as in a sentence.

    >>> listed(["face", "scene", "head"])
    'face, scene and head'
    """
    *most, last = names
    return f"{', '.join(most)} {word} {last}" if most else last
