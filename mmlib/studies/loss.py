"""What chapter 05 reads: what margin and focal term do to logit and gradient, the arms, two sweeps, what scores add."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from mmlib import losses, metrics
from mmlib.compare import compare_arms
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.records import Record
from mmlib.retrieve import make_model
from mmlib.train import pooled_features

# -- logit and gradient ---------------------------------------------------------------------------------------------


def margin_curves(settings: Sequence[tuple[float, float]], *, identities: int, scale: float = 30.0) -> pd.DataFrame:
    """Follow one clip as its angle to its identity grows, every other identity being at a right angle.

    settings: pairs of margin (radians) and gamma; identities: a count of at least 2.  Returns setting, angle (degrees),
    logit of the identity, pull (absolute gradient of the loss with respect to the angle, by autograd).
    """
    angle = (torch.arange(360, dtype=torch.float64) + 0.5) * torch.pi / 360
    label = torch.zeros(len(angle), dtype=torch.long)
    parts = []
    for margin, gamma in settings:
        theta = angle.clone().requires_grad_()
        cosine = torch.cat([theta.cos()[:, None], torch.zeros(len(angle), identities - 1).double()], 1)
        logits = losses.margin_logits(cosine, label, margin=margin, scale=scale)
        loss = losses.focal_loss(logits, label, gamma=gamma) * len(
            angle
        )  # a sum, so that each clip has its own gradient
        (pull,) = torch.autograd.grad(loss, theta)
        parts.append(
            pd.DataFrame(
                {
                    "setting": setting_name(margin, gamma),
                    "angle": np.degrees(angle.numpy()),
                    "logit": logits[:, 0].detach().numpy(),
                    "pull": pull.abs().numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def setting_name(margin: float, gamma: float = 0.0) -> str:
    """Name a margin, and a focal term if there is one, as the figures do."""
    return f"margin {margin:g}" + (f", gamma {gamma:g}" if gamma else "")


def reach(curves: pd.DataFrame) -> dict[str, float]:
    """Return the angle, in degrees, at which the pull of each setting first is half of its largest one."""
    return {
        name: float(part.loc[part["pull"] >= part["pull"].max() / 2, "angle"].iloc[0])
        for name, part in curves.groupby("setting", sort=False)
    }


def _two_classes(probability: np.ndarray) -> torch.Tensor:
    logit = torch.from_numpy(np.log(probability) - np.log1p(-probability))
    return torch.stack([logit, torch.zeros_like(logit)], 1)


def focal_curves(gammas: Sequence[float]) -> pd.DataFrame:
    """Return what a clip of known probability has for a gradient: gamma (name), p, gradient (absolute, at its logit)."""
    p = np.linspace(0.005, 0.995, 199)
    return pd.concat(
        [
            pd.DataFrame({"gamma": f"gamma {gamma:g}", "p": p, "gradient": _gradient(p, gamma, "clip")})
            for gamma in gammas
        ],
        ignore_index=True,
    )


def _gradient(p: np.ndarray, gamma: float, focal: str) -> np.ndarray:
    """Return B times the absolute gradient at the logit of each clip of a batch, (B,)."""
    logits, label = _two_classes(p).requires_grad_(), torch.zeros(len(p), dtype=torch.long)
    term = losses.focal_loss if focal == "clip" else losses.batch_focal_loss
    (found,) = torch.autograd.grad(term(logits, label, gamma=gamma), logits)
    return found[:, 0].abs().numpy() * len(p)


BATCH = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99)  # probabilities of the identity in a batch made by hand


def batch_shares(gamma: float, probabilities: Sequence[float] = BATCH) -> pd.DataFrame:
    """Share out the gradient of a batch: loss, p, gradient (of the clip's logit), share (of the batch), and factor.

    factor: the clip's gradient as a multiple of what cross-entropy gives it.
    """
    p = np.sort(np.asarray(probabilities, float))
    kinds = {
        "cross-entropy": (0.0, "clip"),
        "focal, clip by clip": (gamma, "clip"),
        "focal, over the batch": (gamma, "batch"),
    }
    plain = _gradient(p, 0.0, "clip")
    parts = []
    for name, kind in kinds.items():
        gradient = _gradient(p, *kind)
        parts.append(
            pd.DataFrame(
                {
                    "loss": name,
                    "p": p,
                    "gradient": gradient,
                    "share": gradient / gradient.sum(),
                    "factor": gradient / plain,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def batch_sentence(shares: pd.DataFrame, hardest: int = 2) -> str:
    """Say how much of the gradient the hardest clips get under each loss, and what the batch-level term multiplies by."""
    plain, clip, batch = (
        group.nsmallest(hardest, "p")["share"].sum() for _, group in shares.groupby("loss", sort=False)
    )
    factor = shares.loc[shares["loss"] == "focal, over the batch", "factor"]
    low, high = f"{factor.min():.3f}", f"{factor.max():.3f}"
    return (
        f"Of the gradient of {shares['p'].nunique()} clips the {hardest} hardest get {plain:.3f} under the "
        f"cross-entropy, {clip:.3f} under the focal term clip by clip, and {batch:.3f} under the focal term over the "
        f"batch, which multiplies the gradient of every clip by {low if low == high else f'something from {low} to {high}'}."
    )


# -- the arms -------------------------------------------------------------------------------------------------------

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
REFERENCE = "margin"


def steps_frame(records: Sequence[Record], names: Sequence[str]) -> pd.DataFrame:
    """Compare the two arms of every step that was run: step, arm, against, and the columns of ``compare_arms``."""
    rows = []
    for step, pair in STEPS.items():
        if set(pair) <= set(names):
            both = [(record, name) for record, name in zip(records, names, strict=True) if name in pair]
            table = compare_arms([record for record, _ in both], "arm", pair[1], names=[name for _, name in both])
            rows.append({"step": step, "arm": pair[0], "against": pair[1], **table.set_index("arm").loc[pair[0]]})
    return pd.DataFrame(rows)


def change(row: dict | pd.Series, unit: str = "points of MAP@100") -> str:
    """Say what the interval of a difference supports, and the numbers; row: difference, low, high, n, interval."""
    if not np.isfinite(row["low"]):
        return f"differs by {_signed(row['difference'])} {unit} (no interval)"
    verb = "gains" if row["low"] > 0 else "loses" if row["high"] < 0 else "changes nothing that can be told apart,"
    size = _signed(row["difference"]) if verb.endswith(",") else f"{abs(row['difference']):.2f}"
    return f"{verb} {size} {unit} ({_interval(row)}, {row['n']:.0f} {row['interval']})"


def _interval(row: dict | pd.Series) -> str:
    return (
        f"95 % interval {_signed(row['low'])} to {_signed(row['high'])}" if np.isfinite(row["low"]) else "no interval"
    )


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # + 0.0, because a rounded -0.001 is -0.0


def steps_sentence(steps: pd.DataFrame) -> str:
    """Say which steps gain, which lose, and which cannot be told apart from nothing."""
    groups = {"a gain": steps[steps["low"] > 0], "a loss": steps[steps["high"] < 0]}
    groups["nothing that can be told apart"] = steps.drop(index=[*groups["a gain"].index, *groups["a loss"].index])
    out = [
        f"{what} in {len(part)}: "
        + ", ".join(f"{row['step']} {_signed(row['difference'])}" for row in part.to_dict("records"))
        for what, part in groups.items()
        if len(part)
    ]
    return f"These {len(steps)} steps bring " + "; ".join(out) + " (points of MAP@100)."


_ASKED = {  # step, how the answer calls it
    "a margin": "the margin is worth {} points over a cosine softmax",
    "focal term clip by clip (described)": "the focal term {} as described",
    "focal term over the batch (coded)": "and {} as coded",
    "scores on normalised features (described)": "the appended scores are worth {} as described",
    "scores on raw features beside the focal term (coded)": "and {} as coded",
}


def answer(table: pd.DataFrame, steps: pd.DataFrame, where: str) -> str:
    """Answer the chapter's question: the best arm against the margin alone, the margin, both focal terms, both scores.

    table: of ``compare_arms``, with the column ``arm``; where: the clips, as in "the simulated clips".
    """
    rest = table[table["arm"] != REFERENCE]
    best = rest.iloc[0]
    head = (
        f"{best['arm']} is the best of {len(rest)} other arms and, against the margin alone, {change(best)}"
        if best["difference"] > 0
        else f"no other arm has a higher MAP@100 than the margin alone, and the next of {len(rest)}, {best['arm']}, "
        f"{change(best)}"
    )
    by_step = steps.set_index("step")
    parts = [
        text.format(f"{_signed(row['difference'])} ({_signed(row['low'])} to {_signed(row['high'])})")
        for step, text in _ASKED.items()
        if step in by_step.index
        for row in [by_step.loc[step]]
    ]
    return f"On {where}, {head}; " + ", ".join(parts).replace(", and", " and") + "."


# -- the sweeps -----------------------------------------------------------------------------------------------------

SWEEPS = {"margin": (0.0, 0.1, 0.3, 0.5, 0.7), "gamma": (0.0, 0.5, 1.0, 2.0, 4.0)}


def sweep(arm: Experiment, field: str, seeds: Iterable[int]) -> list[Experiment]:
    """List the experiments of a sweep: a field of the arm's training takes every value of ``SWEEPS``."""
    return [
        replace(arm, seed=seed, training=replace(arm.training, **{field: value}))
        for value in SWEEPS[field]
        for seed in seeds
    ]


def sweep_frame(records: Iterable[Record], field: str, baseline: float) -> pd.DataFrame:
    """Compare values of a field of the training with one of them, world by world, in points of MAP@100.

    Returns one row a value, in order: ``field``, map_at_100 and difference (means over worlds), low and high (the
    smallest and the largest world), n (worlds).  Records that differ in the field and the seed only.
    """
    rows = pd.DataFrame(
        [{"seed": r.experiment["seed"], field: r.experiment["training"][field], "map": np.mean(r.ap)} for r in records]
    )
    wide = rows.pivot(index="seed", columns=field, values="map")
    gap = 100 * wide.sub(wide[baseline], axis=0)
    frame = pd.DataFrame(
        {"map_at_100": wide.mean(), "difference": gap.mean(), "low": gap.min(), "high": gap.max(), "n": gap.count()}
    )
    return frame.reset_index()


def sweep_sentence(frame: pd.DataFrame, field: str, baseline: float) -> str:
    """Say which value is best, and whether every world says so; a range over worlds is no interval."""
    rest = frame[frame[field] != baseline]
    best = rest.loc[rest["map_at_100"].idxmax()]
    if best["difference"] <= 0:
        return (
            f"No {field} of the sweep has a higher mean than {baseline:g}; the next is {best[field]:g}, "
            f"{_signed(best['difference'])} points."
        )
    edge = (
        f", the {'largest' if best[field] == frame[field].max() else 'smallest'} tried"
        if best[field] in (frame[field].min(), frame[field].max())
        else ""
    )
    seeds = (
        "one seed"
        if best["n"] == 1
        else (
            f"{_signed(best['low'])} to {_signed(best['high'])} over {best['n']:.0f} seeds, "
            + ("ahead in each" if best["low"] > 0 else "not ahead in each")
        )
    )
    return (
        f"The best {field} of the sweep is {best[field]:g}{edge}, {_signed(best['difference'])} points from "
        f"{baseline:g} ({seeds})."
    )


# -- what the scores add --------------------------------------------------------------------------------------------

PAIRS = {  # the arm without the scores, or without the focal term, that each is compared with
    "margin, scores": "margin",
    "margin + focal, scores": "margin + focal",
    "margin + focal, raw scores": "margin + focal",
    "margin + focal": "margin",
}


def gains(records: Sequence[Record], names: Sequence[str], group: str = "quality") -> pd.DataFrame:
    """Compare the arms of ``PAIRS`` by fifths of clip quality, or by another group of clips, in points of precision.

    Returns arm, against, start, end (of the group: percentiles, or frames), middle, clips (mean a world), difference, low
    and high (95 %, over worlds; NaN for one world or one data set), n, interval; groups in order.  Fifths are the finer
    groups of a record put together.
    """
    parts: dict[tuple, dict] = {}
    for record, name in zip(records, names, strict=True):
        for (start, end), found in _merged(record.breakdown.get(group, []), group).items():
            parts.setdefault((name, start, end), {})[record.experiment["seed"]] = found
    simulated = all(record.experiment["data"] == "simulated" for record in records)
    rows = []
    for arm, against in PAIRS.items():
        for name, start, end in sorted(key for key in parts if key[0] == arm):
            here, there = parts[name, start, end], parts.get((against, start, end), {})
            seeds = sorted(here.keys() & there.keys())
            if not seeds:
                continue
            over = metrics.over_worlds(np.array([100 * (here[seed][1] - there[seed][1]) for seed in seeds]))
            low, high = (over.low, over.high) if simulated else (np.nan, np.nan)
            rows.append(
                (
                    arm,
                    against,
                    start,
                    end,
                    (start + end) / 2,
                    np.mean([here[seed][0] for seed in seeds]),
                    over.mean,
                    low,
                    high,
                    over.n,
                    "worlds",
                )
            )
    return pd.DataFrame(
        rows,
        columns=["arm", "against", "start", "end", "middle", "clips", "difference", "low", "high", "n", "interval"],
    )


def _merged(rows: Iterable[Sequence[float]], group: str) -> dict[tuple[float, float], tuple[float, float]]:
    """Return (clips, precision) of each group of a breakdown, by its edges; percentiles of quality put into fifths."""
    total: dict[tuple[float, float], list[tuple[float, float]]] = {}
    for low, high, clips, _, precision in rows:
        fifth = 20 * (low // 20)
        edges = (fifth, fifth + 20) if group == "quality" else (low, high - 1)
        total.setdefault(edges, []).append((clips, precision))
    return {
        edges: (sum(n for n, _ in found), sum(n * value for n, value in found) / sum(n for n, _ in found))
        for edges, found in total.items()
    }


def scores_sentence(fifths: pd.DataFrame) -> str:
    """Say what appended scores do to the fifth of clips with the lowest quality, and to that with the highest."""
    fifths = fifths[fifths["arm"].str.contains("scores")]
    if fifths.empty:
        return "No arm here has scores appended."
    out, found = [], []
    for place, where in ((fifths["start"].min(), "lowest"), (fifths["start"].max(), "highest")):
        part = fifths[fifths["start"] == place]
        found.append(part)
        out.append(
            f"In the fifth of {where} quality the precision changes by "
            + ", ".join(
                f"{_signed(row['difference'])} points with “{row['arm']}” ({_interval(row)})"
                for row in part.to_dict("records")
            )
            + "."
        )
    low = found[0]
    out.append(
        f"In the fifth of lowest quality, where they should help, the scores gain in {(low['low'] > 0).sum()} of "
        f"{len(low)} arms and lose in {(low['high'] < 0).sum()}, as far as the intervals tell."
    )
    return " ".join(out)


def length_in_scores(asked: Experiment, store: ClipStore) -> dict[str, float]:
    """Return the mean share of the squared length of a clip feature that appended scores make up, before any training.

    By ``concat``, over the labelled val clips with a face.  It is the cosine of two clips that have the same scores and
    nothing else in common.
    """
    clips = store.select("val", labelled=True, having="face")
    pooled = pooled_features(make_model(replace(asked, concat="raw"), store), store, clips)
    feature, scores = pooled[:, :-2].square().sum(1), pooled[:, -2:].square().sum(1)
    return {"normalised": float((scores / (1 + scores)).mean()), "raw": float((scores / (feature + scores)).mean())}
