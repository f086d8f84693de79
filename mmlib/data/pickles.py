"""Read pickled dicts of arrays safely, the arrays as a stream; and write such dicts.

A pickle is a program: `pickle.load` runs whatever it names. Here a name leads to a stand-in, made for one load, that
runs nothing and cannot be changed. Those of what arrays and plain containers need move bytes; any other is `Foreign`
and swallows what it is given, so that the file is read to its end and the record that holds it can be named.
"""

import copyreg
import gc
import pickle
import re
import reprlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np

BLOCK = 2**20  # bytes read or written at once
KEPT = 256  # bytes of an array that is no feature
SHOWN = 200  # characters of a value in a message
# Types that a defaultdict may make: they say nothing of what it holds. They are stand-ins like all others.
KINDS = "bool", "complex", "dict", "float", "frozenset", "int", "long", "object", "set", "str", "tuple", "unicode"
FACTORIES = {f"builtins.{kind}" for kind in KINDS}
PLAIN = re.compile(r"[<>|=]?[biufcSU]\d{1,3}")  # dtypes of numbers and text


class _Short(reprlib.Repr):
    """Show any value in one short text."""

    def repr(self, x: object) -> str:
        text = super().repr(x)
        return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"  # too long for repr


SHORT = _Short()
SHORT.maxother = 60


class Array(int):
    """What stands for an array in the loaded containers: its number in the spool, in the fewest bytes there are."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "an array"


class Foreign:
    """What a pickle gets for a name that is not known: a class that swallows whatever it is given."""

    __slots__ = ()

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __call__(self, *_, **__) -> "Foreign":  # protocol 2 fetches a method by getattr
        return self

    @classmethod
    def _swallow(cls, *_) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _swallow  # all that an unpickler calls


class Spool:
    """Equally long features in `file`, each known by its row, and what there is of other arrays."""

    def __init__(self, file: IO[bytes], dtype: str, width: int):
        self.dtype, self.width, self.rows, self._file = np.dtype(dtype), width, 0, file
        self._places = array("i")  # of each array: its row, or if it is no feature its place among the others from -1
        self._others: list[tuple[str, tuple, bytes | bytearray | list, int]] = [("nothing", (), b"", 0)]

    def number(self) -> int:
        """Return a number for an array whose content is still to come."""
        self._places.append(-1)
        return len(self._places) - 1

    def add(self, number: int, code: str, shape: tuple, payload: bytes | bytearray | list) -> None:
        """Keep one array: a feature on disk, of another dtype or shape a description and its first bytes or objects."""
        size = len(payload)
        if code[1:] != self.dtype.str[1:] or shape != (self.width,) or size != self.width * self.dtype.itemsize:
            self._others.append((code, shape, payload[:KEPT], size))
            self._places[number] = -len(self._others)
        else:
            content = payload if code == self.dtype.str else np.frombuffer(payload, code).astype(self.dtype).data
            self._file.write(content)
            self._places[number] = self.rows
            self.rows += 1
        if type(payload) is bytearray:
            del payload[:]  # an unpickler keeps it to the end; clear would not give its memory back

    def rows_of(self, values: Sequence) -> np.ndarray:
        """Return the rows of features (n,), negative where a value is none."""
        if not all(issubclass(kind, Array) for kind in set(map(type, values))):
            return np.full(len(values), -1)
        return np.frombuffer(self._places, np.int32)[np.fromiter(values, np.int64, len(values))]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the features at `rows` (n,), for a negative row some other."""
        if not len(rows) or not self.rows:
            return np.empty((0, self.width), self.dtype)
        # mapped anew each time, so that pages once read do not stay resident
        return np.memmap(self._file, self.dtype, "r", shape=(self.rows, self.width))[np.maximum(rows, 0)]

    def values(self, values: Sequence) -> Sequence:
        """Put for each short array the list, or if it has one element the number or text, that it holds."""
        if not any(issubclass(kind, Array) for kind in set(map(type, values))):
            return values
        return [self._value(value) if isinstance(value, Array) else value for value in values]

    def _value(self, number: Array) -> object:
        place = self._places[number]
        return number if place >= 0 else _plain(*self._others[-1 - place][:3], otherwise=number)

    def describe(self, value: object) -> str:
        """Say what a value is that is no feature, or not a finite one."""
        if not isinstance(value, Array):
            return SHORT.repr(value)
        if (place := self._places[value]) < 0:
            code, shape, _, size = self._others[-1 - place]
            return f"{code} {shape} of {size} bytes"
        feature = self.read(np.array([place]))[0]
        bad = np.argmin(np.abs(feature) < np.float32(65520))  # from there on float16 has infinity
        return f"{feature[bad]} at position {bad}"


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
        if isinstance(error.__cause__, KeyboardInterrupt | SystemExit):  # C code says that a call of it went wrong
            raise error.__cause__ from None
        message = " ".join(str(error).split())[:SHOWN]
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
        self._known = _stand_ins(spool)

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
        if full not in self._known:
            self._known[full] = _foreign(full)
            self.foreign |= {full} - FACTORIES
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


def _stand_ins(spool: Spool) -> dict[str, object]:
    """Make what stands for the known names; arrays go to `spool` when their content arrives."""

    class SpooledArray(Array):
        __slots__ = ()

        def __setstate__(self, state: tuple) -> None:
            _, shape, dtype, _, payload = state
            spool.add(self, dtype.code, shape, payload)

    def reconstruct(kind: object, *_) -> object:
        if isinstance(kind, type):  # then it is Foreign
            return kind()
        return SpooledArray(spool.number())

    def from_buffer(buffer: bytes | bytearray, dtype: _Dtype, shape: tuple, order: str) -> Array:
        number = SpooledArray(spool.number())
        spool.add(number, dtype.code, shape, buffer)
        return number

    def scalar(dtype: _Dtype, payload: bytes) -> object:
        return _plain(dtype.code, (), payload, otherwise=_foreign(f"numpy.{dtype.code}")())

    known: dict[str, Any] = {
        "numpy.ndarray": None,  # passed on, not called
        "numpy.memmap": None,
        "builtins.list": None,
        "numpy.dtype": _Dtype,
        "numpy.core.multiarray._reconstruct": reconstruct,
        "numpy.core.multiarray.scalar": scalar,
        "numpy.core.numeric._frombuffer": from_buffer,
        "_codecs.encode": _encode,
        "builtins.bytes": b"".lower,  # of nothing: no size is taken
        "collections.OrderedDict": _dict,
        "collections.defaultdict": _dict,
    }
    return {name: _Known(call) for name, call in known.items()}


def _plain(code: str, shape: tuple, payload: bytes | bytearray | list, otherwise: object) -> object:
    """Return numbers or text as Python has them: those of a short vector or column as a list, one alone by itself."""
    if type(payload) is list:  # of an array of objects
        return payload[0] if len(payload) == 1 else payload
    if PLAIN.fullmatch(code) and type(shape) is tuple:
        try:
            if {*shape[1:]} - {1}:
                return otherwise
            values = np.ndarray(shape[:1], code, payload)
            values = values.astype(np.float64) if values.dtype.kind == "f" else values  # long ones have no Python float
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
