"""What chapter 11 predicts from measured costs: time and memory at another size, and of new face features."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from benchmarks.cost import exponents, growth_frame, measured_lines, seconds_text, where
from benchmarks.growth import TENFOLD

DIM, CONTEXT, K = 512, 128, 100  # of a face, of a reduced scene; clips ranked for an identity
FRAME_BYTES = 2 * DIM + 4 + 4 * 8 + 8 + 8  # of a face in a store: feature, frame, box and two scores
PARTS = {"epoch": "train", "drawn epoch": "train, a tenth drawn"}  # what a cost is called that is not its name
STEPS = {"drawn epoch": "clips"}  # an axis without a series of its own, with which a cost grows in proportion
REMEDY = {
    "import": "several processes, each with a part of the files",
    "open": "a table in parts",
    "train": "a classifier that draws its classes (`Training.classes`), or is split over devices",
    "train, a tenth drawn": "a classifier that is split over devices",
    "rank": "an index for approximate search, or more devices",
    "metric": "a part of the queries at a time",
}
AS_IT_IS = "works as it is"
BY_ESTIMATE, NOT_BY_ESTIMATE = "works by the estimate alone", "too slow by the estimate alone"  # the interval has both
OPEN = [BY_ESTIMATE, NOT_BY_ESTIMATE]
MEASURED = {"train, a tenth drawn": "tenfold, epoch", "rank": "tenfold, rank"}
FACES_THERE = 1.0  # of a clip there; none of these parts depends on it
TIMES = np.geomspace(1, 1_000, 61)  # the challenge's size, as steps of a twentieth of a decade
SEARCH = "searching a picture"  # for faces


def predict(
    results: list[dict],
    *,
    clips: float,
    identities: float,
    faces: float,
    batch: int = 512,
    hours: float = 24.0,
    level: float = 0.95,
    corrected: bool = True,
) -> pd.DataFrame:
    """Predict time and memory of every cost at another size, on every processor that its growth was measured on.

    faces: a clip; batch: clips of a training step, of one epoch; hours: that a part may take.  By ``power`` the time is
    that of the largest size measured, times (asked / measured)^exponent for every axis, ``low`` and ``high`` with all
    exponents at their lower and upper ends, and in proportion to the axis of `STEPS` that has no series.  By ``line``
    each factor is that of a fixed cost and one in proportion, fitted to the same points: where the fixed cost is large,
    the power law says too little.  ``floor`` is what the counted operations take at the ceiling.  ``seconds`` is the
    largest of the three, times ``off``, 1 at least: what a part took at ten times the challenge by what it was so
    predicted to take there (`tenfold_frame`), if ``corrected``.  The verdict is open where the limit lies between
    ``low`` (the floor, if that is more) and ``high`` (``seconds``, if that is), both times that.
    Memory (bytes) is counted for training and ranking, and a straight line through what was measured for the others.
    Columns: part, where, seconds, off, power, low, high, line, floor, memory, limit (bytes), verdict, needs (empty for
    what works as it is).
    """
    columns = [
        "part",
        "where",
        "seconds",
        "off",
        "power",
        "low",
        "high",
        "line",
        "floor",
        "memory",
        "limit",
        "verdict",
        "needs",
    ]
    growth, rows, off = growth_frame(results), [], _off(results) if corrected else {}
    fits = exponents(growth, level)
    asked = {"clips": clips, "identities": identities, "faces": clips * faces}
    for result in results:
        for device, ceilings in result["ceilings"].items():
            place = where(result, device)
            limit = result["machine"]["gpu_memory" if device == "cuda" else "memory"]
            here, fitted = growth[growth["where"] == place], fits[fits["where"] == place]
            for cost in here["cost"].unique():
                part = PARTS.get(cost, cost)
                points = here[(here["cost"] == cost) & here["axis"].isin(asked)]
                found = _extrapolate(points, fitted[fitted["cost"] == cost], asked, STEPS.get(cost))
                if found is None:
                    continue
                floor = _floor(part, clips, identities, ceilings, device)
                memory = counted_memory(part, clips, identities, batch) or _line(points, asked)
                more = off.get((part, place), 1.0)
                most = more * max(found[0], found[3], floor)
                ends = _ends(most, more, found[1], found[2], floor)
                verdict = _verdict(most, ends, 3_600 * hours, memory > limit)
                needs = "" if verdict in (AS_IT_IS, BY_ESTIMATE) else REMEDY[part]
                rows.append((part, place, most, more, *found, floor, memory, limit, verdict, needs))
    return pd.DataFrame(rows, columns=columns)


def tenfold_frame(results: list[dict]) -> pd.DataFrame:
    """Hold what is predicted for ten times the challenge against what a part of that work took, as a page shows it.

    Columns: part, where, by power, by line, at least, measured, times (by the largest of the three).
    """
    full = [result for result in results if result["scale"] == "full"]  # others measure the same lines at other sizes
    measured = {(row["name"], where(result, row["device"])): row["median"] for result, row in measured_lines(full)}
    rows = predict(full, faces=FACES_THERE, corrected=False, **TENFOLD)
    rows["measured"] = [measured.get((MEASURED.get(part), place)) for part, place in zip(rows["part"], rows["where"])]
    rows = rows.dropna(subset=["measured"])
    words = shown(rows)[["part", "where", "by power", "by line", "at least"]]
    times = (rows["measured"] / rows["seconds"]).astype(float)
    return words.assign(measured=rows["measured"].map(seconds_text), times=times)


def _off(results: list[dict]) -> dict[tuple[str, str], float]:
    """Return how many times longer than predicted a part took at ten times the challenge, where it did, by place."""
    held = tenfold_frame(results)
    return dict(zip(zip(held["part"], held["where"]), held["times"].clip(lower=1)))


def pays_from(results: list[dict]) -> str:
    """Say from how many identities on an epoch that draws a tenth of them is the faster one, of the sizes measured."""
    growth = growth_frame(results)
    growth = growth[growth["axis"] == "identities"]
    for place, part in growth.groupby("where", sort=False):
        took = {cost: rows.set_index("size")["seconds"] for cost, rows in part.groupby("cost")}
        if {"epoch", "drawn epoch"} <= {*took}:
            ahead = (took["drawn epoch"] < took["epoch"])[::-1].cummin()[::-1]
            factor = took["epoch"] / took["drawn epoch"]
            if ahead.any():
                most = f"{factor.iloc[-1]:.2g} times faster with {factor.index[-1]:,}"
                return f"{ahead.idxmax():,} on, and {most} ({place})"
            return f"none of the sizes measured, up to {factor.index[-1]:,}, on ({place})"
    return "sizes that were not measured"


def _extrapolate(
    growth: pd.DataFrame, fits: pd.DataFrame, asked: dict[str, float], steps: str | None
) -> np.ndarray | None:
    """Return seconds by power, low, high and by line at the sizes asked for; None if no axis of them was fitted.

    steps: an axis with which they grow in proportion, as an epoch's do with its clips.
    """
    fits = fits[fits["axis"].isin(asked)]
    if fits.empty:
        return None
    first = fits.iloc[0]
    at = growth.loc[growth["axis"] == first["axis"], "fixed"].iloc[0] | {first["axis"]: first["last"]}
    factors = []
    for fit in fits.to_dict("records"):
        axis, ratio = fit["axis"], asked[fit["axis"]] / at[fit["axis"]]
        fixed, rate = _fixed_and_rate(growth[growth["axis"] == axis])
        ends = sorted(ratio ** fit[name] for name in ("low", "high"))
        factors.append((ratio ** fit["exponent"], *ends, (fixed + rate * asked[axis]) / (fixed + rate * at[axis])))
    times = asked[steps] / at[steps] if steps and steps not in {*fits["axis"]} else 1.0
    return first["seconds"] * times * np.prod(factors, axis=0)


def _fixed_and_rate(points: pd.DataFrame) -> np.ndarray:
    """Fit seconds = fixed + rate size, neither negative, by least squares of relative errors: (fixed, rate)."""
    size, seconds = points["size"].to_numpy(float), points["seconds"].to_numpy(float)
    return nnls(np.stack([1 / seconds, size / seconds], axis=1), np.ones(len(size)))[0]


def _floor(part: str, clips: float, identities: float, ceilings: dict[str, float], device: str) -> float:
    """Return the seconds of the counted products at the ceiling; 0 for a part without any."""
    if part == "rank":
        return 2 * clips * identities * DIM / ceilings["fp32"]
    if part.startswith("train"):  # the classifier alone: forward, and backward to features and to vectors
        precision = "bf16" if device == "cuda" else "fp32"
        return 6 * clips * _compared(part, identities) * (DIM + CONTEXT) / ceilings[precision]
    return 0.0


def counted_memory(part: str, clips: float, identities: float, batch: int = 512) -> float:
    """Return the bytes that training or ranking holds at least; 0 for another part.

    Training: each number of the identities' vectors, its gradient and AdamW's two states, and of a batch the cosines,
    the logits and their gradients.  Ranking: both features and 100 rows and scores an identity.
    """
    if part.startswith("train"):
        return 16 * identities * (DIM + CONTEXT) + 12 * batch * _compared(part, identities)
    if part == "rank":
        return 4 * DIM * (clips + identities) + 12 * K * identities
    return 0.0


def _compared(part: str, identities: float) -> float:
    """Return with how many identities a step compares."""
    return identities if part == "train" else identities / 10


def _line(points: pd.DataFrame, asked: dict[str, float]) -> float:
    """Extend a straight line through the measured memory."""
    slope, start = np.polyfit(points["size"].astype(float), points["memory"].astype(float), 1)
    return max(0.0, start) + max(0.0, slope) * asked[points["axis"].iloc[0]]


def _ends(seconds: float, off: float, low: float, high: float, floor: float) -> tuple[float, float]:
    """Return the interval of the time that a verdict looks at: not below the floor, and never without the estimate."""
    return min(seconds, max(off * low, floor)), max(seconds, off * high)


def _verdict(seconds: float, ends: tuple[float, float], limit: float, large: bool) -> str:
    wrong = " and ".join(word for word, so in (("too slow", ends[0] > limit), ("too large", large)) if so)
    return wrong or (NOT_BY_ESTIMATE if seconds > limit else BY_ESTIMATE if ends[1] > limit else AS_IT_IS)


def best(predicted: pd.DataFrame) -> pd.DataFrame:
    """Return by part the prediction with the best verdict over the processors."""
    order = predicted["verdict"].map({AS_IT_IS: 0, BY_ESTIMATE: 1, NOT_BY_ESTIMATE: 2}).fillna(3)
    return predicted.loc[order.groupby(predicted["part"], sort=False).idxmin()].set_index("part")


def told(predicted: pd.DataFrame) -> dict[str, list[str]]:
    """Say which parts work as they are ("works"), are open ("tight") and do not work ("fails"), with time and memory.

    Of a part that is open the interval of its time stands beside that, as the verdict takes it.
    """
    out: dict[str, list[str]] = {"works": [], "tight": [], "fails": []}
    for part, row in best(predicted).iterrows():
        kind = "works" if row["verdict"] == AS_IT_IS else "tight" if row["verdict"] in OPEN else "fails"
        ends = _ends(*row[["seconds", "off", "low", "high", "floor"]])
        between = f" [{', '.join(map(seconds_text, ends))}]" if kind == "tight" else ""
        out[kind].append(f"{part} ({seconds_text(row['seconds'])}{between}, {row['memory'] / 1e9:.3g} GB)")
    return out


def works(predicted: pd.DataFrame) -> pd.Series:
    """Say of each part whether it works on some processor, as it is or by the estimate alone (bool), by part."""
    return best(predicted)["verdict"].isin([AS_IT_IS, BY_ESTIMATE])


def breaks(results: list[dict], *, faces: float, hours: float = 24.0) -> pd.Series:
    """Return at how many times the challenge's size each part first fails, clips and identities growing together.

    Of `TIMES`, by part in the order in which they break; a part that never does is left out.
    """
    one = {name: size / 10 for name, size in TENFOLD.items()}
    sizes = [{name: size * times for name, size in one.items()} for times in TIMES]
    work = pd.DataFrame([works(predict(results, faces=faces, hours=hours, **size)) for size in sizes], index=TIMES)
    failed = ~work.astype(bool)
    return failed.idxmax()[failed.any()].sort_values()


def shown(predicted: pd.DataFrame) -> pd.DataFrame:
    """Return predictions as a page shows them: durations in words, memory in GB."""
    words = {name: predicted[name].map(seconds_text) for name in ("seconds", "power", "low", "high", "line", "floor")}
    out = predicted[["part", "where"]].assign(time=words["seconds"])
    ends = [f"{power} [{low}, {high}]" for power, low, high in zip(words["power"], words["low"], words["high"])]
    out["by power"], out["by line"] = ends, words["line"]
    out["at least"] = words["floor"].where(predicted["floor"] > 0, "")
    out["GB"], out["GB there"] = predicted["memory"] / 1e9, predicted["limit"] / 1e9
    return out.join(predicted[["verdict", "needs"]])


def index(*, clips: float, identities: float, probes: int) -> dict[str, float]:
    """Count what an inverted index saves in ranking (Jegou et al., PAMI 2011): lists, exact, approximate (operations).

    An index of sqrt(N) lists compares an identity with the lists' centres and with the clips of ``probes`` lists.
    """
    lists = round(clips**0.5)
    approximate = 2 * identities * DIM * (lists + probes * clips / lists)
    return {"lists": lists, "exact": 2 * clips * identities * DIM, "approximate": approximate}


def extraction_frame(
    results: list[dict],
    *,
    clips: int,
    clip_seconds: float,
    rate: float,
    faces: float,
    gflop: dict[str, float],
    hours: float,
) -> pd.DataFrame:
    """Return what new face features of the test clips would take at the measured FLOP/s of a network.

    clip_seconds: length of a clip; rate: pictures a second that are searched for faces; faces: a clip; gflop: of a face
    by the name of its network, and of ``SEARCH``; hours: that there are.  Columns: network, where, GFLOP/s (measured),
    hours, needed GFLOP/s for ``hours``, fits (bool).
    """
    rows = []
    for result, row in measured_lines(results):
        if row["name"].startswith("forward"):
            speed = row["flops"] / row["median"] / 1e9
            for network, face in gflop.items():
                if network != SEARCH:
                    total = clips * (clip_seconds * rate * gflop[SEARCH] + faces * face) / 3_600
                    rows.append((network, where(result, row["device"]), speed, total / speed, total / hours))
    frame = pd.DataFrame(rows, columns=["network", "where", "GFLOP/s", "hours", "needed GFLOP/s"])
    return frame.assign(fits=frame["hours"] <= hours)
