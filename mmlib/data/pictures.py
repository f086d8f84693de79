"""Pictures as a network wants them: one drawn picture a clip, cropped, in batches; decoded once where that pays.

Everything random about a picture (which of its clip's, which crop, flipped or not) comes from a generator of the seed,
the epoch and the clip, so that neither the order nor the number of loading processes changes a batch.  Nor does it
whether a picture is decoded when it is asked for or was before (``decode``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from mmlib.data.crops import LONGEST, Crops, cut_crops, fit_picture, resample
from mmlib.data.images import Images, read_image
from mmlib.data.writer import ArrayStream, map_array, partial_folder

EVALUATION = -1  # in place of an epoch: the one picture a clip that is drawn in test
DECODED = "decoded.json"  # in a folder of decoded pictures: of which files
_WORTH_A_WORKER = 128  # pixels; smaller pictures are decoded faster than they are passed between processes
_AT_ONCE = 16  # clips a loading process decodes before it hands over


# -- decoded once ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """Pictures of clips in a memory map, their shorter side ``resize`` pixels.

    first: (N,) the row of each clip's first picture, -1 for clips that are not here; start (n,), shape (n, 2) and mode
    (n,) of the pictures, their first pixel, height and width, and the mode of their file; pixels (P, 3) uint8, picture
    by picture and row by row.
    """

    resize: int
    first: np.ndarray
    start: np.ndarray
    shape: np.ndarray
    mode: np.ndarray
    pixels: np.ndarray

    def picture(self, clip: int, number: int) -> tuple[np.ndarray, str] | None:
        """Return a clip's picture (H, W, 3), not copied, and the mode of its file; None if it is not here."""
        if self.first[clip] < 0:
            return None
        row = self.first[clip] + number
        height, width = self.shape[row]
        return self.pixels[self.start[row] : self.start[row] + height * width].reshape(height, width, 3), self.mode[row]

    def line(self) -> str:
        """Say it in a sentence for a terminal."""
        return (
            f"decoded: {len(self.shape)} pictures of {(self.first >= 0).sum()} clips, {self.pixels.nbytes / 1e9:.2f} GB"
        )


def decode(
    images: Images,
    folder: str | Path,
    clips: np.ndarray,
    *,
    resize: int,
    most: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Decoded:
    """Decode all pictures of clips (n,) into ``folder``, or open what is there of the same files, sizes and ``resize``.

    What is there of others is replaced.  A picture takes 3 bytes for each of ``resize`` x ``resize`` x its aspect: at 256
    pixels and 16:9 that is 350 kB, 21 GB for one picture of each of the challenge's 60,566 train clips.  So this is for
    clips whose pictures are read in many epochs; features are extracted from a picture once, and decoding it first would
    only write it and read it again.  most: bytes after which no further clip is added, half of what the disk has free
    unless given; a clip that is not added is decoded whenever it is asked for, with the same pixels.  workers: as in
    ``image_batches``.
    """
    folder, clips = Path(folder), np.unique(clips)
    said = [resize, LONGEST, PIL.__version__, len(images.clips), clips.tolist(), images.digest(clips)]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    if not _is_of(folder, key):
        with partial_folder(folder, DECODED, overwrite=True) as partial:
            most = shutil.disk_usage(partial).free // 2 if most is None else most
            _write_decoded(images, partial, clips, resize, most, workers, progress)
            (partial / DECODED).write_text(json.dumps({"key": key, "resize": resize}) + "\n")
    arrays = {name: map_array(folder / f"{name}.npy") for name in ("first", "shape", "mode", "pixels")}
    start = np.cumsum([0, *arrays["shape"].prod(1)])
    if len(arrays["pixels"]) != start[-1]:
        raise ValueError(f"{folder}: {len(arrays['pixels'])} pixels, expected {start[-1]}")
    return Decoded(resize, start=start[:-1], **arrays)


def _is_of(folder: Path, key: str) -> bool:
    try:
        return json.loads((folder / DECODED).read_text())["key"] == key
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / DECODED}: not the description of decoded pictures ({error!r})") from None


def _write_decoded(
    images: Images, folder: Path, clips: np.ndarray, resize: int, most: int, workers: int | None, progress: bool
) -> None:
    """Write the arrays of ``Decoded``, one clip after another until ``most`` bytes are full."""
    first, shapes, modes = np.full(len(images.clips), -1), [np.empty((0, 2), np.int64)], []
    pixels = ArrayStream(folder / "pixels.npy", np.uint8, (3,))
    found = tqdm(
        _by_clip(images, clips, resize, workers),
        total=len(clips),
        desc="decode",
        unit="clip",
        disable=not progress,
        mininterval=1,
    )
    try:
        for clip, pictures in found:
            if 3 * (pixels.rows + len(pictures.pixels)) > most:
                break
            first[clip] = len(modes)
            pixels.append(pictures.pixels.numpy())
            shapes.append(pictures.shape)
            modes += pictures.modes
        pixels.finish()
    finally:
        found.close()
        pixels.abandon()
    np.save(folder / "first.npy", first)
    np.save(folder / "shape.npy", np.concatenate(shapes))
    np.save(folder / "mode.npy", np.array(modes, "U8"))


def _by_clip(images: Images, clips: np.ndarray, resize: int, workers: int | None) -> Iterator[tuple[int, _Pictures]]:
    """Yield the fitted pictures of each clip, several clips decoded at a time."""
    groups = np.array_split(clips, max(1, -(-len(clips) // _AT_ONCE)))
    workers = _workers(resize, groups, workers, os.cpu_count() or 1)
    for group, found in zip(groups, _loaded(_Fitted(images, resize), groups, workers)):
        count = [len(images.files[clip]) for clip in group]
        rows = np.cumsum([0, *count])
        ends = np.cumsum([0, *found.shape.prod(1)])
        for clip, row, stop in zip(group, rows, rows[1:]):
            yield clip, _Pictures(found.pixels[ends[row] : ends[stop]], found.shape[row:stop], found.modes[row:stop])


class _Pictures(NamedTuple):
    """Fitted pictures one after another: pixels (P, 3) uint8, shape (n, 2), modes (n,)."""

    pixels: Tensor
    shape: np.ndarray
    modes: list[str]


class _Fitted(Dataset):
    """All pictures of clips."""

    def __init__(self, images: Images, resize: int):
        self.images, self.resize = images, resize

    def __getitems__(self, clips: list[int]) -> _Pictures | ValueError:
        try:
            found = [
                _fitted(self.images, clip, number, self.resize)
                for clip in clips
                for number in range(len(self.images.files[clip]))
            ]
        except ValueError as error:
            return error
        pictures, modes = zip(*found)
        flat = torch.from_numpy(np.concatenate([picture.reshape(-1, 3) for picture in pictures]))
        return _Pictures(flat, np.array([picture.shape[:2] for picture in pictures]), list(modes))


def _fitted(images: Images, clip: int, number: int, resize: int) -> tuple[np.ndarray, str]:
    image, mode = read_image(images.path(clip, number), images.clips[clip])
    return fit_picture(image, resize), mode


# -- batches --------------------------------------------------------------------------------------------------------


class ImageBatch(NamedTuple):
    """Pictures of B clips: ``clips`` (B,) positions in the store, ``number`` (B,) which of the clip's images, ``pixels``
    (B, 3, S, S) uint8, channels last in memory, ``modes`` (B,) of the files, such as ``RGB`` or ``L``.
    """

    clips: np.ndarray
    number: np.ndarray
    pixels: Tensor
    modes: list[str]


class _Cut(NamedTuple):
    clips: np.ndarray
    number: np.ndarray
    crops: Crops
    modes: list[str]


class _Drawn(Dataset):
    """One crop a clip, drawn by seed, epoch and clip; a class because a DataLoader takes one."""

    def __init__(self, images: Images, decoded: Decoded | None, size: int, resize: int, seed: int, epoch: int):
        self.images, self.decoded, self.size, self.resize = images, decoded, size, resize
        self.seed, self.epoch = seed, epoch

    def __getitems__(self, clips: list[int]) -> _Cut | ValueError:
        numbers, found, place, flip = [], [], np.full((len(clips), 2), 0.5), np.zeros(len(clips), bool)
        try:
            for row, clip in enumerate(clips):
                rng = np.random.default_rng([self.seed, 5, self.epoch + 1, clip])
                numbers.append(int(rng.integers(len(self.images.files[clip]))))
                kept = self.decoded.picture(clip, numbers[-1]) if self.decoded else None
                found.append(kept or _fitted(self.images, clip, numbers[-1], self.resize))
                if self.epoch != EVALUATION:
                    place[row], flip[row] = rng.random(2), rng.random() < 0.5
        except ValueError as error:  # a DataLoader would wrap it into pages of traceback
            return error
        pictures, modes = zip(*found)
        return _Cut(
            np.array(clips),
            np.array(numbers),
            cut_crops(pictures, place, flip, self.size),
            [str(mode) for mode in modes],
        )


def image_batches(
    images: Images,
    groups: list[np.ndarray],
    *,
    size: int,
    resize: int,
    seed: int,
    epoch: int = EVALUATION,
    workers: int | None = None,
    decoded: Decoded | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[ImageBatch]:
    """Yield one drawn picture of each clip, for groups of clips that have images, in the order given.

    The shorter side becomes ``resize`` pixels, and of that a crop of ``size`` is taken.  epoch: from 0 in training (crop
    anywhere, flipped in one half of the cases); EVALUATION draws the picture of test (centre crop).  workers: loading
    processes; None takes as many as there are cores where pictures are large enough for that to pay.  decoded: pictures
    that need not be decoded again.  device: where the pixels come to lie; they travel as bytes.
    """
    device = torch.device(device)
    if decoded is not None and decoded.resize != resize:
        raise ValueError(f"resize must be that of the decoded pictures, {decoded.resize}, got {resize}")
    for group in groups:
        for clip in group:
            if not images.files[clip]:
                raise ValueError(f"{images.folder}: clip {images.clips[clip]} has no image")
    dataset = _Drawn(images, decoded, size, resize, seed, epoch)
    # Processes of a launched run share the machine's cores, and cutting takes less of them than decoding.
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = _workers(size, groups, workers, min(8 if decoded else 32, cores))
    for batch in _loaded(dataset, groups, workers, pin=device.type == "cuda"):
        crops = Crops(*(part.to(device, non_blocking=True) for part in batch.crops))
        yield ImageBatch(batch.clips, batch.number, resample(crops).permute(0, 3, 1, 2), batch.modes)


def _workers(size: int, groups: list[np.ndarray], asked: int | None, most: int) -> int:
    if asked is not None:
        return asked
    return max(1, most) if size >= _WORTH_A_WORKER and len(groups) > 4 else 0


def _loaded(dataset: Dataset, groups: list[np.ndarray], workers: int, pin: bool = False) -> Iterator:
    """Yield what a dataset has for each group of clips, and raise where it has an error."""
    loader = DataLoader(
        dataset,
        batch_sampler=[list(map(int, group)) for group in groups],
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),
    )  # its own, or it would take a number from the global one
    for found in loader:
        if isinstance(found, ValueError):
            raise found
        yield found


def _as_it_is(found):
    return found
