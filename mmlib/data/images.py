"""Scene pictures ``img/<clip>/<n>.jpg``: find those of a store's clips, decode them once, cut one crop a clip.

What is random about a crop comes from a generator of the seed, the epoch and the clip: neither order, nor loading
processes, nor pictures decoded before change a batch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mmlib.data.store import ClipStore
from mmlib.data.writer import partial_folder

SUFFIXES = (".jpg", ".jpeg", ".png")
SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir")  # left by systems, in any case
LONGEST = 2  # longer sides, in shorter ones: of a longer picture the middle is taken, so that memory is bounded
EVALUATION = -1  # in place of an epoch: the one picture a clip that is drawn in test
DECODED = "decoded.json"  # in a folder of decoded pictures: of which files
_WORTH_A_WORKER = 128  # pixels; smaller pictures are decoded faster than they are passed between processes
_AT_ONCE = 16  # clips a loading process decodes before it hands over


@dataclass(frozen=True)
class Images:
    """The image files of a store's clips.

    files: for each clip the names of its files, by number (``2.jpg`` before ``10.jpg``), then by name; whole paths of
    those that lie elsewhere.  unknown: folders that are no clip of the store.  other: files in clips' folders that are
    no ``.jpg``, ``.jpeg`` or ``.png``.
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

    def digest(self, clips: np.ndarray) -> str:
        """Hash the names and the content of the files of clips (n,).

        Size and times would be cheaper, but a copy of the folder has others, and would be decoded and trained on again.
        To read every file costs little beside decoding it.
        """
        files = [(clip, number) for clip in clips for number in range(len(self.files[clip]))]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(self._digest, *zip(*files)))
        return hashlib.sha256("".join(found).encode()).hexdigest()

    def _digest(self, clip: int, number: int) -> str:
        path = self.path(clip, number)
        try:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            raise ValueError(f"{path}: image of clip {self.clips[clip]}: missing") from None
        return f"{self.clips[clip]}/{self.files[clip][number]} {content}\n"

    def lines(self) -> list[str]:
        """Say it in sentences for a terminal."""
        count, clips = sum(map(len, self.files)), len(self.present)
        said = [f"{count} of {clips} clips; {len(self.clips) - clips} clips without any, left out"]
        said += [f"{self.unknown} folders belong to no clip of the store"] * bool(self.unknown)
        said += [f"{self.other} files are no .jpg, .jpeg or .png"] * bool(self.other)
        return [f"images: {line}" for line in said]


def index_images(folder: str | Path, store: ClipStore) -> Images:
    """List the images of a store's clips in ``folder``, which holds a folder a clip; nothing is opened."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    names = tuple(store.clips["clip"])
    found = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name)}
    files, other = [], 0
    for name in names:
        entries = os.scandir(folder / name) if name in found else ()
        listed = [entry.name for entry in entries if not is_hidden(entry.name)]
        chosen = [file for file in listed if file.lower().endswith(SUFFIXES)]
        other += len(listed) - len(chosen)
        files.append(tuple(sorted(chosen, key=by_number)))
    if not any(files):
        example = f"{names[0] if names else 'none'}/1.jpg"
        raise ValueError(f"{folder}: holds no image <clip>/<n>.jpg of any clip of {store.path}, such as {example}")
    return Images(folder, names, tuple(files), len(found.difference(names)), other)


def is_hidden(name: str) -> bool:
    """Say whether a file or folder is hidden, or one that a system puts beside pictures, by its name."""
    return name.startswith(".") or name.lower() in SYSTEM


def by_number(file: str) -> tuple[bool, int, str]:
    """Order names of files: ``2.jpg`` before ``10.jpg``, and those without a number after them."""
    stem = file.rsplit(".", 1)[0]
    numbered = stem.isascii() and stem.isdigit()
    return not numbered, int(stem) if numbered else 0, file


def read_image(path: Path, clip: str) -> tuple[Image.Image, str]:
    """Open an image file as RGB, 16-bit grey by its upper byte, without alpha; return it and the mode that it had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice that size is an error below
            with Image.open(path) as file:
                mode, image = file.mode, cast(Image.Image, file)
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


def count_converted(modes: Counter) -> str:
    """Say how many pictures were not RGB; empty if all were."""
    other = [f"{number} of mode {mode}" for mode, number in sorted(modes.items()) if mode != "RGB"]
    return f"converted to RGB: {', '.join(other)}" if other else ""


def fit_picture(image: Image.Image, resize: int) -> Image.Image:
    """Resize the shorter side of an image to ``resize`` pixels, the longer in proportion, at most to ``LONGEST``."""
    shorter = min(image.size)
    size = [min(LONGEST * resize, round(side * resize / shorter)) for side in image.size]
    kept = [min(side, LONGEST * shorter) for side in image.size]
    left, top = ((side - part) / 2 for side, part in zip(image.size, kept))
    return image.resize(size, Image.Resampling.BILINEAR, (left, top, left + kept[0], top + kept[1]))


def crop_picture(image: Image.Image, size: int, place: np.ndarray, flip: bool) -> np.ndarray:
    """Cut a crop (S, S, 3) uint8 of ``size`` pixels a side, interpolated between pixels, and mirrored if ``flip``.

    place: (2,) in [0, 1], along width and height, from the left or top (0) to the right or bottom (1).
    """
    left, top = ((side - size) * part for side, part in zip(image.size, place))
    box = (left, top, left + size, top + size)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    return pixels[:, ::-1] if flip else pixels


def decode(
    images: Images, folder: Path, clips: np.ndarray, *, resize: int, most: int | None = None, progress: bool = False
) -> Images:
    """Return the images with those of clips (n,) decoded: read from ``folder`` without compression, the same pixels.

    What is in the folder is used again if it is of the same files and ``resize``, else replaced.  At 256 pixels a
    picture of 16:9 takes 350 kB, one of each of the challenge's 60,566 train clips 21 GB.  most: bytes that they may
    take, half of what the disk has free unless given; where they might take more, the images are returned as they are.
    """
    folder, clips = Path(os.path.abspath(folder)), np.unique(clips)
    said = [resize, LONGEST, PIL.__version__, images.clips, clips.tolist(), images.digest(clips)]
    key = json.dumps({"key": hashlib.sha256(json.dumps(said).encode()).hexdigest()})
    files = {int(clip): [f"{number}.ppm" for number in range(len(images.files[clip]))] for clip in clips}
    if not (folder / DECODED).exists() or (folder / DECODED).read_bytes() != key.encode():
        folder.parent.mkdir(parents=True, exist_ok=True)
        most = shutil.disk_usage(folder.parent).free // 2 if most is None else most
        if 3 * resize * LONGEST * resize * sum(map(len, files.values())) > most:
            return images
        with partial_folder(folder, DECODED, overwrite=True) as partial:
            groups = np.array_split(clips, -(-len(clips) // _AT_ONCE))
            save = functools.partial(_save_fitted, images, resize, partial)
            saved = _loaded(save, groups, _workers(resize, groups))
            for _ in tqdm(saved, "decode", len(groups), unit="block", disable=not progress, mininterval=1):
                pass
            (partial / DECODED).write_text(key)
    decoded = {clip: tuple(str(folder / images.clips[clip] / name) for name in of) for clip, of in files.items()}
    return replace(images, files=tuple(decoded.get(clip, own) for clip, own in enumerate(images.files)))


def _save_fitted(images: Images, resize: int, folder: Path, clips: list[int]) -> None:
    for clip in clips:
        (folder / images.clips[clip]).mkdir()
        for number in range(len(images.files[clip])):
            image, _ = read_image(images.path(clip, number), images.clips[clip])
            fit_picture(image, resize).save(folder / images.clips[clip] / f"{number}.ppm")


class ImageBatch(NamedTuple):
    """Pictures of B clips."""

    clips: np.ndarray  # (B,) positions in the store
    number: np.ndarray  # (B,) which of the clip's images
    pixels: Tensor  # (B, 3, S, S) uint8, channels last in memory
    modes: list[str]  # of the files, such as ``RGB`` or ``L``


def image_batches(
    images: Images,
    groups: list[np.ndarray],
    *,
    size: int,
    resize: int,
    seed: int,
    epoch: int = EVALUATION,
    workers: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[ImageBatch]:
    """Yield one drawn picture of each clip, for groups of clips that have images, in the order given.

    The shorter side becomes ``resize`` pixels, and of that a crop of ``size`` is taken: in training, epoch 0 and on,
    anywhere, and flipped in one half of the cases; in EVALUATION in the centre.  workers: loading processes; None takes
    one a core where pictures are large enough for that to pay.  device: of the pixels, which travel as bytes.
    """
    if workers is None:  # processes of a launched run share the machine's cores
        workers = _workers(size, groups, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    draw = functools.partial(_draw, images, size, resize, seed, epoch)
    for batch in _loaded(draw, groups, workers, pin=torch.device(device).type == "cuda"):
        yield batch._replace(pixels=batch.pixels.to(device, non_blocking=True).permute(0, 3, 1, 2))


def _draw(images: Images, size: int, resize: int, seed: int, epoch: int, clips: list[int]) -> ImageBatch:
    """Draw one crop a clip by seed, epoch and clip; the pixels are (B, S, S, 3)."""
    numbers, modes, pixels = [], [], np.empty((len(clips), size, size, 3), np.uint8)
    for row, clip in enumerate(clips):
        if not images.files[clip]:
            raise ValueError(f"{images.folder}: clip {images.clips[clip]} has no image")
        rng = np.random.default_rng([seed, 5, epoch + 1, clip])
        number = int(rng.integers(len(images.files[clip])))
        image, mode = read_image(images.path(clip, number), images.clips[clip])
        place, flip = (np.full(2, 0.5), False) if epoch == EVALUATION else (rng.random(2), rng.random() < 0.5)
        pixels[row] = crop_picture(fit_picture(image, resize), size, place, flip)
        numbers.append(number)
        modes.append(mode)
    return ImageBatch(np.array(clips), np.array(numbers), torch.from_numpy(pixels), modes)


def _workers(side: int, groups: list[np.ndarray], sharing: int = 1) -> int:
    cores = (os.cpu_count() or 1) // sharing
    return min(32, max(1, cores)) if side >= _WORTH_A_WORKER and len(groups) > 4 else 0


def _attempt(work: Callable, group: np.ndarray) -> Any:
    """Return what ``work`` makes of a group, or its error, which a DataLoader would wrap into pages of traceback."""
    try:
        return work([int(clip) for clip in group])
    except (ValueError, OSError, MemoryError) as error:
        return error


def _loaded(work: Callable, groups: list[np.ndarray], workers: int, pin: bool = False) -> Iterator:
    """Yield what ``work`` makes of each group of clips, computed by ``workers`` processes, and raise where it fails."""
    # A generator of its own, or the loader would take a number from the global one.
    how: dict[str, Any] = {"dataset": groups, "batch_size": None, "num_workers": workers, "pin_memory": pin}
    how |= {"generator": torch.Generator(), "collate_fn": functools.partial(_attempt, work)}
    try:
        for found in DataLoader(**how):
            if isinstance(found, Exception):
                raise found
            yield found
    except RuntimeError as error:  # a process that the system killed
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise MemoryError(f"in a process that loads pictures ({reason}); lower batch, or allow more") from None
