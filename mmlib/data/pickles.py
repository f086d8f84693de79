"""Read pickled dicts of arrays safely, the arrays as a stream; and write such dicts.

A pickle is a program: `pickle.load` runs whatever it names. Here a name leads to a stand-in that runs nothing and
cannot be changed. Those of what arrays and plain containers need move bytes; any other is `Foreign` and swallows what
it is given, so that the file is read to its end and the record that holds it can be named.
"""

from __future__ import annotations

import copyreg
import gc
import pickle
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np

BLOCK = 2**20  # bytes read or written at once
KEPT = 256  # bytes of an array that is no feature
SHORT = reprlib.Repr()
SHORT.maxother = 60
SHORT.repr_int = SHORT.repr_instance  # type: ignore[method-assign]  # integers may have too many digits for repr
PLAIN = re.compile(r"[<>|=]?[biufcSU]\d{1,3}")  # dtypes of numbers and text


class Array:
    """What stands for an array: the spool that gets its content, and then what `Spool.add` makes of that."""

    __slots__ = ("held",)

    def __init__(self, spool: Spool):
        self.held: Any = spool

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, _, payload = state
        self.held = self.held.add(dtype.code, shape, payload)

    def __repr__(self) -> str:
        return "an array"


class Foreign:
    """What a pickle gets for a name that is not known: a class that swallows whatever it is given."""

    __slots__ = ()

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    @classmethod
    def _swallow(cls, *_) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _swallow  # all that an unpickler calls


class Spool:
    """Equally long features in `file`, each known by its row."""

    def __init__(self, file: IO[bytes], dtype: str, width: int):
        self.dtype, self.width, self.rows, self._file = np.dtype(dtype), width, 0, file

    def add(
        self, code: str, shape: tuple, payload: bytes | bytearray
    ) -> int | tuple[str, tuple, bytes | bytearray, int]:
        """Keep a feature on disk and return its row, or dtype, shape, first bytes and size of what is no feature."""
        size = len(payload)
        if code[1:] == self.dtype.str[1:] and shape == (self.width,) and size == self.width * self.dtype.itemsize:
            content = payload if code == self.dtype.str else np.frombuffer(payload, code).astype(self.dtype).data
            self._file.write(content)
            self.rows += 1
            held: Any = self.rows - 1
        else:
            held = code, shape, payload[:KEPT], size
        if type(payload) is bytearray:
            del payload[:]  # an unpickler keeps it to the end; clear would not give its memory back
        return held

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the features at `rows` (n,), for a negative row some other."""
        if not len(rows) or not self.rows:
            return np.empty((0, self.width), self.dtype)
        # mapped anew each time, so that pages once read do not stay resident
        return np.memmap(self._file, self.dtype, "r", shape=(self.rows, self.width))[np.maximum(rows, 0)]

    def describe(self, value: object) -> str:
        """Say what a value is that is no feature, or not a finite one."""
        held = value.held if isinstance(value, Array) else None
        if type(held) is tuple:
            return "{} {} of {} bytes".format(*held[:2], held[3])
        if type(held) is not int:
            return SHORT.repr(value)
        feature = self.read(np.array([held]))[0]
        bad = np.argmin(np.abs(feature) < np.float32(65520))  # from there on float16 has infinity
        return f"{feature[bad]} at position {bad}"


def rows_of(values: Sequence) -> np.ndarray:
    """Return the rows of features (n,), -1 where a value is none."""
    held = (value.held if isinstance(value, Array) else None for value in values)
    return np.array([row if type(row) is int else -1 for row in held], np.int64)


def plain(values: Sequence) -> Sequence:
    """Put for each short array the list, or if it has one element the number or text, that it holds."""
    if not any(issubclass(kind, Array) for kind in set(map(type, values))):
        return values
    short = (value.held if isinstance(value, Array) else None for value in values)
    return [_plain(*held[:3], value) if type(held) is tuple else value for value, held in zip(values, short)]


def read_pickle(path: Path, raw: Any, spool: Spool) -> tuple[dict, set[str]]:
    """Load the dict in `path`, opened as `raw`, its arrays going to `spool`, and the foreign names that it holds.

    Memory is that of the containers for a file of Python 2 or of `write_pickle`. Other pickles of Python 3 have the
    bytes of all arrays remembered to the end, as in `pickle.load`, unless they are of protocol 5.
    """
    size = path.stat().st_size
    copyreg.clear_extension_cache()  # of live objects, which come without find_class
    try:
        file = BufferedReader(raw, BLOCK)
        unpickler = _Unpickler(file, spool)
        loaded = unpickler.load()
    except OSError:
        raise
    except MemoryError:
        raise MemoryError(f"while {path} was read") from None
    except Exception as error:
        message = " ".join(str(error).split())
        if isinstance(error, EOFError) or message == "pickle data was truncated":
            raise ValueError(f"{path}: cut short at byte {size}") from None
        raise ValueError(f"{path}: not a pickle of features, after {spool.rows} of them: {message}") from None
    finally:
        copyreg.clear_extension_cache()
    if rest := size - file.tell():
        raise ValueError(f"{path}: {rest} bytes after the pickle's end")
    if type(loaded) is not dict:
        raise ValueError(f"{path}: holds {SHORT.repr(loaded)}, not a dict of clips; nothing was run")
    return loaded, unpickler.foreign


def write_pickle(path: Path, items: Iterable[tuple[bytes, object]]) -> None:
    """Write a dict from its `items`, one at a time, in protocol 2: each pickled by itself, so that none is kept."""
    with open(path, "wb") as file:
        file.write(pickle.PROTO + b"\2" + pickle.EMPTY_DICT)
        for item in items:
            key, value = (pickle.dumps(part, 2)[2:-1] for part in item)  # without the opcodes of a whole file
            file.write(key + value + pickle.SETITEM)
        file.write(pickle.STOP)


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


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, spool: Spool):
        super().__init__(file, encoding="bytes")
        self.foreign: set[str] = set()
        known = KNOWN | {
            "numpy.core.multiarray._reconstruct": self._array,
            "numpy.core.numeric._frombuffer": self._filled,
        }
        self._spool, self._known = spool, {name: _Known(call) for name, call in known.items()}

    def _array(self, kind: object, *_) -> object:
        return kind() if isinstance(kind, type) else Array(self._spool)  # a type is Foreign

    def _filled(self, buffer: bytes | bytearray, dtype: _Dtype, shape: tuple, order: str) -> Array:
        made = Array(self._spool)
        made.__setstate__((1, shape, dtype, order, buffer))
        return made

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
        if full not in self._known:
            self._known[full] = _foreign(full)
            self.foreign.add(full)
        return self._known[full]


def _foreign(name: str) -> type[Foreign]:
    return type(ascii(name)[1:-1], (Foreign,), {"__slots__": (), "__module__": "builtins"})  # which is not written


class _Known:
    """What a pickle gets for a known name: it can be called and passed on, and not changed."""

    __slots__ = ("_call",)

    def __init__(self, call: Any):
        self._call = call

    def __call__(self, *given) -> object:
        return self._call(*given)

    def __setstate__(self, state) -> None:
        raise pickle.UnpicklingError("it changes what a name stands for, which is refused")


class _Dtype:
    """Stands for a numpy dtype: byte order and kind, such as '<f2'."""

    __slots__ = ("code",)

    def __init__(self, code: object, *_):
        self.code = _text(code)

    def __setstate__(self, state: tuple) -> None:
        self.code = _text(state[1]) + self.code.lstrip("<>|=")


def _scalar(dtype: _Dtype, payload: bytes) -> object:
    return _plain(dtype.code, (), payload, _foreign(f"numpy.{dtype.code}")())


def _plain(code: str, shape: tuple, payload: bytes | bytearray, otherwise: object) -> object:
    """Return numbers or text as Python has them: those of a short vector as a list, one alone by itself."""
    if PLAIN.fullmatch(code) and type(shape) is tuple and len(shape) <= 1:
        try:
            values = np.ndarray(shape, code, payload)
            return values.item() if values.size == 1 else values.tolist()
        except (TypeError, ValueError):  # a dtype that is none, a shape that does not fit, text that is none
            pass
    return otherwise


def _dict(*given) -> dict:
    return dict(given[0] if given and type(given[0]) is list else ())


def _encode(text: str, codec: bytes | str) -> bytes | bytearray:
    if _text(codec) != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {codec!r}")
    return text.encode("latin1") if len(text) < KEPT else bytearray(text, "latin1")  # see Spool.add


def _text(code: object) -> str:
    return code.decode("latin1") if isinstance(code, bytes) else str(code)


KNOWN: dict[str, Any] = {
    "numpy.ndarray": None,  # passed on, not called
    "numpy.memmap": None,
    "builtins.list": None,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "_codecs.encode": _encode,
    "builtins.bytes": b"".lower,  # of nothing: no size is taken
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
}
