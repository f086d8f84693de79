"""What chapter 11 predicts from measured costs: time and memory at another size, and what new face features would take."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from benchmarks.cost import RELEASED, exponents, growth_frame, measured_lines, seconds_text, times_text, where
from mmlib.compare import listed

DIM, CONTEXT, K = 512, 128, 100  # of a face, of a reduced scene; clips ranked for an identity
FRAME_BYTES = 2 * DIM + 4 + 4 * 8 + 8 + 8  # of a face in a store: feature, frame, box and two scores


REMEDY = {
    "import": "several processes, each with a part of the files",
    "open": "a table in parts",
    "train": "a classifier that is split over devices or samples its classes",
    "rank": "an index for approximate search, or more devices",
    "metric": "a part of the queries at a time",
}
AS_IT_IS = "works as it is"


def predict(
    results: list[dict],
    *,
    clips: float,
    identities: float,
    faces: float,
    epochs: int = 1,
    batch: int = 512,
    hours: float = 24.0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Predict time and memory of every cost at another size, on every processor that its growth was measured on.

    faces: a clip; batch: clips of a training step; hours: that a part may take.  By ``power`` the time is that of the
    largest size measured, times (asked / measured)^exponent for every axis, ``low`` and ``high`` with all exponents at
    their lower and upper ends.  By ``line`` each factor is that of a fixed cost and one in proportion, fitted to the same
    points: where the fixed cost is large, the power law says too little.  ``floor`` is what the counted operations take at
    the ceiling.  ``seconds`` is the largest of the three.  Memory (bytes) is counted for training and ranking, and a
    straight line through what was measured for the others.  Columns: part, where, seconds, power, low, high, line, floor,
    memory, limit (bytes), verdict.
    """
    growth, rows = growth_frame(results), []
    fits = exponents(growth, level)
    asked = {"clips": clips, "identities": identities, "faces": clips * faces}
    for result in results:
        for device, ceilings in result["ceilings"].items():
            place = where(result, device)
            limit = result["machine"]["gpu_memory" if device == "cuda" else "memory"]
            for cost in dict.fromkeys(growth.loc[growth["where"] == place, "cost"]):
                part = "train" if cost == "epoch" else cost
                found = _extrapolate(
                    growth[(growth["cost"] == cost) & (growth["where"] == place)],
                    fits[(fits["cost"] == cost) & (fits["where"] == place)],
                    asked,
                )
                if found is None:
                    continue
                seconds = np.array(found) * (epochs if cost == "epoch" else 1)
                floor = _floor(part, clips, identities, ceilings, device, epochs)
                memory = counted_memory(part, clips, identities, batch) or _line(growth, cost, place, asked)
                most = max(seconds[0], seconds[3], floor)
                rows.append(
                    (part, place, most, *seconds, floor, memory, limit, _verdict(part, most, memory, limit, hours))
                )
    return pd.DataFrame(
        rows,
        columns=["part", "where", "seconds", "power", "low", "high", "line", "floor", "memory", "limit", "verdict"],
    )


def _extrapolate(growth: pd.DataFrame, fits: pd.DataFrame, asked: dict[str, float]) -> tuple[float, ...] | None:
    """Return seconds by power, low, high and by line at the sizes asked for; None if no axis of them was fitted."""
    fits = fits[fits["axis"].isin(asked.keys())]
    if fits.empty:
        return None
    first = fits.iloc[0]
    at = growth.loc[growth["axis"] == first["axis"], "fixed"].iloc[0] | {first["axis"]: first["last"]}
    factors = []
    for fit in fits.to_dict("records"):
        axis, ratio = fit["axis"], asked[fit["axis"]] / at[fit["axis"]]
        line = _fixed_and_rate(growth[growth["axis"] == axis])
        ends = sorted(ratio ** fit[name] for name in ("low", "high"))
        factors.append((ratio ** fit["exponent"], *ends, (line @ [1, asked[axis]]) / (line @ [1, at[axis]])))
    return tuple(float(first["seconds"] * factor) for factor in np.prod(factors, axis=0))


def _fixed_and_rate(points: pd.DataFrame) -> np.ndarray:
    """Fit seconds = fixed + rate size, neither negative, by least squares of relative errors: (fixed, rate)."""
    size, seconds = points["size"].to_numpy(float), points["seconds"].to_numpy(float)
    return nnls(np.stack([1 / seconds, size / seconds], axis=1), np.ones(len(size)))[0]


def _floor(part: str, clips: float, identities: float, ceilings: dict[str, float], device: str, epochs: int) -> float:
    """Return the seconds of the counted products at the ceiling; 0 for a part without any."""
    if part == "rank":
        return 2 * clips * identities * DIM / ceilings["bf16"]
    if part == "train":  # the classifier alone: forward, and backward to features and to vectors
        return epochs * 6 * clips * identities * (DIM + CONTEXT) / ceilings["bf16" if device == "cuda" else "fp32"]
    return 0.0


def counted_memory(part: str, clips: float, identities: float, batch: int) -> float:
    """Return the bytes that training or ranking holds at least; 0 for another part.

    Training: each number of the identities' vectors, its gradient and AdamW's two states, and of a batch the cosines, the
    logits and their gradients.  Ranking: both features and 100 rows and scores an identity.
    """
    if part == "train":
        return 16 * identities * (DIM + CONTEXT) + 12 * batch * identities
    if part == "rank":
        return 4 * DIM * (clips + identities) + 12 * K * identities
    return 0.0


def _line(growth: pd.DataFrame, cost: str, place: str, asked: dict[str, float]) -> float:
    """Extend a straight line through the measured memory."""
    part = growth[(growth["cost"] == cost) & (growth["where"] == place)]
    part = part[part["axis"].isin(asked.keys())]
    slope, start = np.polyfit(part["size"].astype(float), part["memory"].astype(float), 1)
    return max(0.0, start) + max(0.0, slope) * asked[part["axis"].iloc[0]]


def _verdict(part: str, seconds: float, memory: float, limit: float, hours: float) -> str:
    slow, large = seconds > 3_600 * hours, memory > limit
    if not (slow or large):
        return AS_IT_IS
    return f"{' and '.join(w for w, so in (('too slow', slow), ('too large', large)) if so)}: needs {REMEDY[part]}"


def prediction_sentence(predicted: pd.DataFrame) -> str:
    """Say which parts work as they are on some processor, and what the others need."""
    if predicted.empty:
        return "nothing is predicted, since no growth was measured."
    works, needs = [], []
    for part, rows in predicted.groupby("part", sort=False):
        fine = rows[rows["verdict"] == AS_IT_IS]
        if len(fine):
            works.append(part if len(fine) == len(rows) else f"{part} (on {listed(fine['where'])})")
        else:
            best = rows.loc[rows["seconds"].idxmin()]
            needs.append(
                f"{part} would take {seconds_text(best['seconds'])} and {best['memory'] / 1e9:,.1f} GB on "
                f"{best['where']} and needs {REMEDY[part]}"
            )
    out = (
        f"{listed(works)} {'work' if len(works) > 1 else 'works'} as measured" if works else "no part works as measured"
    )
    return "; ".join([out, *needs]) + "."


def shown(predicted: pd.DataFrame) -> pd.DataFrame:
    """Return predictions as a page shows them: durations in words, memory in GB."""
    return pd.DataFrame(
        {
            "part": predicted["part"],
            "where": predicted["where"],
            "time": predicted["seconds"].map(seconds_text),
            "by power": [
                "{} ({} to {})".format(*(seconds_text(row[name]) for name in ("power", "low", "high")))
                for row in predicted.to_dict("records")
            ],
            "by line": predicted["line"].map(seconds_text),
            "at least": predicted["floor"].map(lambda floor: seconds_text(floor) if floor else ""),
            "GB": predicted["memory"] / 1e9,
            "GB there": predicted["limit"] / 1e9,
            "verdict": predicted["verdict"],
        }
    )


def index_sentence(
    *, clips: float, identities: float, faces: float, probes: int, device_memory: float, batch: int = 512
) -> str:
    """Say what an inverted index saves in ranking (Jegou et al., PAMI 2011) and over how many devices a classifier is split.

    An index of sqrt(N) lists compares an identity with the lists' centres and with the clips of ``probes`` lists.
    """
    lists = round(clips**0.5)
    exact, approximate = 2 * clips * identities * DIM, 2 * identities * DIM * (lists + probes * clips / lists)
    memory = counted_memory("train", clips, identities, batch)
    devices = int(np.ceil(memory / device_memory))
    split = (
        f"fits one device of {device_memory / 1e9:.0f} GB"
        if devices == 1
        else f"is split over {devices} devices of {device_memory / 1e9:.0f} GB"
    )
    return (
        f"Exact ranking is {exact:.2g} operations; an index of {lists:,} lists that looks into {probes} of them takes "
        f"{approximate:.2g}, a factor of {exact / approximate:,.0f} less, and misses the clips that lie in other lists. "
        f"The classifier with its optimiser and logits holds {memory / 1e9:,.1f} GB, and {split}. "
        f"With {faces:g} faces a clip the store takes {clips * faces * FRAME_BYTES / 1e9:,.0f} GB on disk."
    )


# -- the decision of 2019 -------------------------------------------------------------------------------------------


SEARCH = "searching a picture"  # for faces


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

    clip_seconds: length of a clip; rate: pictures a second that are searched for faces; faces: a clip; gflop: of a face by
    the name of its network, and of ``SEARCH``; hours: that there are.  Columns: network, where, GFLOP/s (measured), hours,
    needed GFLOP/s for ``hours``, fits.
    """
    rows = []
    for result, row in measured_lines(results):
        if row["name"].startswith("forward"):
            speed = row["flops"] / row["median"] / 1e9
            for network, face in gflop.items():
                if network == SEARCH:
                    continue
                total = clips * (clip_seconds * rate * gflop[SEARCH] + faces * face)
                rows.append(
                    (
                        network,
                        where(result, row["device"]),
                        speed,
                        total / speed / 3_600,
                        total / hours / 3_600,
                        total / speed / 3_600 <= hours,
                    )
                )
    return pd.DataFrame(rows, columns=["network", "where", "GFLOP/s", "hours", "needed GFLOP/s", "fits"])


def extraction_sentence(extraction: pd.DataFrame, hours: float) -> str:
    """Say whether new features would have fitted into the container's time."""
    if extraction.empty:
        return "No network was timed, so the decision cannot be costed."
    parts = []
    for network, rows in extraction.groupby("network", sort=False):
        took = listed(f"{seconds_text(3_600 * row['hours'])} on {row['where']}" for row in rows.to_dict("records"))
        parts.append(f"{network} would take {took}, and needs {rows['needed GFLOP/s'].iloc[0]:,.0f} GFLOP/s to fit")
    fits = extraction["fits"]
    verdict = (
        "time alone did not force the decision on any of these"
        if fits.all()
        else "time forced the decision on all of these"
        if not fits.any()
        else "whether time forced the decision depends on network and machine"
    )
    return f"In {hours:g} hours: {'; '.join(parts)}; {verdict}."


def answer(beside: pd.DataFrame, predicted: pd.DataFrame, asked: str) -> str:
    """Say the chapter's answer; asked: the size that is predicted, in words."""
    epoch = beside[(beside["against"] == RELEASED) & beside["line"].str.startswith("epoch")]
    first = (
        ""
        if epoch.empty
        else f"An epoch is {times_text(epoch['times'].iloc[0])} than that of the released code on the same machine. "
    )
    return f"{first}For {asked}: {prediction_sentence(predicted)}"
