"""What chapters 05 and 07 read of their searches: the training of each arm, what is under-trained, what lies at the edge."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from mmlib import systems
from mmlib.compare import listed
from mmlib.experiment import Experiment, arm_key
from mmlib.records import Record
from mmlib.studies.aggregation import longer_is_worth

UNDER_TRAINED = 0.1  # points of MAP@100 that twice the epochs are worth


def search_frame(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the best short and the best long training of each arm of ``systems.best_trials``.

    Columns: arm, lr, map_at_100, longer lr, longer map_at_100, worth (points), at the edge (of the rates, the short one).
    """
    columns = ["arm", "lr", "map_at_100", "longer lr", "longer map_at_100", "worth", "at the edge"]
    if trials.empty:
        return pd.DataFrame(columns=columns)
    worth, rows = longer_is_worth(trials, "arm"), []
    for name, part in trials.groupby("arm", sort=False):
        short, long = (part[part["epochs"] == epochs].nlargest(1, "map_at_100").iloc[0] for epochs in systems.EPOCHS)
        rows.append(
            (
                name,
                short["lr"],
                short["map_at_100"],
                long["lr"],
                long["map_at_100"],
                worth[name],
                short["lr"] in (min(systems.RATES), max(systems.RATES)),
            )
        )
    return pd.DataFrame(rows, columns=columns).sort_values("map_at_100", ascending=False, ignore_index=True)


def search_sentence(best: pd.DataFrame) -> str:
    """Say which arms are under-trained, and whose best rate is the smallest or largest that was tried."""
    if best.empty:
        return "There are no records of the search, so nothing here says whether an arm is under-trained."
    late = best[best["worth"] > UNDER_TRAINED].sort_values("worth", ascending=False)
    named = ", ".join(f"{row['arm']} ({row['worth']:+.2f} points)" for row in late.to_dict("records"))
    most = best.loc[best["worth"].idxmax()]
    out = (
        f"Twice the epochs are worth more than {UNDER_TRAINED:g} points to {len(late)} of {len(best)} arms, which are "
        f"under-trained here: {named}."
        if named
        else f"Twice the epochs are worth at most {most['worth']:+.2f} points, to {most['arm']}, so no arm is under-trained."
    )
    edge = best[best["at the edge"]]
    if len(edge):
        out += (
            " The best rate is the smallest or the largest tried, so that a better one may lie outside, for "
            f"{listed(edge['arm'])}."
        )
    return out


def names_of(group: dict[str, Experiment], records: Iterable[Record]) -> list[str]:
    """Name the arm of each record, whatever its world, its length and its learning rate."""
    free = ("training.lr", "training.epochs")
    known = {arm_key(arm, *free): name for name, arm in group.items()}
    return [known[arm_key(record.experiment, *free)] for record in records]


def best_trials(group: dict[str, Experiment], records: Iterable[Record]) -> pd.DataFrame:
    """Return the search, best first within an arm: arm, epochs, lr, map_at_100 (mean over worlds), chosen."""
    records = list(records)
    frame = pd.DataFrame(
        [
            {
                "arm": name,
                "epochs": r.experiment["training"]["epochs"],
                "lr": r.experiment["training"]["lr"],
                "map_at_100": r.measures["map_at_100"],
            }
            for name, r in zip(names_of(group, records), records)
        ],
        columns=["arm", "epochs", "lr", "map_at_100"],
    )
    mean = frame.groupby(["arm", "epochs", "lr"], sort=False)["map_at_100"].mean().reset_index()
    mean["chosen"] = [
        row["epochs"] == systems.EPOCHS[0] and row["lr"] == systems.CHOSEN.get(row["arm"])
        for row in mean.to_dict("records")
    ]
    return mean.sort_values(["arm", "map_at_100"], ascending=[True, False], ignore_index=True)
