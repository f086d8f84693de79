"""Features of one's own, a table beside an array, to a ClipStore."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from rich.progress import track

from mmlib.data.foreign import SCORES, ImportReport, count_lost, open_array, read_rows, to_half
from mmlib.data.quality import Scale, rescale, said
from mmlib.data.store import ClipStore
from mmlib.data.writer import nonfinite_rows

BLOCK = 2**22  # numbers copied at once


def import_features(
    table: str | Path,
    array: str | Path,
    store: str | Path,
    *,
    width: int | None = None,
    quality_scale: Scale | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> ImportReport:
    """Turn `table` (parquet or CSV) and `array` into a store of faces.

    Row i of the table (columns clip, frame, identity, split, and quality and det where known) belongs to row i of the
    array: a `.npy` (F, D) of floats, or raw little-endian float32 of the given `width`; a row of zeros is refused. Rows
    may come in any order; an empty identity is none; det is in [0, 1]. Identities stand in the store sorted by name.
    quality_scale: that of the scores, as in `quality.rescale`; without one, scores that plainly are not in the
    challenge's units are refused.
    """
    began, table, array = time.perf_counter(), Path(table), Path(array)
    rows, features = read_rows(table), open_array(array, width)
    if len(rows) != len(features):
        raise ValueError(f"{array}: {len(features)} rows, but {table} has {len(rows)}")
    provenance = {"table": digest(table), "array": digest(array)}
    if "quality" in rows:
        rows["quality"], provenance["quality"] = rescale(rows["quality"].to_numpy(), quality_scale, f"{table}: quality")
    elif quality_scale is not None:
        raise ValueError(f"{table}: no column quality, which --quality-scale could map")
    options: dict = {"provenance": provenance, "overwrite": overwrite, "progress": progress}
    return replace(write_faces(rows, features, array, store, **options), seconds=time.perf_counter() - began)


def write_faces(
    rows: pd.DataFrame,
    features: np.ndarray,
    array: Path,
    store: str | Path,
    *,
    provenance: dict,
    scenes: tuple[np.ndarray, pd.Series] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> ImportReport:
    """Write a store of `rows`, sorted by clip and frame as `read_rows` returns them, and of `features` (F, D).

    The index of `rows` says which row of `features`, which came from the file `array`, belongs to each.  provenance:
    for the store; what it says of quality is reported.  scenes: features (n, D), and which row each clip has.
    """
    began, columns = time.perf_counter(), [name for name in ("frame", *SCORES) if name in rows]
    with ClipStore.create(store, simulated=False, provenance=provenance, overwrite=overwrite) as writer:
        step, losses = max(1, BLOCK // max(1, features.shape[1])), []
        starts = range(0, len(rows), step)
        for first in track(starts, f"store {array.name}", transient=True, disable=not progress):
            block = rows.iloc[first : first + step]
            taken = features[block.index.to_numpy()]
            feature, loss = to_half(taken)
            for row in sorted({*nonfinite_rows(feature), *np.flatnonzero(~taken.any(1))}):
                place, at = np.argmin(np.isfinite(feature[row])), block.iloc[row]
                where = f"{array}, row {at.name + 1}: clip {at['clip']}, frame {at['frame']}"
                if not taken[row].any():
                    raise ValueError(f"{where}: feature is 0 at every position, which is nobody's face")
                what = f"feature is {taken[row, place]} at position {place}, which float16 cannot hold"
                raise ValueError(f"{where}: {what}")
            writer.append("face", feature, **{name: block[name].to_numpy() for name in columns})
            losses.append(loss)
        lost = count_lost(np.concatenate(losses), array)
        clips = rows.drop_duplicates("clip")[["clip", "split", "identity"]].reset_index(drop=True)
        named = pd.Categorical(clips["identity"])
        clips["identity"] = named.codes.astype(np.int32)
        count = rows.groupby("clip", sort=False).size().to_numpy()
        spans = {"face": (np.cumsum(count) - count, count)}
        if scenes is not None:
            writer.append("scene", to_half(scenes[0][scenes[1][clips["clip"]].to_numpy()])[0])
            spans["scene"] = (np.arange(len(clips)), np.ones(len(clips), np.int64))
        writer.finish(clips, [*named.categories], spans)
    absent = [f"column {name}" for name in SCORES if name not in columns]
    notes = [said(provenance["quality"])] if "quality" in provenance else []
    return ImportReport(ClipStore.open(store), time.perf_counter() - began, absent, *lost, notes=notes)


def digest(path: Path) -> dict:
    """Return the name, the bytes and the sha256 of a file, for a provenance."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}
