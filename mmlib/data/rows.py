"""What one official pickle says about each clip, checked and turned into columns.

Every check runs on thousands of records at once. Only where it fails are the clips, then the records,
checked one by one to find which it was: the same functions, on lists of one.
"""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from mmlib.data.pickles import EMPTY, Feature, Spool

CHUNK = 2**14  # records checked at once


@dataclass(frozen=True)
class Layout:
    """Fields of a record in their order, and the dtype and width of its feature."""

    fields: tuple[str, ...]
    dtype: str = "<f2"
    width: int = 512


LAYOUTS = {
    "face": Layout(("frame", "box", "det", "quality", "feature")),
    "head": Layout(("frame", "box", "det", "feature")),
    "body": Layout(("frame", "box", "feature")),
    "audio": Layout(("feature",)),  # a clip has one array, not a list of records
    "scene": Layout(("frame", "feature"), "<f4", 2048),  # not official: image index and feature
}


class BadRecord(ValueError):
    """A record that cannot be: `reason` names the kind, the message adds the value."""

    def __init__(self, reason: str, value: str):
        super().__init__(f"{reason}: {value}")
        self.reason = reason


@dataclass
class Records:
    """The records of one pickle: `count` (N,) of each clip in `clips`, then per record (F,) its `columns`.

    `columns["row"]` is the place of the feature in the spool. `refused` holds, for each reason, how many
    records were dropped and the first of them.
    """

    clips: list[str]
    count: np.ndarray
    columns: dict[str, np.ndarray]
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)


def gather_records(loaded: dict, modality: str, spool: Spool, path: Path, skip_bad_records: bool) -> Records:
    """Empty `loaded`, as `read_pickle` returned it, into columns.

    The first bad record raises ValueError with file, clip, frame and value, or with `skip_bad_records` is
    counted and dropped. Checked are: frames integers that never fall within a clip; 0 <= x1 <= x2 and
    0 <= y1 <= y2; scores finite Python floats (integers are refused, as by the published loaders);
    features finite, of the official dtype and width.
    """
    layout = LAYOUTS[modality]
    clips = _clip_names(loaded, path)
    counts, parts, refused = [], [], {}
    used = np.zeros(spool.rows, bool)
    for names, values in _chunks(loaded, clips, modality):
        try:
            lists = [_as_list(value) for value in values]
            count = [len(records) for records in lists]
            columns = _parse(list(chain.from_iterable(lists)), layout, spool)
            _check_order(columns, count)
        except BadRecord:
            count, columns = _parse_singly(names, values, layout, spool, path, skip_bad_records, refused)
            rows = spool.places[list(_features(values))]
            used[rows[rows >= 0]] = True
        used[columns["row"]] = True
        counts.extend(count)
        parts.append(columns)
    columns = {
        name: np.concatenate([part[name] for part in parts] or [np.zeros(0, np.int64)])
        for name in ("row", *layout.fields[:-1])
    }
    count = np.array(counts, np.int64)
    if not used.all():
        clip = _repeated_clip(clips, count, columns["row"], used)
        raise ValueError(f"{path}: {(~used).sum()} features belong to no clip, because a clip is named twice: {clip}")
    return Records(clips, count, columns, refused)


def _clip_names(loaded: dict, path: Path) -> list[str]:
    names = []
    for key in loaded:
        if type(key) not in (bytes, str):
            raise ValueError(f"{path}: clip name {key!r} is a {type(key).__name__}")
        try:
            name = key if type(key) is str else key.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: clip name {key!r} is not text") from None
        if name.split() != [name]:  # the text files separate clips by spaces
            raise ValueError(f"{path}: clip name {name!r} is empty or has spaces")
        names.append(name.removesuffix(".mp4"))
    if len(set(names)) < len(names):
        seen = set()
        repeated = next(name for name in names if name in seen or seen.add(name))
        raise ValueError(f"{path}: clip {repeated} is named twice, with and without .mp4")
    return names


def _chunks(loaded: dict, clips: list[str], modality: str) -> Iterator[tuple[list[str], list]]:
    names, values, records = [], [], 0
    keys = list(loaded)[::-1]
    for name in clips:
        value = loaded.pop(keys.pop())  # so that memory falls as columns grow, with nothing left that holds it
        names.append(name)
        values.append([(value,)] if modality == "audio" else value)
        records += len(values[-1]) if type(value) in (list, tuple) else 1
        if records >= CHUNK:
            yield names, values
            names, values, records = [], [], 0
    if names:
        yield names, values


def _parse_singly(
    names: list[str], values: list, layout: Layout, spool: Spool, path: Path, skip_bad_records: bool, refused: dict
) -> tuple[list[int], dict[str, np.ndarray]]:
    """Do what `gather_records` does at once, record by record."""
    counts, kept = [], [_parse([], layout, spool)]

    def refuse(error: BadRecord, clip: str, where: str) -> None:
        message = f"{path}: clip {clip}{where}: {error}"
        if not skip_bad_records:
            raise ValueError(message) from None
        number, first = refused.get(error.reason, (0, message))
        refused[error.reason] = (number + 1, first)

    for clip, value in zip(names, values):
        counts.append(0)
        last = None
        try:
            records = _as_list(value)
        except BadRecord as error:
            refuse(error, clip, "")
            continue
        for number, record in enumerate(records, 1):
            try:
                columns = _parse([record], layout, spool)
                if "frame" in columns:
                    if last is not None and columns["frame"][0] < last:
                        raise BadRecord("frames out of order", f"{columns['frame'][0]} after {last}")
                    last = columns["frame"][0]
            except BadRecord as error:
                has_frame = "frame" in layout.fields and type(record) in (list, tuple) and record
                frame = f" (frame {reprlib.repr(record[0])})" if has_frame else ""
                refuse(error, clip, f", record {number}{frame}")
            else:
                counts[-1] += 1
                kept.append(columns)
    return counts, {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}


def _as_list(value: object) -> list:
    if type(value) not in (list, tuple):
        raise BadRecord("clip without a list of records", f"its value is a {type(value).__name__}")
    return value


def _parse(records: list, layout: Layout, spool: Spool) -> dict[str, np.ndarray]:
    """Turn `records` (n) into columns (n, ...), or raise BadRecord for one of them."""
    width = len(layout.fields)
    for record in records:
        if type(record) not in (list, tuple) or len(record) != width:
            size = f" of {len(record)}" if type(record) in (list, tuple) else ""
            raise BadRecord(f"record without its {width} fields", f"a {type(record).__name__}{size}")
    values = dict(zip(layout.fields, zip(*records) if records else [()] * width))
    columns = {"row": _parse_features(values["feature"], spool)}
    if "frame" in values:
        columns["frame"] = _parse_frames(values["frame"])
    if "box" in values:
        columns["box"] = _parse_boxes(values["box"])
    for name in ("det", "quality"):
        if name in values:
            columns[name] = _parse_scores(name, values[name])
    return columns


def _parse_features(values: tuple, spool: Spool) -> np.ndarray:
    if not all(issubclass(kind, Feature) for kind in set(map(type, values))):
        other = next(value for value in values if not isinstance(value, Feature))
        raise BadRecord("feature is not an array", reprlib.repr(other))
    rows = spool.places[np.fromiter(values, np.int64, len(values))]
    if (rows == EMPTY).any():
        raise BadRecord("feature is not an array", "one without content")
    if (rows < 0).any():
        raise BadRecord("feature of another dtype or width", spool.flaws[-1 - rows[rows < 0][0]])
    if spool.nonfinite[rows].any():
        feature = spool.read(rows[spool.nonfinite[rows]][:1])[0]
        place = np.flatnonzero(~np.isfinite(feature))[0]
        raise BadRecord("feature not finite in float16", f"{feature[place]} at position {place}")
    return rows


def _parse_frames(values: tuple) -> np.ndarray:
    try:
        if set(map(type, values)) <= {bytes, str, int}:
            frames = np.fromiter(map(int, values), np.int64, len(values))
            if frames.min(initial=0) >= 0 and frames.max(initial=0) < 2**31:
                return frames
    except (ValueError, OverflowError):
        pass
    raise BadRecord("frame is not a number from 0", reprlib.repr(values[0]))


def _parse_boxes(values: tuple) -> np.ndarray:
    boxes = np.zeros((0, 4))
    if (
        values
        and set(map(type, values)) <= {list, tuple}
        and set(map(type, chain.from_iterable(values))) <= {float, int}
        and set(map(len, values)) == {4}
    ):
        try:
            boxes = np.array(values, np.float64)
        except OverflowError:  # an integer beyond any float
            pass
    x1, y1, x2, y2 = boxes.T
    with np.errstate(invalid="ignore"):
        right = (0 <= x1) & (x1 <= x2) & (x2 < np.inf) & (0 <= y1) & (y1 <= y2) & (y2 < np.inf)
    if len(boxes) < len(values) or not right.all():
        raise BadRecord("box is not 0 <= x1 <= x2, 0 <= y1 <= y2", reprlib.repr(values[0]))
    return boxes


def _parse_scores(name: str, values: tuple) -> np.ndarray:
    if set(map(type, values)) <= {float}:
        scores = np.array(values, np.float64)
        if np.isfinite(scores).all():
            return scores
    raise BadRecord(f"{name} score is not a finite float", reprlib.repr(values[0]))


def _check_order(columns: dict[str, np.ndarray], count: list[int]) -> None:
    if "frame" in columns:
        falls = np.diff(columns["frame"]) < 0
        ends = np.cumsum(count)[:-1] - 1  # the step from one clip to the next is free
        falls[ends[(ends >= 0) & (ends < len(falls))]] = False
        if falls.any():
            raise BadRecord("frames out of order", "")


def _features(value: object, depth: int = 4) -> Iterator[Feature]:
    if isinstance(value, Feature):
        yield value
    elif type(value) in (list, tuple) and depth:  # a list may hold itself
        for item in value:
            yield from _features(item, depth - 1)


def _repeated_clip(clips: list[str], count: np.ndarray, rows: np.ndarray, used: np.ndarray) -> str:
    # a dict keeps the first place of a repeated key with the last value, so its rows stand too high there;
    # if nothing stood between the two, the clip is the one that owns the row after the lost ones
    owner = np.repeat(np.arange(len(clips)), count)
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    falls = np.flatnonzero(np.diff(rows[first]) < 0)
    after = np.flatnonzero(rows > np.argmin(used))
    if falls.size:
        return clips[owner[first[falls[0]]]]
    return clips[owner[after[np.argmin(rows[after])]]] if after.size else "one of the last"
