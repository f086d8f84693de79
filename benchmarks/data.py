"""Sizes of the work, and the random clips that it is done on, written once for all lines of a run."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mmlib.data.iqiyi import export_folder, import_folder
from mmlib.data.store import ClipStore

FACE, SCENE = 512, 2048  # dimensions of the official features


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    clips, identities, batch, frames: of an epoch, whose clips have 1 to 39 faces and of which ``frames`` are drawn.
    members: of an ensemble.  imported: faces in the pickle.  store_clips, store_frames: of the store that is opened.
    gallery, queries, labelled: clips and identities that are ranked, and the clips that belong to one.
    challenge_clips, challenge_frames, challenge_identities, challenge_batch: the train split of the challenge.
    images: of a forward pass.
    """

    name: str
    clips: int = 8_000
    identities: int = 1_000
    batch: int = 512
    frames: int = 40
    members: int = 16
    imported: int = 600_000
    store_clips: int = 137_000
    store_frames: int = 4_000_000
    gallery: int = 76_013
    queries: int = 10_034
    labelled: int = 45_472
    challenge_clips: int = 60_566
    challenge_frames: int = 1_900_000
    challenge_identities: int = 10_034
    challenge_batch: int = 4_096
    images: int = 16


SCALES = {
    "full": Scale("full"),
    "tiny": Scale(
        "tiny",
        clips=160,
        identities=20,
        batch=40,
        members=3,
        imported=3_000,
        store_clips=500,
        store_frames=2_000,
        gallery=2_000,
        queries=200,
        labelled=1_200,
        challenge_clips=160,
        challenge_frames=2_000,
        challenge_identities=20,
        challenge_batch=40,
        images=1,
    ),
}


def write_store(
    path: Path,
    count: np.ndarray,
    split: np.ndarray,
    identity: np.ndarray,
    identities: int,
    *,
    face: int = FACE,
    scene: int = 0,
    official: bool = True,
) -> None:
    """Write random clips: count (N,) of faces, split (N,), identity (N,) with -1 for nobody.

    face, scene: dimensions, 0 for no scenes.  official: with the columns that the challenge's files need.
    """
    rng = np.random.default_rng(0)
    frames = int(count.sum())
    with ClipStore.create(path, simulated=True, provenance={"by": "benchmarks"}) as writer:
        for first in range(0, frames, 20_000):
            n = min(20_000, frames - first)
            columns = {"quality": rng.uniform(0, 200, n), "det": rng.uniform(0.8, 1, n)}
            if official:
                corner = rng.random((n, 2)) * 100
                columns |= {"frame": np.full(n, 10), "box": np.concatenate([corner, corner + 50], axis=1)}
            writer.append("face", rng.standard_normal((n, face), np.float32).astype(np.float16), **columns)
        spans = {"face": (np.cumsum(count) - count, count)}
        if scene:
            for first in range(0, len(count), 4_000):
                n = min(4_000, len(count) - first)
                writer.append("scene", rng.standard_normal((n, scene), np.float32).astype(np.float16), frame=np.ones(n))
            spans["scene"] = np.arange(len(count)), np.ones(len(count), int)
        clips = [f"IQIYI_VID_{part.upper()}_{i:07d}" for i, part in enumerate(split)]
        writer.finish(
            pd.DataFrame({"clip": clips, "split": split, "identity": identity}),
            [str(i + 1) for i in range(identities)],
            spans,
        )


def make_faces(folder: str, scale: str, **_) -> dict:
    """Write ``folder/faces``: official pickles, the faces in that of val, 30 a clip; train has one clip."""
    clips = SCALES[scale].imported // 30 + 1
    split = np.array(["train"] + ["val"] * (clips - 1))
    store = Path(folder, "faces-store")
    write_store(store, np.full(clips, 30), split, np.zeros(clips, int), 1)
    export_folder(ClipStore.open(store), Path(folder, "faces"))
    return {}


def make_clips(folder: str, scale: str, **_) -> dict:
    """Write ``folder/official`` and ``folder/scenes``, as the released code reads them, and the store ``folder/clips``.

    One clip of nobody is in val, since an import wants the split; the released code leaves it out of training.
    """
    s, rng = SCALES[scale], np.random.default_rng(1)
    count = rng.integers(1, 40, s.clips + 1)
    split = np.array(["train"] * s.clips + ["val"])
    identity = np.append(rng.integers(0, s.identities, s.clips), -1)
    drawn = Path(folder, "clips-drawn")
    write_store(drawn, count, split, identity, s.identities, scene=SCENE)
    store = ClipStore.open(drawn)
    export_folder(store, Path(folder, "official"))
    import_folder(Path(folder, "official"), Path(folder, "clips"), progress=False)
    scenes = Path(folder, "scenes")
    scenes.mkdir()
    names, scene = store.clips["clip"], store.modalities["scene"]
    for part in ("train", "val"):
        found = {
            names[clip]: [(1, np.array(scene.feature[scene.start[clip]], np.float32))] for clip in store.select(part)
        }
        with open(scenes / f"scene_infos_{part}.pickle", "wb") as file:
            pickle.dump(found, file)
    return {}


def make_store(folder: str, scale: str, **_) -> dict:
    """Write ``folder/store``, of the size of the challenge's train and val."""
    s, rng = SCALES[scale], np.random.default_rng(2)
    count = rng.multinomial(s.store_frames, np.full(s.store_clips, 1 / s.store_clips))
    split = np.where(np.arange(s.store_clips) < s.store_clips // 2, "train", "val")
    write_store(Path(folder, "store"), count, split, rng.integers(-1, s.queries, s.store_clips), s.queries)
    return {}


def make_challenge(folder: str, scale: str, **_) -> dict:
    """Write ``folder/challenge``, faces and scenes of the size of the challenge's train split."""
    s, rng = SCALES[scale], np.random.default_rng(3)
    count = 1 + rng.multinomial(
        s.challenge_frames - s.challenge_clips, np.full(s.challenge_clips, 1 / s.challenge_clips)
    )
    write_store(
        Path(folder, "challenge"),
        count,
        np.full(s.challenge_clips, "train"),
        rng.integers(0, s.challenge_identities, s.challenge_clips),
        s.challenge_identities,
        scene=SCENE,
        official=False,
    )
    return {}
