"""Sizes of the work, and the random clips that it is done on, written once for all lines of a run."""

from __future__ import annotations

import itertools
import pickle
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mmlib.data.iqiyi import export_folder, import_folder, pickle_path
from mmlib.data.store import ClipStore

FACE, SCENE = 512, 2048  # dimensions of the official features


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    clips, identities, batch, frames: of an epoch, whose clips have 1 to 39 faces and of which ``frames`` are drawn.
    members: of an ensemble.  imported: faces in the pickle.  store_clips, store_frames: of the store that is opened.
    gallery, queries, labelled: clips and identities that are ranked, and the clips that belong to one.
    challenge_clips, challenge_frames, challenge_identities, challenge_batch: the train split of the challenge.
    images: of a forward pass.  crops: faces that are embedded.  video: seconds of a video.
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
    crops: int = 5_770
    video: int = 60


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
        crops=40,
        video=2,
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
    norm: float | None = None,
) -> None:
    """Write random clips: count (N,) of faces, split (N,), identity (N,) with -1 for nobody.

    face, scene: dimensions, 0 for no scenes.  official: with the columns that the challenge's files need.  norm: about
    which the norms of faces lie, in steps of a thousandth; None for sqrt(D).
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
            x = rng.standard_normal((n, face), np.float32)
            if norm is not None:
                x *= norm * (1 + 1e-3 * rng.standard_normal((n, 1))) / np.linalg.norm(x, axis=1, keepdims=True)
            writer.append("face", x.astype(np.float16), **columns)
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


def write_faces(path: Path, clips: Iterable[tuple[str, list]]) -> None:
    """Write clips and their faces [frame, box, det, quality, feature] with the opcodes that Python 2 used.

    Its byte strings are what no pickler of Python 3 writes. The names of numpy come first, not in the first array.
    """
    places = itertools.count(4)  # in the memo

    def remembered(opcodes: bytes) -> bytes:
        return opcodes + b"r" + struct.pack("<I", next(places))

    def text(words: bytes) -> bytes:
        return b"U" + bytes([len(words)]) + words

    def record(frame: bytes, box: list[float], det: float, quality: float, feature: np.ndarray) -> bytes:
        start = remembered(b"]") + b"(" + remembered(text(frame)) + remembered(b"]")
        scores = struct.pack(">cdcd", b"G", det, b"G", quality)
        array = remembered(b"h\1h\2K\0\x85U\1b\x87R") + b"(K\1M" + struct.pack("<H", len(feature)) + b"\x85h\3\x89"
        payload = b"T" + struct.pack("<I", feature.nbytes) + feature.tobytes()
        return b"".join(
            (start, b"(", *(struct.pack(">cd", b"G", x) for x in box), b"e", scores, array, payload, b"tbe")
        )

    with open(path, "wb") as file:
        file.write(b"\x80\2cnumpy.core.multiarray\n_reconstruct\nq\0010cnumpy\nndarray\nq\0020")
        file.write(b"cnumpy\ndtype\nU\2f2K\0K\1\x87R(K\3U\1<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tbq\0030}(")
        for name, records in clips:
            file.write(text(name.encode()) + b"](" + b"".join(record(*of) for of in records) + b"e")
        file.write(b"u.")


def export_python2(store: ClipStore, folder: Path) -> None:
    """Write a store as the challenge's files, the faces as Python 2 wrote them."""
    export_folder(store, folder)
    face, names = store.modalities["face"], store.clips["clip"].to_numpy(object)

    def faces(clip: int) -> list:
        rows = slice(face.start[clip], face.start[clip] + face.count[clip])
        columns = (face.columns[name][rows].tolist() for name in ("frame", "box", "det", "quality"))
        return [[b"%d" % frame, *rest] for frame, *rest in zip(*columns, face.feature[rows])]

    for split in ("train", "val"):
        clips = store.select(split)
        write_faces(pickle_path(folder, "face", split), ((names[clip], faces(clip)) for clip in clips))


def make_faces(folder: str, scale: str, **_) -> dict:
    """Write ``folder/faces``: official pickles, the faces in that of val, 30 a clip; train has one clip."""
    clips = SCALES[scale].imported // 30 + 1
    split = np.array(["train"] + ["val"] * (clips - 1))
    store = Path(folder, "faces-store")
    write_store(store, np.full(clips, 30), split, np.zeros(clips, int), 1)
    export_python2(ClipStore.open(store), Path(folder, "faces"))
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
    export_python2(store, Path(folder, "official"))
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
