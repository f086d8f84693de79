"""Read pickled dicts of features safely, the features as a stream.

A pickle is a program: loading one with `pickle.load` runs whatever it names. Here only the five names
that float16 arrays and plain containers need are known, and each leads to a stand-in of ours that moves
bytes and runs nothing of numpy. Every other name is refused.
"""

import gc
import io
import pickle
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mmlib.data.writer import nonfinite_rows

BLOCK = 2**20  # bytes of features gathered before they go to disk
LONG = 256  # bytes; only features are longer
PORTION = 2**25  # bytes read between two reports of progress
PRUNE = 2**14  # features between two visits to the memo


EMPTY = -(2**31)  # the place of a feature that never got its content


class Spool:
    """A temporary file of equally long features; each is known by its row.

    `places`, set by `finish`, gives by the number of a `Feature` its row, -1 - n if it has the n-th of the `flaws`,
    or EMPTY. `flaws` says what is wrong with features that could not be kept; `nonfinite`, set by `finish`, marks the
    rows that hold a NaN, an infinity or a number too large for float16.
    """

    def __init__(self, path: Path, dtype: str, width: int):
        self.dtype, self.width, self.rows = np.dtype(dtype), width, 0
        self.flaws: list[str] = []
        self._path, self._file, self._pending = path, open(path, "wb"), []
        self._nonfinite: list[np.ndarray] = []
        self._places = array("i")

    def number(self) -> int:
        """Return a number for a feature whose content is still to come."""
        self._places.append(EMPTY)
        return len(self._places) - 1

    def add(self, number: int, dtype: str, shape: tuple, payload: bytes) -> None:
        """Keep one feature, or what is wrong with it."""
        size = self.width * self.dtype.itemsize
        if dtype == self.dtype.str and shape == (self.width,) and len(payload) == size:
            self._pending.append(payload)
            self._places[number] = self.rows
            self.rows += 1
            if len(self._pending) * len(payload) >= BLOCK:
                self.flush()
            return
        got = np.dtype(dtype).name if dtype[1:] in ("f2", "f4", "f8") and dtype[0] == "<" else dtype
        self.flaws.append(f"feature is {got} {shape} of {len(payload)} bytes, not {self.dtype.name} ({self.width},)")
        self._places[number] = -len(self.flaws)

    def flush(self) -> None:
        """Write what is pending."""
        block = np.frombuffer(b"".join(self._pending), self.dtype).reshape(-1, self.width)
        self._file.write(block.data.cast("B") if block.size else b"")
        with np.errstate(over="ignore"):
            bad = nonfinite_rows(block.astype(np.float16, copy=False))
        if bad.size:  # an object that stays would keep the memory around it from being given back
            self._nonfinite.append(self.rows - len(block) + bad)
        self._pending.clear()

    def finish(self) -> None:
        """Write what is pending and set `nonfinite`, (rows,) bool, and `places`."""
        self.flush()
        self._file.flush()
        self.places = np.array(self._places, np.int64)
        self.nonfinite = np.zeros(self.rows, bool)
        for rows in self._nonfinite:
            self.nonfinite[rows] = True

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the features at `rows` (n,) as (n, D) float16."""
        if not len(rows):
            return np.empty((0, self.width), np.float16)
        # mapped anew each time, so that pages once read do not stay resident
        mapped = np.memmap(self._path, self.dtype, "r", shape=(self.rows, self.width))
        with np.errstate(over="ignore"):
            return mapped[rows].astype(np.float16, copy=False)

    def close(self) -> None:
        """Close and remove the file."""
        self._pending.clear()
        try:
            self._file.close()
        finally:
            self._path.unlink(missing_ok=True)


class Feature(int):
    """What stands for an array in the loaded containers: its number in the spool, in the fewest bytes there are."""

    __slots__ = ()


def read_pickle(path: Path, spool: Spool, progress: Callable[[int], None] = lambda _: None) -> dict:
    """Load the dict in `path`, its arrays going to `spool`; `progress` hears of each portion of bytes."""
    with _ReportingFile(path, progress) as raw, io.BufferedReader(raw, 2**20) as file:
        size = path.stat().st_size
        unpickler = _Unpickler(file, spool)
        try:
            loaded = unpickler.load()
        except OSError:  # of the spool's disk
            raise
        except Exception as error:
            message = " ".join(str(error).split())
            if isinstance(error, EOFError) or message == "pickle data was truncated":
                raise ValueError(f"{path}: cut short at byte {size}") from None
            where = f"near byte {file.tell()}"
            raise ValueError(f"{path}: not a pickle of features, {where}: {message}") from None
        finally:
            unpickler.release()
        if (end := file.tell()) != size:
            raise ValueError(f"{path}: {size - end} bytes after the pickle's end at byte {end}")
    if type(loaded) is not dict:
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a dict of clips")
    spool.finish()
    return loaded


@contextmanager
def collection_paused() -> Iterator[None]:
    """Keep the garbage collector from visiting millions of lists again and again to find no cycle."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _ReportingFile(io.FileIO):
    """A raw file that tells how much was read; below a buffer, so the unpickler's many reads stay in C."""

    def __init__(self, path: Path, report: Callable[[int], None]):
        super().__init__(path)
        self._report, self._untold = report, 0

    def readinto(self, buffer) -> int:
        got = super().readinto(buffer)
        self._untold += got
        # Seldom: a listener may keep an object, and a small object that stays keeps all the memory around it.
        if self._untold >= PORTION or not got:
            self._report(self._untold)
            self._untold = 0
        return got


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, spool: Spool):
        super().__init__(file, encoding="bytes")
        reconstruct = _reconstructor(spool, self._forget_features)
        self._known = {
            "numpy.core.multiarray._reconstruct": reconstruct,
            "numpy._core.multiarray._reconstruct": reconstruct,
            "numpy.ndarray": _NDARRAY,
            "numpy.dtype": lambda code, align=0, copy=1: _Dtype(_text(code)),
            "_codecs.encode": _encode,
        }

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in self._known:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which is refused; nothing was run")
        return self._known[f"{module}.{name}"]

    def release(self) -> None:
        """Drop the memo and the cycle of references that would keep it."""
        self.memo = {}
        self._known.clear()

    def _forget_features(self) -> bool:
        """Take features' bytes out of the memo; say whether there were any."""
        # Python 3 memoises every object it pickles, features' bytes among them, and the memo would hold all
        # of them to the end. Later parts may refer to globals, dtypes and strings, never to these.
        memo = self.memo.copy()
        if not any(type(kept) in (str, bytes) and len(kept) >= LONG for kept in memo.values()):
            return False
        self.memo = _Memo(
            {
                place: kept
                for place, kept in memo.items()
                if not (
                    type(kept) in (list, tuple)
                    or isinstance(kept, Feature)
                    or type(kept) in (str, bytes)
                    and len(kept) >= LONG
                )
            }
        ).memo
        return True


class _Memo(pickle.Unpickler):
    """An unpickler made to own a given memo, for CPython loses a dict that `memo` is set to."""

    def __init__(self, memo: dict[int, object]):
        # for each place: push it, replace it by the object it names, memoise that there, pop
        steps = np.zeros(len(memo), [("push", "S1"), ("id", "<i4"), ("load", "S2"), ("place", "<u4"), ("pop", "S1")])
        steps["push"], steps["load"], steps["pop"] = b"J", b"Qr", b"0"
        steps["id"] = steps["place"] = np.fromiter(memo, np.int64, len(memo))
        super().__init__(io.BytesIO(steps.tobytes() + b"N."))
        self._given = memo
        self.load()
        self._given = None

    def persistent_load(self, place: int) -> object:
        return self._given[place]


class _Name:
    """Stands for a name that is only passed on."""

    __slots__ = ()


_NDARRAY = _Name()


class _Dtype:
    """Stands for a numpy dtype: byte order and kind, such as '<f2'."""

    __slots__ = ("code",)

    def __init__(self, code: str):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = _text(state[1]) + self.code


def _reconstructor(spool: Spool, forget: Callable[[], bool]) -> Callable:
    """Make the stand-in for numpy's `_reconstruct`, whose arrays go to `spool` when their state arrives."""
    next_visit = PRUNE

    class SpooledFeature(Feature):
        __slots__ = ()

        def __setstate__(self, state: tuple) -> None:
            nonlocal next_visit
            _, shape, dtype, fortran, payload = state
            spool.add(self, dtype.code, shape, payload)
            if self == next_visit:
                # visits cost as much as the memo is long: ever rarer ones keep the whole linear; and a writer
                # that memoised none of the first thousands of features, as Python 2, does not begin later
                next_visit += max(PRUNE, self // 12) if forget() else 2**62

    def reconstruct(kind, shape, code) -> Feature:
        if kind is not _NDARRAY:
            raise pickle.UnpicklingError("an array of another class than numpy.ndarray")
        return SpooledFeature(spool.number())

    return reconstruct


def _text(code: bytes | str) -> str:
    return code if isinstance(code, str) else code.decode("latin1")


def _encode(text: str, codec: str) -> bytes:
    if _text(codec) != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {codec!r}")
    return text.encode("latin1")
