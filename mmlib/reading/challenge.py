"""What the chapters show of runs at the size of the challenge, whose records are kept with the book, beside their own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields

import pandas as pd
from pandas.io.formats.style import Styler

from mmlib.arms import SEARCH_SEEDS
from mmlib.experiment import Experiment
from mmlib.reading import compare, listed, provenance
from mmlib.runs import Record, read_results

KEPT = "full.jsonl.gz"  # written by ``mmlib keep``
_ARM = sorted({item.name for item in fields(Experiment)} - {"data", "profile", "settings", "seed"})


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
            arm_of.setdefault(_arm(record), name)
    kept = [(arm_of[arm], record) for record in read_results(KEPT)
            if (arm := _arm(record)) in arm_of and record.experiment["seed"] not in SEARCH_SEEDS]
    worlds: dict[str, set[int]] = {}
    for name, record in kept:
        worlds.setdefault(name, set()).add(record.experiment["seed"])
    whole = {name for name in worlds if worlds[name] == worlds.get(baseline)}
    columns = ["arm", "map_at_100", "difference", "low", "high", "n"]
    found = []
    for pairs in (zip(names, records), kept):
        pairs = [(name, record) for name, record in pairs if name in whole]
        found.append(compare([record for _, record in pairs], by="arm", baseline=baseline, names=[name for name, _ in pairs])
                     [columns] if pairs else pd.DataFrame(columns=columns))
    own, large = found
    return large.rename(columns=lambda name: name if name == "arm" else f"large {name}").merge(own, on="arm")


def _arm(record: Record) -> str:
    return json.dumps([record.experiment.get(name) for name in _ARM], sort_keys=True)  # tuples and lists are the same


def sentence(frame: pd.DataFrame, baseline: str, data: str) -> str:
    """Say how far the differences of ``beside`` hold at the larger size, and where its records come from.

    data: the parameter of the page.
    """
    if data != "simulated":
        return "The clips of this page were given to it, and have one size."
    if frame.empty:
        return ("No records of this comparison in simulated worlds of the challenge's size are kept with the book. "
                "The command mmlib rerun makes them with profile=full, best on a GPU, and mmlib keep keeps them.")
    rows = frame[frame["arm"] != baseline]
    small, large = (_sign(rows, before) for before in ("", "large "))
    told = {"have the same sign at both sizes": (small == large) & (small != 0),
            "have opposite signs": small * large < 0,
            "are told from zero at the larger size alone": (small == 0) & (large != 0),
            "are told from zero at the smaller size alone": (small != 0) & (large == 0),
            "are told from zero at neither": (small == 0) & (large == 0)}
    parts = [f"{int(which.sum())} {what}" for what, which in told.items() if which.any()]
    return (f"Of {len(rows)} differences from {baseline}, by their intervals, {listed(parts)}. "
            f"The larger worlds: {provenance(read_results(KEPT))}")


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
        out[f"difference {where}"] = [f"{d:+.2f} ({low:+.2f} to {high:+.2f})" for d, low, high in zip(
            *(frame[f"{before}{name}"] for name in ("difference", "low", "high")))]
        out[f"worlds {where}"] = frame[f"{before}n"]
    return out.style.hide(axis="index").format(precision=4)
