"""The digest of what a store holds: stores share one only if every name and number in them is the same.

`StoreWriter` hashes what passes through it and leaves the digest in `store.json`, where it is believed while no other
file has been changed since. Of an older or a changed store every byte is read when the digest is first asked for.
Either is then noted in `content.json` beside size, time of writing and time of change of each file, and believed until
one of them differs: the first two alone would miss an edit by a tool that sets the time of writing back; nothing sets
back the third. What remains unnoticed is an edit in place of a store that was never asked before, if `store.json` was
written or copied after it.
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
        partial.replace(path)
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
    """Name the content of the store at `path`, which `meta` describes: 20 hexadecimal digits.

    Where a store comes from decides nothing, whether it is simulated does.
    """
    columns = {name: ("feature", *described["columns"]) for name, described in meta["modalities"].items()}
    names = [*TABLES, *(f"{modality}/{column}.npy" for modality, of in columns.items() for column in of)]
    stats = {name: (path / name).stat() for name in names}
    stamp = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}
    content = _noted(path, stamp)
    if content is None:
        changed = max(max(times) for _, *times in stamp.values())
        as_written = not (path / NOTE).exists() and changed <= (path / "store.json").stat().st_mtime_ns
        content = (as_written and meta.get("content")) or _read_all(path, json.dumps(stamp))
        _note(path, content, stamp)
    return hashlib.sha256(f"{meta['simulated']} {content}".encode()).hexdigest()[:20]


def read_table(path: Path) -> pd.DataFrame:
    """Read a parquet file as it is: folders named `split=val` above it add no column."""
    with pq.ParquetFile(path) as file:
        return file.read().to_pandas()


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


def _noted(path: Path, stamp: dict) -> str | None:
    try:
        noted = json.loads((path / NOTE).read_text())
        return noted["content"] if noted["files"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):  # damaged ones are made anew
        return None


def _note(path: Path, content: str, stamp: dict) -> None:
    with suppress(OSError):  # the folder may not be ours
        write_whole(path / NOTE, json.dumps({"content": content, "files": stamp}, indent=1).encode() + b"\n")
