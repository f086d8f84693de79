"""What chapters read of their searches for learning rates: the training of each arm, and what may be missed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from mmlib.compare import listed, signed
from mmlib.compare import table as as_table
from mmlib.experiment import Experiment, arm_key
from mmlib.records import Record

UNDER_TRAINED = 0.1  # points of MAP@100 that the longer training is worth
RATES = ["lr", "aggregator_lr"]
SEARCHED = ["map_at_100", *RATES]


def names_of(group: Mapping[str, Experiment], records: Iterable[Record]) -> list[str]:
    """Name the arm of each record, whatever its world, its length and its learning rates."""
    free = [f"training.{name}" for name in ("epochs", *RATES)]
    known = {arm_key(arm, *free): name for name, arm in group.items()}
    return [known[arm_key(record.experiment, *free)] for record in records]


def search_frame(group: Mapping[str, Experiment], records: Iterable[Record]) -> pd.DataFrame:
    """Return the best short and the best long training of each arm, by mean MAP@100 over worlds, best arm first.

    Columns: arm, map_at_100, lr, aggregator_lr, the same of the longer one with "longer " before, worth (points, of the
    longer), at the edge (the best short one has the smallest or the largest of the rates that were tried).
    """
    records = list(records)
    trials = pd.DataFrame([record.experiment["training"] | record.measures for record in records])
    trials = trials.reindex(columns=["epochs", *SEARCHED]).assign(arm=names_of(group, records))
    trials = trials.groupby(["arm", "epochs", *RATES])["map_at_100"].mean().reset_index()
    best = trials.loc[trials.groupby(["arm", "epochs"])["map_at_100"].idxmax()].groupby("arm")[SEARCHED]
    tried = trials.groupby("arm")[RATES]
    low, high, short, longer = tried.min(), tried.max(), best.first(), best.last()
    edge = (short[RATES].eq(low) | short[RATES].eq(high)) & low.lt(high)
    frame = short.join(longer.add_prefix("longer "))
    frame["worth"] = 100 * (frame["longer map_at_100"] - frame["map_at_100"])
    frame["at the edge"] = edge.any(axis=1)
    return frame.sort_values("map_at_100", ascending=False).reset_index()


def summary(best: pd.DataFrame) -> dict[str, int | float | str]:
    """Return what the prose of a page needs of ``search_frame``, by name.

    arms: how many; most, most-arm: what the longer training is worth at most, and to which; late, late-arms: how many
    are under-trained, and which; edge-arms: whose best rate may lie outside of those tried.
    """
    most = max(best["worth"], default=float("nan"))
    late = best[best["worth"] > UNDER_TRAINED].sort_values("worth", ascending=False)
    parts = {"most-arm": best[best["worth"] == most], "late-arms": late, "edge-arms": best[best["at the edge"]]}
    named = {name: listed(f"“{arm}”" for arm in part["arm"]) for name, part in parts.items()}
    return {"arms": len(best), "most": most, "late": len(late), **named}


def table(best: pd.DataFrame, searched: Sequence[str] = ("lr",)) -> Styler | None:
    """Return what a page shows of ``search_frame``: the rates that were searched for, and what longer is worth."""
    shown = best[["arm", *searched, "worth"]].copy()
    for name in searched:
        shown[name] = [f"{rate:g}" if pd.notna(rate) else None for rate in shown[name]]
    return as_table(shown.assign(worth=shown["worth"].map(signed)))


def caveat(best: pd.DataFrame, arms: Iterable[str]) -> str:
    """Say in a sentence what the search leaves open of the arms that a headline names."""
    part = best[best["arm"].isin(list(arms))]
    late = part[part["worth"] > UNDER_TRAINED].sort_values("worth", ascending=False)
    edge = listed(f"“{arm}”" for arm in part.loc[part["at the edge"], "arm"])
    said = []
    if len(late):
        worth = listed(f"{signed(row['worth'])} points to “{row['arm']}”" for row in late.to_dict("records"))
        said.append(f"twice the epochs would be worth {worth}")
    if edge != "none":
        said.append(f"the best rate lies at the edge of those tried for {edge}")
    if not said:
        names = listed(f"“{arm}”" for arm in part["arm"])
        return f"The search for rates leaves nothing open for {names}." if len(part) else ""
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}."
