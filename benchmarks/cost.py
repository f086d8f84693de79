"""What chapter 11 reads of the measured costs: tables, the roofline, and how costs grow."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import linregress
from scipy.stats import t as student

from mmlib.compare import listed
from mmlib.records import PACKAGE, RESULTS

FILES = "benchmark_*.json"
RELEASED, OTHER = "released code", "another way"


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
        parts.append(
            f"on {machine['made'][:10]} on {machine['cpu']} ({machine['cores']} cores, "
            f"{machine['memory'] / 1e9:.0f} GB{gpu}), torch {machine['torch']}, commit {machine['commit']}{small}"
        )
    return f"Measured {listed(parts)}."


def where(result: dict, device: str) -> str:
    """Name the processor that a line ran on."""
    machine = result["machine"]
    return machine["gpu"] if device == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"


def measured_lines(results: list[dict]) -> list[tuple[dict, dict]]:
    """Return every line that was measured, with the file it stands in."""
    return [(result, row) for result in results for row in result["lines"] if "seconds" in row]


# -- lines ----------------------------------------------------------------------------------------------------------


def line_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a measured line: line, where, work, seconds (median), MB (growth of the peak), MB on the GPU, and
    the shares (of 1) of the compute ceiling, of the copy ceiling, and of the roof, the larger of them.

    Work that is that of the row before is "the same".
    """
    rows = [
        (
            row["name"],
            where(result, row["device"]),
            row["work"],
            row["median"],
            row["memory"] / 1e6,
            np.nan if row["device_memory"] is None else row["device_memory"] / 1e6,
            *(row["shares"].get(name, np.nan) for name in ("compute", "copy", "roof")),
        )
        for result, row in measured_lines(results)
    ]
    frame = pd.DataFrame(
        rows, columns=["line", "where", "work", "seconds", "MB", "MB on the GPU", "compute", "copy", "roof"]
    )
    frame["work"] = frame["work"].mask(frame["work"] == frame["work"].shift(), "the same")
    return frame


def left_out(results: list[dict]) -> str:
    """Say which lines were not measured and why; empty if none."""
    said = {
        f"{row['name']} ({where(result, row['device'])}): {row.get('skipped') or 'it failed'}"
        for result in results
        for row in result["lines"]
        if "seconds" not in row
    }
    return f"Not measured: {'; '.join(sorted(said))}." if said else ""


def beside_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a line and what it is held against.

    Columns: line, where, against, seconds, their seconds, times (theirs by ours), MB, their MB, times the memory.
    """
    rows = []
    for result, row in measured_lines(results):
        for kind, name in (("reference", RELEASED), ("baseline", OTHER)):
            other = row.get(kind, {})
            if "median" in other:
                named = name if kind == "reference" else f"{name}: {other['work'].split(', ')[0]}"
                rows.append(
                    (
                        row["name"],
                        where(result, row["device"]),
                        named,
                        row["median"],
                        other["median"],
                        other["median"] / row["median"],
                        row["memory"] / 1e6,
                        other["memory"] / 1e6,
                        other["memory"] / row["memory"] if row["memory"] > 0 else np.nan,
                    )
                )
    return pd.DataFrame(
        rows,
        columns=["line", "where", "against", "seconds", "their seconds", "times", "MB", "their MB", "times the memory"],
    )


def released_sentence(beside: pd.DataFrame) -> str:
    """Say how much faster or slower than the released code each line is."""
    released = beside[beside["against"] == RELEASED]
    if released.empty:
        return "No run of the released code is among the measurements."
    parts = [
        f"{row['line']} takes {seconds_text(row['seconds'])} where the released code takes "
        f"{seconds_text(row['their seconds'])}, " + times_text(row["times"])
        for row in released.to_dict("records")
    ]
    return f"On the same clips and machine, {'; '.join(parts)}."


def bar_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a bar that was set: line, where, quantity, against, bound, value, met."""
    rows = [
        (
            row["name"],
            where(result, row["device"]),
            bar["quantity"],
            {"reference": RELEASED, "baseline": OTHER, "": "at most, bytes"}[bar["other"]],
            bar["bound"],
            bar["value"],
            "met" if bar["met"] else "missed",
        )
        for result, row in measured_lines(results)
        for bar in row["bars"]
    ]
    return pd.DataFrame(rows, columns=["line", "where", "quantity", "against", "bound", "value", "met"])


def bar_sentence(bars: pd.DataFrame) -> str:
    """Say how many bars are met, and name those that are missed."""
    if bars.empty:
        return "No bar was held against these measurements."
    missed = bars[bars["met"] == "missed"]
    out = f"{len(bars) - len(missed)} of {len(bars)} bars are met"
    return out + (
        f"; missed: {listed(f'{line}, {quantity}' for line, quantity in zip(missed['line'], missed['quantity']))}."
        if len(missed)
        else "."
    )


def lean(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out the columns that are empty, and ``where`` if all was measured in one place."""
    empty = [name for name in table if len(table) and table[name].isna().all()]
    return table.drop(columns=[*empty, *(["where"] if table["where"].nunique() == 1 else [])])


def times_text(times: float) -> str:
    """Write a ratio of times as how much faster or slower."""
    return f"{times:.3g} times faster" if times >= 1 else f"{1 / times:.3g} times slower"


def seconds_text(seconds: float) -> str:
    """Write a duration in a unit that it is read in.

    >>> seconds_text(0.0123), seconds_text(25), seconds_text(1500), seconds_text(9000), seconds_text(864000)
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
    for result, row in measured_lines(results):
        if row["flops"]:
            ceilings, precision = result["ceilings"][row["device"]], row["precision"]
            intensity = row["flops"] / row["bytes"]
            mark = "an epoch, any aggregator" if row["name"].startswith("epoch, ") else row["name"]
            rows.append(
                (
                    row["name"],
                    mark,
                    where(result, row["device"]),
                    precision,
                    intensity,
                    row["flops"] / row["median"],
                    min(ceilings[precision], intensity * ceilings["copy"]),
                )
            )
    return pd.DataFrame(rows, columns=["line", "mark", "where", "precision", "intensity", "reached", "attainable"])


def ceiling_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a processor and precision: where, precision, compute (FLOP/s), copy (bytes/s)."""
    rows = [
        (where(result, device), precision, ceilings[precision], ceilings["copy"])
        for result in results
        for device, ceilings in result["ceilings"].items()
        for precision in ("fp32", "bf16")
    ]
    return pd.DataFrame(rows, columns=["where", "precision", "compute", "copy"])


def roofline_sentence(lines: pd.DataFrame) -> str:
    """Say which line is nearest to what the machine can do, and which farthest."""
    known = lines[lines["roof"] > 0]
    if known.empty:
        return "No line has counted operations or bytes."
    best, worst = known.loc[known["roof"].idxmax()], known.loc[known["roof"].idxmin()]
    bound = int((known["compute"] >= known["copy"]).sum())
    return (
        f"{bound} of {len(known)} lines are nearer to the ceiling of computing than to that of copying; "
        f"{best['line']} reaches {best['roof']:.0%} of its roof, {worst['line']} {worst['roof']:.1%}."
    )


# -- growth ---------------------------------------------------------------------------------------------------------


def growth_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a measured size: cost, axis, where, device, size, seconds, memory (bytes), fixed (dict of sizes)."""
    rows = [
        (
            row["cost"],
            row["axis"],
            where(result, row["device"]),
            row["device"],
            point["size"],
            point["seconds"],
            point["device_memory"] if row["device"] == "cuda" else point["memory"],
            row["fixed"],
        )
        for result in results
        for row in result["growth"]
        for point in row.get("points", [])
    ]
    return pd.DataFrame(rows, columns=["cost", "axis", "where", "device", "size", "seconds", "memory", "fixed"])


def exponents(growth: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
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
            rows.append(
                (
                    cost,
                    axis,
                    place,
                    fit.slope,
                    fit.slope - half,
                    fit.slope + half,
                    len(part),
                    part["size"].iloc[0],
                    part["size"].iloc[-1],
                    part["seconds"].iloc[-1],
                    float(np.exp(np.log(part["size"]).mean())),
                    float(np.exp(np.log(part["seconds"]).mean())),
                )
            )
    return pd.DataFrame(
        rows,
        columns=[
            "cost",
            "axis",
            "where",
            "exponent",
            "low",
            "high",
            "n",
            "first",
            "last",
            "seconds",
            "middle",
            "centre",
        ],
    )


def growth_sentence(fits: pd.DataFrame) -> str:
    """Say which costs grow faster than in proportion, and which slower, where the interval decides."""
    if fits.empty:
        return "No series of sizes was measured."
    faster, slower = fits[fits["low"] > 1], fits[fits["high"] < 1]
    rest = len(fits) - len(faster) - len(slower)

    def named(part: pd.DataFrame) -> str:
        return listed(dict.fromkeys(f"{cost} with {axis}" for cost, axis in zip(part["cost"], part["axis"])))

    parts = [
        f"{word} than in proportion grow: {named(part)}"
        for word, part in (("faster", faster), ("slower", slower))
        if len(part)
    ]
    parts.append(f"of {rest} of {len(fits)} series the interval holds 1, growth in proportion")
    out = "; ".join(parts)
    return f"{out[0].upper()}{out[1:]}."
