"""Render scene pictures of simulated clips: a network has to learn from them what the simulator calls show and set.

A picture is a function of its clip's show and set and of chance.  It never sees the identity, so it is evidence of who
is there only as far as shows are: identities share shows, and one identity is in several.
"""

from __future__ import annotations

import json
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


def render_scenes(store: ClipStore, folder: str | Path, *, size: int = 64, overwrite: bool = False) -> int:
    """Write ``folder/<clip>/<n>.jpg`` for all clips of a simulated store, one to three a clip, and count the pictures.

    size: side of the square pictures in pixels.  The same store and size give the same pictures.
    """
    studio, names = Studio(store), store.clips["clip"].to_numpy()
    about = {"simulated": True, "world": _world(store), "size": size, "pictures": len(studio.clip)}
    with partial_folder(Path(folder), ABOUT, overwrite) as partial:
        for name in names:
            (partial / name).mkdir()
        for first in range(0, len(studio.clip), BLOCK):
            for at, pixels in enumerate(studio.draw(first, size)[0], first):
                path = partial / names[studio.clip[at]] / f"{studio.frame[at]}.jpg"
                Image.fromarray(pixels).save(path, quality=88)
        (partial / ABOUT).write_text(json.dumps(about) + "\n")
    return len(studio.clip)


def picture_size(images: Images, store: ClipStore) -> int:
    """Return the side of rendered pictures, 0 for pictures that were not rendered; raise where another world's were."""
    path = images.folder / ABOUT
    if not path.exists():
        return 0
    try:
        size, world = (json.loads(path.read_text())[name] for name in ("size", "world"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the description of rendered pictures ({error!r})") from None
    if world != _world(store):
        other = f"pictures of the simulated world of seed {world.get('seed')}"
        raise ValueError(f"{images.folder}: {other}, not of the clips of {store.path}")
    return size


def _world(store: ClipStore) -> dict:
    """Return the seed and settings of a store's world, from wherever in its provenance they are."""
    said = store.meta["provenance"]
    while isinstance(said.get("source"), dict):
        said = said["source"]
    return {"seed": int(said.get("seed", 0)), "settings": said.get("settings")}


class Studio:
    """The shows of a simulated world as they look; ``draw`` films them.

    clip, frame: (F,) clip and number, from 1, of every picture.  first, place: (N,) of each clip its first picture and
    where it was filmed.  look: by name of a property, its values at each place (show and set).
    """

    def __init__(self, store: ClipStore):
        if missing := [column for column in ("show", "set") if column not in store.clips]:
            raise ValueError(f"{store.path}: no column {missing[0]!r}: not simulated, so nothing can be rendered")
        self.seed = _world(store)["seed"]
        count = np.random.default_rng([self.seed, 4, 3]).integers(1, MOST_FRAMES + 1, len(store))
        self.clip = np.repeat(np.arange(len(store)), count)
        self.frame = np.arange(len(self.clip)) - np.repeat(np.cumsum(count) - count, count) + 1
        self.first = np.cumsum(count) - count
        show, stage = (store.clips[name].to_numpy(np.int64) for name in ("show", "set"))
        places, self.place = np.unique(np.stack([show, stage], 1), axis=0, return_inverse=True)
        self.look = _stacked([self._show(show) | self._set(show, stage) for show, stage in places])

    def _channel(self, number: np.integer) -> dict:
        rng = np.random.default_rng([self.seed, 4, 0, number])
        return {
            "channel": number,
            "bar": rng.uniform(0.13, 0.22),
            "bar_colour": _hsv(rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.9)),
            "logo": rng.uniform(0.05, 0.95),
            "logo_colour": _hsv(rng.random(), 0.9, 0.95),
        }

    def _show(self, number: int) -> dict:
        """Draw a show's palette, pattern of the wall, pieces, light and channel."""
        rng = np.random.default_rng([self.seed, 4, 1, number])
        family = rng.integers(FAMILIES)
        hue = family / FAMILIES + 0.02 * rng.standard_normal()
        near = hue + 0.06 * rng.standard_normal(PIECES) + rng.choice([0, 0.5, 0.33], PIECES, p=[0.5, 0.3, 0.2])
        angle = rng.choice(4) * np.pi / 4 + 0.1 * rng.standard_normal()
        return self._channel(rng.integers(CHANNELS)) | {
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

    def _set(self, show: int, stage: int) -> dict:
        """Draw where a set of a show has its pieces and its light; a piece may stand aside."""
        rng = np.random.default_rng([self.seed, 4, 2, show, stage])
        there = rng.random(PIECES) < 0.8
        there[rng.integers(PIECES)] = True
        piece = rng.uniform([0.05, 0.1], [0.95, 0.8], (PIECES, 2))
        return {"piece": piece, "there": there, "lamp": rng.uniform(0.1, 0.9, 2)}

    def draw(self, first: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the block of pictures from ``first`` on, (n, S, S, 3) uint8, and each pixel's position in REGIONS."""
        rng = np.random.default_rng([self.seed, 4, 4, first, size])
        rows = np.arange(first, min(first + BLOCK, len(self.clip)))
        look = {name: _shaped(value[self.place[self.clip[rows]]]) for name, value in self.look.items()}
        take = _stacked([self._take(clip) for clip in self.clip[rows]])
        take = {name: _shaped(value) for name, value in take.items()}

        def shaken(scale: float, *shape: int) -> np.ndarray:
            return np.float32(scale) * _shaped(rng.standard_normal((len(rows), *shape), np.float32))

        v, u = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size  # of the picture
        zoom, (left, top) = take["zoom"] * (1 + shaken(0.03)), take["centre"] + shaken(0.03, 2)
        x, y = (u - 0.5) * zoom + left, (v - 0.5) * zoom + top  # of the stage

        region = (y > look["horizon"]).astype(np.int8)
        picture = look["wall"] + np.clip(y / look["horizon"], 0, 1) * (look["wall_low"] - look["wall"])  # (3, n, S, S)
        right, down = look["wave"]
        phase, cross = 2 * np.pi * (x * right + y * down), 2 * np.pi * (y * right - x * down)
        pattern = np.sin(phase) * np.where(look["crossed"] > 0, np.sin(cross), 1)
        picture *= 1 + look["contrast"] * np.sign(pattern)
        np.copyto(picture, look["floor"], where=region > 0)
        for k in range(PIECES):
            at, half, shape = (look[name][k] for name in ("piece", "piece_size", "piece_shape"))
            dx, dy = np.abs(x - at[0]) / half[0], np.abs(y - at[1]) / half[1]
            round_or_box = np.where(shape == 1, dx * dx + dy * dy, np.maximum(dx, dy))
            inside = (np.where(shape == 0, dx + dy, round_or_box) < 1) & (look["there"][k] > 0)  # 0 is a diamond
            np.copyto(picture, look["piece_colour"][k], where=inside)
            region[inside] = 2
        far = (x - look["lamp"][0]) ** 2 + (y - look["lamp"][1]) ** 2
        picture *= 1 - look["light"] * (1 - np.exp(-4 * far))
        for k in range(2):  # up to two persons in front, who look like nobody
            (across, up), width, there = take["figure"][k] + shaken(0.02, 2), take["width"][k], take["there"][k] > 0
            dx, dy = u - across, v - up
            head = (dx / width) ** 2 + (dy / (1.3 * width)) ** 2 < 1
            body = (dx / (2.2 * width)) ** 2 + ((v - 1.05) / (1.05 - up - 1.2 * width)) ** 2 < 1
            for part, colour in ((body & there, take["cloth"][k]), (head & there, take["skin"][k])):
                np.copyto(picture, colour, where=part)
                region[part] = 3
        # Exposure and colour cast are of the camera, the caption bar is added after it.
        picture *= take["cast"]
        picture += take["noise"] * np.moveaxis(rng.standard_normal((len(rows), size, size, 3), np.float32), -1, 0)
        bar = (v > 1 - look["bar"]) & (take["caption"] > 0)
        text = bar & (rng.random((len(rows), 1, size)) < 0.5) & (np.abs(v - 1 + look["bar"] / 2) < look["bar"] / 6)
        logo = bar & (np.abs(u - look["logo"]) < 0.06)
        for part, colour in ((bar, look["bar_colour"]), (text, 0.95), (logo, look["logo_colour"])):
            np.copyto(picture, colour, where=part)
        region[bar] = 4
        return np.clip(255 * np.moveaxis(picture, 0, -1) + 0.5, 0, 255).astype(np.uint8), region

    def regions(self, clips: np.ndarray, numbers: np.ndarray, size: int) -> np.ndarray:
        """Return what each pixel of picture ``numbers`` (n,), from 0, of ``clips`` (n,) belongs to, (n, S, S)."""
        at = self.first[clips] + numbers
        out = np.empty((len(at), size, size), np.int8)
        for block in np.unique(at // BLOCK):
            mine = at // BLOCK == block
            out[mine] = self.draw(block * BLOCK, size)[1][at[mine] - block * BLOCK]
        return out

    def _take(self, clip: int) -> dict:
        """Draw what all pictures of a clip share: the camera and the persons in front."""
        rng = np.random.default_rng([self.seed, 4, 5, clip])
        return {
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


def _stacked(drawn: list[dict]) -> dict[str, np.ndarray]:
    """Return what was drawn for each of several, by name (n, ...) float32."""
    return {name: np.array([each[name] for each in drawn], np.float32) for name in drawn[0]}


def _shaped(value: np.ndarray) -> np.ndarray:
    """Give values of pictures (n, ...) the shape (..., n, 1, 1), which broadcasts over pixels."""
    return np.moveaxis(value, 0, -1)[..., None, None]


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Return a colour as (3,) in [0, 1]; a hue is taken modulo 1."""
    offset = np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return value * (1 - saturation * (1 - np.clip(offset, 0, 1)))
