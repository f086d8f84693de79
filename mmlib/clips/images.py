"""Scene images ``img/<clip>/<n>.jpg``: find those of a store's clips, take one a clip, and bring it to the network's size.

Everything random about a picture (which of its clip's, which crop, flipped or not) comes from a generator of the seed,
the epoch and the clip, so that neither the order nor the number of loading processes changes a batch.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmlib.clips.store import ClipStore

SUFFIXES = (".jpg", ".jpeg", ".png")
EVALUATION = -1  # in place of an epoch: the one picture a clip that is drawn in test
_WORTH_A_WORKER = 128  # pixels; smaller pictures are decoded faster than they are passed between processes


@dataclass(frozen=True)
class Images:
    """The image files of a store's clips.

    files: for each clip of the store the names of its files, by number (``2.jpg`` before ``10.jpg``), those without a
    number after them by name; empty for a clip without any.  unknown: folders that are no clip of the store.  other:
    files in clips' folders that are no ``.jpg``, ``.jpeg`` or ``.png``.
    """

    folder: Path
    clips: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]
    unknown: int
    other: int

    @property
    def present(self) -> np.ndarray:
        """Positions of the clips that have an image."""
        return np.flatnonzero([len(files) > 0 for files in self.files])

    def path(self, clip: int, number: int) -> Path:
        """Return the file of a clip's image, counted from 0."""
        return self.folder / self.clips[clip] / self.files[clip][number]

    def lines(self) -> list[str]:
        """Say it in sentences for a terminal."""
        lines = [f"images: {sum(map(len, self.files))} of {len(self.present)} clips; "
                 f"{len(self.clips) - len(self.present)} clips without any, left out"]
        if self.unknown:
            lines.append(f"images: {self.unknown} folders belong to no clip of the store")
        if self.other:
            lines.append(f"images: {self.other} files are no .jpg, .jpeg or .png")
        return lines


def index_images(folder: str | Path, store: ClipStore) -> Images:
    """List the images of a store's clips in ``folder``, which holds a folder a clip; nothing is opened."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    names = tuple(store.clips["clip"])
    found = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
    files, other = [], 0
    for name in names:
        entries = os.scandir(folder / name) if name in found else ()
        listed = [entry.name for entry in entries if not entry.name.startswith(".")]
        chosen = [file for file in listed if file.lower().endswith(SUFFIXES)]
        other += len(listed) - len(chosen)
        files.append(tuple(sorted(chosen, key=_by_number)))
    images = Images(folder, names, tuple(files), len(found.difference(names)), other)
    if not len(images.present):
        raise ValueError(f"{folder}: holds no image <clip>/<n>.jpg of any clip of {store.path}, "
                         f"such as {names[0] if names else 'none'}/1.jpg")
    return images


def _by_number(file: str) -> tuple[bool, int, str]:
    stem = file.rsplit(".", 1)[0]
    numbered = stem.isascii() and stem.isdigit()
    return not numbered, int(stem) if numbered else 0, file


def read_image(path: Path, clip: str) -> tuple[Image.Image, str]:
    """Open an image file as RGB; return it and the mode that it had.

    Grey, palette and CMYK pictures become RGB, 16-bit grey by its upper byte; an alpha channel is dropped.  A file that
    cannot be decoded to its end, or of another mode, raises.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice that size is an error below
            with Image.open(path) as image:
                mode = image.mode
                image.load()
                if mode.startswith("I;16"):
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                elif mode in ("I", "F"):
                    raise ValueError(f"pixels of mode {mode}, not 8 or 16 bits a channel")
                elif mode == "P":  # by way of its alpha, which may be one value a colour
                    image = image.convert("RGBA")
                return image.convert("RGB"), mode
    except FileNotFoundError:
        raise ValueError(f"{path}: image of clip {clip}: missing") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: image of clip {clip}: not a picture ({path.stat().st_size} bytes)") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: image of clip {clip}: {error}") from None


def crop_image(image: Image.Image, size: int, resize: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Resize the shorter side to ``resize`` pixels and crop ``size``: (S, S, 3) uint8.

    With ``rng`` the crop lies anywhere and is flipped in one half of the cases; without, it is the centre.  Crop and
    resize are one step, so that a picture of one pixel by ten thousand takes no more memory than another.
    """
    side = min(image.size) * size / resize
    spare = np.array(image.size) - side
    left, top = spare * (rng.random(2) if rng is not None else .5)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)))
    return pixels[:, ::-1] if rng is not None and rng.random() < .5 else pixels


class ImageBatch(NamedTuple):
    """Pictures of B clips: ``clips`` (B,) positions in the store, ``number`` (B,) which of the clip's images, ``pixels``
    (B, 3, S, S) uint8, ``modes`` (B,) of the files, such as ``RGB`` or ``L``.
    """

    clips: np.ndarray
    number: np.ndarray
    pixels: Tensor
    modes: list[str]


class _Drawn(Dataset):
    """One picture a clip, drawn by seed, epoch and clip; a class because a DataLoader takes one."""

    def __init__(self, images: Images, size: int, resize: int, seed: int, epoch: int):
        self.images, self.size, self.resize, self.seed, self.epoch = images, size, resize, seed, epoch

    def __getitem__(self, clip: int) -> tuple[int, int, np.ndarray, str]:
        rng = np.random.default_rng([self.seed, 5, self.epoch + 1, clip])
        number = int(rng.integers(len(self.images.files[clip])))
        image, mode = read_image(self.images.path(clip, number), self.images.clips[clip])
        return clip, number, crop_image(image, self.size, self.resize, None if self.epoch == EVALUATION else rng), mode


def _collate(drawn: list[tuple]) -> ImageBatch:
    clips, number, pixels, modes = zip(*drawn)
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return ImageBatch(np.array(clips), np.array(number), stacked, list(modes))


def image_batches(images: Images, groups: list[np.ndarray], *, size: int, resize: int, seed: int,
                  epoch: int = EVALUATION, workers: int | None = None) -> Iterator[ImageBatch]:
    """Yield one drawn picture of each clip, for groups of clips that have images, in the order given.

    epoch: from 0 in training (random crop and flip); EVALUATION draws the picture of test (centre crop).  workers:
    loading processes; None takes as many as there are cores where pictures are large enough for that to pay.
    """
    for group in groups:
        for clip in group:
            if not images.files[clip]:
                raise ValueError(f"{images.folder}: clip {images.clips[clip]} has no image")
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if size >= _WORTH_A_WORKER and len(groups) > 4 else 0
    loader = DataLoader(_Drawn(images, size, resize, seed, epoch), batch_sampler=[list(map(int, g)) for g in groups],
                        collate_fn=_collate, num_workers=workers, pin_memory=torch.cuda.is_available(),
                        generator=torch.Generator())  # its own, or it would take a number from the global one
    yield from loader


def count_converted(modes: Counter) -> str:
    """Say how many pictures were not RGB; empty if all were."""
    other = {mode: number for mode, number in sorted(modes.items()) if mode != "RGB"}
    return f"converted to RGB: {', '.join(f'{number} of mode {mode}' for mode, number in other.items())}" if other else ""
