"""Measure a call: seconds and memory, in a process that does nothing else."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def peak_memory() -> int:
    """Return the most bytes that were resident in this process since it began or ``reset_peak`` was called."""
    try:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):  # no such file, or no such line: not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> int:
    """Let the peak begin at what is resident now, where the system can, and return it in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # then growth counts from the peak so far, such as that of the imports
        pass
    return peak_memory()


def measure(call: Callable[[], object], *, repeats: int = 3, warm: int = 0, device: str = "cpu") -> dict:
    """Call ``warm`` times untimed, then ``repeats`` times, waiting for the device after each.

    Returns seconds (a list), memory (bytes by which the peak of resident memory grew over all calls), on a GPU
    device_memory (bytes: the peak of what torch had allocated there), and precision, that of most of the products:
    bf16 where forward passes run under autocast, on a GPU, else fp32.
    """
    import torch  # here, so that the released code's process has it from its own imports

    cuda = device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before, seconds = reset_peak(), []
    for turn in range(warm + repeats):
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        if turn >= warm:
            seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds,
        "memory": peak_memory() - before,
        "device_memory": torch.cuda.max_memory_allocated() if cuda else None,
        "precision": "bf16" if cuda else "fp32",
    }


class StepFailed(RuntimeError):
    """A step ended with an error; the message is its last line."""


class OutOfTime(StepFailed):
    """A step had no time, or not enough."""


def isolated(step: str, *, device: str = "cpu", seconds: float | None = None, **arguments) -> dict:
    """Run ``module:function`` of this package in a process of its own and return what it returned, through JSON.

    It gets the device and the arguments by name.  device: ``cpu`` hides every GPU from the process.  seconds: after
    which it is killed, None for as long as it takes.  Raises ``OutOfTime``, or ``StepFailed`` with the last line of its
    errors.
    """
    if seconds is not None and seconds <= 0:
        raise OutOfTime(f"{step}: no time was left")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [
            sys.executable,
            "-m",
            "benchmarks.meter",
            step,
            json.dumps({"device": device} | arguments),
            str(answer),
        ]
        fixed: dict = {"env": environment, "cwd": folder, "capture_output": True, "text": True}
        try:
            done = subprocess.run(command, timeout=seconds, **fixed)
        except subprocess.TimeoutExpired:
            raise OutOfTime(f"{step}: not done in {seconds:.0f} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise StepFailed(f"{step}: {lines[-1]}")
        return json.loads(answer.read_text())


def main(step: str, arguments: str, answer: str) -> None:
    module, function = step.split(":")
    found = getattr(importlib.import_module(f"benchmarks.{module}"), function)(**json.loads(arguments))
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
