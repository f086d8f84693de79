"""Features of one's own, a table beside an array, to a ClipStore."""

import hashlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.progress import track

from mmlib.data.foreign import SCORES, ImportReport, count_lost, open_array, read_rows, to_half
from mmlib.data.store import ClipStore
from mmlib.data.writer import nonfinite_rows

BLOCK = 2**22  # numbers copied at once
# The files of import_lfw: sha256, and the names they go by. The first is theirs in oss_data/ of
# github.com/huyhoang17/128D-Facenet-LFW-Embedding-Visualisation at 75ca7f43ce1576a2240de24077016f17d3b52b10.
LFW_ARRAY = (
    "f4ed45ab485beab6a4345a3f86001a7bedbacdd35aaf80298895352329315edb",
    ("LFW_tensor.bytes", "lfw-facenet-128.bytes"),
)
LFW_LABELS = (
    "63e115d1d791ed3d1e48e430e8ebb546357cbf7e97a37cce6ae023558e748ed2",
    ("LFW_labels.tsv", "lfw-facenet-128-labels.tsv"),
)


def import_features(
    table: str | Path,
    array: str | Path,
    store: str | Path,
    *,
    width: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> ImportReport:
    """Turn `table` (parquet or CSV) and `array` into a store of faces.

    Row i of the table (columns clip, frame, identity, split, and quality and det where known) belongs to row i of the
    array: a `.npy` (F, D) of floats, or raw little-endian float32 of the given `width`. Rows may come in any order; an
    empty identity is none. Identities stand in the store sorted by name.
    """
    began, table, array = time.perf_counter(), Path(table), Path(array)
    rows, features = read_rows(table), open_array(array, width)
    if len(rows) != len(features):
        raise ValueError(f"{array}: {len(features)} rows, but {table} has {len(rows)}")
    columns = [name for name in ("frame", *SCORES) if name in rows]
    provenance = {"table": file_digest(table), "array": file_digest(array)}
    with ClipStore.create(store, simulated=False, provenance=provenance, overwrite=overwrite) as writer:
        step, losses = max(1, BLOCK // max(1, features.shape[1])), []
        starts = range(0, len(rows), step)
        for first in track(starts, f"store {array.name}", transient=True, disable=not progress):
            block = rows.iloc[first : first + step]
            taken = features[block.index.to_numpy()]
            feature, loss = to_half(taken)
            for row in nonfinite_rows(feature):
                place, at = np.argmin(np.isfinite(feature[row])), block.iloc[row]
                where = f"{array}, row {at.name + 1}: clip {at['clip']}, frame {at['frame']}"
                what = f"feature is {taken[row, place]} at position {place}, which float16 cannot hold"
                raise ValueError(f"{where}: {what}")
            writer.append("face", feature, **{name: block[name].to_numpy() for name in columns})
            losses.append(loss)
        lost = count_lost(np.concatenate(losses), array)
        clips = rows.drop_duplicates("clip")[["clip", "split", "identity"]].reset_index(drop=True)
        named = pd.Categorical(clips["identity"])
        clips["identity"] = named.codes.astype(np.int32)
        count = rows.groupby("clip", sort=False).size().to_numpy()
        writer.finish(clips, [*named.categories], {"face": (np.cumsum(count) - count, count)})
    absent = [f"column {name}" for name in SCORES if name not in columns]
    return ImportReport(ClipStore.open(store), time.perf_counter() - began, absent, *lost)


def import_lfw(folder: str | Path, store: str | Path, *, seed: int = 0, overwrite: bool = False) -> ImportReport:
    """Turn public embeddings of photographs of Labeled Faces in the Wild into a store.

    `folder` holds `LFW_ARRAY`, 2,921 FaceNet embeddings of 128 dimensions as raw float32, and `LFW_LABELS`, a name a
    line; their sha256 is checked. Spaces in a name become underscores, as the challenge's text files divide words at
    spaces. The photographs, of which `group_photographs` makes clips, are for research.
    """
    array, labels = (_find_published(Path(folder), *file) for file in (LFW_ARRAY, LFW_LABELS))
    names = labels.read_text(encoding="utf-8").replace(" ", "_").splitlines()
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / f"grouped-{seed}.csv"
        group_photographs(names, seed).to_csv(table, index=False)
        return import_features(table, array, store, width=128, overwrite=overwrite)


def group_photographs(names: Sequence[str], seed: int) -> pd.DataFrame:
    """Make clips of photographs: a table for `import_features`, row i for the photograph of `names[i]` (F,).

    The photographs of a person are shuffled. Of 4 or more, half (and the odd one) go to train and half to val, each
    half cut into a random number of even clips of 2 to 5. 1 to 3 make one val clip, a distractor without identity.
    Clips are numbered in random order, so that a name tells nothing.

    >>> table = group_photographs(["ann", "bob", "ann", "ann", "bob", "ann"], seed=0)
    >>> table["split"].value_counts().to_dict()
    {'val': 4, 'train': 2}
    """
    rng = np.random.default_rng(seed)
    clips = []
    for name, rows in pd.Series(names, dtype=object).groupby(np.asarray(names, object)).indices.items():
        rows = rng.permutation(rows)
        if len(rows) < 4:
            clips.append(("val", None, rows))
            continue
        for split, half in zip(("train", "val"), np.array_split(rows, 2)):
            number = rng.integers(-(-len(half) // 5), len(half) // 2, endpoint=True)
            clips += [(split, name, part) for part in np.array_split(half, number)]
    table = pd.DataFrame(clips, columns=["split", "identity", "row"])
    numbers = rng.permutation(len(table))
    table["clip"] = [f"{split}_{number:05d}" for split, number in zip(table["split"], numbers)]
    table = table.explode("row")
    table["frame"] = table.groupby("clip").cumcount()
    return table.set_index(table.pop("row").astype(np.int64)).sort_index()


def _find_published(folder: Path, digest: str, names: Sequence[str]) -> Path:
    path = next(filter(Path.exists, (folder / name for name in names)), folder / names[0])
    if not path.exists():
        raise ValueError(f"{path}: missing")
    if (found := file_digest(path)["sha256"]) != digest:
        raise ValueError(f"{path}: not the published file, its sha256 is {found}, not {digest}")
    return path


def file_digest(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
