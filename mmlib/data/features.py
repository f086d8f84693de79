"""Features of one's own, a table beside an array, to a ClipStore."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from mmlib.data.store import SPLITS, ClipStore
from mmlib.data.writer import map_array

REQUIRED = ("clip", "frame", "identity", "split")
SCORES = ("quality", "det")
BLOCK = 2**22  # numbers copied at once
# The files of import_lfw: sha256, and the names they go by. The first is theirs in oss_data/ of
# github.com/huyhoang17/128D-Facenet-LFW-Embedding-Visualisation at 75ca7f43ce1576a2240de24077016f17d3b52b10.
LFW_ARRAY = (
    "f4ed45ab485beab6a4345a3f86001a7bedbacdd35aaf80298895352329315edb",
    ("LFW_tensor.bytes", "lfw-facenet-128.bytes"),
)
LFW_LABELS = (
    "63e115d1d791ed3d1e48e430e8ebb546357cbf7e97a37cce6ae023558e748ed2",
    ("LFW_labels.tsv", "lfw-facenet-128-labels.tsv"),
)


@dataclass
class FeatureReport:
    """What an import of a table found."""

    clips: dict[str, int] = field(default_factory=dict)  # by split
    frames: int = 0
    width: int = 0
    identities: int = 0
    nameless: dict[str, int] = field(default_factory=dict)  # clips without an identity, by split
    absent: list[str] = field(default_factory=list)  # score columns
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """Say it in sentences for a terminal."""
        lines = [
            f"{split}: {clips} clips, {self.nameless[split]} without an identity" for split, clips in self.clips.items()
        ]
        lines.append(f"{self.frames} frames of {self.width} dimensions, {self.identities} identities")
        lines += [f"no column {name}: the store has no such score" for name in self.absent]
        return [*lines, f"{self.seconds:.1f} s"]


def import_features(
    table: str | Path,
    array: str | Path,
    store_path: str | Path,
    *,
    width: int | None = None,
    modality: str = "face",
    overwrite: bool = False,
    progress: Callable[[float], None] = lambda _: None,
) -> FeatureReport:
    """Turn `table` (parquet or CSV) and `array` into a store with one modality.

    Row i of the table (columns clip, frame, identity, split, and quality and det where known) belongs to
    row i of the array: a `.npy` (F, D) of floats, or raw little-endian float32 of the given `width`. Rows
    may come in any order; an empty identity is none. Identities stand in the store sorted by name.
    `progress` hears of the share done.
    """
    began = time.perf_counter()
    table, array = Path(table), Path(array)
    rows = _read_table(table)
    features = _map_features(array, width)
    if len(rows) != len(features):
        raise ValueError(f"{array}: {len(features)} rows, but {table} has {len(rows)}")
    scores = [name for name in SCORES if name in rows]
    rows = rows.sort_values(["clip", "frame"], kind="stable")  # its index still says which row of the array
    _check_rows(rows, table)
    provenance = {"table": _fingerprint(table), "array": _fingerprint(array)}
    with ClipStore.create(store_path, simulated=False, provenance=provenance, overwrite=overwrite) as writer:
        step = max(1, BLOCK // max(1, features.shape[1]))
        for first in range(0, len(rows), step):
            block = rows.iloc[first : first + step]
            feature = _to_half(features[block.index.to_numpy()], block, table, array)
            writer.append(modality, feature, **{name: block[name].to_numpy() for name in ("frame", *scores)})
            progress(min(1.0, (first + step) / len(rows)))
        clips = rows.drop_duplicates("clip")[["clip", "split", "identity"]].reset_index(drop=True)
        identities = sorted(clips["identity"].dropna().unique())
        code = {identity: place for place, identity in enumerate(identities)}
        clips["identity"] = clips["identity"].map(code).fillna(-1).astype(np.int32)
        count = rows.groupby("clip", sort=False).size().to_numpy()
        writer.finish(clips, identities, {modality: (np.cumsum(count) - count, count)})
    report = FeatureReport(
        frames=len(rows),
        width=features.shape[1],
        identities=len(identities),
        absent=[name for name in SCORES if name not in scores],
    )
    for split in SPLITS:
        if (inside := clips["split"] == split).any():
            report.clips[split] = int(inside.sum())
            report.nameless[split] = int((inside & (clips["identity"] < 0)).sum())
    report.seconds = time.perf_counter() - began
    return report


def import_lfw(folder: str | Path, store_path: str | Path, *, seed: int = 0, overwrite: bool = False) -> FeatureReport:
    """Turn public embeddings of photographs of Labeled Faces in the Wild into a store.

    `folder` holds `LFW_ARRAY`, 2,921 FaceNet embeddings of 128 dimensions as raw float32, and `LFW_LABELS`, a
    name a line; their sha256 is checked. `group_photographs` makes clips of them. Spaces in a name become
    underscores, because the challenge's text files divide words at spaces. The photographs are for research.
    """
    array, labels = (_find_published(Path(folder), *file) for file in (LFW_ARRAY, LFW_LABELS))
    names = labels.read_text(encoding="utf-8").replace(" ", "_").splitlines()
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / f"grouped-{seed}.csv"
        group_photographs(names, seed).to_csv(table, index=False)
        return import_features(table, array, store_path, width=128, overwrite=overwrite)


def group_photographs(names: Sequence[str], seed: int) -> pd.DataFrame:
    """Make clips of photographs: a table for `import_features`, row i for the photograph of `names[i]` (F,).

    The photographs of a person are shuffled. Of 4 or more, half (and the odd one) go to train and half to
    val, each half cut into clips of 2 to 5, as even as a random number of clips allows. 2 or 3 make one val
    clip, and 1 a val clip of one frame: distractors, without identity. Clips are numbered in random order, so
    that a name tells nothing.

    >>> table = group_photographs(["ann", "bob", "ann", "ann", "bob", "ann"], seed=0)
    >>> table["split"].value_counts().to_dict()
    {'val': 4, 'train': 2}
    """
    rng = np.random.default_rng(seed)
    clips = []
    for name, rows in pd.Series(names, dtype=object).groupby(np.asarray(names, object)).indices.items():
        rows = rng.permutation(rows)
        if len(rows) < 4:
            clips.append(("val", None, rows))
            continue
        for split, half in zip(("train", "val"), np.array_split(rows, 2)):
            number = rng.integers(-(-len(half) // 5), len(half) // 2, endpoint=True)
            clips += [(split, name, part) for part in np.array_split(half, number)]
    table = pd.DataFrame(clips, columns=["split", "identity", "row"])
    numbers = rng.permutation(len(table))
    table["clip"] = [f"{split}_{number:05d}" for split, number in zip(table["split"], numbers)]
    table = table.explode("row")
    table["frame"] = table.groupby("clip").cumcount()
    return table.set_index(table.pop("row").astype(np.int64)).sort_index()


def _find_published(folder: Path, digest: str, names: Sequence[str]) -> Path:
    path = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
    if not path.exists():
        raise ValueError(f"{path}: missing")
    found = _fingerprint(path)["sha256"]
    if found != digest:
        raise ValueError(f"{path}: not the published file, its sha256 is {found}, not {digest}")
    return path


def _read_table(path: Path) -> pd.DataFrame:
    """Read the table: clip, identity and split as text, frame and scores as numbers, all checked."""
    text = {"clip": str, "identity": str, "split": str}
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pd.read_parquet(path)
        else:
            # only an empty cell is no identity: someone may be called NA or None
            table = pd.read_csv(
                path,
                dtype=text,
                keep_default_na=False,
                na_values={name: [""] for name in ("clip", "frame", "identity", "split", *SCORES)},
                encoding="utf-8-sig",
            )
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (ValueError, OSError) as error:  # of which the errors of pandas and pyarrow are kinds
        raise ValueError(f"{path}: not a readable table ({error})") from None
    missing = [name for name in REQUIRED if name not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    if not len(table):
        raise ValueError(f"{path}: no rows")
    table = table[[*REQUIRED, *(name for name in SCORES if name in table)]].reset_index(drop=True)
    for name in text:
        table[name] = _as_text(table[name])
    table["clip"] = table["clip"].str.removesuffix(".mp4")
    for name, missing in (
        ("clip", table["clip"].isna() | (table["clip"] == "")),
        ("split", ~table["split"].isin(SPLITS)),
    ):
        if missing.any():
            row = int(np.argmax(missing))
            raise ValueError(f"{path}, row {row + 1}: clip {table['clip'][row]!r}: {name} is {table[name][row]!r}")
    for name in ("frame", *SCORES):
        if name in table:
            table[name] = _as_numbers(table, name, path)
    return table


def _as_text(column: pd.Series) -> pd.Series:
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")  # whole numbers that a missing value made floats
    text = column.astype(object).where(column.notna(), None)
    return text.map(lambda value: str(value).strip() or None, na_action="ignore")


def _as_numbers(table: pd.DataFrame, name: str, path: Path) -> pd.Series:
    numbers = pd.to_numeric(table[name], errors="coerce").astype(np.float64)
    wrong = ~np.isfinite(numbers)
    if name == "frame":
        wrong |= (numbers < 0) | (numbers >= 2**31) | (numbers % 1 != 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{path}, row {row + 1}: clip {table['clip'][row]}: {name} is {table[name][row]}")
    return numbers.astype(np.int64) if name == "frame" else numbers


def _map_features(path: Path, width: int | None) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        features = map_array(path)
        if features.ndim != 2 or features.dtype.kind != "f" or width not in (None, features.shape[1]):
            expected = "(F, D)" if width is None else f"(F, {width})"
            raise ValueError(f"{path}: {features.dtype} {features.shape}, expected floats {expected}")
        return features
    if width is None or width < 1:
        raise ValueError(f"width: {width!r}, but {path} is raw numbers and needs one")
    if not path.exists():
        raise ValueError(f"{path}: missing")
    size = path.stat().st_size
    if not size or size % (4 * width):
        raise ValueError(f"{path}: {size} bytes are not whole rows of {width} float32")
    return np.memmap(path, "<f4", "r").reshape(-1, width)


def _check_rows(rows: pd.DataFrame, path: Path) -> None:
    """Refuse a clip with two identities or splits, and a frame that a clip has twice; `rows` are sorted."""
    same_clip = rows["clip"].to_numpy()[1:] == rows["clip"].to_numpy()[:-1]
    for name in ("identity", "split", "frame"):
        values = rows[name].fillna("") if name == "identity" else rows[name]
        equal = values.to_numpy()[1:] == values.to_numpy()[:-1]
        wrong = same_clip & (equal if name == "frame" else ~equal)
        if wrong.any():
            at = int(np.argmax(wrong))
            found = " and ".join(str(rows[name].iloc[row]) for row in (at, at + 1))
            raise ValueError(f"{path}, row {rows.index[at + 1] + 1}: clip {rows['clip'].iloc[at]} has {name} {found}")


def _to_half(block: np.ndarray, rows: pd.DataFrame, table: Path, array: Path) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = block.astype(np.float16)
    wrong = ~np.isfinite(half)
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        raise ValueError(
            f"{array}, row {rows.index[row] + 1}: clip {rows['clip'].iloc[row]}, frame "
            f"{rows['frame'].iloc[row]}: feature is {block[row, place]} at position {place}, "
            "which float16 cannot hold"
        )
    return half


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        return {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
