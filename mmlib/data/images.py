"""Scene images ``img/<clip>/<n>.jpg``: find those of a store's clips and read them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmlib.data.store import ClipStore

SUFFIXES = (".jpg", ".jpeg", ".png")


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

    def digest(self, clips: np.ndarray) -> str:
        """Hash the names and sizes of the files of clips (n,)."""
        digest = hashlib.sha256()
        for clip in clips:
            for number, file in enumerate(self.files[clip]):
                path = self.path(clip, number)
                try:
                    size = path.stat().st_size
                except FileNotFoundError:
                    raise ValueError(f"{path}: image of clip {self.clips[clip]}: missing") from None
                digest.update(f"{self.clips[clip]}/{file} {size}\n".encode())
        return digest.hexdigest()

    def lines(self) -> list[str]:
        """Say it in sentences for a terminal."""
        lines = [
            f"images: {sum(map(len, self.files))} of {len(self.present)} clips; "
            f"{len(self.clips) - len(self.present)} clips without any, left out"
        ]
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
        raise ValueError(
            f"{folder}: holds no image <clip>/<n>.jpg of any clip of {store.path}, "
            f"such as {names[0] if names else 'none'}/1.jpg"
        )
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


def count_converted(modes: Counter) -> str:
    """Say how many pictures were not RGB; empty if all were."""
    other = {mode: number for mode, number in sorted(modes.items()) if mode != "RGB"}
    return (
        f"converted to RGB: {', '.join(f'{number} of mode {mode}' for mode, number in other.items())}" if other else ""
    )
