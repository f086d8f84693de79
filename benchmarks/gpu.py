"""Make the most of some minutes on a GPU, in order of worth: ``python -m benchmarks.gpu --minutes 9 --out FOLDER``.

    smoke.json           one step of every arm of every chapter, and members trained together held against each alone
    tests.log            the tests that need the device
    benchmark_cuda.json  the lines of the cost table
    full.jsonl.gz        the records of the chapters in worlds of the challenge's size, world after world

Every file is written whole, as soon as there is something to write, and ``summary.md`` says what was done and what is
left.  The same command goes on where it was stopped, however that was: it takes what FOLDER and the book have, if this
version of the library made it.  Copy ``benchmark_cuda.json`` and ``full.jsonl.gz`` to ``book/results``.  The command
needs neither papermill nor jupytext; with MMLIB_CACHE set, which then has the worlds, not platformdirs either.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import __main__ as costs
from benchmarks.meter import ROOT
from mmlib import retrieve, systems
from mmlib.data.content import write_whole
from mmlib.data.store import ClipStore
from mmlib.ensemble import member_seed
from mmlib.experiment import TRAINED, Experiment, torch_device
from mmlib.records import fetch, is_fresh, library_hash, open_store, read_records, read_results, restore, write_results
from mmlib.studies.plans import PLANS, placed
from mmlib.train import train_together

FULL = "full.jsonl.gz"
# Of the minutes, at most: what a part does not use is left to those after it.
SHARES = {"smoke": 0.08, "tests": 0.15, "costs": 0.35, "records": 1.0}
LINES = [
    "challenge, one member",
    "members together",
    "rank",
    "forward",
    "scene",
    "epoch, quality",
    "epoch, attention +",
]
LINES += ["epoch, as coded", "merge", "epoch", "growth"]
CHAPTERS = ["04_aggregation", "10_ladder", "03_baselines", "05_loss", "07_fusion", "08_ensemble", "09_inference"]
MEMBERS = 4  # trained together in the smoke check
SAVED = 10.0  # seconds between two writings of the records, about


@dataclass
class Run:
    """What was asked for: device, profile, folder for what is made, how many worlds, begin and end (monotonic)."""

    device: str
    profile: str
    out: Path
    worlds: int
    end: float
    began: float

    def left(self, part: str) -> float:
        """Return the seconds that a part may take from now on."""
        now = time.monotonic()
        return max(0.0, min(SHARES[part] * (self.end - self.began), self.end - now))


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 if one has failed, which keeps no other from being run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split(":")[0])
    parser.add_argument("--minutes", type=float, default=math.inf, help="in all; without it until all is done")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--worlds", type=int, default=5, help="of the challenge's size, the first so many")
    parser.add_argument("--profile", choices=("tiny", "quick", "full"), default="full", help="tiny tries the command")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the command")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --profile tiny tries the command")
    asked.out.mkdir(parents=True, exist_ok=True)
    now = time.monotonic()
    run = Run(asked.device, asked.profile, asked.out, asked.worlds, now + 60 * asked.minutes, now)
    said: dict[str, str] = {}
    for name in asked.parts:
        began = time.monotonic()
        try:
            said[name] = PARTS[name](run, run.left(name))
        except Exception as error:  # the others are worth as much
            said[name] = f"FAILED: {type(error).__name__}: {error}"
        said[name] += f" ({time.monotonic() - began:.0f} s)"
        print(f"{name}: {said[name]}", flush=True)
        summary = [f"{device_name(run)}, profile {run.profile}, library {library_hash()}", ""]
        write_whole(
            run.out / "summary.md", "\n".join([*summary, *(f"- {k}: {v}" for k, v in said.items()), ""]).encode()
        )
    return int(any(line.startswith("FAILED") for line in said.values()))


def device_name(run: Run) -> str:
    return torch.cuda.get_device_name() if run.device == "cuda" else "CPU"


# -- one step of every arm -------------------------------------------------------------------------------------


def smoke(run: Run, seconds: float) -> str:
    """Take one step of every arm in a tiny world, and train members together and alone."""
    path, end = run.out / "smoke.json", time.monotonic() + seconds
    asked = {"library": library_hash(), "device": device_name(run), "torch": torch.__version__}
    known = json.loads(path.read_text()) if path.exists() else {}
    found = known if asked.items() <= known.items() else asked | {"steps": {}, "together": {}}
    store = open_store(Experiment(profile="tiny"))
    for name, arm in one_of_each(store).items():
        if name not in found["steps"] and time.monotonic() < end:
            began = time.perf_counter()
            loss = retrieve.fit(arm, store, device=run.device).losses
            found["steps"][name] = {"loss": loss[-1] if loss else None, "seconds": time.perf_counter() - began}
            write_whole(path, json.dumps(found, indent=1).encode())
    for name, arm in together_arms().items():
        if name not in found["together"] and time.monotonic() < end:
            found["together"][name] = together_and_alone(arm, store, run.device)
            write_whole(path, json.dumps(found, indent=1).encode())
    of = f"a step of {len(found['steps'])} of {len(one_of_each(store))} arms"
    apart = [f"{name} {value:.1e}" for name, value in found["together"].items()]
    return f"{of}; largest difference of a cosine, members together against alone: {', '.join(apart) or 'not tried'}"


def one_of_each(store: ClipStore) -> dict[str, Experiment]:
    """Name the models that the chapters train, each once, with one step of one epoch."""
    arms: dict[Experiment, str] = {}
    for chapter, plan in PLANS.items():
        for name, arm in plan(store).items():
            for branch, _ in retrieve.members_of(arm):
                if branch.classifier in TRAINED:
                    short = replace(branch.training, epochs=1, batch=4_096)
                    arms.setdefault(replace(branch, profile="tiny", training=short), f"{chapter}: {name}")
    out: dict[str, Experiment] = {}
    for arm, name in arms.items():
        number = sum(known.startswith(name) for known in out)
        out[f"{name}, {number + 1}" if number else name] = arm
    return out


def together_arms() -> dict[str, Experiment]:
    """Name the members that are trained together: of views, of every kind of network."""
    arms = systems.arms(systems.ENSEMBLES) | {"as coded": systems.ONE_NAME_AS_CODED}
    short = {"epochs": 2, "batch": 128}
    return {
        name: replace(arm, profile="tiny", ensemble="views", fallback=None, training=replace(arm.training, **short))
        for name, arm in arms.items()
    }


@torch.no_grad()
def together_and_alone(arm: Experiment, store: ClipStore, device: str) -> float:
    """Return the largest difference between the cosines of val clips by members trained together and by each alone."""
    clips, val = retrieve.training_clips(arm, store), retrieve.gallery_of(arm, store)
    seeds = [member_seed(arm.seed, member) for member in range(MEMBERS)]
    both = [
        [retrieve.make_model(arm, store, member).to(torch_device(device)) for member in range(MEMBERS)]
        for _ in ("together", "alone")
    ]
    with torch.enable_grad():
        for models, at in ((both[0], seeds), *(([model], [seed]) for model, seed in zip(both[1], seeds))):
            options: dict = {"seeds": at, "modality": arm.modality, "loss": arm.loss}
            train_together(models, store, [clips] * len(models), arm.training, **options)
    said = [
        [retrieve.Member(arm, store, model.eval(), clips, [], 0.0).cosines(val) for model in models] for models in both
    ]
    return max(float((one - other).abs().max()) for one, other in zip(*said))


# -- tests and costs -------------------------------------------------------------------------------------------


def tests(run: Run, seconds: float) -> str:
    """Run the tests that have the device in their names; the log is kept whatever becomes of them."""
    path = run.out / "tests.log"
    head = f"library {library_hash()}, {device_name(run)}"
    if path.exists() and path.read_text().startswith(head) and "finished" in path.read_text().splitlines()[0]:
        return f"{path.read_text().splitlines()[-1]} (kept)"
    parts = ["-q", "-k", run.device, "-p", "no:cacheprovider", "-n", "auto", "--dist", "worksteal", "tests"]
    state, text = "finished", ""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *parts], cwd=ROOT, timeout=seconds, capture_output=True, text=True
        )
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        state, text = "stopped", (late.stdout or b"").decode()
    write_whole(path, f"{head}, {state}\n{text.rstrip()}\n".encode())
    last = ([""] + text.strip().splitlines())[-1].strip("= ")
    return f"{state}: {last}" if state == "stopped" or not done.returncode else f"FAILED: {last}"


def cost_table(run: Run, seconds: float) -> str:
    """Measure the lines of the cost table that run on a GPU, there, the bars first."""
    path = run.out / f"benchmark_{run.device}.json"
    scale = "full" if run.profile == "full" else "tiny"
    asked = ["--device", run.device, "--scale", scale, "--save", str(path), "--resume", "--only", *LINES]
    limit = [] if math.isinf(seconds) else ["--minutes", str(max(seconds, 1) / 60)]
    failed = costs.main([*asked, *limit])
    rows = json.loads(path.read_text())["lines"]
    measured = sum("seconds" in row for row in rows)
    return f"{'FAILED lines; ' if failed else ''}{measured} of {len(rows)} lines measured: {path.name}"


# -- records ---------------------------------------------------------------------------------------------------


def records(run: Run, seconds: float) -> str:
    """Make the records of one world after the other, the chapters of most worth first; write them every few seconds."""
    path, end = run.out / FULL, time.monotonic() + seconds
    known = [*read_results(FULL), *read_records(path)]
    have = {record.key: record for record in known if is_fresh(record)}
    restore(have.values())
    new, written, made = 0, time.monotonic(), defaultdict(int)
    for chapter, seed, asked in work(run):
        if time.monotonic() >= end:
            break
        for record in fetch(asked, device=run.device):
            new += record.key not in have
            have.setdefault(record.key, replace(record, ap=[round(value, 4) for value in record.ap]))
            made[seed, chapter] += 1
        if time.monotonic() - written > SAVED:
            write_results(path, have.values())
            written = time.monotonic()
    if have:
        write_results(path, have.values())
    last = max(made, default=None)
    return f"{new} new, {len(have)} in all; the last is of chapter {last[1]}, world {last[0]}" if last else "none"


def work(run: Run) -> Iterator[tuple[str, int, list[Experiment]]]:
    """Yield chapter, world and the experiments that share their models, so that little is lost where it is stopped."""
    for seed in range(run.worlds):
        store: ClipStore | None = None
        for chapter in CHAPTERS:
            store = store or open_store(Experiment(profile=run.profile, seed=seed))
            groups: dict[object, list[Experiment]] = {}
            for arm in placed(PLANS[chapter](store), [seed], profile=run.profile):
                groups.setdefault(arm.branch(), []).append(arm)
            yield from ((chapter, seed, group) for group in groups.values())


PARTS: dict[str, Callable[[Run, float], str]] = {
    "smoke": smoke,
    "tests": tests,
    "costs": cost_table,
    "records": records,
}

if __name__ == "__main__":
    sys.exit(main())
