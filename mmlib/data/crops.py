"""Crops of pictures: each is cut out where it is stored, the rest is arithmetic of whole batches on any device.

A picture is brought to the network's resolution once (``fit_picture``); a crop of it may lie between pixels.  The
arithmetic is that of Pillow's ``Image.resize`` with ``box`` and ``BILINEAR``, to the last bit: weights in fixed point
of 22 bits, columns before rows, each rounded to 8 bits.  (New versions of Pillow take rows first where a picture is tall
enough, so that a pixel of these may differ by 1.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_BITS = 22  # of a weight, as in Pillow for 8-bit channels
_TAPS = 4  # pixels that may have a part in one: two, and one more on either side by rounding of the box
LONGEST = 2  # the longer side of a picture in shorter sides; of longer ones the middle is taken


def fit_picture(image: Image.Image, resize: int) -> np.ndarray:
    """Resize the shorter side of an RGB image to ``resize`` pixels, the longer in proportion: (H, W, 3) uint8.

    Of a picture longer than two squares the middle two are taken, so that one of one pixel by ten thousand takes no more
    memory than another.
    """
    shorter = min(image.size)
    size = [min(LONGEST * resize, round(side * resize / shorter)) for side in image.size]
    kept = [min(side, LONGEST * shorter) for side in image.size]
    left, top = ((side - part) / 2 for side, part in zip(image.size, kept))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, (left, top, left + kept[0], top + kept[1])))


class Crops(NamedTuple):
    """Crops of B pictures before the arithmetic: ``window`` (B, S + K - 1, S + K - 1, 3) uint8, ``weight`` (2, B, S, K)
    int32, of K neighbours for each row and each column of a crop, and ``flip`` (B,), True where it is mirrored.
    """

    window: Tensor
    weight: Tensor
    flip: Tensor


def cut_crops(pictures: Sequence[np.ndarray], place: np.ndarray, flip: np.ndarray, size: int) -> Crops:
    """Cut crops of ``size`` pixels a side out of B pictures (H, W, 3) uint8 whose sides are no shorter.

    place: (B, 2) in [0, 1], of the crop along width and height, from the left or top (0) to the right or bottom (1).
    flip: (B,).
    """
    length = np.array([picture.shape[:2] for picture in pictures])
    start = (length - size) * place[:, ::-1]
    weight = np.stack([_weights(start[:, axis], length[:, axis], size) for axis in (0, 1)])
    # Of the four neighbours one or two have a part: those alone are sent.
    used = np.flatnonzero(weight.any((0, 1, 2)))
    weight = weight[..., used[0] : used[-1] + 1]
    side = size + weight.shape[-1] - 1
    window = torch.zeros(len(pictures), side, side, 3, dtype=torch.uint8)
    first = np.floor(start.astype(np.float32)).astype(int) - 1 + used[0]
    for picture, target, (top, left) in zip(pictures, window.numpy(), first):
        # What lies outside of the picture has a weight of 0.
        above, before = max(0, -top), max(0, -left)
        inside = picture[top + above : top + side, left + before : left + side]
        target[above : above + inside.shape[0], before : before + inside.shape[1]] = inside
    return Crops(window, torch.from_numpy(weight), torch.from_numpy(np.asarray(flip, bool)))


def _weights(start: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """Return the weights (B, S, 4) int32 of the pixels from ``floor(start) - 1 + s`` on for pixel s of a crop.

    Pillow takes a box in single precision, so that its scale is 1 but for rounding.
    """
    low, high = start.astype(np.float32), (start + size).astype(np.float32)
    scale = (high - low).astype(np.float64) / size
    reach = np.maximum(scale, 1)[:, None]
    centre = low.astype(np.float64)[:, None] + (np.arange(size) + 0.5) * scale[:, None]
    first = np.trunc(centre - reach + 0.5)[..., None]
    last = np.minimum(np.trunc(centre + reach + 0.5), length[:, None])[..., None]
    at = np.floor(low).astype(int)[:, None, None] - 1 + np.arange(size)[:, None] + np.arange(_TAPS)
    far = np.abs((at - centre[..., None] + 0.5) * (1 / reach)[..., None])
    weight = np.where((at >= np.maximum(first, 0)) & (at < last), np.maximum(1 - far, 0), 0)
    total = weight[..., 0].copy()
    for tap in range(1, _TAPS):
        total += weight[..., tap]
    return np.trunc(0.5 + weight / total[..., None] * 2**_BITS).astype(np.int32)


def resample(crops: Crops) -> Tensor:
    """Return the pixels (B, S, S, 3) uint8 of crops, on their device."""
    pixels = crops.window
    if crops.weight.shape[-1] > 1:  # else every weight is 1
        rows, columns = crops.weight.unbind()
        # The channels of a column share its weights; one long last axis is what a processor does best.
        pixels = _blend(pixels.flatten(2), columns.repeat_interleave(3, 1)[:, None], 2, 3)
        pixels = _blend(pixels, rows[:, :, None], 1, 1).unflatten(2, (-1, 3))
    return torch.where(crops.flip[:, None, None, None], pixels.flip(2), pixels)


def _blend(pixels: Tensor, weight: Tensor, axis: int, step: int) -> Tensor:
    """Weigh neighbours that lie ``step`` apart along an axis: (B, H, W) uint8 by (B, S, 1, K) or (B, 1, S, K) int32."""
    pixels, total = pixels.int(), 1 << _BITS - 1
    for tap in range(weight.shape[-1]):
        total = total + pixels.narrow(axis, tap * step, weight.shape[axis]) * weight[..., tap]
    return (total >> _BITS).to(torch.uint8)
