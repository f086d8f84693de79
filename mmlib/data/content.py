"""The digest of what a store holds: stores share one only if every name and number in them is the same.

`StoreWriter` leaves it in `store.json`, where it is believed while no other file has been changed since; else every
byte is read when it is first asked for. It is then noted in `content.json` beside size, time of writing and time of
change of each file, the one that no tool sets back, and believed until one of them differs. Unnoticed remains an edit
in place of a store that was never asked before, if `store.json` was written or copied after it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy

NOTE = "content.json"
TABLES = ("clips.parquet", "identities.parquet")


class ArrayStream:
    """Write a `.npy` file of unknown length: rows are appended, hashed by a thread beside, and hardly held."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]):
        self.dtype, self.row_shape, self.rows = np.dtype(dtype), tuple(row_shape), 0
        self._sha256, self._beside = hashlib.sha256(), ThreadPoolExecutor(1)
        self._hashed = self._beside.submit(self._sha256.update, b"")
        self._file = open(path, "wb")  # noqa: SIM115 - open until finish or abandon
        self._write_header()

    def append(self, block: np.ndarray) -> None:
        """Add the rows of `block (n, *row_shape)`, which must have the stream's dtype and not be changed afterwards."""
        wanted, got = (self.dtype, list(self.row_shape)), (block.dtype, list(block.shape[1:]))
        if got != wanted:
            raise ValueError("{}: expected rows of {}{}, got {}{}".format(self._file.name, *wanted, *got))
        content = np.ascontiguousarray(block).data
        self._hashed.result()  # so that one block is held and no more
        self._hashed = self._beside.submit(self._sha256.update, content)
        self._file.write(content)
        self.rows += len(block)

    def finish(self) -> tuple[str, tuple[int, ...], str]:
        """Write the true length into the header and close the file; return dtype, shape and digest, for `combine`."""
        self._file.seek(0)
        self._write_header()
        self._file.close()
        self._beside.shutdown()
        return self.dtype.str, (self.rows, *self.row_shape), self._sha256.hexdigest()

    def abandon(self) -> None:
        """Close the file, whatever its state."""
        self._beside.shutdown()
        with suppress(OSError):  # on a full disk the last flush fails again
            self._file.close()

    def _write_header(self) -> None:
        # numpy pads headers so that the first axis may grow in place
        shape = self.rows, *self.row_shape
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def combine(arrays: Mapping[str, tuple[str, tuple[int, ...], str]], tables: Mapping[str, pd.DataFrame]) -> str:
    """Hash a store, by name of file: dtype, shape and sha256 of the rows of each array, the cells of each table.

    Cells count as text, because the bytes of a parquet file depend on the version of the library that wrote it.
    """
    text = {name: table.to_csv(index=False, lineterminator="\n") for name, table in tables.items()}
    said = {**arrays, **{name: hashlib.sha256(cells.encode()).hexdigest() for name, cells in text.items()}}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path, meta: dict) -> str:
    """Name the content of the store at `path`, and whether it is simulated, by 20 hexadecimal digits."""
    kinds = meta["modalities"].items()
    arrays = [f"{name}/{column}.npy" for name, of in kinds for column in ("feature", *of["columns"])]
    stats = {name: (path / name).stat() for name in (*TABLES, *arrays)}
    stamp = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}
    noted = None
    try:
        noted = json.loads((path / NOTE).read_text())
        content = noted["content"] if noted["files"] == stamp else ""
    except FileNotFoundError:
        changed = max(max(times) for _, *times in stamp.values())
        content = meta.get("content") if changed <= (path / "store.json").stat().st_mtime_ns else ""
    except (OSError, ValueError, KeyError, TypeError):  # damaged ones are made anew
        content = ""
    note = {"content": content or _read_all(path, json.dumps(stamp)), "files": stamp}
    if note != noted:
        with suppress(OSError):  # the folder may not be ours
            write_whole(path / NOTE, json.dumps(note, indent=1).encode() + b"\n")
    return hashlib.sha256(f"{meta['simulated']} {note['content']}".encode()).hexdigest()[:20]


def read_table(path: Path) -> pd.DataFrame:
    """Read a parquet file as it is: folders named `split=val` above it add no column."""
    try:
        with pq.ParquetFile(path) as file:
            return file.read().to_pandas()
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a readable table ({error})") from None


@lru_cache(maxsize=64)  # for stores beside which nothing can be noted
def _read_all(path: Path, stamp: str) -> str:
    """Return what the writer of the store, as `stamp` knows it, would have said."""
    arrays = {}
    for name in json.loads(stamp).keys() - {*TABLES}:
        array = npy.open_memmap(path / name, "r")
        with open(path / name, "rb") as file:
            file.seek(array.offset)
            order = "" if array.flags.c_contiguous else " Fortran"
            arrays[name] = array.dtype.str + order, array.shape, hashlib.file_digest(file, "sha256").hexdigest()
    return combine(arrays, {name: read_table(path / name) for name in TABLES})
