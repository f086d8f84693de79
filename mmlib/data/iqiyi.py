"""The challenge's own files to a ClipStore and back.

A folder holds `feat/<modality>_<split>.pickle`, `train_gt.txt` and `val_gt.txt`. The pickles are dicts from clip to
records, written by Python 2; `LAYOUTS` gives the records of each modality. Scene features are no official ones:
those that the released code of 2019 has written are found under its name, see `find_pickle`. Clips may be named with
`.mp4` or without in any of these files; a store has the names without.
"""

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import numpy as np
import pandas as pd
from rich.progress import Progress

from mmlib.data.foreign import ImportReport, count_lost, to_half
from mmlib.data.pickles import SHORT, Array, Spool, collection_paused, read_pickle, write_pickle
from mmlib.data.store import SPLITS, ClipStore, Modality
from mmlib.data.submission import (
    check_names,
    read_train_truth,
    read_val_truth,
    short,
    write_train_truth,
    write_val_truth,
)
from mmlib.data.writer import StoreWriter, nonfinite_rows, partial_folder

ORIGIN = "origin.json"  # beside exported files: whether they are simulated, and where they come from
DISORDER = "frames out of order"
UNSEEN, LOST = -1, -2  # for the clip of a feature: it was in no record so far; in one that was refused
CHUNK, BLOCK = 2**8, 2**14  # clips, and of their records how many, that are checked and stored at once


@dataclass(frozen=True)
class Layout:
    """Fields of a record in their order, and the dtype and width of its feature."""

    fields: tuple[str, ...]
    dtype: str = "float16"
    width: int = 512


LAYOUTS = {
    "face": Layout(("frame", "box", "det", "quality", "feature")),
    "head": Layout(("frame", "box", "det", "feature")),
    "body": Layout(("frame", "box", "feature")),
    "audio": Layout(("feature",)),  # a clip has one array, not a list of records
    "scene": Layout(("frame", "feature"), "float32", 2048),  # not official: image index and feature
}


class BadRecord(ValueError):
    """A record that cannot be: the rule that it breaks, and what does."""


def pickle_path(folder: Path, modality: str, split: str) -> Path:
    """Return where the challenge keeps a modality of a split."""
    version = "_v2" if modality == "face" and split != "test" else ""
    return Path(folder) / "feat" / f"{modality}_{split}{version}.pickle"


def find_pickle(folder: Path, modality: str, split: str) -> Path:
    """Return where a modality of a split is, in the challenge's place or, of scenes, in those of the released code.

    That writes `scene_infos_<split>.pickle` to a folder of the user's choice, `scene_feat` unless told otherwise; here
    it may lie in `feat`, in `scene_feat` or beside them. Of several, none is meant: ValueError.
    """
    path = pickle_path(folder, modality, split)
    places = ("feat", "scene_feat", "") if modality == "scene" else ()
    found = [at for at in (path, *(folder / place / f"scene_infos_{split}.pickle" for place in places)) if at.exists()]
    if len(found) > 1:
        raise ValueError(f"{found[1]}: {found[0].relative_to(folder)} has {modality} features of {split} too; keep one")
    return found[0] if found else path


def import_folder(
    folder: Path, store: Path, *, skip_bad_records: bool = False, overwrite: bool = False, progress: bool = True
) -> ImportReport:
    """Turn the challenge's files into a store.

    Faces of train and val and both ground truths must be there; all else is taken where present. Clips of a split are
    those of any of its pickles; a pickle without a clip counts as absent. Identities are the lines of `val_gt.txt` in
    order, then those that only `train_gt.txt` names. A bad record raises ValueError, or with `skip_bad_records` is
    counted and left out; frames out of order are then sorted, and of a clip that is named twice the last is kept. A
    score that is NaN, which published loaders let pass and which would make all of its clip NaN, is unknown: it is
    stored as 0, so that the frame has no weight beside others, comes last among them, and lowers the mean of its clip;
    it is counted.
    """
    began = time.perf_counter()
    truth, identities = _read_truth(folder)
    absent = [] if (folder / "img").is_dir() else ["img/"]
    lost, refused, mended = np.zeros(2, int), {}, {}
    found: dict[Path, pd.DataFrame] = {}
    with (
        ClipStore.create(store, overwrite=overwrite, **_read_origin(folder)) as writer,
        Progress(disable=not progress, transient=True) as bar,
        collection_paused(),
    ):
        for modality, split in product(LAYOUTS, SPLITS):
            path = find_pickle(folder, modality, split)
            if path.exists():
                reader = _Reader(path, modality, writer, mended, refused if skip_bad_records else None)
                spans = reader.stream(bar).assign(modality=modality, split=split)
                lost += count_lost(np.concatenate(reader.losses), path)
                if len(spans):
                    found[path] = spans
                else:
                    absent.append(f"{path.relative_to(folder).as_posix()} (no clips)")
            elif modality == "face" and split != "test":
                raise ValueError(f"{path}: missing")
            else:
                absent.append(path.relative_to(folder).as_posix())
        if not any(pickle_path(folder, "face", split) in found for split in ("train", "val")):
            raise ValueError(f"{folder / 'feat'}: no clip in the face pickles of train and val")
        spans = pd.concat(found.values()).pivot(index=["clip", "split"], columns="modality", values=["start", "count"])
        start, count = (spans[part].fillna(0).astype(np.int64) for part in ("start", "count"))
        clips = count.index.to_frame(index=False)
        _check_clips(folder, clips, truth, found)
        clips["identity"] = [truth.get(clip, (0, -1))[1] for clip in count.index]
        writer.finish(clips, identities, {name: (start[name], count[name]) for name in count})
    return ImportReport(ClipStore.open(store), time.perf_counter() - began, absent, *lost.tolist(), refused, mended)


def val_truth(store: ClipStore, suffix: str = "") -> tuple[list[str], list[list[str]]]:
    """Return what `val_gt.txt` says of a store: its identities, and the val clips of each, of which there may be none.

    suffix: behind the name of every clip, such as the `.mp4` of `read_as_script`.
    """
    names, val = (store.clips["clip"] + suffix).to_numpy(object), store.select("val", labelled=True)
    code = store.identity_of(val)
    rows = pd.Series(code).groupby(code).indices
    clips = [names[val[rows.get(identity, slice(0))]].tolist() for identity in range(len(store.identities))]
    return store.identities.tolist(), clips


def export_folder(store: ClipStore, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write `store` as the challenge's files; loaders read them as the official ones, with `encoding="bytes"`.

    What the files have no place for is left out: columns of truth and the identities of test clips.
    """
    for name, modality in store.modalities.items():
        layout, width = LAYOUTS.get(name), modality.feature.shape[1]
        if layout is None or width != layout.width or not {*layout.fields[:-1]} <= modality.columns.keys():
            has = f"{name} of {width} dimensions with {', '.join(modality.columns)}"
            raise ValueError(f"{store.path}: {has}, the official files have {layout}")
    with partial_folder(Path(folder), "feat", overwrite) as made:
        (made / "feat").mkdir()
        for modality, split in product(store.modalities.values(), SPLITS):
            if len(clips := store.select(split)):
                write_pickle(pickle_path(made, modality.name, split), _official_items(store, modality, clips))
        names = store.clips["clip"].to_numpy(object)
        train = store.select("train", labelled=True)
        write_train_truth(made / "train_gt.txt", names[train], store.identities[store.identity_of(train)])
        write_val_truth(made / "val_gt.txt", *val_truth(store))
        origin = {key: store.meta[key] for key in ("simulated", "provenance")}
        (made / ORIGIN).write_text(json.dumps(origin) + "\n")


def _official_items(store: ClipStore, modality: Modality, clips: np.ndarray) -> Iterator[tuple[bytes, object]]:
    layout, names = LAYOUTS[modality.name], store.clips["clip"].to_numpy(object)
    for clip in clips:
        rows = slice(modality.start[clip], modality.start[clip] + modality.count[clip])
        fields = {name: modality.columns[name][rows].tolist() for name in layout.fields[:-1]}
        fields["feature"] = np.array(modality.feature[rows], layout.dtype)
        if modality.name not in ("scene", "audio"):
            fields["frame"] = [b"%d" % frame for frame in fields["frame"]]
        records = list(map(tuple if modality.name == "scene" else list, zip(*fields.values())))
        if records or modality.name != "audio":
            yield names[clip].encode(), records[0][0] if modality.name == "audio" else records


def _read_truth(folder: Path) -> tuple[dict[tuple[str, str], tuple[int, int]], list[str]]:
    """Read both ground truths: for each clip and split that is named its line and identity, and the identities."""
    train = read_train_truth(folder / "train_gt.txt", bare=True)
    identities, clips = read_val_truth(folder / "val_gt.txt", bare=True)
    code = {name: place for place, name in enumerate(dict.fromkeys([*identities, *train["identity"]]))}
    truth = {(clip, "train"): (row + 1, code[identity]) for row, clip, identity in train.itertuples()}
    seen: dict[str, int] = {}
    for line, (identity, of) in enumerate(zip(identities, clips), 1):
        for what in (f"identity {identity}", *(f"clip {clip}" for clip in of)):
            if what in seen:
                where = f"{folder / 'val_gt.txt'}, line {line}"
                raise ValueError(f"{where}: {short(what)} is named twice, first on line {seen[what]}")
            seen[what] = line
        truth.update({(clip, "val"): (line, code[identity]) for clip in of})
    check_names((), code)
    return truth, list(code)


def _read_origin(folder: Path) -> dict:
    if not (folder / ORIGIN).exists():
        used = {find_pickle(folder, modality, split) for modality, split in product(LAYOUTS, SPLITS)}
        paths = used.union((folder / "feat").glob("*.pickle"))
        sizes = {path.name: path.stat().st_size for path in sorted(paths) if path.exists()}
        return {"simulated": False, "provenance": {"source": "files of iQIYI-VID-2019", "bytes": sizes}}
    try:
        origin = json.loads((folder / ORIGIN).read_text())
        return {"simulated": bool(origin["simulated"]), "provenance": dict(origin["provenance"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / ORIGIN}: not an origin ({type(error).__name__}: {error})") from None


def _check_clips(
    folder: Path, clips: pd.DataFrame, truth: dict[tuple[str, str], tuple[int, int]], found: dict[Path, pd.DataFrame]
) -> None:
    for clip, of in clips[clips["clip"].duplicated(keep=False)].groupby("clip", sort=False):
        splits = " and ".join(of["split"])
        paths = ", ".join(str(path.relative_to(folder)) for path, spans in found.items() if clip in {*spans["clip"]})
        raise ValueError(f"{folder}: clip {short(clip)} is named twice, in the pickles of {splits}: {paths}")
    for clip, split in sorted(truth.keys() - zip(clips["clip"], clips["split"]), key=truth.__getitem__):
        where = f"{folder / f'{split}_gt.txt'}, line {truth[clip, split][0]}"
        raise ValueError(f"{where}: clip {short(clip)} has no features in any pickle of {split}")


class _Reader:
    """Check one official pickle and stream it to a store.

    Frames are whole numbers that never fall within a clip; scores are Python floats (integers are refused, as by the
    published loaders); features are finite, of the official dtype and width. mended: where it is counted what was
    stored otherwise. refused: where bad records are counted, which else raise.
    """

    def __init__(
        self,
        path: Path,
        modality: str,
        writer: StoreWriter,
        mended: dict[str, tuple[int, str]],
        refused: dict[str, tuple[int, str]] | None,
    ):
        self._path, self._modality, self._layout = path, modality, LAYOUTS[modality]
        self._writer, self._refused, self._mended, self._last, self.losses = writer, refused, mended, 0, [np.zeros(0)]
        # The released code lists scenes as its file system lists pictures, and reads them so.
        self._sorts = modality == "scene" or (refused is not None and "frame" in self._layout.fields)

    def stream(self, bar: Progress) -> pd.DataFrame:
        """Append all good records to the store: clip, start and count of each clip."""
        with (
            tempfile.TemporaryFile(dir=self._writer.partial, buffering=2**20) as spooled,
            bar.open(self._path, "rb", description=f"read {self._path.name}") as file,
        ):
            self._spool = Spool(spooled, self._layout.dtype, self._layout.width)
            loaded, foreign = read_pickle(self._path, file, self._spool)
            keys, self._clips = list(loaded), _clip_names(self._path, loaded)
            self._count, self._bad = np.zeros(len(keys), np.int64), False
            self._owner = np.full(self._spool.rows, UNSEEN, np.int32)  # of each feature
            none = np.zeros(0, np.int64)
            first = self._writer.append(self._modality, **self._parse([], none, none)) if keys else 0
            for at in bar.track(range(0, len(keys), CHUNK), description=f"store {self._path.name}"):
                values = [loaded.pop(key) for key in keys[at : at + CHUNK]]  # so that memory falls
                if self._modality == "audio":
                    values = [[(value,)] for value in values]
                values = [value if type(value) in (list, tuple) else [value] for value in values]
                sizes = np.array(list(map(len, values)))
                owner = np.repeat(np.arange(at, at + len(values)), sizes)
                number = 1 + np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
                self._append(list(chain.from_iterable(values)), owner, number, self._sorts)
        if foreign and not self._bad:
            what = f"names {ascii(short(min(foreign)))}, outside of all records; nothing was run"
            raise ValueError(f"{self._path}: {what}; write the clips as a dict of lists and arrays, without it")
        if len(lost := np.flatnonzero(self._owner == UNSEEN)):
            # Of a clip that is named twice the former features stand before all that is kept from there on.
            later = self._owner[lost[0] :]
            clip = short(self._clips[later[later >= 0].min()]) if (later >= 0).any() else "one of the last"
            what = f"{len(lost)} features are in no record of a clip, as if one were named twice: {clip}"
            self._refuse("features in no record of a clip", "leaves them out", f"{self._path}: {what}", len(lost))
        start = first + np.cumsum(self._count) - self._count
        return pd.DataFrame({"clip": self._clips, "start": start, "count": self._count})

    def _append(self, records: list, owner: np.ndarray, number: np.ndarray, sorts: bool = False) -> None:
        """Store records (n) of the clips `owner` (n,), all at once or, if one is bad, by halves, down to that one.

        number (n,): of each record in its clip, from 1.  sorts: sort frames that are out of order, rather than refuse.
        """
        try:
            self._writer.append(self._modality, **self._parse(records, owner, number))
            np.add.at(self._count, owner, 1)
        except BadRecord as error:
            if sorts:
                records, number = self._sorted(records, owner, number)
            if (half := len(records) // 2) or sorts:
                for part in (slice(half), slice(half, None)):
                    self._append(records[part], owner[part], number[part])
                return
            rule, where = error.args[0], self._where(records[0], owner[0], number[0])
            does = "sorts them" if rule == DISORDER else "leaves such records out"
            self._refuse(rule, does, f"{where}: {': '.join(error.args)}")
            if type(records[0]) in (list, tuple):  # its features are lost with it, and counted so
                rows = self._spool.rows_of([value for value in records[0] if isinstance(value, Array)])
                rows = rows[rows >= 0]
                self._owner[rows[self._owner[rows] == UNSEEN]] = LOST

    def _refuse(self, rule: str, does: str, message: str, n: int = 1) -> None:
        """Count what is bad, or raise where nothing may be skipped."""
        self._bad = True
        if self._refused is None:
            raise ValueError(f"{message} (--skip-bad-records {does})") from None
        _tally(self._refused, rule, n, message)

    def _sorted(self, records: list, owner: np.ndarray, number: np.ndarray) -> tuple[list, np.ndarray]:
        """Sort records within each clip by their frames; those whose frame cannot be read stay where they are."""
        frames = [record[0] if type(record) in (list, tuple) and record else None for record in records]
        frame = np.array([_frame_number(value) for value in self._spool.values(frames)])
        rows = np.flatnonzero(frame >= 0)
        order = np.argsort(owner[rows] << 32 | frame[rows], kind="stable")
        moved = np.unique(owner[rows[order != np.arange(len(order))]])
        if len(moved):
            first = ", ".join(SHORT.repr(frames[row]) for row in np.flatnonzero(owner == moved[0])[:8])
            where = f"{self._path}: clip {short(self._clips[moved[0]])}, frames {first}"
            _tally(self._mended, "clips had frames out of order, which were sorted", len(moved), where)
        place = np.arange(len(records))
        place[rows] = rows[order]
        return [records[row] for row in place], number[place]

    def _parse(self, records: list, owner: np.ndarray, number: np.ndarray) -> dict[str, np.ndarray]:
        """Turn records (n) into columns (n, ...), or raise BadRecord for one of them."""
        fields, width = self._layout.fields, self._layout.width
        if len(records) > BLOCK or set(map(type, records)) - {list, tuple} or set(map(len, records)) - {len(fields)}:
            raise BadRecord(f"record without its {len(fields)} fields", SHORT.repr(records[0]))
        *values, features = zip(*records) if records else [()] * len(fields)
        columns = {name: _column(name, of, self._spool) for name, of in zip(fields, values)}
        rows = self._spool.rows_of(features)
        columns["feature"], loss = to_half(self._spool.read(rows))
        if (rows < 0).any() or len(nonfinite_rows(columns["feature"])):
            reason = f"feature is not {self._layout.dtype} ({width},), finite in float16"
            raise BadRecord(reason, self._spool.describe(features[0]))
        if "frame" in columns:
            place = np.append(self._last, owner << 32 | columns["frame"])  # ascends through clips and their frames
            if (np.diff(place) < 0).any():
                raise BadRecord(DISORDER, f"{columns['frame'][0]} after {self._last & 2**32 - 1}")
            self._last = place[-1]
        for name in {"det", "quality"} & columns.keys():
            if len(unknown := np.flatnonzero(np.isnan(columns[name]))):
                columns[name][unknown] = 0
                where = self._where(records[unknown[0]], owner[unknown[0]], number[unknown[0]])
                _tally(self._mended, f"records whose {name} is NaN, unknown, have it stored as 0", len(unknown), where)
        self._owner[rows] = owner
        self.losses.append(loss)
        return columns

    def _where(self, record: object, clip: int, number: int) -> str:
        """Name a record."""
        has_frame = "frame" in self._layout.fields and type(record) in (list, tuple) and record
        frame = f" (frame {SHORT.repr(record[0])})" if has_frame else ""
        return f"{self._path}: clip {short(self._clips[clip])}, record {number}{frame}"


def _tally(counts: dict[str, tuple[int, str]], what: str, n: int, first: str) -> None:
    known, first = counts.get(what, (0, first))
    counts[what] = known + n, first


def _frame_number(value: object) -> int:
    """Return the number of a frame, -1 if it is none."""
    try:
        number = int(value) if type(value) in (bytes, str, int, float) else -1  # type: ignore[call-overload]
    except (ValueError, OverflowError):
        return -1
    return number if 0 <= number < 2**31 else -1


def _clip_names(path: Path, keys: Iterable) -> list[str]:
    """Return the name of each key, in their order; keys may be bytes or text, with `.mp4` or without."""
    names: dict[str, object] = {}
    for key in keys:
        name = key.decode(errors="surrogateescape") if type(key) is bytes else key
        if type(name) is not str or name.split() != [name] or not name.isprintable() or name == ".mp4":
            raise ValueError(f"{path}: clip name {SHORT.repr(key)} is not printable text without spaces")
        if (first := names.setdefault(name.removesuffix(".mp4"), key)) is not key:
            twice = f"as {SHORT.repr(first)} and {SHORT.repr(key)}"
            raise ValueError(f"{path}: clip {short(name.removesuffix('.mp4'))} is named twice, {twice}")
    return list(names)


def _column(name: str, values: Sequence, spool: Spool) -> np.ndarray:
    """Turn a field of n records into an array (n, ...), or raise BadRecord if one of them breaks its rule."""
    values = spool.values(values)
    kinds, right = set(map(type, values)), np.zeros(1, bool)
    try:
        if name == "frame" and kinds <= {bytes, str, int, float}:
            column = np.fromiter(map(int, values), np.int64, len(values))
            right = (column >= 0) & (column < 2**31)
            if float in kinds:
                right &= np.array([type(value) is not float or value.is_integer() for value in values])
        elif name == "box" and kinds <= {list, tuple} and set(map(len, values)) <= {4}:
            sides = spool.values(list(chain.from_iterable(values)))  # each may be an array of one number
            if set(map(type, sides)) <= {float, int}:
                column = np.array(sides, np.float64).reshape(len(values), 4)
                low, high = column[:, :2], column[:, 2:]
                right = (low >= 0) & (low <= high) & (high < np.inf)
        elif name in ("det", "quality") and kinds <= {float}:
            column = np.array(values, np.float64)
            right = ~np.isinf(column)
    except (ValueError, OverflowError):  # no number, too large
        pass
    if not np.all(right):
        rule = {"frame": "a number from 0", "box": "0 <= x1 <= x2, 0 <= y1 <= y2"}.get(name, "a finite float")
        raise BadRecord(f"{name} is not {rule}", SHORT.repr(values[0]))
    return column
