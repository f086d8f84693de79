"""The arms of the comparisons of chapters 05 and 07, and the training that was chosen for each of them.

An arm is a name and what it changes of a base experiment.  Its learning rate was chosen from ``search`` on worlds that no
comparison uses, with the same budget for every arm; ``best_trials`` shows what was found.  Nothing here decides a number
that is not a field of an experiment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace

import pandas as pd

from mmlib.experiment import Experiment
from mmlib.runs import Record
from mmlib.train import Training

SEARCH_SEEDS = (100, 101)  # worlds that no comparison uses
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
EPOCHS = (8, 16)

BASE = Experiment(training=Training(lr=1e-3))
# Of an aggregator 3e-3 is as good, within .02 points (chapter 04).
FUSED = replace(BASE, aggregator="attention + scores", training=Training(lr=1e-3, aggregator_lr=1e-3))


def _arm(base: Experiment, training: dict | None = None, **fields) -> Experiment:
    return replace(base, training=replace(base.training, **training or {}), **fields)


LOSSES = {
    "softmax": _arm(BASE, {"margin": 0.0, "scale": 1.0}, head="dot", scale=1.0),
    "cosine softmax": _arm(BASE, {"margin": 0.0}),
    "margin": BASE,
    "margin + focal": _arm(BASE, {"gamma": 2.0}),
    "margin + batch focal": _arm(BASE, {"gamma": 2.0, "focal": "batch"}),
    "margin, scores": _arm(BASE, concat="normalised"),
    "margin + focal, scores": _arm(BASE, {"gamma": 2.0}, concat="normalised"),
    "margin + focal, raw scores": _arm(BASE, {"gamma": 2.0}, concat="raw"),
}
FUSIONS = {
    "face": FUSED,
    "scene": replace(FUSED, modality=None, context=("scene",)),
    **{f"scene {dim}": replace(FUSED, context=("scene",), context_dim=dim) for dim in (32, 64, 128, 256)},
    "scene 128, gated": replace(FUSED, context=("scene",), fusion="gated"),
    **{name: replace(FUSED, context=(name,)) for name in ("head", "body", "audio")},
    "all": replace(FUSED, context=("scene", "head", "body", "audio")),
}
# The rate with the best mean MAP@100 in the search at the shorter length, at which all arms are compared.
CHOSEN = {
    "softmax": 3e-4, "cosine softmax": 1e-3, "margin": 1e-3, "margin + focal": 1e-3, "margin + batch focal": 1e-3,
    "margin, scores": 1e-2, "margin + focal, scores": 1e-2, "margin + focal, raw scores": 1e-3,
    "face": 1e-3, "scene": 3e-4, "scene 32": 1e-3, "scene 64": 1e-3, "scene 128": 1e-2, "scene 256": 1e-3,
    "scene 128, gated": 1e-3, "head": 1e-3, "body": 1e-3, "audio": 1e-3, "all": 3e-3,
}


def arms(group: dict[str, Experiment]) -> dict[str, Experiment]:
    """Return the arms with the learning rate chosen for each."""
    return {name: _arm(arm, {"lr": CHOSEN.get(name, arm.training.lr)}) for name, arm in group.items()}


def search(group: dict[str, Experiment], profile: str = "quick", seeds: tuple[int, ...] = SEARCH_SEEDS) -> list[Experiment]:
    """List the experiments of the search: two lengths times four rates on each world, for every arm."""
    return [_arm(replace(arm, profile=profile, seed=seed), {"lr": rate, "epochs": epochs})
            for arm in group.values() for epochs in EPOCHS for rate in RATES for seed in seeds]


def names_of(group: dict[str, Experiment], records: Iterable[Record]) -> list[str]:
    """Name the arm of each record, whatever its world, its length and its learning rate."""
    known = {_shape(asdict(arm)): name for name, arm in group.items()}
    return [known[_shape(record.experiment)] for record in records]


def _shape(experiment: dict) -> str:
    training = {name: value for name, value in experiment["training"].items() if name not in ("lr", "epochs")}
    free = ("data", "profile", "settings", "seed")
    said = {name: value for name, value in experiment.items() if name not in free} | {"training": training}
    return json.dumps(said, sort_keys=True)  # where tuples and lists are the same


def best_trials(group: dict[str, Experiment], records: Iterable[Record]) -> pd.DataFrame:
    """Return the search, best first within an arm: arm, epochs, lr, map_at_100 (mean over worlds), chosen."""
    records = list(records)
    frame = pd.DataFrame([{"arm": name, "epochs": r.experiment["training"]["epochs"], "lr": r.experiment["training"]["lr"],
                           "map_at_100": r.measures["map_at_100"]} for name, r in zip(names_of(group, records), records)],
                         columns=["arm", "epochs", "lr", "map_at_100"])
    mean = frame.groupby(["arm", "epochs", "lr"], sort=False)["map_at_100"].mean().reset_index()
    mean["chosen"] = [row["epochs"] == EPOCHS[0] and row["lr"] == CHOSEN.get(row["arm"]) for row in mean.to_dict("records")]
    return mean.sort_values(["arm", "map_at_100"], ascending=[True, False], ignore_index=True)
