"""Files that appear whole or not at all: arrays written as a stream, folders renamed into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib import format as npy


class ArrayStream:
    """Write a `.npy` file of unknown length; rows are appended and never held."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]):
        self.dtype, self.row_shape, self.rows = np.dtype(dtype), tuple(row_shape), 0
        self._file = open(path, "wb")
        self._header_size = self._write_header()

    def append(self, block: np.ndarray) -> None:
        """Add the rows of `block (n, *row_shape)`, which must have the stream's dtype."""
        if block.dtype != self.dtype or block.shape[1:] != self.row_shape:
            raise ValueError(f"{self._file.name}: expected rows of {self.dtype}{list(self.row_shape)}, "
                             f"got {block.dtype}{list(block.shape[1:])}")
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
        npy.write_array_header_1_0(self._file, {
            "descr": npy.dtype_to_descr(self.dtype), "fortran_order": False,
            "shape": (self.rows, *self.row_shape)})
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
