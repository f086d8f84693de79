"""Tables and arrays that others wrote: what is in them, whatever they were written with, and what an import found."""

from __future__ import annotations

import re
import string
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from rich.progress import track

from mmlib.data.content import read_table
from mmlib.data.store import ClipStore
from mmlib.data.submission import NAME_RULE, bad_names, short
from mmlib.data.writer import SPLITS, map_array

TEXT, SCORES = ("clip", "identity", "split"), ("quality", "det")
REQUIRED = (*TEXT, "frame")
FLOAT = re.compile(r"-?\d+(\.\d+(e\+\d+)?|e\+\d+)", re.ASCII)  # a float as a table of text has it
NPY = "a .npy"
OFTEN = 15  # seconds from one line on the progress of an import to the next
MAGIC = {
    b"PK\3\4": "a zip archive, as np.savez and torch.save write it",
    b"\x1f\x8b\x08": "compressed by gzip",
    b"\x89HDF": "an HDF5 file",
    b"MATLAB": "a MATLAB file",
    b"PAR1": "a parquet table",
    b"\x93NUMPY": NPY,
}


@dataclass
class ImportReport:
    """What an import found: the store that it made, and all that was absent, damaged or left out.

    absent: files and columns.  damaged: frames of whose small numbers float16 keeps few digits; vanished: those of them
    of which it keeps nothing.  refused: by reason, how many records, and the first of them.  mended: by what was done,
    how many, and the first.  notes: what else was decided, such as the scale of scores.
    """

    store: ClipStore
    seconds: float
    absent: list[str]
    damaged: int
    vanished: int
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    mended: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def untrained(self) -> list[str]:
        """Identities that no train clip has."""
        trained = self.store.identity_of(self.store.select("train", labelled=True))
        return np.delete(self.store.identities, trained).tolist()

    def lines(self) -> list[str]:
        """Say it in sentences for a terminal."""
        lines, store, untrained = [], self.store, self.untrained
        for split in SPLITS:
            if clips := len(store.select(split)):
                faces, nameless = (len(store.select(split, **of)) for of in ({"having": "face"}, {"labelled": False}))
                lines.append(f"{split}: {clips} clips, {nameless} without an identity, {clips - faces} without a face")
        for name, modality in store.modalities.items():
            lines.append("{}: {} frames of {} dimensions".format(name, *modality.feature.shape))
        some = f": {', '.join(map(short, untrained[:5]))}{', ...' * (len(untrained) > 5)}" if untrained else ""
        lines.append(f"{len(store.identities)} identities, {len(untrained)} without a train clip{some}")
        known = [{*store.identity_of(store.select(split, labelled=True))} for split in ("train", "val")]
        if not set.intersection(*known):
            lines.append("nobody has a clip in train and another in val: there is nothing to score")
        if self.damaged:
            lines.append(f"too small for float16: {self.damaged} frames, {self.vanished} of them stored as zeros")
        if self.absent:
            lines.append(f"absent: {', '.join(self.absent)}")
        lines += [f"refused: {n} records, {rule}; first: {first}" for rule, (n, first) in self.refused.items()]
        lines += [f"mended: {n} {what}; first: {first}" for what, (n, first) in self.mended.items()]
        return [*lines, *self.notes, f"{self.seconds:.1f} s"]


def read_rows(path: Path, *, files: bool = False) -> pd.DataFrame:
    """Read the table of frames, clip, identity and split as text, frame and scores as numbers, and check it.

    Rows come back sorted by clip and frame; their index says which row of the table each was.  With `files` they have
    a column `path` too, and those of a clip are numbered as they come unless there is a column `frame`.
    """
    texts = (*TEXT, "path") if files else TEXT
    if path.suffix.lower() in (".parquet", ".pq"):
        table = read_table(path)
    else:
        # Only an empty cell is no identity: someone may be called NA or None.
        options = {"keep_default_na": False, "na_values": {name: [""] for name in (*REQUIRED, *texts, *SCORES)}}
        try:
            table = pd.read_csv(path, dtype=dict.fromkeys(texts, str), encoding="utf-8-sig", **options)
            # Of two columns of one name pandas renames the second.
            heads = pd.read_csv(path, dtype=str, encoding="utf-8-sig", header=None, nrows=1).iloc[0]
        except FileNotFoundError:
            raise ValueError(f"{path}: missing") from None
        except (ValueError, OSError) as error:  # of which the errors of pandas are kinds
            raise ValueError(f"{path}: not a readable table ({error})") from None
        _refuse_twice(heads.dropna(), path)
    return check_rows(table, path, files=files)


def check_rows(table: pd.DataFrame, path: Path, *, files: bool = False) -> pd.DataFrame:
    """Check a table that was read from `path` as `read_rows` says."""
    texts = (*TEXT, "path") if files else TEXT
    _refuse_twice(pd.Series(table.columns), path)
    if missing := [name for name in (texts if files else REQUIRED) if name not in table]:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; it has {short(', '.join(map(str, table.columns)), 400)}"
        )
    if not len(table):
        raise ValueError(f"{path}: no rows")
    if files and "frame" not in table:
        table["frame"] = table.groupby("clip").cumcount()
    table = table[[*texts, "frame", *(name for name in SCORES if name in table)]].reset_index(drop=True)

    def refuse(wrong: pd.Series, name: str, why: str = "") -> None:
        for row in np.flatnonzero(wrong):
            value = table[name][row]
            whose = "" if name == "clip" else f"clip {short(str(table['clip'][row]))}: "
            shown = repr(short(value)) if isinstance(value, str) else value
            raise ValueError(f"{path}, row {row + 1}: {whose}{name} is {shown}{why}")

    for name in texts:
        table[name] = _as_text(table[name], f"{path}: {name}")
    table["clip"] = table["clip"].str.removesuffix(".mp4")
    for name in texts:
        if name not in ("identity", "split"):
            refuse(table[name].isna(), name)
    for name in ("clip", "identity"):
        refuse(table[name].isin(bad_names(name, table[name].dropna().unique())), name, f"; {NAME_RULE}")
    refuse(~table["split"].isin(SPLITS), "split", f"; it must be one of {', '.join(SPLITS)}")
    for name in table.columns.drop([*texts]):
        numbers = pd.to_numeric(table[name], errors="coerce").astype(np.float64)
        refuse(~np.isfinite(numbers), name)
        if name == "frame":
            refuse((numbers < 0) | (numbers >= 2**31) | (numbers % 1 != 0), name)
            numbers = numbers.astype(np.int64)
        if name == "det":
            refuse((numbers < 0) | (numbers > 1), name, "; it must be in [0, 1]")
        table[name] = numbers
    table = table.sort_values(["clip", "frame"], kind="stable")
    _check_clips(table, path)
    return table


def _refuse_twice(names: pd.Series, path: Path) -> None:
    for name in names[names.duplicated()]:
        raise ValueError(f"{path}: two columns are called {short(str(name))}")


def _as_text(column: pd.Series, where: str) -> pd.Series:
    """Write cells as words, the same from every format: whole numbers, which a missing cell makes floats, as such."""
    codes, values = pd.factorize(column.astype(object))
    texts = (value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value) for value in values)
    words = [text.strip() for text in texts]
    floats = [float(word) for word in words if FLOAT.fullmatch(word)]
    if floats and all(word.isdecimal() or FLOAT.fullmatch(word) for word in words) and not any(np.mod(floats, 1)):
        if max(map(abs, floats)) >= 2**53:
            raise ValueError(f"{where} {max(floats):.0f} has lost digits as a float; write numbers that long as text")
        words = [word if word.isdecimal() else str(int(float(word))) for word in words]
    return pd.Series(np.array([*(word or None for word in words), None], object)[codes], column.index)


def _check_clips(rows: pd.DataFrame, path: Path) -> None:
    """Refuse a clip with two identities or splits, and a frame that a clip has twice; `rows` are sorted."""
    clip = rows["clip"].to_numpy()
    for name in ("identity", "split", "frame"):
        values = (rows[name].fillna("") if name == "identity" else rows[name]).to_numpy()
        for at in np.flatnonzero((clip[1:] == clip[:-1]) & ((values[1:] == values[:-1]) == (name == "frame"))):
            found = " and ".join(short(str(rows[name].iloc[row])) for row in (at, at + 1))
            raise ValueError(f"{path}, row {rows.index[at + 1] + 1}: clip {short(clip[at])} has {name} {found}")


def open_array(path: Path, width: int | None = None) -> np.ndarray:
    """Map the floats (F, D) of a `.npy`, in either order of its axes, or of raw little-endian float32 of that width."""
    if not path.exists():
        raise ValueError(f"{path}: missing")
    kind = _kind(path)
    if kind not in ("", NPY):
        how = "load it with what wrote it and save the array alone, by np.save('features.npy', array)"
        raise ValueError(f"{path}: {kind}, not one array of numbers; {how}")
    if kind == NPY or path.suffix.lower() == ".npy":
        features = map_array(path)
        if (
            features.ndim != 2
            or features.dtype.kind != "f"
            or width not in (None, features.shape[1])
            or not features.size
        ):
            expected = "(F, D)" if width is None else f"(F, {width})"
            raise ValueError(f"{path}: {features.dtype} {features.shape}, expected floats {expected}")
        return features
    if width is None or width < 1:
        raise ValueError(f"{path}: raw numbers, of which --width says how many a row has, 1 or more; got {width}")
    size = path.stat().st_size
    if not size or size % (4 * width):
        raise ValueError(f"{path}: {size} bytes are not whole rows of {width} float32")
    return np.memmap(path, "<f4", "r").reshape(-1, width)


def _kind(path: Path) -> str:
    """Say what a file is by its first and last bytes, `""` where they might be raw numbers."""
    with open(path, "rb") as file:
        head, size = file.read(1024), file.seek(0, 2)
        file.seek(max(0, size - 1))
        last = file.read()
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and last == b".":
        return "a pickle"
    if head and not head.translate(None, string.printable.encode()):
        return "text"
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), "")


T = TypeVar("T")


def watch(
    items: Iterable[T],
    what: str,
    sizes: list[int],
    *,
    progress: bool = False,
    say: Callable[[str], object] | None = None,
) -> Iterator[T]:
    """Yield items, each of which is so many (`sizes`) pictures or files, and tell how far that is.

    progress: show a bar.  say: is called without one, every `OFTEN` seconds, with how many are done, how many that is
    a second, and how long the rest will take.
    """
    began = said = time.perf_counter()
    done, total = 0, sum(sizes)
    for item, size in zip(track(items, what, len(sizes), transient=True, disable=not progress), sizes):
        yield item
        done, now = done + size, time.perf_counter()
        if say and not progress and now - said >= OFTEN:
            rate, said = done / (now - began), now
            say(f"{what}: {done} of {total}, {rate:.1f} a second, about {(total - done) / rate:.0f} s left")


def to_half(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round features (n, D) to float16; return them, infinite where they are too large, and what each has lost, (n,).

    The loss is the largest error over the largest number: 1 where nothing is left, NaN where nothing was.
    """
    if block.dtype == np.float16:
        return block, np.zeros(len(block))
    with np.errstate(over="ignore"):
        half = block.astype(np.float16)
    peak = np.maximum(block.max(1, initial=0), -block.min(1, initial=0))
    loss = np.where(peak > 0, 0.0, np.nan)
    small = np.flatnonzero((peak > 0) & (peak < 2.0**-14))  # only below this it can lose more than 2 ** -11
    loss[small] = np.abs(block[small] - half[small]).max(1) / peak[small]
    return half, loss


def count_lost(loss: np.ndarray, path: Path) -> tuple[int, int]:
    """Count the features (F,) that `to_half` has damaged, and those of which nothing is left.

    Where most are damaged the array is refused, for a model would learn from rounding errors.
    """
    damaged = loss > 2.0**-8
    if 2 * damaged.sum() > (~np.isnan(loss)).sum():
        raise ValueError(
            f"{path}: too small for float16, as which a store keeps features: in {damaged.sum()} of {len(loss)} rows "
            "digits are lost; multiply the array by a constant that brings its numbers near 1"
        )
    return int(damaged.sum()), int((loss == 1).sum())
