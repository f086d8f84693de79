"""The line on the book: a build of a copy of the checkout with an empty cache."""

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


def build(folder: str, scale: str, **_) -> dict:
    """Build the whole book; at scale ``tiny`` run one chapter in the tiny profile.  Memory: the largest process's."""
    copy, cache = Path(folder, "copy"), Path(folder, "cache")
    shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "_build", "__pycache__", "*.egg-info"))
    if scale == "full":
        command = ["-c", "from jupyter_book.cli.main import main; main()", "build", "book/"]
        work = "the whole book, no cache"
    else:
        chapter = f"book/chapters/{CHAPTER}.ipynb"
        command = [
            "-m",
            "papermill",
            "--no-progress-bar",
            chapter,
            str(Path(folder, "out.ipynb")),
            "-p",
            "profile",
            "tiny",
        ]
        work = f"chapter {CHAPTER} alone, in the tiny profile, no cache"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env=os.environ | {"MMLIB_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": [seconds],
        "memory": unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "device_memory": None,
        "work": work,
        "flops": None,
        "bytes": None,
    }
