"""Lines on whole commands, from an empty cache: the book, a world, a submission.  Memory: the largest process's."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.meter import ROOT

CHAPTER = "02_metric"
MMLIB = ("-c", "import sys; from mmlib.cli import main; sys.exit(main())")


def build(folder: str, scale: str, **_) -> dict:
    """Build the whole book from a copy of the checkout; at scale ``tiny`` run one chapter in the tiny profile."""
    copy = Path(folder, "copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "_build", "__pycache__", "*.egg-info"))
    if scale == "full":
        command = ["-c", "from jupyter_book.cli.main import main; main()", "build", "book/"]
        return _run(command, folder, copy) | {"work": "the whole book, no cache"}
    chapter, out = f"book/chapters/{CHAPTER}.ipynb", str(Path(folder, "out.ipynb"))
    command = ["-m", "papermill", "--no-progress-bar", chapter, out, "-p", "profile", "tiny"]
    return _run(command, folder, copy) | {"work": f"chapter {CHAPTER} alone, in the tiny profile, no cache"}


def world(folder: str, scale: str, **_) -> dict:
    """Draw a simulated world."""
    store = Path(folder, "drawn-world")
    found = _run([*MMLIB, "simulate", str(store), "--profile", scale, "--overwrite"], folder)
    return found | {"work": f"mmlib simulate --profile {scale}"}


def make_world(folder: str, scale: str, **_) -> dict:
    """Write ``folder/world``: a quick world, at scale ``tiny`` a tiny one."""
    profile = "quick" if scale == "full" else "tiny"
    return _run([*MMLIB, "simulate", str(Path(folder, "world")), "--profile", profile], folder)


def predict(folder: str, scale: str, system: str = "one-name", **_) -> dict:
    """Make a submission from that world; the system as coded trains 8 of its epochs, as many as the other has."""
    out = Path(folder, f"{system}.txt")
    options = ["--system", system, *(["--epochs", "8"] if system == "one-name-as-coded" else [])]
    options += [] if scale == "full" else ["--members", "1"]
    found = _run([*MMLIB, "predict", str(Path(folder, "world")), "--out", str(out), *options, "--overwrite"], folder)
    return found | {"work": f"mmlib predict {' '.join(options)}, {'a quick' if scale == 'full' else 'a tiny'} world"}


def predict_described(**asked) -> dict:
    """Make one from the same world by the system as described."""
    return predict(**asked | {"system": "one-name"})


def _run(command: list[str], folder: str, place: Path = ROOT) -> dict:
    cache = Path(folder, "cache")
    shutil.rmtree(cache, ignore_errors=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=place,
        env=os.environ | {"MMLIB_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    unit = 1 if sys.platform == "darwin" else 1024
    memory = unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": [seconds], "memory": memory, "device_memory": None, "flops": None, "bytes": None}
