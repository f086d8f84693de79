"""Frames degraded as cameras do it: less resolved, out of focus, compressed, hidden in part, badly exposed.

It is done to aligned crops: a strength is the same for every face, however large it was, and the alignment stays that
of the clean frame, as if a tracker had held the face.  A frame that is found and aligned anew may lose more.
"""

import numpy as np
import pandas as pd

from mmlib.data.detector import need

STRENGTHS: dict[str, tuple[float, ...]] = {  # from weak to strong
    "downscale": (28, 14, 7),  # pixels a side, of 112, to which a crop shrinks before it is enlarged again
    "blur": (2, 4, 8),  # standard deviation of a Gaussian, pixels of the crop
    "compression": (15, 7, 3),  # quality of a JPEG
    "occlusion": (0.15, 0.3, 0.5),  # share of the crop that a grey rectangle hides
    "exposure": (2, 3, 4),  # stops too much or too little light
}


def degrade(crop: np.ndarray, kind: str, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Degrade a crop (S, S, 3) uint8 by a kind of `STRENGTHS`; the generator draws place and sign, where there are any.

    Light goes as the power 2.2 of a pixel's value.
    """
    cv2, side = need("cv2"), len(crop)
    if kind == "downscale":
        small = cv2.resize(crop, (round(strength * side / 112),) * 2, interpolation=cv2.INTER_AREA)
        return cv2.resize(small, (side, side), interpolation=cv2.INTER_LINEAR)
    if kind == "blur":
        return cv2.GaussianBlur(crop, (0, 0), strength * side / 112)
    if kind == "compression":
        coded = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(strength)])[1]
        return cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1]
    if kind == "occlusion":
        stretch = rng.uniform(strength, 1)  # the larger side, so that the other is no more than the crop's
        sides = np.array([stretch, strength / stretch])[rng.permutation(2)]
        top, left = rng.uniform(0, 1 - sides)
        below, right = np.array([top, left]) + sides
        hidden = crop.copy()
        hidden[round(top * side) : round(below * side), round(left * side) : round(right * side)] = 128
        return hidden
    if kind == "exposure":
        light = (crop / 255.0) ** 2.2 * 2.0 ** (strength * rng.choice([-1, 1]))
        return (255 * light.clip(0, 1) ** (1 / 2.2)).round().astype(np.uint8)
    raise ValueError(f"kind {kind!r}: none of {', '.join(STRENGTHS)}")


def choose_frames(clip: pd.Series, share: float, seed: int = 0) -> np.ndarray:
    """Choose a share, rounded, of each clip's frames (F,), whose each is says `clip`; a larger share has them all.

    >>> choose_frames(pd.Series(["a"] * 5 + ["b"] * 5), 0.4).reshape(2, 5).sum(1).tolist()
    [2, 2]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share!r}")
    order = pd.Series(np.random.default_rng(seed).random(len(clip)), clip.index).groupby(clip).rank()
    size = clip.groupby(clip).transform("size")
    return (order <= (share * size).round()).to_numpy()
