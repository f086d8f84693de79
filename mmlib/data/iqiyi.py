"""The challenge's own files to a ClipStore and back.

A folder holds `feat/<modality>_<split>.pickle`, `train_gt.txt` and `val_gt.txt`. The pickles are dicts from
clip to records, written by Python 2; `mmlib.data.rows.LAYOUTS` gives the records of each modality.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from mmlib.data.pickles import Spool, collection_paused, read_pickle
from mmlib.data.python2 import DictPickler, pack_floats, split_rows
from mmlib.data.rows import LAYOUTS, Records, gather_records
from mmlib.data.store import SPLITS, ClipStore, Modality, StoreWriter
from mmlib.data.submission import (
    read_result,
    read_train_truth,
    read_val_truth,
    write_result,
    write_train_truth,
    write_val_truth,
)
from mmlib.data.writer import partial_folder

__all__ = [
    "ImportReport",
    "export_folder",
    "import_folder",
    "pickle_path",
    "read_result",
    "read_train_truth",
    "read_val_truth",
    "write_result",
]

ORIGIN = "origin.json"  # beside exported files: whether they are simulated, and where they come from
BLOCK = 2**13  # frames copied at once


@dataclass
class ImportReport:
    """What an import found: counts of clips and frames, and all that was absent, refused or left out."""

    clips: dict[str, int] = field(default_factory=dict)  # by split
    frames: dict[str, int] = field(default_factory=dict)  # by modality
    faceless: dict[str, int] = field(default_factory=dict)  # clips without a face, by split
    distractors: int = 0  # val clips that val_gt.txt does not name
    unlabelled: int = 0  # train clips that train_gt.txt does not name
    absent: list[str] = field(default_factory=list)  # files
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # by reason: records, the first of them
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """Say it in sentences for a terminal."""
        lines = [
            f"{split}: {clips} clips, {self.faceless[split]} without a face" for split, clips in self.clips.items()
        ]
        lines += [f"{modality}: {frames} frames" for modality, frames in self.frames.items()]
        lines.append(f"val: {self.distractors} distractors (clips that val_gt.txt does not name)")
        lines.append(f"train: {self.unlabelled} clips that train_gt.txt does not name, kept without identity")
        if self.absent:
            lines.append(f"absent: {', '.join(self.absent)}")
        lines += [
            f"refused: {number} records, {reason}; first: {first}" for reason, (number, first) in self.refused.items()
        ]
        if not self.refused:
            lines.append("refused: no record")
        return [*lines, f"{self.seconds:.1f} s"]


def pickle_path(folder: Path, modality: str, split: str) -> Path:
    """Return where the challenge keeps a modality of a split."""
    version = "_v2" if modality == "face" and split != "test" else ""
    return Path(folder) / "feat" / f"{modality}_{split}{version}.pickle"


def import_folder(
    folder: str | Path,
    store_path: str | Path,
    *,
    skip_bad_records: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> ImportReport:
    """Turn the challenge's files into a store.

    Faces of train and val and both ground truths must be there; all else is taken where present. Clips of
    a split are those of any of its pickles. Identities are the lines of `val_gt.txt` in order, then those
    that only `train_gt.txt` names, in the order in which it does. A bad record stops the import, or with
    `skip_bad_records` is counted and left out; see `records.gather_records`.
    """
    began = time.perf_counter()
    folder = Path(folder)
    train, (identities, val) = _read_truth(folder)
    report = ImportReport(absent=[] if (folder / "img").is_dir() else ["img/"])
    origin = _read_origin(folder)
    found: dict[str, list[pd.DataFrame]] = {}
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with (
        ClipStore.create(store_path, overwrite=overwrite, **origin) as writer,
        Progress(*columns, disable=not progress, transient=True) as bar,
    ):
        for modality in LAYOUTS:
            for split in SPLITS:
                path = pickle_path(folder, modality, split)
                if not path.exists():
                    report.absent.append(path.relative_to(folder).as_posix())
                    continue
                records, first = _stream(path, modality, writer, bar, skip_bad_records)
                found.setdefault(modality, []).append(
                    pd.DataFrame(
                        {
                            "clip": records.clips,
                            "split": split,
                            "count": records.count,
                            "start": first + np.cumsum(records.count) - records.count,
                        }
                    )
                )
                for reason, (number, example) in records.refused.items():
                    number += report.refused.get(reason, (0, ""))[0]
                    report.refused[reason] = number, report.refused.get(reason, (0, example))[1]
        spans = {modality: pd.concat(parts, ignore_index=True) for modality, parts in found.items()}
        clips = pd.concat([part[["clip", "split"]] for part in spans.values()]).drop_duplicates()
        _check_one_split(folder, clips)
        _check_truth(folder, clips, train, val)
        code = {identity: place for place, identity in enumerate(identities)}
        label = dict(zip(train["clip"], train["identity"].map(code)))
        label |= {clip: code[identity] for identity, of in zip(identities, val) for clip in of}
        clips["identity"] = clips["clip"].map(label).fillna(-1).astype(np.int32)
        aligned = {
            modality: span.set_index("clip")[["start", "count"]].reindex(clips["clip"], fill_value=0)
            for modality, span in spans.items()
        }
        writer.finish(clips, identities, {m: (span["start"], span["count"]) for m, span in aligned.items()})
    found_in = clips["split"].value_counts()
    report.clips = {split: int(found_in[split]) for split in SPLITS if split in found_in}
    report.frames = {modality: int(span["count"].sum()) for modality, span in spans.items()}
    faceless = aligned["face"]["count"].to_numpy() == 0
    report.faceless = {split: int(faceless[clips["split"] == split].sum()) for split in report.clips}
    nameless = clips["identity"] < 0
    report.distractors = int((nameless & (clips["split"] == "val")).sum())
    report.unlabelled = int((nameless & (clips["split"] == "train")).sum())
    report.seconds = time.perf_counter() - began
    return report


def export_folder(store: ClipStore, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write `store` as the challenge's files, the pickles byte for byte as Python 2 wrote them.

    What the files have no place for is left out: columns of truth and the identities of test clips.
    """
    for modality in store.modalities.values():
        _check_exportable(store, modality)
    with partial_folder(Path(folder), "feat", overwrite) as partial:
        (partial / "feat").mkdir()
        for modality in store.modalities.values():
            for split in SPLITS:
                if len(clips := store.select(split)):
                    _export(store, modality, clips, pickle_path(partial, modality.name, split))
        names = store.clips["clip"].to_numpy(object)
        train, val = (store.select(split, labelled=True) for split in ("train", "val"))
        write_train_truth(partial / "train_gt.txt", names[train], store.identities[store.identity_of(train)])
        code = store.identity_of(val)
        order = np.argsort(code, kind="stable")
        lists = np.split(names[val[order]], np.searchsorted(code[order], np.arange(1, len(store.identities))))
        write_val_truth(partial / "val_gt.txt", store.identities, lists)
        origin = {key: store.meta[key] for key in ("simulated", "provenance")}
        (partial / ORIGIN).write_text(json.dumps(origin) + "\n")


def _read_truth(folder: Path) -> tuple[pd.DataFrame, tuple[list[str], list[list[str]]]]:
    for split in ("train", "val"):
        if not pickle_path(folder, "face", split).exists():
            raise ValueError(f"{pickle_path(folder, 'face', split)}: missing")
    train = read_train_truth(folder / "train_gt.txt")
    identities, clips = read_val_truth(folder / "val_gt.txt")
    seen: dict[str, int] = {}
    for number, names in enumerate(zip(identities, clips), 1):
        for kind, name in (("identity", names[0]), *(("clip", clip) for clip in names[1])):
            if f"{kind} {name}" in seen:
                raise ValueError(
                    f"{folder / 'val_gt.txt'}, line {number}: {kind} {name} is named twice, "
                    f"first on line {seen[f'{kind} {name}']}"
                )
            seen[f"{kind} {name}"] = number
    only_train = train.loc[~train["identity"].isin(identities), "identity"].unique().tolist()
    return train, (identities + only_train, clips)


def _read_origin(folder: Path) -> dict:
    if not (folder / ORIGIN).exists():
        sizes = {path.name: path.stat().st_size for path in sorted((folder / "feat").glob("*.pickle"))}
        return {"simulated": False, "provenance": {"source": "files of iQIYI-VID-2019", "bytes": sizes}}
    try:
        origin = json.loads((folder / ORIGIN).read_text())
        return {"simulated": bool(origin["simulated"]), "provenance": dict(origin["provenance"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / ORIGIN}: not an origin ({error!r})") from None


def _stream(path: Path, modality: str, writer: StoreWriter, bar: Progress, skip: bool) -> tuple[Records, int]:
    """Read a pickle, check it and append it: its records and the row of the first."""
    layout = LAYOUTS[modality]
    spool = Spool(writer.partial / "spool", layout.dtype, layout.width)
    task = bar.add_task(f"read {path.name}", total=path.stat().st_size)
    try:
        with collection_paused():
            loaded = read_pickle(path, spool, lambda size: bar.advance(task, size))
            bar.update(task, description=f"check {path.name}")
            records = gather_records(loaded, modality, spool, path, skip)
        bar.remove_task(task)
        rows = records.columns.pop("row")
        task = bar.add_task(f"store {path.name}", total=len(rows) * layout.width * 2)
        first = None
        for at in range(0, max(len(rows), 1), BLOCK):
            feature = spool.read(rows[at : at + BLOCK])
            columns = {name: column[at : at + BLOCK] for name, column in records.columns.items()}
            row = writer.append(modality, feature, **columns)
            first = row if first is None else first
            bar.advance(task, feature.nbytes)
        bar.remove_task(task)
    finally:
        spool.close()
    return records, first


def _check_one_split(folder: Path, clips: pd.DataFrame) -> None:
    twice = clips[clips["clip"].duplicated(keep=False)]
    if len(twice):
        clip = twice["clip"].iloc[0]
        splits = " and ".join(twice.loc[twice["clip"] == clip, "split"])
        raise ValueError(f"{folder / 'feat'}: clip {clip} is named twice, in the pickles of {splits}")


def _check_truth(folder: Path, clips: pd.DataFrame, train: pd.DataFrame, val: list[list[str]]) -> None:
    for split, lists in (("train", [[clip] for clip in train["clip"]]), ("val", val)):
        known = set(clips.loc[clips["split"] == split, "clip"])
        for number, named in enumerate(lists, 1):
            for clip in named:
                if clip not in known:
                    raise ValueError(
                        f"{folder / f'{split}_gt.txt'}, line {number}: clip {clip} has no "
                        f"features in any pickle of {split}"
                    )


def _check_exportable(store: ClipStore, modality: Modality) -> None:
    if modality.name not in LAYOUTS:
        raise ValueError(f"{store.path}: modality {modality.name} has no official file")
    layout = LAYOUTS[modality.name]
    if modality.feature.shape[1] != layout.width:
        raise ValueError(
            f"{store.path}: {modality.name} has {modality.feature.shape[1]} dimensions, "
            f"the official files {layout.width}"
        )
    missing = [name for name in layout.fields[:-1] if name not in modality.columns]
    if missing:
        raise ValueError(f"{store.path}: {modality.name} has no {', '.join(missing)}, which the official files need")


def _export(store: ClipStore, modality: Modality, clips: np.ndarray, path: Path) -> None:
    layout = LAYOUTS[modality.name]
    if modality.name == "audio":
        clips = clips[modality.count[clips] > 0]
    names = store.clips["clip"].to_numpy(object)
    with open(path, "wb") as file, DictPickler(file, len(clips), layout.dtype, layout.width) as pickler:
        for clip in clips:
            rows = slice(modality.start[clip], modality.start[clip] + modality.count[clip])
            features = split_rows(modality.feature[rows].astype(layout.dtype, copy=False))
            columns = {name: column[rows] for name, column in modality.columns.items()}
            if modality.name == "audio":
                pickler.write_array(names[clip], features[0])
            elif modality.name == "scene":
                pickler.write_pairs(names[clip], zip(columns["frame"].tolist(), features))
            else:
                frames = map(b"%d".__mod__, columns["frame"].tolist())
                kinds = [name for name in layout.fields if name in ("det", "quality")]
                scores = np.array([columns[name] for name in kinds]).reshape(len(kinds), len(features)).T
                boxes = pack_floats(columns["box"])
                pickler.write_records(names[clip], zip(frames, boxes, pack_floats(scores), features))
