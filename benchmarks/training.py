"""Time one epoch of the released network's size, on the clips the released code was timed on.

    python benchmarks/training.py [--aggregator "as coded"] [--epochs 3]

8,000 clips of about 20 frames, 1,001 identities, 40 frames drawn a clip, 480 + 2 face and 1,920 scene inputs, batches of
512: an epoch of the released code of 2019 takes 15-17 s on two idle cores.  Reading is part of the epoch here as there.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mmlib.clips.store import ClipStore
from mmlib.models import AGGREGATORS, IdentityModel, make_aggregator
from mmlib.train import Training, train


def write_store(path: Path, clips: int = 8000, identities: int = 1001) -> ClipStore:
    """Write a store of random clips of 1 to 39 frames."""
    rng = np.random.default_rng(0)
    count = rng.integers(1, 40, clips)
    frames = int(count.sum())
    with ClipStore.create(path, simulated=True, provenance={"by": "benchmarks/training.py"}) as writer:
        face = (rng.standard_normal((frames, 480), np.float32)).astype(np.float16)
        writer.append("face", face, quality=rng.uniform(0, 200, frames), det=rng.uniform(.8, 1, frames))
        writer.append("scene", rng.standard_normal((clips, 1920), np.float32).astype(np.float16))
        table = pd.DataFrame({"clip": [f"{i:06d}" for i in range(clips)], "split": "train",
                              "identity": rng.integers(0, identities, clips)})
        spans = {"face": (np.cumsum(count) - count, count), "scene": (np.arange(clips), np.ones(clips, int))}
        writer.finish(table, [str(i) for i in range(identities)], spans)
    return ClipStore.open(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--aggregator", choices=AGGREGATORS, default="as coded")
    parser.add_argument("--epochs", type=int, default=3)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store")
        aggregator = make_aggregator(asked.aggregator, 480)
        model = IdentityModel(aggregator, 1001, hidden=964, contexts={"scene": 1920}, context_dim=120).to(device)
        training = replace(Training(), epochs=1, batch=512, frames=40, sample="draw")
        for epoch in range(asked.epochs):
            began = time.perf_counter()
            train(model, store, np.arange(len(store)), training, seed=epoch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(f"epoch {epoch}: {time.perf_counter() - began:.2f} s on {device}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
