"""Read pickled dicts of arrays safely, the arrays as a stream; and write such dicts.

A pickle is a program: `pickle.load` runs whatever it names. Here a name leads to a stand-in, made for one load, that
runs nothing and cannot be changed. Those of what arrays and plain containers need move bytes; any other is `Foreign`
and swallows what it is given, so that the file is read to its end and the record that holds it can be named.
A dict forgets what a key had before; the one that such a file is does not: see `Clips`.
"""

import copyreg
import gc
import pickle
import pickletools
import re
import reprlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any

import numpy as np

BLOCK = 2**20  # bytes read or written at once
KEPT = 256  # bytes of an array that is no feature
HEAD = 512  # bytes among which the dict of clips begins; in what picklers write it is the first of all
SHOWN = 200  # characters of a value in a message
# Types that a defaultdict may make: they say nothing of what it holds. They are stand-ins like all others.
KINDS = "bool", "complex", "dict", "float", "frozenset", "int", "long", "object", "set", "str", "tuple", "unicode"
FACTORIES = {f"builtins.{kind}" for kind in KINDS}
PLAIN = re.compile(r"[<>|=]?[biufcSU]\d{1,3}")  # dtypes of numbers and text
CLIPS, MAKE_CLIPS = "mmlib.Clips", pickle.GLOBAL + b"mmlib\nClips\n" + pickle.EMPTY_TUPLE + pickle.REDUCE


class _Short(reprlib.Repr):
    """Show any value in one short text, the same in every run."""

    def __init__(self):
        super().__init__()
        self.maxother, self.maxlevel = 60, 4

    def repr(self, x: object) -> str:
        text = super().repr(x)
        return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"  # too long for repr

    def repr_bytearray(self, x: bytearray, level: int) -> str:
        return self.repr1(bytes(x), level)

    def repr_Clips(self, x: dict, level: int) -> str:
        return self.repr_dict(x, level)


SHORT = _Short()


class Array(int):
    """What stands for an array in the loaded containers: its number in the spool, in the fewest bytes there are."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "an array"


class Foreign:
    """What a pickle gets for a name that is not known: a class that swallows whatever it is given, but for arrays."""

    __slots__ = ("held",)
    held: list[Array]

    def __new__(cls, *given, **named):
        made = super().__new__(cls)
        made.held = [*_arrays((given, named))]
        return made

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __call__(self, *given, **named) -> "Foreign":  # protocol 2 fetches a method by getattr
        self._swallow(given, named)
        return self

    def _swallow(self, *given) -> None:
        if isinstance(self, Foreign):  # not where the class itself is given something
            self.held += _arrays(given)

    __setstate__ = __setitem__ = append = extend = add = _swallow  # all that an unpickler calls


class Clips(dict):
    """A dict that keeps what a key had before it is set again: `repeated`, of each such time the key and the value."""

    __slots__ = ("repeated",)

    def __init__(self, items: Iterable[tuple] = ()):
        super().__init__()
        self.repeated: list[tuple[object, object]] = []
        for key, value in items:
            self[key] = value

    def __setitem__(self, key: object, value: object) -> None:
        if key in self:
            self.repeated.append((key, self.pop(key)))
        super().__setitem__(key, value)

    def __setstate__(self, state) -> None:
        raise pickle.UnpicklingError("it changes what a dict is, which is refused")


def _arrays(value: object) -> Iterator[Array]:
    """Yield the arrays within a value, however deep."""
    left, seen = [value], set()
    while left:
        if isinstance(value := left.pop(), Array):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                left += [*value, *value.values(), *getattr(value, "repeated", ())]
            elif isinstance(value, (list, tuple, set, frozenset)):
                left += value
            elif isinstance(value, Foreign):
                left += value.held


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
            self._others.append((code, shape, payload if type(payload) is list else payload[:KEPT], size))
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

    def rows_in(self, value: object) -> set[int]:
        """Return the rows of all features within a value, however deep."""
        rows: set[int] = set()
        left, seen = [*_arrays(value)], set()
        while left:
            if (number := left.pop()) not in seen:
                seen.add(number)
                if (place := self._places[number]) >= 0:
                    rows.add(place)
                elif type(held := self._others[-1 - place][2]) is list:
                    left += _arrays(held)
        return rows

    def unpacked(self, value: object) -> object:
        """Return an array of objects as a list of them, one with two axes as a list of its rows; else the value."""
        if isinstance(value, Array) and (place := self._places[value]) < 0:
            _, shape, held, size = self._others[-1 - place]
            if type(held) is list and type(shape) is tuple:
                if shape == (size,):
                    return held
                if len(shape) == 2 and type(width := shape[1]) is int and width > 0 and shape[0] * width == size:
                    return [held[at : at + width] for at in range(0, size, width)]
        return value

    def show(self, value: object) -> str:
        """Say what a value is, of an array its dtype and shape."""
        if not isinstance(value, Array):
            return SHORT.repr(value)
        if (place := self._places[value]) >= 0:
            return "a feature"
        code, shape, held, size = self._others[-1 - place]
        return f"{code} {shape} of {size} {'objects' if type(held) is list else 'bytes'}"

    def describe(self, value: object) -> str:
        """Say what a value is that is no feature, or not a finite one."""
        if not isinstance(value, Array) or (place := self._places[value]) < 0:
            return self.show(value)
        feature = self.read(np.array([place]))[0]
        bad = np.argmin(np.abs(feature) < np.float32(65520))  # from there on float16 has infinity
        return f"{feature[bad]} at position {bad}"


def _exchange_dict(head: bytes) -> bytes:
    """Exchange the first dict that the beginning of a pickle makes for a `Clips`."""
    frame, before = None, None
    try:
        for opcode, _, at in pickletools.genops(head):
            if opcode.name == "FRAME":
                frame = at + 1
            empty = opcode.name == "EMPTY_DICT"
            if empty or (opcode.name == "DICT" and before == "MARK"):  # as protocol 0 has it
                start, longer = (at, len(MAKE_CLIPS) - 1) if empty else (at - 1, len(MAKE_CLIPS) - 2)
                if frame is not None:
                    length = int.from_bytes(head[frame : frame + 8], "little") + longer
                    head = head[:frame] + (length % 2**64).to_bytes(8, "little") + head[frame + 8 :]
                return head[:start] + MAKE_CLIPS + head[at + 1 :]
            before = opcode.name
    except Exception:  # no pickle, or nothing of the kind so far; which it is will be seen where it is loaded
        pass
    return head


class _Begun(RawIOBase):
    """A file in whose beginning the dict is exchanged."""

    def __init__(self, raw: Any):
        self._raw, self._head = raw, _exchange_dict(raw.read(HEAD))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if not self._head:
            return self._raw.readinto(buffer)
        part, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def tell(self) -> int:
        return self._raw.tell() - len(self._head)


def read_pickle(path: Path, raw: Any, spool: Spool) -> tuple[Clips, set[str]]:
    """Load the dict in `path`, opened as `raw`, its arrays going to `spool`, and the foreign names that it holds.

    Memory is that of the containers for a file of Python 2 or of `write_pickle`. Other pickles of Python 3 have the
    bytes of all arrays remembered to the end, as in `pickle.load`, unless they are of protocol 5.
    """
    size = path.stat().st_size
    copyreg.clear_extension_cache()  # of live objects, which come without find_class
    try:
        file = BufferedReader(_Begun(raw), BLOCK)
        unpickler = _Unpickler(file, spool)
        loaded = unpickler.load()
    except OSError:
        raise
    except Exception as error:
        for cause in _causes(error):
            if not isinstance(cause, Exception):  # an interrupt, of which C code may say that a call of it went wrong
                raise cause from None
            if isinstance(cause, MemoryError):
                raise MemoryError(f"while {path} was read") from None
        message = " ".join(str(error).split())[:SHOWN]
        if isinstance(error, EOFError) or message == "pickle data was truncated":
            raise ValueError(f"{path}: cut short at byte {size}") from None
        raise ValueError(f"{path}: not a pickle of features, after {spool.rows} of them: {message}") from None
    finally:
        copyreg.clear_extension_cache()
    if rest := size - file.tell():
        raise ValueError(f"{path}: {rest} bytes after the pickle's end")
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds {spool.show(loaded)}, not a dict of clips; nothing was run")
    return loaded if isinstance(loaded, Clips) else Clips(loaded.items()), unpickler.foreign


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


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

    __slots__ = ("_call", "_name")

    def __init__(self, name: str, call: Any):
        self._name, self._call = name, call

    def __call__(self, *given) -> object:
        return self._call(*given)

    def __repr__(self) -> str:
        return f"<{self._name}>"

    def __setstate__(self, state) -> None:
        raise pickle.UnpicklingError("it changes what a name stands for, which is refused")


class _Dtype:
    """Stands for a numpy dtype: byte order and kind, such as '<f2'."""

    __slots__ = ("code",)

    def __init__(self, code: object, *_):
        self.code = _text(code)

    def __repr__(self) -> str:
        return f"<dtype {self.code}>"

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
        "collections.deque": _list,
        CLIPS: Clips,
    }
    return {name: _Known(name, call) for name, call in known.items()}


def _plain(code: str, shape: tuple, payload: bytes | bytearray | list, otherwise: object) -> object:
    """Return numbers or text as Python has them: those of a short vector or column as a list, one alone by itself."""
    if type(shape) is tuple and (type(payload) is list or PLAIN.fullmatch(code)):
        try:
            if {*shape[1:]} - {1}:
                return otherwise
            if type(payload) is list:  # of an array of objects
                return payload[0] if len(payload) == 1 else payload
            values = np.ndarray(shape[:1], code, payload)
            values = values.astype(np.float64) if values.dtype.kind == "f" else values  # long ones have no Python float
            return values.item() if values.size == 1 else values.tolist()
        except (TypeError, ValueError):  # a dtype that is none, a shape that does not fit, text that is none
            pass
    return otherwise


def _dict(*given) -> Clips:
    return Clips(given[0] if given and type(given[0]) is list else ())


def _list(*given) -> list:
    return given[0] if given and type(given[0]) is list else []


def _encode(text: str, codec: bytes | str) -> bytes | bytearray:
    if _text(codec) != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {codec!r}")
    return text.encode("latin1") if len(text) < KEPT else bytearray(text, "latin1")  # see Spool.add


def _text(code: object) -> str:
    return code.decode("latin1") if isinstance(code, bytes) else str(code)
