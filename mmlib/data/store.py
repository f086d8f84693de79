"""The ClipStore: clips with their frames' embeddings on disk, memory-mapped, and batches of them.

A store is a folder: `store.json`, `clips.parquet` (a row a clip, sorted by split and name, with `<modality>_start` and
`<modality>_count`), `identities.parquet` (the queries in order) and `<modality>/{feature,frame,box,det,quality}.npy`:
one flat array over all frames of all clips.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from mmlib.data.content import fingerprint, read_table
from mmlib.data.writer import SCHEMA_VERSION, SPLITS, check_clips, map_array, write_store

SAMPLES = ("all", "first", "random", "replace", "draw")
_PIECE = 2**20  # numbers converted at a time
_SHARE = 0.5  # of the free memory of a GPU that the features of one modality may take


class Batch(NamedTuple):
    """Frames of B clips, padded to T: `mask` (B, T) is True where a frame exists.

    `feature` is (B, T, D) float32; `quality` and `det` are (B, T) float32, or None where the store has no such score;
    `rows` (B, T) are row numbers in the modality's arrays, -1 where padded.
    """

    feature: Tensor
    mask: Tensor
    quality: Tensor | None
    det: Tensor | None
    rows: Tensor


@dataclass(frozen=True)
class Modality:
    """One ragged array: `count[i]` rows of `feature` (F, D) from `start[i]` on are clip i's frames, none if it is 0.

    `columns` are what else is known of each frame (F, ...), `start` and `count` are (N,) int64.
    """

    name: str
    feature: np.ndarray
    columns: dict[str, np.ndarray]
    start: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class Resident:
    """A modality on a device: `feature` (F, D) float16, `quality` and `det` (F,) or None, `start` and `count` (N,).

    On a CPU these are the mapped files themselves. On a GPU they are copies, made once; features that would take more
    than half of the free memory stay on the host, and the gathered frames travel.
    """

    feature: Tensor
    quality: Tensor | None
    det: Tensor | None
    start: Tensor
    count: Tensor

    def gather(self, rows: Tensor, *, gap: slice = slice(0, 0), out: Tensor | None = None) -> Batch:
        """Read the frames `rows` (B, T), -1 where padded, without the dimensions in `gap`; padding may hold anything.

        out (B, T, D - gap) float32: memory for the features, as fresh memory costs more than the copy into it.
        """
        mask, flat = rows >= 0, rows.clamp(min=0).flatten()
        dim = self.feature.shape[1] - (gap.stop - gap.start)
        if out is None:
            out = torch.empty(*rows.shape, dim, device=rows.device)
        scores = (self.quality, self.det)
        if not len(self.feature):  # then all is padding
            quality, det = (None if score is None else out.new_zeros(rows.shape) for score in scores)
            return Batch(out.zero_(), mask, quality, det, rows)
        target, place = out.view(-1, dim), flat.to(self.feature.device)
        # On a CPU little by little, so that the float16 numbers are still in its cache when they are converted.
        step = max(1, _PIECE // self.feature.shape[1]) if self.feature.device.type == "cpu" else max(1, len(flat))
        for i in range(0, len(flat), step):
            piece = self.feature.index_select(0, place[i : i + step])
            if place.device != rows.device:
                piece = piece.pin_memory().to(rows.device, non_blocking=True)
            target[i : i + step, : gap.start] = piece[:, : gap.start]
            target[i : i + step, gap.start :] = piece[:, gap.stop :]
        quality, det = (None if score is None else score.index_select(0, flat).view(rows.shape) for score in scores)
        return Batch(out, mask, quality, det, rows)


@dataclass(frozen=True)
class ClipStore:
    """Clips, identities and features of one data set; `open` it, or `create` it as by `write_store`.

    `clips` has a row a clip: `clip`, `split`, `identity` (a position in `identities`; -1 is none: a distractor in train
    and val, unknown in test) and columns of truth where a simulator knows it.
    """

    path: Path
    meta: dict
    clips: pd.DataFrame
    identities: np.ndarray
    modalities: dict[str, Modality]
    _resident: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> ClipStore:
        """Open and validate the store at `path`, mapping its features without reading them."""
        path = Path(path)
        meta, clips = _read_meta(path / "store.json"), read_table(path / "clips.parquet")
        identities = read_table(path / "identities.parquet")["identity"].to_numpy(object)
        described = meta["modalities"]
        check_clips(path, clips, identities, {name: kinds["frames"] for name, kinds in described.items()})
        modalities = {}
        for name, kinds in described.items():
            columns = ("feature", *kinds["columns"])
            arrays = {column: _map_column(path / name / f"{column}.npy", column, kinds) for column in columns}
            spans = (clips.pop(f"{name}_{part}").to_numpy(np.int64) for part in ("start", "count"))
            modalities[name] = Modality(name, arrays.pop("feature"), arrays, *spans)
        return cls(path, meta, clips, identities, modalities)

    create = staticmethod(write_store)

    @cached_property
    def fingerprint(self) -> str:
        """Every name and number of the store, hashed: 20 hexadecimal digits; see `mmlib.data.content`."""
        return fingerprint(self.path, self.meta)

    def __len__(self) -> int:
        return len(self.clips)

    def select(
        self, split: str | None = None, *, labelled: bool | None = None, having: str | None = None
    ) -> np.ndarray:
        """Return the positions of the clips of `split` that have (or have not) an identity and a modality."""
        if split not in (None, *SPLITS):
            raise ValueError(f"split: {split!r} is none of {', '.join(SPLITS)}")
        chosen = np.full(len(self), True) if split is None else self.clips["split"].to_numpy() == split
        if labelled is not None:
            chosen &= (self.clips["identity"].to_numpy() >= 0) == labelled
        if having is not None:
            chosen &= self._modality(having).count > 0
        return np.flatnonzero(chosen)

    def identity_of(self, clips: np.ndarray) -> np.ndarray:
        """Return the identity codes of `clips`, -1 for none."""
        return self.clips["identity"].to_numpy(np.int64)[clips]

    def on(self, name: str, device: torch.device | str = "cpu") -> Resident:
        """Return a modality on a device, where it stays from the first call on; see `Resident`."""
        source, device = self._modality(name), torch.device(device)
        if (name, device) not in self._resident:
            feature = torch.from_numpy(source.feature)
            if device.type == "cuda" and feature.nbytes < _SHARE * torch.cuda.mem_get_info(device)[0]:
                feature = feature.to(device)
            columns = (source.columns.get(column) for column in ("quality", "det"))
            quality, det = (None if column is None else torch.from_numpy(column).to(device) for column in columns)
            start, count = (torch.tensor(span, device=device) for span in (source.start, source.count))
            self._resident[name, device] = Resident(feature, quality, det, start, count)
        return self._resident[name, device]

    def batch(self, clips: np.ndarray, modality: str = "face", **sampling) -> Batch:
        """Gather frames of `clips` (B,) as tensors: all, or what `sample_rows` draws, which has the same options."""
        source = self.on(modality)
        chosen = torch.from_numpy(np.asarray(clips, np.int64))
        rows = sample_rows(source.start[chosen], source.count[chosen], **sampling)
        batch = source.gather(rows)
        for value in filter(torch.is_tensor, (batch.feature, batch.quality, batch.det)):
            value[~batch.mask] = 0
        return batch

    def clip_means(self, modality: str, column: str) -> np.ndarray:
        """Average a column, or ``norm``, the L2 norm of features, over the frames of each clip: (N,), NaN for none.

        ``norm, float16``: squares, sums, roots and means are rounded to float16, as those of the released code are.
        """
        source, rough = self._modality(modality), column == "norm, float16"
        if rough or column == "norm":
            pieces = np.array_split(source.feature, 1 + source.feature.size // _PIECE)
            kind = np.float16 if rough else np.float32
            value = np.concatenate([np.linalg.norm(piece.astype(kind, copy=False), axis=1) for piece in pieces])
        elif column in source.columns:
            value = source.columns[column]
        else:
            raise ValueError(f"{self.path}: {modality} has no {column}, only {[*source.columns]}")
        total = np.concatenate([[0], np.cumsum(value, dtype=float)])
        with np.errstate(invalid="ignore"):
            mean = (total[source.start + source.count] - total[source.start]) / source.count
        return mean.astype(np.float16).astype(float) if rough else mean

    def _modality(self, name: str) -> Modality:
        if name not in self.modalities:
            raise ValueError(f"{self.path}: no modality {name!r}, it has {', '.join(self.modalities)}")
        return self.modalities[name]


def _read_meta(path: Path) -> dict:
    try:
        meta = json.loads(path.read_text())
        schema, _ = meta["schema"], meta["modalities"].items()
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, so {path.parent} is not a clip store") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the description of a clip store ({error!r})") from None
    if schema != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema {schema!r}, this version reads {SCHEMA_VERSION}")
    return meta


def _map_column(path: Path, column: str, described: dict) -> np.ndarray:
    kinds = described["columns"] | {"feature": {"dtype": "<f2", "shape": [described["dim"]]}}
    dtype, shape = kinds[column]["dtype"], (described["frames"], *kinds[column]["shape"])
    array = map_array(path)
    if array.dtype.str != dtype or array.shape != shape:
        raise ValueError(f"{path}: {array.dtype.str} {array.shape}, store.json says {dtype} {shape}")
    return array


def sample_rows(
    start: Tensor, count: Tensor, sample: str = "all", frames: int | None = None, generator: Generator | None = None
) -> Tensor:
    """Choose frames of B clips that lie at ``start`` (B,) and number ``count`` (B,): rows (B, T), -1 as padding.

    - all: every frame in stored order; T is the longest clip, at least 1, and ``frames`` below.
    - first: the first ``frames`` in stored order.
    - random: uniform without replacement, in random order; short clips are padded.
    - replace: uniform with replacement; only clips without a frame are padded.
    - draw: as random, but clips with fewer than ``frames`` as replace: what the 2019 code does with 40.

    generator: on the device of ``start`` and ``count``.

    >>> sample_rows(torch.tensor([0, 3]), torch.tensor([3, 1]), "first", 2)
    tensor([[ 0,  1],
            [ 3, -1]])
    """
    if sample not in SAMPLES:
        raise ValueError(f"sample: {sample!r} is none of {', '.join(SAMPLES)}")
    if (frames is None) != (sample == "all") or (frames is not None and frames < 1):
        raise ValueError(f"frames: {frames!r} with sample={sample!r}; 'all' takes none, others at least 1")
    if generator is None and sample not in ("all", "first"):
        raise ValueError(f"generator: None; sample={sample!r} needs one")
    if frames is None:
        frames = max(1, int(count.max())) if len(count) else 1
    step = torch.arange(frames, device=start.device).expand(len(start), -1)
    start, count = start[:, None], count[:, None]
    within, there = step, step < count
    if sample in ("random", "draw"):
        within = _shuffled(count, frames, generator)
    if sample in ("replace", "draw"):
        key = torch.rand(step.shape, generator=generator, device=start.device, dtype=torch.float64)
        drawn = torch.minimum((key * count).long(), count - 1)
        within = drawn if sample == "replace" else torch.where(count >= frames, within, drawn)
        there = (count > 0).expand_as(step)
    return torch.where(there, start + within, -1)


def _shuffled(count: Tensor, frames: int, generator: Generator | None) -> Tensor:
    """Return the first ``frames`` of every clip's frames (B, 1) in random order; beyond its number, anything."""
    # One sort for all clips, by clip and a random key within it.
    owner = torch.repeat_interleave(count[:, 0])
    key = torch.rand(len(owner), generator=generator, device=count.device, dtype=torch.float64)
    order = F.pad(torch.argsort(owner + key), (0, frames))
    offset = count.cumsum(0) - count
    return order[offset + torch.arange(frames, device=count.device)] - offset
