"""Write a ClipStore, and the rules that one obeys."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmlib.clips.arrays import ArrayStream, nonfinite_rows, partial_folder

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
# What a frame may carry: dtype, shape of one row, meaning. Other columns (a simulator's truth) keep theirs.
COLUMNS = {
    "frame": ("int32", (), "number of the frame in its clip"),
    "box": ("float64", (4,), "x1, y1, x2, y2 in pixels"),
    "det": ("float64", (), "detection score"),
    "quality": ("float64", (), "quality score, higher is better"),
}


class StoreWriter:
    """Write a store as a stream, inside `with`: `append` blocks of frames, then `finish` with the clips.

    Everything goes to a hidden folder beside the target, which takes its name at the end of the block; on
    any exception, an interrupt or a full disk among them, the hidden folder is removed.
    """

    def __init__(self, path: Path, simulated: bool, provenance: dict, overwrite: bool):
        self._meta = {"schema": SCHEMA_VERSION, "simulated": simulated, "provenance": provenance}
        self._target = partial_folder(path, "store.json", overwrite)
        self._streams: dict[str, dict[str, ArrayStream]] = {}
        self._finished = False

    def __enter__(self) -> "StoreWriter":
        self._exit = ExitStack()
        self.partial = self._exit.enter_context(self._target)
        self._exit.callback(lambda: [s.abandon() for m in self._streams.values() for s in m.values()])
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None and not self._finished:
            error = RuntimeError(f"{self.partial}: the store was left unfinished")
            self._exit.__exit__(RuntimeError, error, None)
            raise error
        self._exit.__exit__(kind, error, traceback)

    def append(self, modality: str, feature: np.ndarray, **columns: np.ndarray) -> int:
        """Write frames `feature` (n, D) float16 with their columns (n, ...); return the first one's row.

        Every call for a modality brings the same columns and width. Columns named in `COLUMNS` are
        converted to the dtype given there.
        """
        if feature.dtype != np.float16 or feature.ndim != 2:
            raise ValueError(f"{modality}: features must be float16 (n, D), "
                             f"got {feature.dtype} {feature.shape}")
        arrays = {"feature": feature}
        for name, values in columns.items():
            arrays[name] = np.asarray(values, COLUMNS[name][0] if name in COLUMNS else None)
        streams = self._streams.setdefault(modality, {})
        if not streams:
            (self.partial / modality).mkdir()
            for name, array in arrays.items():
                path = self.partial / modality / f"{name}.npy"
                streams[name] = ArrayStream(path, array.dtype, array.shape[1:])
        if arrays.keys() != streams.keys():
            raise ValueError(f"{modality}: columns {sorted(arrays)} after {sorted(streams)}")
        first = streams["feature"].rows
        for name, array in arrays.items():
            if len(array) != len(feature):
                raise ValueError(f"{modality}: {len(array)} values of {name} for {len(feature)} frames")
            if array.dtype.kind == "f" and (bad := nonfinite_rows(array)).size:
                raise ValueError(f"{modality}: NaN or infinite {name} in row {first + bad[0]}")
        for name, array in arrays.items():
            streams[name].append(array)
        return first

    def finish(self, clips: pd.DataFrame, identities: list[str],
               spans: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Write the tables: `clips` as in `ClipStore.clips`, in any order, `spans` their starts and counts.

        Modalities to which nothing was appended are left out.
        """
        clips = clips.reset_index(drop=True).astype({"identity": np.int32})
        names = np.asarray(identities, object)
        spans = {name: tuple(np.asarray(part, np.int64) for part in spans[name]) for name in self._streams}
        check_clips(self.partial / "clips.parquet", clips, names,
                     {name: (*span, self._streams[name]["feature"].rows) for name, span in spans.items()})
        for name, (start, count) in spans.items():
            clips[f"{name}_start"], clips[f"{name}_count"] = start, count
        clips["place"] = clips["split"].map(SPLITS.index)
        clips = clips.sort_values(["place", "clip"]).drop(columns="place")
        self._meta["modalities"] = {name: _describe(streams) for name, streams in self._streams.items()}
        for stream in (s for streams in self._streams.values() for s in streams.values()):
            stream.finish()
        _write_table(clips, self.partial / "clips.parquet")
        names = pd.DataFrame({"identity": pd.Series(names, dtype="str")})
        _write_table(names, self.partial / "identities.parquet")
        (self.partial / "store.json").write_text(json.dumps(self._meta, indent=1) + "\n")
        self._finished = True


def check_clips(path: Path, clips: pd.DataFrame, identities: np.ndarray,
                 spans: dict[str, tuple[np.ndarray, np.ndarray, int]]) -> None:
    """Raise for the first clip whose name, split, identity or span of rows cannot be."""

    def refuse(wrong: np.ndarray, what: str, values: np.ndarray) -> None:
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ValueError(f"{path}: clip {clips['clip'].iloc[at]!r}: {what} {values[at]}")

    for column in ("clip", "split", "identity"):
        if column not in clips:
            raise ValueError(f"{path}: no column {column}")
    code = clips["identity"].to_numpy()
    refuse(clips["clip"].duplicated().to_numpy(), "named twice, again in row", np.arange(len(clips)))
    refuse(~clips["split"].isin(SPLITS).to_numpy(), "unknown split", clips["split"].to_numpy())
    refuse((code < -1) | (code >= len(identities)), f"of {len(identities)} identities it has number", code)
    repeated = pd.Series(identities).duplicated().to_numpy()
    if repeated.any():
        raise ValueError(f"{path.with_name('identities.parquet')}: "
                         f"{identities[np.argmax(repeated)]!r} stands twice")
    for name, (start, count, rows) in spans.items():
        if len(start) != len(clips) or len(count) != len(clips):
            raise ValueError(f"{path}: {len(start)} starts and {len(count)} counts of {name} "
                             f"for {len(clips)} clips")
        wrong = (count < 0) | (start < 0) | (start > rows - count)
        refuse(wrong, f"of {rows} rows of {name} it has start and count", np.stack([start, count], axis=1))


def _describe(streams: dict[str, ArrayStream]) -> dict:
    feature = streams["feature"]
    columns = {name: {"dtype": stream.dtype.str, "shape": list(stream.row_shape),
                      "meaning": COLUMNS[name][2] if name in COLUMNS else "truth of the simulator"}
               for name, stream in streams.items() if name != "feature"}
    return {"frames": feature.rows, "dim": feature.row_shape[0], "dtype": feature.dtype.str,
            "columns": columns}


def _write_table(table: pd.DataFrame, path: Path) -> None:
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), path)
