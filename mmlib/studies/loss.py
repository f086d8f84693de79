"""What chapter 05 reads: what margin and focal term do to logit and gradient, the arms, two sweeps, what scores add."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from mmlib import losses, metrics
from mmlib.compare import upper_edge
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.records import Record
from mmlib.retrieve import make_model, missing_scores
from mmlib.train import pooled_features


def margin_curves(settings: Sequence[tuple[float, float]], *, identities: int, scale: float = 30.0) -> pd.DataFrame:
    """Follow one clip as its angle to its identity grows, every other identity being at a right angle.

    settings: pairs of margin (radians) and gamma; identities: a count of at least 2.  Returns setting, angle (degrees),
    logit of the identity, pull (absolute gradient of the loss with respect to the angle, by autograd).
    """
    angle = (torch.arange(360, dtype=torch.float64) + 0.5) * torch.pi / 360
    label, parts = torch.zeros(len(angle), dtype=torch.long), []
    for margin, gamma in settings:
        theta = angle.clone().requires_grad_()
        cosine = torch.cat([theta.cos()[:, None], torch.zeros(len(angle), identities - 1).double()], 1)
        logits = losses.margin_logits(cosine, label, margin=margin, scale=scale)
        # A sum, so that each clip has its own gradient.
        loss = losses.focal_loss(logits, label, gamma=gamma) * len(angle)
        (pull,) = torch.autograd.grad(loss, theta)
        name = f"margin {margin:g}" + (f", gamma {gamma:g}" if gamma else "")
        columns = {"angle": torch.rad2deg(angle), "logit": logits[:, 0].detach(), "pull": pull.abs()}
        parts.append(pd.DataFrame(columns).assign(setting=name))
    return pd.concat(parts, ignore_index=True)


def reach(curves: pd.DataFrame) -> pd.Series:
    """Return the angle, in degrees, at which the pull of each setting first is half of its largest one."""
    half = curves["pull"] >= curves.groupby("setting")["pull"].transform("max") / 2
    return curves[half].groupby("setting", sort=False)["angle"].first()


def focal_curves(gammas: Sequence[float]) -> pd.DataFrame:
    """Return the gradient of a clip by its probability p: gamma (name), p, gradient (absolute, at its logit)."""
    p = np.linspace(0.005, 0.995, 199)
    wide = {f"gamma {gamma:g}": _gradient(p, gamma, losses.focal_loss) for gamma in gammas}
    return pd.DataFrame({"p": p} | wide).melt("p", var_name="gamma", value_name="gradient")


def _gradient(p: np.ndarray, gamma: float, term: Callable[..., torch.Tensor]) -> np.ndarray:
    """Return B times the absolute gradient at the logit of each clip of a batch of two classes, (B,)."""
    logit = torch.from_numpy(np.log(p) - np.log1p(-p))
    logits = torch.stack([logit, torch.zeros_like(logit)], 1).requires_grad_()
    label = torch.zeros(len(p), dtype=torch.long)
    (found,) = torch.autograd.grad(term(logits, label, gamma=gamma), logits)
    return found[:, 0].abs().numpy() * len(p)


BATCH = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99)  # probabilities of the identity in a batch made by hand


def batch_shares(gamma: float, probabilities: Sequence[float] = BATCH) -> pd.DataFrame:
    """Share out the gradient of a batch: p, loss, gradient (of the clip's logit), share (of the batch), and factor.

    factor: the clip's gradient as a multiple of what cross-entropy gives it.
    """
    p = np.sort(np.asarray(probabilities, float))
    kinds = {"cross-entropy": (0.0, losses.focal_loss), "focal, clip by clip": (gamma, losses.focal_loss)}
    kinds["focal, over the batch"] = gamma, losses.batch_focal_loss
    wide = {name: _gradient(p, *kind) for name, kind in kinds.items()}
    frame = pd.DataFrame({"p": p} | wide).melt("p", var_name="loss", value_name="gradient")
    frame["share"] = np.concatenate([found / found.sum() for found in wide.values()])
    return frame.assign(factor=frame["gradient"] / np.tile(wide["cross-entropy"], len(wide)))


def share_of_hardest(shares: pd.DataFrame, hardest: int = 2) -> dict[str, float]:
    """Return the share of the gradient of a batch that its hardest clips get under each loss."""
    return {name: part.nsmallest(hardest, "p")["share"].sum() for name, part in shares.groupby("loss", sort=False)}


STEPS = {  # one change each: the arm with it, and the arm without
    "cosines in place of inner products": ("cosine softmax", "softmax"),
    "a margin": ("margin", "cosine softmax"),
    "focal term clip by clip (described)": ("margin + focal", "margin"),
    "focal term over the batch (coded)": ("margin + batch focal", "margin"),
    "scores on normalised features (described)": ("margin, scores", "margin"),
    "the same scores beside the focal term": ("margin + focal, scores", "margin + focal"),
    "scores on raw features beside the focal term (coded)": ("margin + focal, raw scores", "margin + focal"),
    "normalising before the scores are appended": ("margin + focal, scores", "margin + focal, raw scores"),
}
SWEEPS = {"margin": (0.0, 0.1, 0.3, 0.5, 0.7), "gamma": (0.0, 0.5, 1.0, 2.0, 4.0)}


def sweep(arm: Experiment, field: str, seeds: Iterable[int]) -> list[Experiment]:
    """List the experiments of a sweep: a field of the arm's training takes every value of ``SWEEPS``."""
    trainings = [replace(arm.training, **{field: value}) for value in SWEEPS[field]]  # type: ignore[arg-type]
    return [replace(arm, training=training, seed=seed) for training in trainings for seed in seeds]


def sweep_frame(records: Iterable[Record], field: str, baseline: float) -> pd.DataFrame:
    """Compare values of a field of the training with one of them, world by world, in points of MAP@100.

    Returns one row a value: ``field``, map_at_100 and difference (means over worlds), low and high (smallest and
    largest world; NaN where there is one), n (worlds).
    """
    rows = [(r.experiment["seed"], r.experiment["training"][field], np.mean(r.ap)) for r in records]
    wide = pd.DataFrame(rows, columns=["seed", field, "map"]).pivot(index="seed", columns=field, values="map")
    gap = 100 * wide.sub(wide[baseline], axis=0)
    found = {"map_at_100": wide.mean(), "difference": gap.mean(), "low": gap.min(), "high": gap.max(), "n": gap.count()}
    frame = pd.DataFrame(found)
    frame.loc[frame["n"] == 1, ["low", "high"]] = np.nan
    return frame.reset_index()


PAIRS = {  # the arm without the scores, or without the focal term, that each is compared with
    "margin, scores": "margin",
    "margin + focal, scores": "margin + focal",
    "margin + focal, raw scores": "margin + focal",
    "margin + focal": "margin",
}


def gains(records: Sequence[Record], names: Sequence[str], group: str = "quality") -> pd.DataFrame:
    """Compare the arms of ``PAIRS`` by fifths of clip quality, or by another group of clips, in points of precision.

    Returns arm, against, start, end (percentiles, or frames), middle, clips (mean a world), difference, low and high
    (95 %, over worlds; NaN for one world or data set), n, interval.  The longest clips stand at their shortest.
    """
    rows = [
        (name, *_edges(group, low, high), record.experiment["seed"], clips, clips * precision)
        for record, name in zip(records, names, strict=True)
        for low, high, clips, _, precision in record.breakdown.get(group, [])
    ]
    frame = pd.DataFrame(rows, columns=["arm", "start", "end", "seed", "clips", "right"])
    total = frame.groupby(["arm", "start", "end", "seed"]).sum()
    points = 100 * total["right"] / total["clips"]
    simulated = all(record.experiment["data"] == "simulated" for record in records)
    out = []
    for arm, against in PAIRS.items():
        if {arm, against} <= set(names):
            gap = (points[arm] - points[against]).dropna()
            for (start, end), part in gap.groupby(["start", "end"]):
                over, clips = metrics.over_worlds(part.to_numpy()), total["clips"][arm, start, end].mean()
                bounds = (over.low, over.high) if simulated else (np.nan, np.nan)
                out.append((arm, against, start, end, (start + end) / 2, clips, over.mean, *bounds, over.n, "worlds"))
    columns = ["arm", "against", "start", "end", "middle", "clips", "difference", "low", "high", "n", "interval"]
    return pd.DataFrame(out, columns=columns)


def _edges(group: str, low: float, high: float | None) -> tuple[float, float]:
    """Return the ends of the group that a range of a breakdown belongs to."""
    if group == "quality":
        return 20 * (low // 20), 20 * (low // 20) + 20
    high = upper_edge(group, high)
    return low, low if np.isinf(high) else high - 1


def length_in_scores(asked: Experiment, store: ClipStore) -> pd.DataFrame:
    """Return the share of the squared length of a clip feature that appended scores make up, before any training.

    Columns: appended to, share (mean over labelled val clips with a face); empty where the store lacks scores.  It is
    the cosine of two clips that have the same scores and nothing else in common.
    """
    columns = ["appended to", "share of the squared length"]
    asked = replace(asked, concat="raw")
    if missing_scores(asked, store):
        return pd.DataFrame(columns=columns)
    clips = store.select("val", labelled=True, having="face")
    pooled = pooled_features(make_model(asked, store), store, clips)
    feature, scores = pooled[:, :-2].square().sum(1), pooled[:, -2:].square().sum(1)
    lengths = {"normalised feature": torch.ones_like(scores), "raw feature": feature}
    rows = [(name, float((scores / (length + scores)).mean())) for name, length in lengths.items()]
    return pd.DataFrame(rows, columns=columns)
