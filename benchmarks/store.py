"""Time opening a store of challenge size and a batch of 512 clips x 40 frames.

    python benchmarks/store.py [--clips 137000] [--frames 4000000] [--folder DIR]
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mmlib.clips.store import ClipStore


def write_store(path: Path, clips: int, frames: int, dim: int = 512) -> None:
    """Write a store of `clips` clips with `frames` random embeddings in all."""
    rng = np.random.default_rng(0)
    count = rng.multinomial(frames, np.full(clips, 1 / clips))
    block = rng.standard_normal((20_000, dim), np.float32).astype(np.float16)
    with ClipStore.create(path, simulated=True, provenance={"by": "benchmarks/store.py"}) as writer:
        for first in range(0, frames, len(block)):
            n = min(len(block), frames - first)
            score = rng.random(n)
            writer.append("face", block[:n], quality=score, det=score, frame=np.zeros(n),
                          box=np.zeros((n, 4)))
        table = pd.DataFrame({"clip": [f"CLIP_{i:07d}" for i in range(clips)],
                              "split": np.where(np.arange(clips) < clips // 2, "train", "val"),
                              "identity": rng.integers(-1, 10_034, clips)})
        writer.finish(table, [str(i) for i in range(1, 10_035)], {"face": (np.cumsum(count) - count, count)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=137_000)
    parser.add_argument("--frames", type=int, default=4_000_000)
    parser.add_argument("--folder", default=None, help="where the temporary store goes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "store"
        write_store(path, args.clips, args.frames)
        opening = []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(5):
            began = time.perf_counter()
            store = ClipStore.open(path)
            opening.append(time.perf_counter() - began)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        features = store.modalities["face"].feature.nbytes
        print(f"open: first {opening[0] * 1e3:.0f} ms, median {np.median(opening) * 1e3:.0f} ms; "
              f"peak memory grew by {grown / 1024:.0f} MiB for {features / 2**20:.0f} MiB of features")
        rng = np.random.default_rng(1)
        for sample in ("first", "random", "replace", "draw"):
            times = []
            for _ in range(30):
                clips = rng.integers(0, len(store), 512)
                began = time.perf_counter()
                store.batch(clips, sample=sample, frames=40, rng=rng)
                times.append(time.perf_counter() - began)
            print(f"batch 512 x 40, {sample:8s} first {times[0] * 1e3:.0f} ms, "
                  f"median {np.median(times) * 1e3:.0f} ms on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
