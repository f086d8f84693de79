"""Write a ClipStore, and the rules that one obeys."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
# What a frame may carry: dtype, shape of one row, meaning. Other columns (a simulator's truth) keep theirs.
COLUMNS = {
    "frame": ("int32", (), "number of the frame in its clip"),
    "box": ("float64", (4,), "x1, y1, x2, y2 in pixels"),
    "det": ("float64", (), "detection score"),
    "quality": ("float64", (), "quality score, higher is better"),
}


class StoreWriter:
    """Write a store as a stream, inside `with`: `append` blocks of frames, then `finish` with the clips.

    Everything goes to a hidden folder beside the target, which takes its name at the end of the block; on
    any exception, an interrupt or a full disk among them, the hidden folder is removed.
    """

    def __init__(self, path: Path, simulated: bool, provenance: dict, overwrite: bool):
        self._meta = {"schema": SCHEMA_VERSION, "simulated": simulated, "provenance": provenance}
        self._target = partial_folder(path, "store.json", overwrite)
        self._streams: dict[str, dict[str, ArrayStream]] = {}
        self._finished = False

    def __enter__(self) -> "StoreWriter":
        self._exit = ExitStack()
        self.partial = self._exit.enter_context(self._target)
        self._exit.callback(lambda: [s.abandon() for m in self._streams.values() for s in m.values()])
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None and not self._finished:
            error = RuntimeError(f"{self.partial}: the store was left unfinished")
            self._exit.__exit__(RuntimeError, error, None)
            raise error
        self._exit.__exit__(kind, error, traceback)

    def append(self, modality: str, feature: np.ndarray, **columns: np.ndarray) -> int:
        """Write frames `feature` (n, D) float16 with their columns (n, ...); return the first one's row.

        Every call for a modality brings the same columns and width. Columns named in `COLUMNS` are
        converted to the dtype given there.
        """
        if feature.dtype != np.float16 or feature.ndim != 2:
            raise ValueError(f"{modality}: features must be float16 (n, D), got {feature.dtype} {feature.shape}")
        arrays = {"feature": feature}
        for name, values in columns.items():
            arrays[name] = np.asarray(values, COLUMNS[name][0] if name in COLUMNS else None)
        streams = self._streams.setdefault(modality, {})
        if not streams:
            (self.partial / modality).mkdir()
            for name, array in arrays.items():
                path = self.partial / modality / f"{name}.npy"
                streams[name] = ArrayStream(path, array.dtype, array.shape[1:])
        if arrays.keys() != streams.keys():
            raise ValueError(f"{modality}: columns {sorted(arrays)} after {sorted(streams)}")
        first = streams["feature"].rows
        for name, array in arrays.items():
            if len(array) != len(feature):
                raise ValueError(f"{modality}: {len(array)} values of {name} for {len(feature)} frames")
            if array.dtype.kind == "f" and (bad := nonfinite_rows(array)).size:
                raise ValueError(f"{modality}: NaN or infinite {name} in row {first + bad[0]}")
        for name, array in arrays.items():
            streams[name].append(array)
        return first

    def finish(
        self, clips: pd.DataFrame, identities: list[str], spans: dict[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """Write the tables: `clips` as in `ClipStore.clips`, in any order, `spans` their starts and counts.

        Modalities to which nothing was appended are left out.
        """
        clips = clips.reset_index(drop=True).astype({"identity": np.int32})
        names = np.asarray(identities, object)
        spans = {name: tuple(np.asarray(part, np.int64) for part in spans[name]) for name in self._streams}
        check_clips(
            self.partial / "clips.parquet",
            clips,
            names,
            {name: (*span, self._streams[name]["feature"].rows) for name, span in spans.items()},
        )
        for name, (start, count) in spans.items():
            clips[f"{name}_start"], clips[f"{name}_count"] = start, count
        clips["place"] = clips["split"].map(SPLITS.index)
        clips = clips.sort_values(["place", "clip"]).drop(columns="place")
        self._meta["modalities"] = {name: _describe(streams) for name, streams in self._streams.items()}
        for stream in (s for streams in self._streams.values() for s in streams.values()):
            stream.finish()
        _write_table(clips, self.partial / "clips.parquet")
        names = pd.DataFrame({"identity": pd.Series(names, dtype="str")})
        _write_table(names, self.partial / "identities.parquet")
        (self.partial / "store.json").write_text(json.dumps(self._meta, indent=1) + "\n")
        self._finished = True


def check_clips(
    path: Path, clips: pd.DataFrame, identities: np.ndarray, spans: dict[str, tuple[np.ndarray, np.ndarray, int]]
) -> None:
    """Raise for the first clip whose name, split, identity or span of rows cannot be."""

    def refuse(wrong: np.ndarray, what: str, values: np.ndarray) -> None:
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ValueError(f"{path}: clip {clips['clip'].iloc[at]!r}: {what} {values[at]}")

    for column in ("clip", "split", "identity"):
        if column not in clips:
            raise ValueError(f"{path}: no column {column}")
    code = clips["identity"].to_numpy()
    refuse(clips["clip"].duplicated().to_numpy(), "named twice, again in row", np.arange(len(clips)))
    refuse(~clips["split"].isin(SPLITS).to_numpy(), "unknown split", clips["split"].to_numpy())
    refuse((code < -1) | (code >= len(identities)), f"of {len(identities)} identities it has number", code)
    repeated = pd.Series(identities).duplicated().to_numpy()
    if repeated.any():
        raise ValueError(f"{path.with_name('identities.parquet')}: {identities[np.argmax(repeated)]!r} stands twice")
    for name, (start, count, rows) in spans.items():
        if len(start) != len(clips) or len(count) != len(clips):
            raise ValueError(f"{path}: {len(start)} starts and {len(count)} counts of {name} for {len(clips)} clips")
        wrong = (count < 0) | (start < 0) | (start > rows - count)
        refuse(wrong, f"of {rows} rows of {name} it has start and count", np.stack([start, count], axis=1))


def _describe(streams: dict[str, ArrayStream]) -> dict:
    feature = streams["feature"]
    columns = {
        name: {
            "dtype": stream.dtype.str,
            "shape": list(stream.row_shape),
            "meaning": COLUMNS[name][2] if name in COLUMNS else "truth of the simulator",
        }
        for name, stream in streams.items()
        if name != "feature"
    }
    return {"frames": feature.rows, "dim": feature.row_shape[0], "dtype": feature.dtype.str, "columns": columns}


def _write_table(table: pd.DataFrame, path: Path) -> None:
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), path)


class ArrayStream:
    """Write a `.npy` file of unknown length; rows are appended and never held."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]):
        self.dtype, self.row_shape, self.rows = np.dtype(dtype), tuple(row_shape), 0
        self._file = open(path, "wb")
        self._header_size = self._write_header()

    def append(self, block: np.ndarray) -> None:
        """Add the rows of `block (n, *row_shape)`, which must have the stream's dtype."""
        if block.dtype != self.dtype or block.shape[1:] != self.row_shape:
            raise ValueError(
                f"{self._file.name}: expected rows of {self.dtype}{list(self.row_shape)}, "
                f"got {block.dtype}{list(block.shape[1:])}"
            )
        self._file.write(np.ascontiguousarray(block).data.cast("B") if block.size else b"")
        self.rows += len(block)

    def finish(self) -> None:
        """Write the true length into the header and close the file."""
        self._file.seek(0)
        if self._write_header() != self._header_size:
            raise ValueError(f"{self._file.name}: {self.rows} rows do not fit the reserved header")
        self._file.close()

    def abandon(self) -> None:
        """Close the file, whatever its state."""
        try:
            self._file.close()
        except OSError:  # on a full disk the last flush fails again
            pass

    def _write_header(self) -> int:
        # numpy pads headers so that the first axis may grow in place
        npy.write_array_header_1_0(
            self._file,
            {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.rows, *self.row_shape)},
        )
        return self._file.tell()


def map_array(path: Path) -> np.ndarray:
    """Memory-map a `.npy` file copy-on-write, refusing one that is missing, damaged or cut short."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
            offset = file.tell()
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable array ({error})") from None
    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size != expected or fortran or dtype.hasobject:
        raise ValueError(f"{path}: {size} bytes where {dtype} {shape} takes {expected}")
    if size == offset:  # nothing to map
        return np.empty(shape, dtype)
    # copy-on-write rather than read-only, so that torch.from_numpy takes it without a warning
    return np.memmap(path, dtype, "c", offset, shape)


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

    A folder that exists is refused unless `overwrite`, and is then replaced only when the new one is
    complete, and only if it holds `marker`: a slip of the pen must not delete someone's documents.
    """
    path = Path(os.path.abspath(path))
    _check_target(path, marker, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        _check_target(path, marker, overwrite)
        replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
        if path.exists():
            path.rename(replaced)
        try:
            partial.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(path: Path, marker: str, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path}: exists already")
    if not (path / marker).exists():
        raise FileExistsError(f"{path}: not replaced, because it holds no {marker}")
