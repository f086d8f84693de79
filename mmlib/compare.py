"""Compare arms by their records: pairs, intervals, and the one place that decides what an interval says.

What every chapter uses stands here, what one of them needs in its module of ``mmlib.studies``.
"""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from scipy import stats

from mmlib import metrics
from mmlib.records import Record, is_fresh

COMPARED = ["map_at_100", "difference", "low", "high", "sd", "n", "interval"]
HEADINGS = {  # of tables, for columns of frames
    "map_at_100": "MAP@100",
    "clip_top1": "clips recognised (share)",
    "difference": "gain, points",
    "sd": "spread over worlds, points",
    "told": "smallest gain told, points",
    "lr": "learning rate",
    "aggregator_lr": "rate of the aggregator",
    "worth": "longer is worth, points",
}
HEADINGS |= {f"longer {name}": f"longer: {HEADINGS[name]}" for name in ("map_at_100", "lr", "aggregator_lr")}


def as_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row a record: the fields of its experiment and its measures."""
    return pd.DataFrame([record.row() for record in records])


def breakdown_frame(records: Iterable[Record], by: str, *, names: Iterable[str] | None = None) -> pd.DataFrame:
    """Return the breakdowns of records, averaged over seeds: ``by``, group, range, clips, top1, precision.

    names: as for ``compare_arms``.
    """
    records = list(records)
    rows = [
        (name, group, low, upper_edge(group, high), *measured)
        for name, record in _named(records, by, names)
        for group, parts in record.breakdown.items()
        for low, high, *measured in parts
    ]
    measures = ["clips", "top1", "precision"]
    frame = pd.DataFrame(rows, columns=[by, "group", "low", "high", *measures])
    frame["place"] = pd.factorize(frame["group"])[0]
    keys = [by, "group", "place", "low", "high"]
    mean = frame.groupby(keys, sort=False)[measures].mean().reset_index()
    mean = mean.sort_values(["place", "low", "high"], kind="stable", ignore_index=True)
    mean["range"] = [_range(*edges) for edges in zip(mean["group"], mean["low"], mean["high"])]
    return with_source(mean[[by, "group", "range", *measures]], records)


def with_source(frame: pd.DataFrame, records: Iterable[Record]) -> pd.DataFrame:
    """Return a frame that remembers what it was made from, for the line under its figure (``attrs``, key ``made``)."""
    records = list(records)
    if records:
        frame.attrs["made"] = provenance(records)
    return frame


def upper_edge(group: str, high: float | None) -> float:
    """Read the upper edge of a range: the longest clips have none, and had 241 frames in earlier records."""
    return np.inf if high is None or np.isnan(high) or (group, high) == ("frames", 241) else high


def _range(group: str, low: float, high: float) -> str:
    if group == "frames":
        return f"{low:g}" if high == low + 1 else f"{low:g}+" if np.isinf(high) else f"{low:g}–{high - 1:g}"
    if group == "wrong" and low < 1e-6:  # the first range holds the clips without a wrong frame
        return "none" if high < 1e-6 else f"to {high:.2g}"
    return f"{low:.2g}–{min(high, 1):.2g}" if group == "wrong" else f"{low:g}–{min(high, 100):g}"


def _named(records: Iterable[Record], by: str, names: Iterable[str] | None) -> list[tuple[str, Record]]:
    """Put the name of its arm before each record: its value of field ``by`` unless ``names`` are given."""
    records = list(records)
    return list(zip([r.experiment[by] for r in records] if names is None else names, records, strict=True))


def compare_arms(
    records: Iterable[Record],
    by: str,
    baseline: str,
    *,
    names: Iterable[str] | None = None,
    arms: Collection[str] | None = None,
) -> pd.DataFrame:
    """Compare every value of field ``by`` with ``baseline``, pair by pair, in points of MAP@100.

    names: the arm of each record, for arms that differ in more than ``by`` and the seed; ``by`` is then only what their
    column is called.  arms: those that count, else all.

    Returns, sorted by MAP: ``by``, map_at_100 (mean over seeds), difference, low and high (95 %, NaN for one identity),
    sd (of the difference over worlds), n, and ``interval``: over worlds, or splits of real clips, by a t interval where
    each seed has clips of its own, else over identities by a bootstrap of APs averaged over seeds.
    """
    groups: dict[str, dict[int, Record]] = {}
    for name, record in _named(records, by, names):
        seed = record.experiment["seed"]
        if arms is not None and name not in arms:
            continue
        if groups.setdefault(name, {}).setdefault(seed, record).key != record.key:
            raise ValueError(f"two different experiments have {by} = {name!r} and seed {seed}")
    if baseline not in groups:
        raise ValueError(f"no record has {by} = {baseline!r}, only {', '.join(map(str, groups))}")
    seeds, rows = sorted(groups[baseline]), []
    for name, members in groups.items():
        if sorted(members) != seeds:
            raise ValueError(f"{by} = {name!r} has seeds {sorted(members)}, the baseline {seeds}")
        here, there = ([np.array(group[s].ap) for s in seeds] for group in (members, groups[baseline]))
        data = {record.experiment["data"] for record in members.values()}
        worlds = "worlds" if data == {"simulated"} else "splits" if len(data) == len(seeds) else ""
        worlds = worlds if len(seeds) > 1 else ""
        if worlds:
            over = metrics.over_worlds(np.array([(a - b).mean() for a, b in zip(here, there)]))
            n, found = over.n, (over.mean, over.low, over.high, over.sd)
        else:
            pair = metrics.paired_test(np.mean(here, 0), np.mean(there, 0))
            n, found = pair.n, (pair.difference, pair.low, pair.high, np.nan)
        mean, points = np.mean([ap.mean() for ap in here]), [100 * value for value in found]
        rows.append((name, mean, *points, n, worlds or "identities"))
    frame = pd.DataFrame(rows, columns=[by, *COMPARED])
    frame = with_source(frame, (record for group in groups.values() for record in group.values()))
    return frame.sort_values("map_at_100", ascending=False, ignore_index=True)


def steps_frame(steps: Mapping[str, tuple[str, str]], records: Iterable[Record], names: Iterable[str]) -> pd.DataFrame:
    """Compare the two arms of every step that was run: step, arm, against, and the columns of ``compare_arms``.

    steps: by what each is called, the arm that takes it and the arm that does not.  names: the arm of each record.
    """
    records, names, rows = list(records), list(names), []
    for step, (arm, against) in steps.items():
        if {arm, against} <= set(names):
            table = compare_arms(records, "arm", against, names=names, arms=(arm, against)).set_index("arm")
            rows.append({"step": step, "arm": arm, "against": against, **table.loc[arm]})
    return with_source(pd.DataFrame(rows, columns=["step", "arm", "against", *COMPARED]), records)


def sign(row: Mapping, bound: float = 0.0) -> int | None:
    """Return 1 where the interval low..high of a row lies above ``bound``, -1 below, 0 where it holds it, else None."""
    low, high = row["low"], row["high"]
    return int(low > bound) - int(high < bound) if np.isfinite([low, high]).all() else None


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

    >>> verdict({"low": 0.1, "high": 0.4}), verdict({"low": -0.1, "high": 0.4}, open_="is level with")
    ('gains', 'is level with')
    """
    return {1: gain, 0: open_, -1: loss, None: unknown}[sign(row, bound)]


def smallest_told(sd: pd.Series, n: pd.Series, *, power: float = 0.8) -> pd.Series:
    """Return the difference that n worlds of this spread tell from zero at the level of .05 with this probability.

    (t(.975) + t(power)) sd / sqrt(n), by the quantiles of t with n - 1 degrees of freedom; NaN for one world.
    """
    return (stats.t.ppf(0.975, n - 1) + stats.t.ppf(power, n - 1)) * sd / np.sqrt(n)


def counts(frame: pd.DataFrame) -> dict[str, int]:
    """Count the differences of a frame, and of them gains, losses and those that their intervals leave open."""
    signs = [sign(row) or 0 for row in frame.to_dict("records")]
    return {"all": len(signs), "gains": signs.count(1), "losses": signs.count(-1), "open": signs.count(0)}


def interval_text(row: Mapping, digits: int = 2) -> str:
    """Write the interval of a difference, with the digits that it takes to see its length and its side of 0."""
    side = sign(row)
    if side is None:
        return "no interval"
    low, high = signed(row["low"], digits), signed(row["high"], digits)
    zero = signed(0, digits)
    hidden = (side and zero in (low, high)) or (low == high == zero and row["low"] < row["high"])
    return interval_text(row, digits + 1) if hidden else f"[{low}, {high}]"


def signed(value: float, digits: int = 2) -> str:
    """Write a difference with its sign; one that rounds to nothing has none, and one that nobody measured is a dash.

    >>> signed(0.123), signed(-0.001), signed(np.nan)
    ('+0.12', '0.00', '—')
    """
    if not np.isfinite(value):
        return "—"
    rounded = round(value, digits) + 0.0
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def is_same(row: Mapping) -> bool:
    """Say whether two arms differ by nothing at all, with an interval of 0 or none: so a table knows the reference."""
    return not np.nan_to_num([row["difference"], row["low"], row["high"]]).any()


def whole(text: str) -> str:
    """Keep a text of a cell in one line: cells break at blanks, so that a table fits its page."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def table(frame: pd.DataFrame, digits: int = 3) -> Styler | None:
    """Return a frame as a page shows it: headings in words, an interval in one column, no column without a value.

    The reference, which differs from itself by nothing, has a dash in place of a gain.  What intervals are over stands
    in their heading, or in a column where it differs; spreads stay in the records.  Nothing if the frame is empty.
    """
    if frame.empty:
        return None
    shown, rows = frame.rename(columns=HEADINGS), frame.to_dict("records")
    if "interval" in frame:
        gain, place = HEADINGS["difference"], list(frame).index("difference")
        itself = [is_same(row) for row in rows]
        shown[gain] = ["—" if same else signed(row["difference"]) for row, same in zip(rows, itself)]
        texts = ["" if same else whole(interval_text(row)) for row, same in zip(rows, itself)]
        over = [whole(f"{row['n']:.0f} {row['interval']}") for row in rows]
        heading = "95 % interval" + (f", {over[0]}" if len(set(over)) == 1 else "")
        shown.insert(place + 1, heading, texts)
        if len(set(over)) > 1:
            shown["over"] = over
        shown = shown.drop(columns=["low", "high", "n", "interval"])
    shown = shown.drop(columns=[HEADINGS["sd"]], errors="ignore")
    return shown.dropna(axis=1, how="all").style.hide(axis="index").format(precision=digits, na_rep="")


def scores_missing(missing: list[str]) -> str:
    """Say which scores a store lacks and what follows; empty if none."""
    return f"These clips have no {' and no '.join(missing)} score, so what needs one is not run." if missing else ""


def provenance(records: list[Record]) -> str:
    """Say in a sentence where records come from, and whether this library would make the same."""
    if not records:
        return "There are no such records."
    days, devices, commits = (sorted(set(said)) for said in zip(*((r.made[:10], r.device, r.commit) for r in records)))
    fresh = all(map(is_fresh, records))
    kinds = {record.simulated for record in records}
    kind = "partly simulated" if len(kinds) > 1 else "simulated" if True in kinds else "real"
    return (
        f"{len(records)} records on {kind} clips, made {' to '.join(dict.fromkeys((days[0], days[-1])))} on "
        f"{', '.join(devices)}, commit {', '.join(commits)}, "
        f"by {'the code that built this page' if fresh else 'an earlier version of the code than this page'}."
    )


def listed(names: Iterable[str], word: str = "and") -> str:
    """Write names as in a sentence.

    >>> listed(["face", "scene", "head"]), listed([])
    ('face, scene and head', 'none')
    """
    *most, last = list(names) or ["none"]
    return f"{', '.join(most)} {word} {last}" if most else last
