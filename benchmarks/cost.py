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

from mmlib.compare import verdict
from mmlib.records import RESULTS

FILES = "benchmark_*.json"
RELEASED, OTHER = "released code", "another way"


def read(folder: str | Path = RESULTS) -> list[dict]:
    """Read what ``python -m benchmarks --save`` wrote: all files ``benchmark_*.json`` of a folder, by name."""
    found = []
    for path in sorted(Path(folder).glob(FILES)):
        try:
            result = json.loads(path.read_text())
            if result["schema"] != 1:
                raise ValueError(f"schema {result['schema']!r}, this version reads 1")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of the benchmark command ({error!r})") from None
        found.append(result)
    if not found:
        raise ValueError(f"{folder}: no file {FILES}; python -m benchmarks --save writes one")
    return found


def measure(*names: str) -> list[dict]:
    """Run the benchmark command here at its smallest scale, for lines that begin so, and read what it saves."""
    with tempfile.TemporaryDirectory() as folder:
        saved, root = Path(folder, "benchmark_here.json"), Path(__file__).parents[1]
        command = [sys.executable, "-m", "benchmarks", "--scale", "tiny", "--save", str(saved), "--only", *names]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"python -m benchmarks: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return read(folder)


def where(result: dict, device: str) -> str:
    """Name the processor that a line ran on."""
    machine = result["machine"]
    return machine["gpu"] if device == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"


def machine_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a file: measured (day), processor, cores, memory in GB, GPU, torch, commit, scale.

    A line that another commit measured has its own ``commit``, which stands there too.
    """
    frame = pd.DataFrame([result["machine"] | {"scale": result["scale"]} for result in results])
    frame["commit"] = [
        ", ".join(dict.fromkeys(row.get("commit", result["machine"]["commit"]) for row in result["lines"]))
        or result["machine"]["commit"]
        for result in results
    ]
    frame["made"], frame["memory"] = frame["made"].str[:10], frame["memory"] / 1e9
    frame["gpu"] = frame["gpu"].fillna("none")
    names = {"made": "measured", "cpu": "processor", "cores": "cores", "memory": "memory, GB", "gpu": "GPU"}
    return frame.rename(columns=names)[[*names.values(), "torch", "commit", "scale"]]


def _with_source(frame: pd.DataFrame, results: list[dict]) -> pd.DataFrame:
    """Say with a frame, as ``figures.note`` wants it, who measured it."""
    files = machine_frame(results)[["measured", "processor", "commit"]].itertuples(index=False) if results else ()
    frame.attrs["made"] = " ".join("Measured {} on {}, commit {}.".format(*file) for file in files)
    return frame


def measured_lines(results: list[dict]) -> list[tuple[dict, dict]]:
    """Return every line that was measured, with the file it stands in."""
    return [(result, row) for result in results for row in result["lines"] if "seconds" in row]


def line_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a line: line, where, work, seconds (median), MB (growth of the peak), MB on the GPU, and shares.

    The shares (of 1) are those of the compute ceiling, of the copy ceiling, and of the roof, the larger of them.  Work
    that is that of the row before is "the same"; a line that was not measured says why there.
    """
    columns = ["line", "where", "work", "seconds", "MB", "MB on the GPU", "compute", "copy", "roof"]
    rows = []
    for result in results:
        for row in result["lines"]:
            said = {"line": row["name"], "where": where(result, row["device"])}
            if "seconds" in row:
                gpu = np.nan if row["device_memory"] is None else row["device_memory"] / 1e6
                said |= {"work": row["work"], "seconds": row["median"], "MB": row["memory"] / 1e6, "MB on the GPU": gpu}
                said |= row["shares"]
            else:
                said["work"] = f"not measured: {row.get('skipped') or 'it failed'}"
            rows.append(said)
    frame = pd.DataFrame(rows, columns=columns).drop_duplicates(["line", "where", "work", "seconds"])
    frame["work"] = frame["work"].mask(frame["work"] == frame["work"].shift(), "the same")
    return frame.astype(dict.fromkeys(columns[3:], float))


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
                said = row["name"], where(result, row["device"]), named
                rows.append((*said, row["median"], other["median"], row["memory"] / 1e6, other["memory"] / 1e6))
    frame = pd.DataFrame(rows, columns=["line", "where", "against", "seconds", "their seconds", "MB", "their MB"])
    frame.insert(5, "times", frame["their seconds"] / frame["seconds"])
    frame["times the memory"] = (frame["their MB"] / frame["MB"]).where(frame["MB"] > 0)
    return frame


def bar_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a bar that was set: line, where, quantity, against, bound, value, met."""
    against = {"reference": RELEASED, "baseline": OTHER, "": "at most, bytes"}
    rows = [
        {"line": row["name"], "where": where(result, row["device"]), "against": against[bar["other"]]}
        | {name: bar[name] for name in ("quantity", "bound", "value")}
        | {"met": "met" if bar["met"] else "missed"}
        for result, row in measured_lines(results)
        for bar in row["bars"]
    ]
    return pd.DataFrame(rows, columns=["line", "where", "quantity", "against", "bound", "value", "met"])


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


def roofline_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a line with operations.

    Columns: line, mark (what a figure calls it: epochs of all aggregators share one, as they lie close together),
    where, precision, intensity (FLOP a byte), reached, attainable (FLOP/s).  Attainable is the roof, min(compute
    ceiling, intensity x copy ceiling) (Williams et al., CACM 2009).
    """
    rows = []
    for result, row in measured_lines(results):
        if row["flops"]:
            name, precision, ceilings = row["name"], row["precision"], result["ceilings"][row["device"]]
            mark = "an epoch, any aggregator" if name.startswith("epoch, ") else name
            intensity = row["flops"] / row["bytes"]
            attainable = min(ceilings[precision], intensity * ceilings["copy"])
            reached = row["flops"] / row["median"]
            rows.append((name, mark, where(result, row["device"]), precision, intensity, reached, attainable))
    columns = ["line", "mark", "where", "precision", "intensity", "reached", "attainable"]
    return _with_source(pd.DataFrame(rows, columns=columns), results)


def ceiling_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a processor and precision: where, precision, compute (FLOP/s), copy (bytes/s)."""
    rows = [
        (where(result, device), precision, ceilings[precision], ceilings["copy"])
        for result in results
        for device, ceilings in result["ceilings"].items()
        for precision in ("fp32", "bf16")
    ]
    return pd.DataFrame(rows, columns=["where", "precision", "compute", "copy"])


def growth_frame(results: list[dict]) -> pd.DataFrame:
    """Return one row a measured size: cost, axis, where, device, size, seconds, memory (bytes), fixed (sizes)."""
    columns = ["cost", "axis", "where", "device", "size", "seconds", "memory", "fixed"]
    rows = [
        row
        | point
        | {"where": where(result, row["device"])}
        | ({"memory": point["device_memory"]} if row["device"] == "cuda" else {})
        for result in results
        for row in result["growth"]
        for point in row.get("points", [])
    ]
    return _with_source(pd.DataFrame(rows, columns=columns), results)


def exponents(growth: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Fit seconds = a size^b to every series of at least three sizes, by least squares of the logarithms.

    Columns: cost, axis, where, exponent b with the t interval low to high of n sizes, first, last, seconds at the last,
    middle (size) and centre (seconds on the fitted line there), grows: ``faster`` than in proportion, or ``slower``,
    where the interval lies on one side of 1.
    """
    columns = ["cost", "axis", "where", "exponent", "low", "high", "n", "first", "last", "seconds", "middle", "centre"]
    rows = []
    for series, part in growth.groupby(["cost", "axis", "where"], sort=False):
        part = part.sort_values("size")
        size, seconds = part["size"].to_numpy(float), part["seconds"].to_numpy(float)
        if len(part) >= 3:
            fit = linregress(np.log(size), np.log(seconds))
            half = student.ppf((1 + level) / 2, len(part) - 2) * fit.stderr
            middle, centre = (float(np.exp(np.log(values).mean())) for values in (size, seconds))
            found = fit.slope, fit.slope - half, fit.slope + half, len(part)
            rows.append((*series, *found, part["size"].iloc[0], part["size"].iloc[-1], seconds[-1], middle, centre))
    frame = pd.DataFrame(rows, columns=columns)
    words = "faster", "in proportion", "slower"
    return frame.assign(grows=[verdict(row, *words, bound=1.0) for row in frame.to_dict("records")])
