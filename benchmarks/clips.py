"""Lines on reading: import, open, batches."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import FACE, SCALES, SCENE
from benchmarks.meter import measure
from mmlib.data.iqiyi import import_folder, pickle_path
from mmlib.data.store import ClipStore


def import_official(folder: str, scale: str, **_) -> dict:
    """Import official pickles: as Python 2 wrote them, checked, to a store.  Once, as memory is that of one import.

    Bytes: the pickle is read, its features are written to a spool, read, and written to the store.
    """
    store, source = Path(folder, "imported"), Path(folder, "faces")
    found = measure(lambda: import_folder(source, store, progress=False), repeats=1)
    shutil.rmtree(store)
    frames = SCALES[scale].imported
    size = pickle_path(source, "face", "val").stat().st_size
    return found | {
        "work": f"{frames:,} faces of {FACE}, pickle to store",
        "flops": 0,
        "bytes": size + 3 * 2 * FACE * frames,
    }


def load_pickle(folder: str, scale: str, **_) -> dict:
    """Load the same pickle with ``pickle.load`` as it comes, the collector of garbage running."""
    path = pickle_path(Path(folder, "faces"), "face", "val")

    def load():
        with open(path, "rb") as file:
            pickle.load(file, encoding="bytes")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy has moved the functions that old pickles name
        return measure(load, repeats=1) | {"work": "pickle.load alone"}


def open_store(folder: str, scale: str, **_) -> dict:
    """Open a store, which checks its tables and maps its features.  Bytes: those of its tables."""
    path, s = Path(folder, "store"), SCALES[scale]
    found = measure(lambda: ClipStore.open(path), repeats=5)
    return found | {
        "work": f"{s.store_clips:,} clips, {s.store_frames:,} frames",
        "flops": 0,
        "bytes": sum((path / name).stat().st_size for name in ("clips.parquet", "identities.parquet")),
    }


def batch(folder: str, scale: str, sample: str, **_) -> dict:
    """Gather random clips.  Bytes: each number of the batch is read as float16 and written as float32."""
    s, rng, draw = SCALES[scale], np.random.default_rng(1), torch.Generator().manual_seed(1)
    store = ClipStore.open(Path(folder, "store"))
    found = measure(
        lambda: store.batch(rng.integers(0, len(store), s.batch), sample=sample, frames=s.frames, generator=draw),
        repeats=30,
    )
    return found | {
        "work": f"{s.batch} of {s.store_clips:,} clips, {s.frames} frames each, sample {sample!r}",
        "flops": 0,
        "bytes": s.batch * s.frames * FACE * (2 + 4),
    }


def first_batch(folder: str, scale: str, **_) -> dict:
    """Open the store and gather the first batch of train clips: faces with their scores, and scenes.

    Bytes: as for ``batch``, and those of the tables.
    """
    s, path = SCALES[scale], Path(folder, "clips")
    rng, draw = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def first():
        store = ClipStore.open(path)
        chosen = rng.permutation(store.select("train", labelled=True))[: s.batch]
        store.batch(chosen, sample="draw", frames=s.frames, generator=draw)
        store.batch(chosen, "scene")

    found = measure(first, repeats=5)
    tables = sum((path / name).stat().st_size for name in ("clips.parquet", "identities.parquet"))
    return found | {
        "work": f"{s.clips:,} clips opened, the first {s.batch} with {s.frames} faces each and a scene",
        "flops": 0,
        "bytes": tables + s.batch * (s.frames * FACE + SCENE) * (2 + 4),
    }
