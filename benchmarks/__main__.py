"""Measure every line, print the table and save it: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import reference as released
from benchmarks.lines import Bar, Line, chosen
from benchmarks.meter import OutOfTime, StepFailed, isolated
from benchmarks.parity import BOUND
from mmlib.records import write_whole

SCHEMA = 1
LATE = "the minutes were over"
ON_GPU_ONLY = {"challenge, one member": "100 epochs of the challenge's train split are hours on a CPU"}  # at full scale


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 if a line failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what the study costs.")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="lines that begin so, e.g. rank 'epoch, NAN'"
    )
    parser.add_argument("--scale", choices=("tiny", "full"), default="full", help="tiny tries the command itself")
    parser.add_argument(
        "--reference",
        metavar="PATH",
        help="a checkout of the released code of 2019, measured beside ours and held against it part by part (parity)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: all that there are")
    parser.add_argument("--minutes", type=float, default=0, help="begin nothing, and wait for nothing, after so many")
    parser.add_argument("--save", metavar="FILE.json", help="written anew after every line")
    parser.add_argument("--resume", action="store_true", help="keep lines of FILE.json that this library measured here")
    parser.add_argument("--folder", help="where temporary files go; at full scale some 10 GB")
    asked = parser.parse_args(arguments)
    try:
        lines, growth, scene, parity = chosen(asked.only)
        path = str(released.check(asked.reference)) if asked.reference else ""
    except ValueError as error:
        parser.error(str(error))
    if asked.only and parity and not path:
        parser.error("parity needs the released code: --reference PATH")
    found: dict = {}
    limit, known = Limit(60 * asked.minutes), earlier(asked.save, asked.scale) if asked.resume else []
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        options = {"scale": asked.scale, "reference": path, "folder": str(Path(folder).resolve()), "limit": limit}
        for found in measure_all(lines, growth, scene, device=asked.device, known=known, **options):
            save(asked.save, with_known(found, known))
    if parity and path:
        found["parity"] = hold(path)
        save(asked.save, found)
    rows = found["lines"] + found["growth"] + found.get("parity", [])
    return int(any(row.get("failed") for row in rows))


def earlier(path: str | None, scale: str) -> list[dict]:
    """Read the lines that were measured on a machine like this one, by this library, if the file has such."""
    if not path or not Path(path).exists():
        return []
    found, here = json.loads(Path(path).read_text()), isolated("machine:describe", device="cuda")
    same = all(found["machine"].get(name) == here[name] for name in ("cpu", "cores", "gpu", "torch", "library"))
    every = [*found["lines"], *found["growth"]] if same and found["scale"] == scale else []
    return [row for row in every if "seconds" in row or "points" in row]


def with_known(found: dict, known: list[dict]) -> dict:
    """Return what was found with the known rows that are still to come, so that none is lost where a run ends early."""
    there = {(row["name"], row["device"]) for row in found["lines"] + found["growth"]}
    rest = [row for row in known if (row["name"], row["device"]) not in there]
    parts = {"lines": [row for row in rest if "points" not in row], "growth": [row for row in rest if "points" in row]}
    return found | {part: found[part] + rows for part, rows in parts.items()}


def save(path: str | None, found: dict) -> None:
    """Write what was found so far, whole; no path writes nothing."""
    if path:
        write_whole(Path(path), (json.dumps(found, indent=1) + "\n").encode())


class Limit:
    """A limit of seconds from now on; 0 is none."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds if seconds else None

    def left(self) -> float | None:
        """Return the seconds that are left, 0 at least; None without a limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def hold(reference: str) -> list[dict]:
    """Print and return how far every part is from the released code; what is beyond the bound has failed."""
    try:
        rows = isolated("parity:check", reference=reference)["rows"]
    except StepFailed as error:
        rows = [{"part": "parity", "of": "all", "difference": float("nan"), "failed": str(error)}]
    for row in rows:
        if not row["difference"] <= BOUND:  # or NaN
            row.setdefault("failed", f"more than {BOUND:g}")
        print(f"parity, {row['part']:24s} {row['of']:44s} {row['difference']:8.1e}  {row.get('failed', '')}".rstrip())
    return rows


def measure_all(
    lines: list[Line],
    growth: list[Line],
    scene: bool,
    *,
    scale: str,
    reference: str,
    folder: str,
    device: str = "auto",
    limit: Limit,
    known: list[dict],
) -> Iterator[dict]:
    """Measure lines and growth series on the devices asked for, printing each; yield all that was found after each.

    known: rows that were measured before, which stand.
    """
    machine = isolated("machine:describe", device="cuda")
    devices = ["cpu", *(["cuda"] if machine["gpu"] else [])] if device == "auto" else [device]
    if not machine["gpu"] and "cuda" in devices:
        raise StepFailed("--device cuda: torch finds no GPU here")
    ceilings = {at: isolated("machine:ceilings", device=at, scale=scale) for at in devices}
    found: dict = {
        "schema": SCHEMA,
        "scale": scale,
        "machine": machine,
        "ceilings": ceilings,
        "lines": [],
        "growth": [],
    }
    print(header(found))
    made: set[str] = set()
    before = {(row["name"], row["device"]): row for row in known}
    fixed: dict = {"scale": scale, "folder": folder, "made": made, "limit": limit}
    for line, at in pairs(lines, devices):
        row = before.get((line.name, at)) or measure_line(line, at, reference=reference, **fixed)
        found["lines"].append(finish(row, ceilings[at], line.bars))
        print(sentence(row), flush=True)
        yield found
    for at in devices if scene else ():
        stand = [row for (name, device), row in before.items() if name.startswith("scene, ") and device == at]
        for row in stand or scene_rows(at, scale, limit):
            found["lines"].append(finish(row, ceilings[at], ()))
            print(sentence(row), flush=True)
        yield found
    for line, at in pairs(growth, devices):
        row = {"name": line.name, "device": at}
        row = before.get((line.name, at)) or attempt(row, line.step, line, at, **fixed)
        found["growth"].append(row)
        points = ", ".join(f"{p['size']:,}: {p['seconds']:.3g} s" for p in row.get("points", []))
        print(f"{row['name']} ({at}): {points or row.get('failed') or row['skipped']}", flush=True)
        yield found
    for at in devices:  # a second time, so that one disturbed moment lowers no ceiling
        for name, value in isolated("machine:ceilings", device=at, scale=scale).items():
            ceilings[at][name] = max(value, ceilings[at][name])
    for row in found["lines"]:
        if "seconds" in row:
            row["shares"] = shares(row, ceilings[row["device"]])
    yield found


def pairs(lines: list[Line], devices: list[str]) -> Iterator[tuple[Line, str]]:
    """Yield every line with the devices that it runs on: on a GPU some do, on the CPU all."""
    for line in lines:
        yield from ((line, device) for device in devices if line.gpu or device == "cpu")


def measure_line(line: Line, device: str, *, scale: str, reference: str, **options) -> dict:
    """Measure one line, its baseline and its reference; options as for ``attempt``."""
    row = {"name": line.name, "device": device, "scale": scale}
    if scale == "full" and device == "cpu" and line.name in ON_GPU_ONLY:
        return row | {"skipped": ON_GPU_ONLY[line.name]}
    row = attempt(row, line.step, line, device, scale=scale, **options)
    if "seconds" not in row:
        return row
    for kind, step in (("baseline", line.baseline), ("reference", line.reference if reference else "")):
        if step:
            row[kind] = attempt({}, step, line, device, scale=scale, reference=reference, **options)
    return row


def attempt(
    row: dict,
    step: str,
    line: Line,
    device: str,
    *,
    scale: str,
    folder: str,
    made: set[str],
    limit: Limit,
    reference: str = "",
) -> dict:
    """Run a step of a line after what it needs; what fails is said in the row, so that the others go on.

    made: what earlier lines needed and have made, to which this adds.
    """
    try:
        for need in line.needs:
            if need not in made:
                isolated(need, folder=folder, scale=scale, seconds=limit.left())
                made.add(need)
        asked = {"device": device, "folder": folder, "scale": scale, "reference": reference} | line.arguments
        return row | isolated(step, seconds=limit.left(), **asked)
    except OutOfTime:
        return row | {"skipped": LATE}
    except StepFailed as error:
        return row | {"failed": str(error)}


def scene_rows(device: str, scale: str, limit: Limit) -> list[dict]:
    """Return the lines of ``benchmarks.scene``."""
    row = {"name": "scene", "device": device, "scale": scale}
    try:
        rows = isolated("networks:scene", device=device, scale=scale, seconds=limit.left())["rows"]
    except OutOfTime:
        return [row | {"skipped": LATE}]
    except StepFailed as error:
        return [row | {"failed": str(error)}]
    return [row | found for found in rows]


def finish(row: dict, ceilings: dict[str, float], bars: tuple[Bar, ...]) -> dict:
    """Add to a row, in place, its shares of the ceilings and what became of its bars, which are meant at full scale."""
    if "seconds" not in row:
        return row
    for part in (row, row.get("baseline", {}), row.get("reference", {})):
        if "seconds" in part:
            part["best"], part["median"] = min(part["seconds"]), float(np.median(part["seconds"]))
    row["shares"] = shares(row, ceilings)
    row["ratios"] = {
        other: {
            quantity: row[other][key] / row[key]
            for quantity, key in (("seconds", "median"), ("memory", "memory"))
            if row[key] and row[other].get(key) is not None
        }
        for other in ("baseline", "reference")
        if "median" in row.get(other, {})
    }
    row["bars"] = []
    for bar in bars if row["scale"] == "full" else ():
        own = {"seconds": row["median"], "memory": row["memory"]}
        value = (row["ratios"].get(bar.other, {}) if bar.other else own).get(bar.quantity)
        if value is not None:
            met = value >= bar.ratio if bar.other else value <= bar.most
            row["bars"].append(
                {
                    "quantity": bar.quantity,
                    "other": bar.other,
                    "value": value,
                    "bound": bar.ratio if bar.other else bar.most,
                    "met": met,
                }
            )
    return row


def shares(row: dict, ceilings: dict[str, float]) -> dict[str, float]:
    """Return shares of the compute ceiling of the row's precision and of the copy ceiling, and the larger one."""
    if row["flops"] is None:
        return {}
    found = {
        "compute": row["flops"] / row["median"] / ceilings[row["precision"]],
        "copy": row["bytes"] / row["median"] / ceilings["copy"],
    }
    return found | {"roof": max(found.values())}


def header(found: dict) -> str:
    """Say what the machine is and what it reaches."""
    machine = found["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 1e9:.0f} GB; "
        f"{machine['gpu'] or 'no GPU'}; torch {machine['torch']}; {machine['made']}, commit {machine['commit']}"
    ]
    lines += [
        f"ceilings, {device}: {c['fp32'] / 1e9:,.0f} GFLOP/s fp32, {c['bf16'] / 1e9:,.0f} bf16, "
        f"{c['copy'] / 1e9:,.1f} GB/s"
        for device, c in found["ceilings"].items()
    ]
    columns = "line; seconds (median); memory; GFLOP counted, share of compute; GB, share of copy; ratios"
    return "\n".join([*lines, "", columns])


def sentence(row: dict) -> str:
    """Say a line of the table."""
    name = f"{row['name']:24s} {row['device']:4s}"
    if "seconds" not in row:
        return f"{name} {'skipped: ' + row['skipped'] if 'skipped' in row else 'failed: ' + row['failed']}"
    parts = [f"{name} {row['median']:10.4g} s", f"{row['memory'] / 1e6:8,.0f} MB"]
    if row["shares"]:
        parts.append(f"{row['flops'] / 1e9:9,.1f} GFLOP {row['shares']['compute']:4.0%}")
        parts.append(f"{row['bytes'] / 1e9:7.2f} GB {row['shares']['copy']:4.0%}")
    for other, ratios in row["ratios"].items():
        parts += [f"{quantity} of {other} x{value:.3g}" for quantity, value in ratios.items()]
    for other in ("baseline", "reference"):
        for word in ("failed", "skipped"):
            if word in row.get(other, {}):
                parts.append(f"{other} {word}: {row[other][word]}")
    parts += [
        f"bar {bar['quantity']} {'>=' if bar['other'] else '<='} {bar['bound']:.3g}: "
        f"{'met' if bar['met'] else 'missed'}"
        for bar in row["bars"]
    ]
    return "  ".join(parts) + f"\n    {row['work']}"


if __name__ == "__main__":
    sys.exit(main())
