"""What chapter 11 reads of the measured costs: tables, the roofline, how costs grow, and what that predicts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from scipy.stats import linregress
from scipy.stats import t as student

from mmlib.reading import listed
from mmlib.runs import PACKAGE, RESULTS

FILES = "benchmark_*.json"
RELEASED, OTHER = "released code", "another way"
DIM, CONTEXT, K = 512, 128, 100  # of a face, of a reduced scene; clips ranked for an identity
FRAME_BYTES = 2 * DIM + 4 + 4 * 8 + 8 + 8  # of a face in a store: feature, frame, box and two scores


def read(folder: str | Path = RESULTS) -> list[dict]:
    """Read what ``python -m benchmarks --save`` wrote: all files ``benchmark_*.json`` of a folder, by name."""
    found = []
    for path in sorted(Path(folder).glob(FILES)):
        try:
            result = json.loads(path.read_text())
            if result["schema"] != 1 or not isinstance(result["lines"], list):
                raise ValueError(f"schema {result['schema']!r}, this version reads 1")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of the benchmark command ({error!r})") from None
        found.append(result)
    if not found:
        raise ValueError(f"{folder}: no file {FILES}; python -m benchmarks --save writes one")
    return found


def measure(*names: str) -> list[dict]:
    """Run the benchmark command here at its smallest scale, for lines that begin with ``names``, and read what it saves."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "--scale", "tiny", "--save", f"{folder}/benchmark_here.json"]
        done = subprocess.run([*command, "--only", *names], cwd=PACKAGE.parent, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"python -m benchmarks: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return read(folder)


def provenance(results: list[dict]) -> str:
    """Say on which machines, when and by which code the numbers were measured."""
    parts = []
    for result in results:
        machine = result["machine"]
        gpu = f" and {machine['gpu']}" if machine["gpu"] else ", no GPU"
        small = ", at a small scale that only tries the command" if result["scale"] != "full" else ""
        parts.append(f"on {machine['made'][:10]} on {machine['cpu']} ({machine['cores']} cores, "
                     f"{machine['memory'] / 1e9:.0f} GB{gpu}), torch {machine['torch']}, commit {machine['commit']}{small}")
    return f"Measured {listed(parts)}."


def where(result: dict, device: str) -> str:
    """Name the processor that a line ran on."""
    machine = result["machine"]
    return machine["gpu"] if device == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"


def _rows(results: list[dict]) -> list[tuple[dict, dict]]:
    return [(result, row) for result in results for row in result["lines"] if "seconds" in row]


# -- lines ----------------------------------------------------------------------------------------------------------


def line_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a measured line: line, where, work, seconds (median), MB (growth of the peak), MB on the GPU, and
    the shares (of 1) of the compute ceiling, of the copy ceiling, and of the roof, the larger of them.

    Work that is that of the row before is "the same".
    """
    rows = [(row["name"], where(result, row["device"]), row["work"], row["median"], row["memory"] / 1e6,
             np.nan if row["device_memory"] is None else row["device_memory"] / 1e6,
             *(row["shares"].get(name, np.nan) for name in ("compute", "copy", "roof"))) for result, row in _rows(results)]
    frame = pd.DataFrame(rows, columns=["line", "where", "work", "seconds", "MB", "MB on the GPU", "compute", "copy", "roof"])
    frame["work"] = frame["work"].mask(frame["work"] == frame["work"].shift(), "the same")
    return frame


def left_out(results: list[dict]) -> str:
    """Say which lines were not measured and why; empty if none."""
    said = {f"{row['name']} ({where(result, row['device'])}): {row.get('skipped') or 'it failed'}"
            for result in results for row in result["lines"] if "seconds" not in row}
    return f"Not measured: {'; '.join(sorted(said))}." if said else ""


def beside_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a line and what it is held against.

    Columns: line, where, against, seconds, their seconds, times (theirs by ours), MB, their MB, times the memory.
    """
    rows = []
    for result, row in _rows(results):
        for kind, name in (("reference", RELEASED), ("baseline", OTHER)):
            other = row.get(kind, {})
            if "median" in other:
                named = name if kind == "reference" else f"{name}: {other['work']}"
                rows.append((row["name"], where(result, row["device"]), named, row["median"], other["median"],
                             other["median"] / row["median"], row["memory"] / 1e6, other["memory"] / 1e6,
                             other["memory"] / row["memory"] if row["memory"] > 0 else np.nan))
    return pd.DataFrame(rows, columns=["line", "where", "against", "seconds", "their seconds", "times", "MB", "their MB",
                                       "times the memory"])


def released_sentence(beside: pd.DataFrame) -> str:
    """Say how much faster or slower than the released code each line is."""
    released = beside[beside["against"] == RELEASED]
    if released.empty:
        return "No run of the released code is among the measurements."
    parts = [f"{row['line']} takes {_seconds(row['seconds'])} where the released code takes "
             f"{_seconds(row['their seconds'])}, " + _times(row["times"]) for row in released.to_dict("records")]
    return f"On the same clips and machine, {'; '.join(parts)}."


def bar_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a bar that was set: line, where, quantity, against, bound, value, met."""
    rows = [(row["name"], where(result, row["device"]), bar["quantity"],
             {"reference": RELEASED, "baseline": OTHER, "": "at most, bytes"}[bar["other"]],
             bar["bound"], bar["value"], "met" if bar["met"] else "missed")
            for result, row in _rows(results) for bar in row["bars"]]
    return pd.DataFrame(rows, columns=["line", "where", "quantity", "against", "bound", "value", "met"])


def bar_sentence(bars: pd.DataFrame) -> str:
    """Say how many bars are met, and name those that are missed."""
    if bars.empty:
        return "No bar was held against these measurements."
    missed = bars[bars["met"] == "missed"]
    out = f"{len(bars) - len(missed)} of {len(bars)} bars are met"
    return out + (f"; missed: {listed(f'{line}, {quantity}' for line, quantity in zip(missed['line'], missed['quantity']))}."
                  if len(missed) else ".")


def lean(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out the columns that are empty, and ``where`` if all was measured in one place."""
    empty = [name for name in table if len(table) and table[name].isna().all()]
    return table.drop(columns=[*empty, *(["where"] if table["where"].nunique() == 1 else [])])


def _times(times: float) -> str:
    return f"{times:.3g} times faster" if times >= 1 else f"{1 / times:.3g} times slower"


def _seconds(seconds: float) -> str:
    """Write a duration in a unit that it is read in.

    >>> _seconds(0.0123), _seconds(25), _seconds(1500), _seconds(9000), _seconds(864000)
    ('12.3 ms', '25 s', '25 min', '2.5 h', '10 days')
    """
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min"), (1, "s")):
        if seconds >= (size if unit == "s" else 2 * size):
            return f"{seconds / size:.3g} {unit}"
    return f"{1_000 * seconds:.3g} ms"


# -- the roofline ---------------------------------------------------------------------------------------------------


def roofline_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a line with operations.

    Columns: line, mark (what a figure calls it: epochs of all aggregators share a mark, as they lie close together), where,
    precision, intensity (FLOP a byte), reached, attainable (FLOP/s).  Attainable is the roof, min(compute ceiling,
    intensity x copy ceiling) (Williams et al., CACM 2009).
    """
    rows = []
    for result, row in _rows(results):
        if row["flops"]:
            ceilings, precision = result["ceilings"][row["device"]], row["precision"]
            intensity = row["flops"] / row["bytes"]
            mark = "an epoch, any aggregator" if row["name"].startswith("epoch, ") else row["name"]
            rows.append((row["name"], mark, where(result, row["device"]), precision, intensity, row["flops"] / row["median"],
                         min(ceilings[precision], intensity * ceilings["copy"])))
    return pd.DataFrame(rows, columns=["line", "mark", "where", "precision", "intensity", "reached", "attainable"])


def ceiling_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a processor and precision: where, precision, compute (FLOP/s), copy (bytes/s)."""
    rows = [(where(result, device), precision, ceilings[precision], ceilings["copy"])
            for result in results for device, ceilings in result["ceilings"].items() for precision in ("fp32", "bf16")]
    return pd.DataFrame(rows, columns=["where", "precision", "compute", "copy"])


def roofline_sentence(lines: pd.DataFrame) -> str:
    """Say which line is nearest to what the machine can do, and which farthest."""
    known = lines[lines["roof"] > 0]
    if known.empty:
        return "No line has counted operations or bytes."
    best, worst = known.loc[known["roof"].idxmax()], known.loc[known["roof"].idxmin()]
    bound = int((known["compute"] >= known["copy"]).sum())
    return (f"{bound} of {len(known)} lines are nearer to the ceiling of computing than to that of copying; "
            f"{best['line']} reaches {best['roof']:.0%} of its roof, {worst['line']} {worst['roof']:.1%}.")


# -- growth ---------------------------------------------------------------------------------------------------------


def growth_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a measured size: cost, axis, where, device, size, seconds, memory (bytes), fixed (dict of sizes)."""
    rows = [(row["cost"], row["axis"], where(result, row["device"]), row["device"], point["size"], point["seconds"],
             point["device_memory"] if row["device"] == "cuda" else point["memory"], row["fixed"])
            for result in results for row in result["growth"] for point in row.get("points", [])]
    return pd.DataFrame(rows, columns=["cost", "axis", "where", "device", "size", "seconds", "memory", "fixed"])


def exponents(growth: pd.DataFrame, level: float = .95) -> pd.DataFrame:
    """Fit seconds = a size^b to every series of at least three sizes, by least squares of the logarithms.

    Columns: cost, axis, where, exponent b with the t interval low to high of n sizes, first, last, seconds at the last,
    middle (size) and centre (seconds on the fitted line there).
    """
    rows = []
    for (cost, axis, place), part in growth.groupby(["cost", "axis", "where"], sort=False):
        part = part.sort_values("size")
        if len(part) >= 3:
            fit = linregress(np.log(part["size"].astype(float)), np.log(part["seconds"]))
            half = student.ppf((1 + level) / 2, len(part) - 2) * fit.stderr
            rows.append((cost, axis, place, fit.slope, fit.slope - half, fit.slope + half, len(part),
                         part["size"].iloc[0], part["size"].iloc[-1], part["seconds"].iloc[-1],
                         float(np.exp(np.log(part["size"]).mean())), float(np.exp(np.log(part["seconds"]).mean()))))
    return pd.DataFrame(rows, columns=["cost", "axis", "where", "exponent", "low", "high", "n", "first", "last", "seconds",
                                       "middle", "centre"])


def growth_sentence(fits: pd.DataFrame) -> str:
    """Say which costs grow faster than in proportion, and which slower, where the interval decides."""
    if fits.empty:
        return "No series of sizes was measured."
    faster, slower = fits[fits["low"] > 1], fits[fits["high"] < 1]
    rest = len(fits) - len(faster) - len(slower)

    def named(part: pd.DataFrame) -> str:
        return listed(dict.fromkeys(f"{cost} with {axis}" for cost, axis in zip(part["cost"], part["axis"])))

    parts = [f"{word} than in proportion grow: {named(part)}" for word, part in (("faster", faster), ("slower", slower))
             if len(part)]
    parts.append(f"of {rest} of {len(fits)} series the interval holds 1, growth in proportion")
    out = "; ".join(parts)
    return f"{out[0].upper()}{out[1:]}."


# -- prediction -----------------------------------------------------------------------------------------------------

REMEDY = {"import": "several processes, each with a part of the files",
          "open": "a table in parts",
          "train": "a classifier that is split over devices or samples its classes",
          "rank": "an index for approximate search, or more devices",
          "metric": "a part of the queries at a time"}
AS_IT_IS = "works as it is"


def predict(results: list[dict], *, clips: float, identities: float, faces: float, epochs: int = 1, batch: int = 512,
            hours: float = 24.0, level: float = .95) -> pd.DataFrame:
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
                found = _extrapolate(growth[(growth["cost"] == cost) & (growth["where"] == place)],
                                     fits[(fits["cost"] == cost) & (fits["where"] == place)], asked)
                if found is None:
                    continue
                seconds = np.array(found) * (epochs if cost == "epoch" else 1)
                floor = _floor(part, clips, identities, ceilings, device, epochs)
                memory = counted_memory(part, clips, identities, batch) or _line(growth, cost, place, asked)
                most = max(seconds[0], seconds[3], floor)
                rows.append((part, place, most, *seconds, floor, memory, limit, _verdict(part, most, memory, limit, hours)))
    return pd.DataFrame(rows, columns=["part", "where", "seconds", "power", "low", "high", "line", "floor", "memory", "limit",
                                       "verdict"])


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
            needs.append(f"{part} would take {_seconds(best['seconds'])} and {best['memory'] / 1e9:,.1f} GB on "
                         f"{best['where']} and needs {REMEDY[part]}")
    out = f"{listed(works)} {'work' if len(works) > 1 else 'works'} as measured" if works else "no part works as measured"
    return "; ".join([out, *needs]) + "."


def shown(predicted: pd.DataFrame) -> pd.DataFrame:
    """Return predictions as a page shows them: durations in words, memory in GB."""
    return pd.DataFrame({"part": predicted["part"], "where": predicted["where"],
                         "time": predicted["seconds"].map(_seconds),
                         "by power": [f"{_seconds(row['power'])} ({_seconds(row['low'])} to {_seconds(row['high'])})"
                                      for row in predicted.to_dict("records")],
                         "by line": predicted["line"].map(_seconds),
                         "at least": predicted["floor"].map(lambda floor: _seconds(floor) if floor else ""),
                         "GB": predicted["memory"] / 1e9, "GB there": predicted["limit"] / 1e9,
                         "verdict": predicted["verdict"]})


def index_sentence(*, clips: float, identities: float, faces: float, probes: int, device_memory: float,
                   batch: int = 512) -> str:
    """Say what an inverted index saves in ranking (Jegou et al., PAMI 2011) and over how many devices a classifier is split.

    An index of sqrt(N) lists compares an identity with the lists' centres and with the clips of ``probes`` lists.
    """
    lists = round(clips ** .5)
    exact, approximate = 2 * clips * identities * DIM, 2 * identities * DIM * (lists + probes * clips / lists)
    memory = counted_memory("train", clips, identities, batch)
    devices = int(np.ceil(memory / device_memory))
    split = (f"fits one device of {device_memory / 1e9:.0f} GB" if devices == 1 else
             f"is split over {devices} devices of {device_memory / 1e9:.0f} GB")
    return (f"Exact ranking is {exact:.2g} operations; an index of {lists:,} lists that looks into {probes} of them takes "
            f"{approximate:.2g}, a factor of {exact / approximate:,.0f} less, and misses the clips that lie in other lists. "
            f"The classifier with its optimiser and logits holds {memory / 1e9:,.1f} GB, and {split}. "
            f"With {faces:g} faces a clip the store takes {clips * faces * FRAME_BYTES / 1e9:,.0f} GB on disk.")


# -- the decision of 2019 -------------------------------------------------------------------------------------------


SEARCH = "searching a picture"  # for faces


def extraction_frame(results: list[dict], *, clips: int, clip_seconds: float, rate: float, faces: float,
                     gflop: dict[str, float], hours: float) -> pd.DataFrame:
    """Return what new face features of the test clips would take at the measured FLOP/s of a network.

    clip_seconds: length of a clip; rate: pictures a second that are searched for faces; faces: a clip; gflop: of a face by
    the name of its network, and of ``SEARCH``; hours: that there are.  Columns: network, where, GFLOP/s (measured), hours, needed
    GFLOP/s for ``hours``, fits.
    """
    rows = []
    for result, row in _rows(results):
        if row["name"].startswith("forward"):
            speed = row["flops"] / row["median"] / 1e9
            for network, face in gflop.items():
                if network == SEARCH:
                    continue
                total = clips * (clip_seconds * rate * gflop[SEARCH] + faces * face)
                rows.append((network, where(result, row["device"]), speed, total / speed / 3_600, total / hours / 3_600,
                             total / speed / 3_600 <= hours))
    return pd.DataFrame(rows, columns=["network", "where", "GFLOP/s", "hours", "needed GFLOP/s", "fits"])


def extraction_sentence(extraction: pd.DataFrame, hours: float) -> str:
    """Say whether new features would have fitted into the container's time."""
    if extraction.empty:
        return "No network was timed, so the decision cannot be costed."
    parts = []
    for network, rows in extraction.groupby("network", sort=False):
        took = listed(f"{_seconds(3_600 * row['hours'])} on {row['where']}" for row in rows.to_dict("records"))
        parts.append(f"{network} would take {took}, and needs {rows['needed GFLOP/s'].iloc[0]:,.0f} GFLOP/s to fit")
    fits = extraction["fits"]
    verdict = ("time alone did not force the decision on any of these" if fits.all() else
               "time forced the decision on all of these" if not fits.any() else
               "whether time forced the decision depends on network and machine")
    return f"In {hours:g} hours: {'; '.join(parts)}; {verdict}."


def answer(beside: pd.DataFrame, predicted: pd.DataFrame, asked: str) -> str:
    """Say the chapter's answer; asked: the size that is predicted, in words."""
    epoch = beside[(beside["against"] == RELEASED) & beside["line"].str.startswith("epoch")]
    first = ("" if epoch.empty else
             f"An epoch is {_times(epoch['times'].iloc[0])} than that of the released code on the same machine. ")
    return f"{first}For {asked}: {prediction_sentence(predicted)}"
