"""Measure memory and speed of importing faces, and of exporting them.

    python benchmarks/import_memory.py [--frames 300000] [--folder DIR]

Each import runs in a process of its own. Bytes a frame are the growth of its peak resident memory from
after the imports of modules, divided by the frames. The pickles are as Python 2 wrote them, and as Python 3
does, which memoises every object.
"""

import argparse
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from mmlib.clips.iqiyi import export_folder, import_folder, pickle_path
from mmlib.clips.store import ClipStore

FRAMES_A_CLIP = 30


def write_store(path: Path, frames: int) -> None:
    """Write a store whose val clips hold `frames` faces, and train one clip."""
    rng = np.random.default_rng(0)
    clips = frames // FRAMES_A_CLIP
    with ClipStore.create(path, simulated=True, provenance={"by": "benchmarks/import_memory.py"}) as writer:
        for clip in range(clips + 1):
            n = FRAMES_A_CLIP
            corner = rng.random((n, 2)) * 100
            writer.append("face", rng.standard_normal((n, 512), np.float32).astype(np.float16),
                          frame=np.arange(10, 10 + n), box=np.concatenate([corner, corner + 50], axis=1),
                          det=rng.random(n), quality=rng.random(n) * 100)
        table = pd.DataFrame({"clip": [f"IQIYI_VID_VAL_{i:07d}" for i in range(clips + 1)],
                              "split": ["val"] * clips + ["train"], "identity": 0})
        start = np.arange(clips + 1) * FRAMES_A_CLIP
        writer.finish(table, ["1"], {"face": (start, np.full(clips + 1, FRAMES_A_CLIP))})


def prepare(store: str, folder: str, frames: str) -> None:
    """Write a store, export it and print the seconds that the export took."""
    write_store(Path(store), int(frames))
    opened = ClipStore.open(store)
    began = time.perf_counter()
    export_folder(opened, folder)
    print(time.perf_counter() - began)


def rewrite_as_python3(folder: str) -> None:
    """Write the val faces anew with Python 3's pickler."""
    path = pickle_path(folder, "face", "val")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy has moved the functions that old pickles name
        with open(path, "rb") as file:
            loaded = pickle.load(file, encoding="bytes")
    with open(path, "wb") as file:
        pickle.dump(loaded, file, protocol=2)


def measure_import(folder: str, store: str) -> None:
    """Import and print peak growth in bytes, frames and seconds."""
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    report = import_folder(folder, store, progress=False)
    print(peak() - before, report.frames["face"], report.seconds)


def run_step(*arguments: str) -> str:
    """Run one step in a process of its own; its peak starts at this one's, which therefore stays small."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300_000)
    parser.add_argument("--folder", default=None, help="where temporary files go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        official, imported = Path(temporary, "official"), Path(temporary, "imported")
        seconds = float(run_step("prepare", str(Path(temporary, "store")), str(official), str(args.frames)))
        print(f"export {args.frames / seconds:,.0f} frames/s")
        print(f"{'pickles by':12}{'bytes a frame':>15}{'frames/s':>12}")
        for writer in ("Python 2", "Python 3"):
            if writer == "Python 3":
                run_step("rewrite", str(official))
            grown, frames, seconds = map(float, run_step("measure", str(official), str(imported)).split())
            print(f"{writer:12}{grown / frames:15,.0f}{frames / seconds:12,.0f}")
            shutil.rmtree(imported)


STEPS = {"prepare": prepare, "rewrite": rewrite_as_python3, "measure": measure_import}

if __name__ == "__main__":
    STEPS[sys.argv[1]](*sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in STEPS else main()
