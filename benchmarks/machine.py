"""What the machine is, and the most that it does: matrix products and copies, measured."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.meter import measure
from mmlib.records import commit, library_hash

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes


def describe(**_) -> dict:
    """Return names, cores, memory (bytes), versions, date, commit and the library's hash."""
    gpu = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpu_memory": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "library": library_hash(),
    }


def ceilings(device: str, scale: str = "full") -> dict[str, float]:
    """Measure the ceilings of a roofline (Williams et al., CACM 2009): fp32 and bf16 in FLOP/s, copy in bytes/s.

    The first two are products of two square matrices, 2 n^3 operations; copy counts each byte twice, read and written.
    The best of several tries, so that a disturbed one lowers no ceiling.  At scale ``tiny`` both are an eighth as
    large.
    """
    shrink = 1 if scale == "full" else 8
    side, found = SIDE[device] // (2 if shrink > 1 else 1), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        took = measure(lambda: torch.mm(a, b, out=out), repeats=5, warm=1, device=device)["seconds"]
        found[name] = 2 * side**3 / min(took)
    source = torch.ones(COPIED[device] // 4 // shrink, device=device)
    target = torch.empty_like(source)
    took = measure(lambda: target.copy_(source), repeats=5, warm=1, device=device)["seconds"]
    return found | {"copy": 2 * source.nbytes / min(took)}


def _cpu_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()
