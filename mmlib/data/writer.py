"""Write a ClipStore, and the rules that one obeys."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy

from mmlib.data.content import ArrayStream, combine
from mmlib.data.submission import check_names

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
# What a frame may carry: dtype and meaning. Other columns (a simulator's truth) keep theirs.
COLUMNS = {
    "frame": ("int32", "number of the frame in its clip"),
    "box": ("float64", "x1, y1, x2, y2 in pixels"),
    "det": ("float64", "detection score"),
    "quality": ("float64", "quality score, higher is better"),
}


@contextmanager
def write_store(
    path: str | Path, *, simulated: bool, provenance: dict, overwrite: bool = False
) -> Iterator[StoreWriter]:
    """Yield the writer of a store, which takes its place at the end of the block; on any exception nothing is left."""
    meta = {"schema": SCHEMA_VERSION, "simulated": simulated, "provenance": provenance}
    with partial_folder(Path(path), "store.json", overwrite) as partial, ExitStack() as files:
        yield StoreWriter(partial, files, meta)
        if not (partial / "store.json").exists():
            raise RuntimeError(f"{partial}: the store was left unfinished")


class StoreWriter:
    """Write a store as a stream into the folder `partial`: `append` blocks of frames, then `finish` with the clips."""

    def __init__(self, partial: Path, files: ExitStack, meta: dict):
        self.partial, self._files, self._meta = partial, files, meta
        self._streams: dict[str, dict[str, ArrayStream]] = {}

    def append(self, modality: str, feature: np.ndarray, **columns: np.ndarray) -> int:
        """Write frames `feature` (n, D) float16 with their columns (n, ...), the same in each call; return its row.

        Columns named in `COLUMNS` are converted to the dtype given there.
        """
        if feature.dtype != np.float16 or feature.ndim != 2:
            raise ValueError(f"{modality}: features must be float16 (n, D), got {feature.dtype} {feature.shape}")
        kinds = {name: dtype for name, (dtype, _) in COLUMNS.items()}
        arrays = {"feature": feature} | {name: np.asarray(of, kinds.get(name)) for name, of in columns.items()}
        streams = self._streams.setdefault(modality, {})
        if not streams:
            (self.partial / modality).mkdir()
            for name, array in arrays.items():
                path = self.partial / modality / f"{name}.npy"
                streams[name] = ArrayStream(path, array.dtype, array.shape[1:])
                self._files.callback(streams[name].abandon)
        first = streams["feature"].rows
        for name, array in arrays.items():
            if array.dtype.kind == "f" and (bad := nonfinite_rows(array)).size:
                raise ValueError(f"{modality}: NaN or infinite {name} in row {first + bad[0]}")
        for name, array in arrays.items():
            streams[name].append(array)
        return first

    def finish(self, clips: pd.DataFrame, identities: Sequence[str], spans: Mapping[str, Sequence]) -> None:
        """Write the tables: `clips` as in `ClipStore.clips`, in any order; `spans` start and count (N,) by modality.

        Modalities to which nothing was appended are left out. Names are those that `submission.check_names` takes.
        """
        clips = clips.reset_index(drop=True).astype({"identity": np.int32})
        for name in self._streams:
            for part, values in zip(("start", "count"), spans[name]):
                clips[f"{name}_{part}"] = np.asarray(values, np.int64)
        names = pd.DataFrame({"identity": pd.Series(np.asarray(identities, object), dtype="str")})
        frames = {name: streams["feature"].rows for name, streams in self._streams.items()}
        check_clips(self.partial, clips, names["identity"].to_numpy(object), frames)
        check_names(clips["clip"], names["identity"])
        clips = clips.sort_values("clip").sort_values("split", key=lambda split: split.map(SPLITS.index), kind="stable")
        streams = {f"{name}/{column}.npy": s for name, of in self._streams.items() for column, s in of.items()}
        arrays = {path: stream.finish() for path, stream in streams.items()}
        tables = {"clips.parquet": clips, "identities.parquet": names}
        for name, table in tables.items():
            pq.write_table(pa.Table.from_pandas(table, preserve_index=False), self.partial / name)
        self._meta["modalities"] = {name: _describe(**streams) for name, streams in self._streams.items()}
        self._meta["content"] = combine(arrays, tables)
        (self.partial / "store.json").write_text(json.dumps(self._meta, indent=1) + "\n")


def check_clips(store: Path, clips: pd.DataFrame, identities: np.ndarray, frames: dict[str, int]) -> None:
    """Raise for the first clip whose name, split, identity or span, of so many `frames` a modality, cannot be."""
    path = store / "clips.parquet"
    wanted = ["clip", "split", "identity", *(f"{name}_{part}" for name in frames for part in ("start", "count"))]
    if missing := [name for name in wanted if name not in clips]:
        raise ValueError(f"{path}: no column {', '.join(missing)}")

    def refuse(wrong: pd.Series, what: str, *columns: str) -> None:
        for at in np.flatnonzero(wrong):
            found = " and ".join(str(clips[column].iloc[at]) for column in columns)
            raise ValueError(f"{path}: clip {clips['clip'].iloc[at]!r}: {what} {found}")

    code = clips["identity"]
    refuse(clips["clip"].duplicated(), "named twice, again in", "split")
    refuse(~clips["split"].isin(SPLITS), "unknown split", "split")
    refuse((code < -1) | (code >= len(identities)), f"of {len(identities)} identities it has number", "identity")
    for name, rows in frames.items():
        start, count = clips[f"{name}_start"], clips[f"{name}_count"]
        wrong = (count < 0) | (start < 0) | (start > rows - count)
        refuse(wrong, f"of {rows} rows of {name} it has start and count", start.name, count.name)
    for name in identities[pd.Series(identities).duplicated()]:
        raise ValueError(f"{store / 'identities.parquet'}: {name!r} stands twice")


def _describe(feature: ArrayStream, **others: ArrayStream) -> dict:
    columns: dict[str, dict] = {}
    for name, stream in others.items():
        _, meaning = COLUMNS.get(name, ("", "truth of the simulator"))
        columns[name] = {"dtype": stream.dtype.str, "shape": list(stream.row_shape), "meaning": meaning}
    return {"frames": feature.rows, "dim": feature.row_shape[0], "dtype": feature.dtype.str, "columns": columns}


def map_array(path: Path) -> np.ndarray:
    """Memory-map a `.npy` file, refusing one that is missing, damaged, cut short or no numbers."""
    try:
        array = npy.open_memmap(path, "c")  # so that torch.from_numpy takes it without a warning
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable array ({error})") from None
    if (rest := path.stat().st_size - array.offset - array.nbytes) > 0:
        raise ValueError(f"{path}: {rest} bytes after an array of {array.dtype} {array.shape}")
    return array


def nonfinite_rows(block: np.ndarray) -> np.ndarray:
    """Find the rows of `block (n, ...)` that hold NaN or infinity: their numbers, ascending."""
    within_row = tuple(range(1, block.ndim))
    if block.dtype == np.float16:  # on the bits: several times faster than isfinite in half precision
        finite = (block.view(np.uint16) & 0x7C00).max(axis=within_row, initial=0) != 0x7C00
    else:
        finite = np.isfinite(block).all(axis=within_row)
    return np.flatnonzero(~finite)


@contextmanager
def partial_folder(path: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside `path` that takes its name when the block ends well, else is removed.

    A folder that exists is refused unless `overwrite`, and is replaced only when the new one is complete, and only if
    it holds `marker`: a slip of the pen must not delete someone's documents.  A link stays, and what it leads to is
    written.  On an error the folders above that were made for it go too.
    """
    path = Path(os.path.realpath(path))
    above = [folder for folder in path.parents if not folder.exists()]

    def check() -> None:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            if not overwrite:
                raise FileExistsError(f"{path}: exists already")
            if not (path / marker).exists():
                raise FileExistsError(f"{path}: not replaced, because it holds no {marker}")

    check()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("partial", "replaced"))
    partial.mkdir()
    try:
        yield partial
        check()
        with ExitStack() as undo:
            if path.exists():
                path.rename(replaced)
                undo.callback(replaced.rename, path)
            partial.rename(path)
            undo.pop_all()
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in above:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
