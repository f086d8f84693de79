"""How each cost grows: the same work at four sizes along one axis, the rest fixed.

A series runs in one process from small to large, so that the peak of memory is that of the largest size so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import FACE, SCENE, export_python2, write_store
from benchmarks.meter import measure
from benchmarks.ranking import SCALE, K, embeddings, ranked, ranking_problem, scored
from benchmarks.training import system
from mmlib import rank
from mmlib.data.iqiyi import import_folder
from mmlib.data.store import ClipStore
from mmlib.ensemble import member_seed
from mmlib.retrieve import BLOCK, make_model
from mmlib.train import train_together

# Cost and axis -> its four sizes, and the sizes of what stays fixed, at full scale.
SERIES: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "import, faces": ((10_000, 30_000, 100_000, 300_000), {}),
    "open, clips": ((10_000, 100_000, 300_000, 1_000_000), {}),
    "epoch, clips": ((1_000, 2_000, 4_000, 8_000), {"identities": 1_000, "frames": 20, "members": 1}),
    "epoch, identities": ((2_000, 8_000, 32_000, 128_000), {"clips": 1_024, "frames": 20, "members": 1}),
    "drawn epoch, identities": ((2_000, 8_000, 32_000, 128_000), {"clips": 1_024, "frames": 20, "members": 1}),
    "epoch, frames": ((10, 20, 40, 80), {"clips": 4_000, "identities": 1_000, "members": 1}),
    "epoch, members": ((1, 2, 4, 8), {"clips": 2_000, "identities": 1_000, "frames": 20}),
    "rank, clips": ((8_000, 32_000, 128_000, 512_000), {"identities": 2_000}),
    "rank, identities": ((1_250, 5_000, 20_000, 80_000), {"clips": 8_000}),
    "metric, identities": ((3_000, 10_000, 30_000, 100_000), {"clips": 200_000}),
}
TENFOLD = {"clips": 1_000_000, "identities": 100_000}  # ten times the challenge, whatever is measured of it
PART = 20  # of that: one in so many clips is trained on, and ranked
TINY = {"faces": 30, "clips": 20, "identities": 20, "frames": 4, "members": 1}  # what a size is divided by


def sizes(series: str, scale: str) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return the sizes of a series and of what stays fixed at a scale."""
    along, fixed = SERIES[series]
    if scale == "full":
        return along, fixed
    axis = series.split(", ")[1]
    return tuple(size // TINY[axis] for size in along), {name: size // TINY[name] for name, size in fixed.items()}


def grow(folder: str, scale: str, device: str, series: str, **_) -> dict:
    """Measure a series: ``points``, each with its size, seconds (median), memory (bytes) and what stayed fixed."""
    cost, axis = series.split(", ")
    along, fixed = sizes(series, scale)
    points, memory = [], 0
    for size, call in COSTS[cost](Path(folder), device, axis, along, fixed):
        found = measure(call, warm=1, device=device)
        memory = max(memory, found["memory"])
        points.append(
            {
                "size": size,
                "seconds": float(np.median(found["seconds"])),
                "memory": memory,
                "device_memory": found["device_memory"],
            }
        )
    return {"cost": cost, "axis": axis, "device": device, "fixed": fixed, "points": points}


def make_imports(folder: str, scale: str, **_) -> dict:
    """Write official pickles of every size of the import series."""
    for faces in sizes("import, faces", scale)[0]:
        clips = faces // 10 + 1
        store = Path(folder, f"grow-{faces}")
        write_store(store, np.full(clips, 10), np.array(["train"] + ["val"] * (clips - 1)), np.zeros(clips, int), 1)
        export_python2(ClipStore.open(store), Path(folder, f"grow-official-{faces}"))
    return {}


def make_epochs(folder: str, scale: str, **_) -> dict:
    """Write a store for every size of the epoch series."""
    for series in SERIES:
        along, fixed = sizes(series, scale)
        cost, axis = series.split(", ")
        for size in along if cost.endswith("epoch") else ():
            path = _epoch_store(Path(folder), fixed | {axis: size})
            if not path.exists():
                said, rng = fixed | {axis: size}, np.random.default_rng(4)
                write_store(
                    path,
                    np.full(said["clips"], 20),
                    np.full(said["clips"], "train"),
                    rng.integers(0, said["identities"], said["clips"]),
                    said["identities"],
                    scene=SCENE,
                    official=False,
                )
    return {}


def make_opens(folder: str, scale: str, **_) -> dict:
    """Write a store for every size of the open series, two frames of few dimensions a clip."""
    for clips in sizes("open, clips", scale)[0]:
        write_store(
            Path(folder, f"grow-open-{clips}"),
            np.full(clips, 2),
            np.full(clips, "val"),
            np.zeros(clips, int),
            1,
            face=8,
            official=False,
        )
    return {}


def make_tenfold(folder: str, scale: str, **_) -> dict:
    """Write a store of ten times the challenge's clips, each with one face and one scene."""
    clips, identities = _tenfold(scale)
    of, rng = Path(folder, "tenfold"), np.random.default_rng(4)
    one, train = np.ones(clips, int), np.full(clips, "train")
    write_store(of, one, train, rng.integers(0, identities, clips), identities, scene=SCENE, official=False)
    return {}


def tenfold_epoch(folder: str, scale: str, device: str, **_) -> dict:
    """Train on one clip in ``PART`` of that store, at random, with a tenth of the identities in every step."""
    clips, identities = _tenfold(scale)
    store = ClipStore.open(Path(folder, "tenfold"))
    some = np.sort(np.random.default_rng(0).choice(clips, clips // PART, replace=False))
    asked = system("attention + scores", "full")
    batch = min(512, max(2, len(some) // 2))
    classes = max(2 * batch, identities // 10)
    training = replace(asked.training, frames=20, sample="replace", batch=batch, classes=classes)
    model = make_model(asked, store).to(device)
    found = measure(
        lambda: train_together([model], store, [some], training, seeds=[member_seed(0, 0)]), repeats=1, device=device
    )
    work = f"an epoch of {clips:,} clips, {identities:,} identities, {classes:,} a step: {len(some):,} clips measured"
    return found | _times_part(found, work)


def tenfold_rank(folder: str, scale: str, device: str, **_) -> dict:
    """Rank one clip in ``PART`` for all identities; features are drawn block by block, so that none are held.

    Operations: 2 N C D.  Bytes: features and vectors are read, and 100 rows and scores of every identity written.
    """
    clips, identities = _tenfold(scale)
    prototype = embeddings(1, identities, device)[1]

    def blocks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.arange(clips // PART, device=device).split(BLOCK):
            yield rows, rank.combine_scores([embeddings(len(rows), 1, device)[0] @ prototype.T], "softmax", scale=SCALE)

    found = measure(lambda: rank.top_k(blocks(), k=K), repeats=1, device=device)
    counted = {"flops": 2 * clips * identities * FACE, "bytes": 4 * FACE * (clips + identities) + 12 * K * identities}
    return (
        found | _times_part(found, f"{clips:,} clips for {identities:,} identities: {clips // PART:,} clips") | counted
    )


def _tenfold(scale: str) -> tuple[int, ...]:
    return tuple(size if scale == "full" else size // 1_000 for size in TENFOLD.values())


def _times_part(found: dict, work: str) -> dict:
    seconds = [PART * second for second in found["seconds"]]
    return {"seconds": seconds, "work": f"{work}, times {PART}", "flops": None, "bytes": None}


Calls = Iterator[tuple[int, Callable[[], object]]]


def _imports(folder: Path, device: str, axis: str, along: tuple[int, ...], fixed: dict) -> Calls:
    for faces in along:
        source, target = folder / f"grow-official-{faces}", folder / f"grow-imported-{faces}"
        yield faces, lambda: import_folder(source, target, overwrite=target.exists(), progress=False)


def _opens(folder: Path, device: str, axis: str, along: tuple[int, ...], fixed: dict) -> Calls:
    for clips in along:
        yield clips, lambda: ClipStore.open(folder / f"grow-open-{clips}")


def _epoch_store(folder: Path, said: dict[str, int]) -> Path:
    return folder / f"grow-epoch-{said['clips']}-{said['identities']}"


def _epochs(folder: Path, device: str, axis: str, along: tuple[int, ...], fixed: dict, share: float = 0.0) -> Calls:
    """share: of the identities that a step draws, beside those of its clips; 0 for all of them."""
    asked = system("attention + scores", "full")
    for size in along:
        said = fixed | {axis: size}
        store = ClipStore.open(_epoch_store(folder, said))
        clips = store.select("train")
        training = replace(
            asked.training, frames=said["frames"], batch=min(512, max(2, len(clips) // 2)), sample="replace"
        )
        if share:
            training = replace(training, classes=max(2 * training.batch, round(share * said["identities"])))
        models = [make_model(asked, store, member).to(device) for member in range(said["members"])]
        seeds = [member_seed(0, member) for member in range(len(models))]

        def call():
            train_together(models, store, [clips] * len(models), training, seeds=seeds)

        yield size, call


def _ranks(folder: Path, device: str, axis: str, along: tuple[int, ...], fixed: dict) -> Calls:
    for size in along:
        said = fixed | {axis: size}
        embedded, prototype = embeddings(said["clips"], said["identities"], device)
        rows = torch.arange(said["clips"], device=device)
        yield size, lambda: ranked([(embedded, prototype)], rows)


def _metrics(folder: Path, device: str, axis: str, along: tuple[int, ...], fixed: dict) -> Calls:
    for queries in along:
        identity, ranking = ranking_problem(fixed["clips"], queries, min(fixed["clips"], 2 * queries))
        yield queries, lambda: scored(ranking, identity)


COSTS: dict[str, Callable[..., Calls]]
COSTS = {
    "import": _imports,
    "open": _opens,
    "epoch": _epochs,
    "drawn epoch": partial(_epochs, share=0.1),
    "rank": _ranks,
    "metric": _metrics,
}
