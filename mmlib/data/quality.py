"""The scale of quality scores: the hand-made weights have thresholds in the units of the challenge's own."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mmlib.data.calibration import QUALITY_KNOTS

MEDIAN = 60.0  # about that of the challenge's scores, and the last step of `aggregate.quality_weights`
AS_THEY_ARE, BY_RANK = "challenge", "rank"
Scale = str | Sequence[tuple[float, float]]


def rescale(score: np.ndarray, scale: Scale | None, where: str = "quality") -> tuple[np.ndarray, dict]:
    """Bring quality scores (F,) to the challenge's scale, about -20 to 260; return them and what was done.

    scale: "challenge", they have it; "rank", the frame that is better than a share of all (of equals, their mean) gets
    the score that is better than that share of the challenge's; or knots (score, challenge score), linear between them
    and constant beyond.  None is "challenge" too, but refuses scores that plainly have another: all on one side of 60,
    above which half of the challenge's are.  What was done says the scale of the scores as returned, how they came to
    it, and the least, the median and the greatest score as given and as returned: all of a file's provenance.

    >>> rescale([0.1, 0.3, 0.3, 0.8], "rank")[0].round(1).tolist()
    [19.5, 59.0, 59.0, 122.5]
    >>> rescale([0.1, 0.4, 0.9], [(0.2, 0), (0.6, 60)])[0].tolist()
    [0.0, 30.0, 60.0]
    """
    score = np.asarray(score, np.float64)
    for row in np.flatnonzero(~np.isfinite(score)):
        raise ValueError(f"{where}: score {row + 1} is {score[row]}")
    how: object = scale
    if scale is None or scale == AS_THEY_ARE:
        if scale is None and len(score) and (score.max() <= MEDIAN or score.min() > MEDIAN):
            raise ValueError(
                f"{where}: scores from {score.min():.4g} to {score.max():.4g}, all on one side of {MEDIAN:.0f}, have "
                "hardly the challenge's scale, on which weights by quality rest (about -20 to 260, half of them above "
                f"{MEDIAN:.0f}); say what to do by --quality-scale: rank, knots SCORE:CHALLENGE,..., or challenge, "
                "if they have it all the same"
            )
        scaled, how = score, "as given"
    elif isinstance(scale, str):
        if scale != BY_RANK:
            raise ValueError(f"--quality-scale: {scale!r} is none of {AS_THEY_ARE}, {BY_RANK} and knots")
        share = (pd.Series(score).rank().to_numpy() - 0.5) / max(1, len(score))
        scaled, how = np.interp(share, *np.array(QUALITY_KNOTS).T), "by rank"
    else:
        knots = np.array(scale, np.float64).reshape(-1, 2)
        if len(knots) < 2 or not np.isfinite(knots).all() or (np.diff(knots[:, 0]) <= 0).any():
            raise ValueError(f"--quality-scale: {scale}; knots are two or more pairs of numbers, the first ones rising")
        scaled, how = np.interp(score, *knots.T), knots.tolist()
    return scaled, {"scale": AS_THEY_ARE, "mapped": how, "from": _summary(score), "to": _summary(scaled)}


def parse_scale(text: str) -> Scale:
    """Read what a command says: challenge, rank, or knots such as 0:0,0.5:59,1:260."""
    if text in (AS_THEY_ARE, BY_RANK):
        return text
    try:
        return [(float(low), float(high)) for low, high in (pair.split(":") for pair in text.split(","))]
    except ValueError:
        expected = f"expected {AS_THEY_ARE}, {BY_RANK} or knots SCORE:CHALLENGE,SCORE:CHALLENGE,..."
        raise ValueError(f"--quality-scale {text}: {expected}") from None


def said(done: dict) -> str:
    """Say in a line what `rescale` did."""
    given, scaled = (
        "{:.4g} to {:.4g} (median {:.4g})".format(*done[part][::2], done[part][1]) for part in ("from", "to")
    )
    if done["mapped"] == "as given":
        return f"quality: {given}, as given, in the challenge's units"
    how = done["mapped"]
    if not isinstance(how, str):
        how = "by knots " + ", ".join(f"{low:g}:{high:g}" for low, high in how)
    return f"quality: {given}, mapped {how} to the challenge's units: {scaled}"


def _summary(score: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(score, [0, 0.5, 1])] if len(score) else []
