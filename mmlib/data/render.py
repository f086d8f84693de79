"""Render scene pictures of simulated clips: a network has to learn from them what the simulator calls show and set.

A picture is a function of its clip's show and set and of chance.  It never sees the identity, so it is evidence of who
is there only as far as shows are: identities share shows, and one identity is in several.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmlib.data.images import Images
from mmlib.data.store import ClipStore
from mmlib.data.writer import partial_folder

ABOUT = "pictures.json"  # beside the clips' folders: what drew them
BLOCK = 256  # pictures drawn from one generator; part of the definition of the pictures
MOST_FRAMES = 3
FAMILIES = 6  # of colours, each shared by many shows
CHANNELS = 8  # a caption bar is a channel's, and so of several shows
PIECES = 5
REGIONS = ("wall", "floor", "set piece", "figure", "caption bar")


@dataclass(frozen=True)
class Pictures:
    """What was rendered: ``folder`` holds ``<clip>/<n>.jpg``, ``pictures`` files of ``clips`` clips."""

    folder: Path
    clips: int
    pictures: int


def render_scenes(store: ClipStore, folder: str | Path, *, size: int = 64, overwrite: bool = False) -> Pictures:
    """Write ``folder/<clip>/<n>.jpg`` for all clips of a simulated store, one to three pictures a clip.

    size: side of the square pictures in pixels, at least 16.  The world's seed draws them, from generators of their
    own; the same store and size give the same pictures.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    studio = Studio(store)
    names = store.clips["clip"].to_numpy()
    about = {"simulated": True, "world": _world(store), "size": size, "pictures": len(studio.clip)}
    with partial_folder(Path(folder), ABOUT, overwrite) as partial:
        for name in names:
            (partial / name).mkdir()
        for first in range(0, len(studio.clip), BLOCK):
            picture, _ = studio.draw(first, size)
            for at, pixels in enumerate(picture, first):
                path = partial / names[studio.clip[at]] / f"{studio.frame[at]}.jpg"
                Image.fromarray(pixels).save(path, quality=88)
        (partial / ABOUT).write_text(json.dumps(about) + "\n")
    return Pictures(Path(folder), len(store), len(studio.clip))


def picture_size(images: Images, store: ClipStore) -> int:
    """Return the side of rendered pictures, 0 for pictures that were not rendered; raise where another world's were."""
    path = images.folder / ABOUT
    if not path.exists():
        return 0
    try:
        about = json.loads(path.read_text())
        size, world = about["size"], about["world"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the description of rendered pictures ({error!r})") from None
    if world != _world(store):
        raise ValueError(
            f"{images.folder}: pictures of the simulated world of seed {world.get('seed')}, "
            f"not of the clips of {store.path}"
        )
    return size


def _world(store: ClipStore) -> dict:
    """Return the seed and settings of a store's world, from wherever in its provenance they are."""
    said = store.meta["provenance"]
    while isinstance(said.get("source"), dict):
        said = said["source"]
    return {"seed": int(said.get("seed", 0)), "settings": said.get("settings")}


class Studio:
    """The shows of a simulated world as they look; ``draw`` films them.

    clip, frame: (F,) position in the store and number, from 1, of every picture, in the order of the clips.  first:
    (N,) the first picture of each clip.  look: by name of a property, its values at each place (show and set); place:
    (N,) that of each clip.
    """

    def __init__(self, store: ClipStore):
        for column in ("show", "set"):
            if column not in store.clips:
                raise ValueError(
                    f"{store.path}: no column {column!r}, so it is not simulated and nothing can be rendered"
                )
        self.seed = _world(store)["seed"]
        count = np.random.default_rng([self.seed, 4, 3]).integers(1, MOST_FRAMES + 1, len(store))
        self.clip = np.repeat(np.arange(len(store)), count)
        self.frame = np.arange(len(self.clip)) - np.repeat(np.cumsum(count) - count, count) + 1
        self.first = np.cumsum(count) - count
        show, stage = (store.clips[name].to_numpy(np.int64) for name in ("show", "set"))
        places, self.place = np.unique(np.stack([show, stage], 1), axis=0, return_inverse=True)
        shows, of_place = np.unique(places[:, 0], return_inverse=True)
        channels = [self._channel(number) for number in range(CHANNELS)]
        looks = [self._show(number, channels) for number in shows]
        self.look = {name: np.array([look[name] for look in looks], np.float32)[of_place] for name in looks[0]}
        sets = [self._set(*place) for place in places]
        self.look |= {name: np.array([one[name] for one in sets], np.float32) for name in sets[0]}

    def _channel(self, number: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, 4, 0, number])
        return {
            "channel": number,
            "bar": rng.uniform(0.13, 0.22),
            "bar_colour": _hsv(rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.9)),
            "logo": rng.uniform(0.05, 0.95),
            "logo_colour": _hsv(rng.random(), 0.9, 0.95),
        }

    def _show(self, number: int, channels: list[dict]) -> dict[str, np.ndarray]:
        """Draw a show's palette, pattern of the wall, pieces, light and channel."""
        rng = np.random.default_rng([self.seed, 4, 1, number])
        family = rng.integers(FAMILIES)
        hue = family / FAMILIES + 0.02 * rng.standard_normal()
        near = hue + 0.06 * rng.standard_normal(PIECES) + rng.choice([0, 0.5, 0.33], PIECES, p=[0.5, 0.3, 0.2])
        angle = rng.choice(4) * np.pi / 4 + 0.1 * rng.standard_normal()
        return channels[rng.integers(CHANNELS)] | {
            "family": family,
            "wall": _hsv(hue, rng.uniform(0.3, 0.7), rng.uniform(0.45, 0.8)),
            "wall_low": _hsv(hue + 0.05, rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.6)),
            "floor": _hsv(hue + rng.choice([0, 0.5]), rng.uniform(0.1, 0.5), rng.uniform(0.2, 0.6)),
            "horizon": rng.uniform(0.6, 0.8),
            "wave": rng.uniform(4, 14) * np.array([np.cos(angle), np.sin(angle)]),
            "crossed": float(rng.random() < 0.4),
            "contrast": rng.uniform(0.15, 0.4),
            "piece_colour": np.stack([_hsv(h, rng.uniform(0.4, 0.9), rng.uniform(0.3, 0.95)) for h in near]),
            "piece_size": rng.uniform(0.05, 0.17, (PIECES, 2)),
            "piece_shape": rng.integers(3, size=PIECES),
            "light": rng.uniform(0.2, 0.7),
        }

    def _set(self, show: int, stage: int) -> dict[str, np.ndarray]:
        """Draw where a set of a show has its pieces and its light; a piece may stand aside."""
        rng = np.random.default_rng([self.seed, 4, 2, show, stage])
        there = rng.random(PIECES) < 0.8
        there[rng.integers(PIECES)] = True
        return {
            "piece": rng.uniform([0.05, 0.1], [0.95, 0.8], (PIECES, 2)),
            "there": there,
            "lamp": rng.uniform(0.1, 0.9, 2),
        }

    def draw(self, first: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the pictures ``first`` (a multiple of BLOCK) and after: (n, S, S, 3) uint8, and what each pixel
        belongs to, (n, S, S), a position in REGIONS.
        """
        rng = np.random.default_rng([self.seed, 4, 4, first, size])
        rows = np.arange(first, min(first + BLOCK, len(self.clip)))
        n = len(rows)
        look = {name: value[self.place[self.clip[rows]]] for name, value in self.look.items()}
        take = self._takes(self.clip[rows])
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        v, u = np.meshgrid(axis, axis, indexing="ij")  # of the picture
        zoom = take["zoom"] * (1 + 0.03 * rng.standard_normal(n, np.float32))
        centre = take["centre"] + np.float32(0.03) * rng.standard_normal((n, 2), np.float32)
        x, y = ((part - 0.5) * _each(zoom) + _each(centre[:, i]) for i, part in enumerate((u, v)))  # of the stage

        region = (y > _each(look["horizon"])).astype(np.int8)
        high = _each(np.clip(y / _each(look["horizon"]), 0, 1))
        picture = _each(look["wall"]) + high * _each(look["wall_low"] - look["wall"])
        phase = 2 * np.pi * (x * _each(look["wave"][:, 0]) + y * _each(look["wave"][:, 1]))
        cross = 2 * np.pi * (y * _each(look["wave"][:, 0]) - x * _each(look["wave"][:, 1]))
        pattern = np.sin(phase) * np.where(_each(look["crossed"]) > 0, np.sin(cross), 1)
        picture *= _each(1 + _each(look["contrast"]) * np.sign(pattern))
        _paint(picture, look["floor"], region > 0)
        for k in range(PIECES):
            a, b = (_each(look["piece_size"][:, k, i]) for i in (0, 1))
            dx, dy = (
                np.abs(part - _each(look["piece"][:, k, i])) / half for i, (part, half) in enumerate(((x, a), (y, b)))
            )
            shape = _each(look["piece_shape"][:, k])  # a diamond, an ellipse, a box
            inside = np.where(shape == 0, dx + dy, np.where(shape == 1, dx * dx + dy * dy, np.maximum(dx, dy))) < 1
            inside &= _each(look["there"][:, k]) > 0
            _paint(picture, look["piece_colour"][:, k], inside)
            region[inside] = 2
        far = (x - _each(look["lamp"][:, 0])) ** 2 + (y - _each(look["lamp"][:, 1])) ** 2
        picture *= _each(1 - _each(look["light"]) * (1 - np.exp(-4 * far)))
        for k in range(2):  # up to two persons in front, who look like nobody
            at = take["figure"][:, k] + np.float32(0.02) * rng.standard_normal((n, 2), np.float32)
            width, there = _each(take["width"][:, k]), _each(take["there"][:, k])
            dx, dy = u - _each(at[:, 0]), v - _each(at[:, 1])
            head = (dx / width) ** 2 + (dy / (1.3 * width)) ** 2 < 1
            body = (dx / (2.2 * width)) ** 2 + ((v - 1.05) / (1.05 - _each(at[:, 1]) - 1.2 * width)) ** 2 < 1
            for part, colour in ((body & there, take["cloth"][:, k]), (head & there, take["skin"][:, k])):
                _paint(picture, colour, part)
                region[part] = 3
        # Exposure and colour cast are of the camera, the caption bar is added after it.
        picture *= _each(take["cast"])
        picture += _each(_each(take["noise"])) * rng.standard_normal(picture.shape, dtype=np.float32)
        bar = (v > 1 - _each(look["bar"])) & _each(take["caption"])
        text = (
            bar & (rng.random((n, 1, size)) < 0.5) & (np.abs(v - 1 + _each(look["bar"]) / 2) < _each(look["bar"]) / 6)
        )
        logo = bar & (np.abs(u - _each(look["logo"])) < 0.06)
        _paint(picture, look["bar_colour"], bar)
        _paint(picture, np.full((n, 3), 0.95), text)
        _paint(picture, look["logo_colour"], logo)
        region[bar] = 4
        return np.clip(255 * picture + 0.5, 0, 255).astype(np.uint8), region

    def regions(self, clips: np.ndarray, numbers: np.ndarray, size: int) -> np.ndarray:
        """Return what each pixel of picture ``numbers`` (n,), from 0, of ``clips`` (n,) belongs to, (n, S, S)."""
        at = self.first[clips] + numbers
        out = np.empty((len(at), size, size), np.int8)
        for block in np.unique(at // BLOCK):
            mine = at // BLOCK == block
            out[mine] = self.draw(block * BLOCK, size)[1][at[mine] - block * BLOCK]
        return out

    def _takes(self, clip: np.ndarray) -> dict[str, np.ndarray]:
        """Draw what all pictures of a clip share, for each of ``clip`` (n,): the camera and the persons in front."""
        unique, inverse = np.unique(clip, return_inverse=True)
        takes = []
        for number in unique:
            rng = np.random.default_rng([self.seed, 4, 5, number])
            takes.append(
                {
                    "zoom": rng.uniform(0.6, 1.0),
                    "centre": 0.5 + rng.uniform(-0.22, 0.22, 2),
                    "figure": np.stack([rng.uniform(0.1, 0.9, 2), rng.uniform(0.3, 0.55, 2)], 1),
                    "width": rng.uniform(0.05, 0.11, 2),
                    "there": [True, rng.random() < 0.5],
                    "cloth": rng.uniform(0.05, 0.9, (2, 3)),
                    "skin": np.outer(rng.uniform(0.4, 0.95, 2), [1, 0.8, 0.65]),
                    "cast": rng.uniform(0.65, 1.2) * rng.uniform(0.87, 1.13, 3),
                    "noise": rng.uniform(0.01, 0.05),
                    "caption": rng.random() < 0.6,
                }
            )
        kind = {"there": bool, "caption": bool}
        return {
            name: np.array([take[name] for take in takes], kind.get(name, np.float32))[inverse] for name in takes[0]
        }


def _each(value: np.ndarray) -> np.ndarray:
    """Give one value a picture (n,), one colour a picture (n, 3) or one value a pixel (n, S, S) its broadcast shape."""
    if value.ndim == 3:
        return value[..., None]
    return value[:, None, None] if value.ndim == 1 else value[:, None, None, :]


def _paint(picture: np.ndarray, colour: np.ndarray, where: np.ndarray) -> None:
    """Cover pixels (n, S, S) of pictures (n, S, S, 3) with a colour a picture (n, 3)."""
    np.copyto(picture, _each(colour), where=where[..., None], casting="same_kind")


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Return a colour as (3,) in [0, 1]; a hue is taken modulo 1."""
    offset = np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return value * (1 - saturation * (1 - np.clip(offset, 0, 1)))
