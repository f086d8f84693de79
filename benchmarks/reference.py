"""The same work by the released code of 2019, imported from a checkout of the user's own.

Its functions are called as they are.  What it needs of a modern installation: ``numpy.math``, which numpy 2 has not,
and silence about names that numpy has moved.  Nothing of it is part of this project.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np

from benchmarks.data import FACE, SCALES, SCENE
from benchmarks.meter import measure, peak_memory, reset_peak

FILES = ("utils.py", "evaluation_map.py", "demo_train_face_scene_multi_view.py", "datasets/iqiyi_dataset.py")
WORKERS = 4  # of its own scripts


def check(path: str | Path) -> Path:
    """Return the path of a checkout, or say what it lacks."""
    for name in FILES:
        if not Path(path, name).is_file():
            raise ValueError(f"--reference {path}: no checkout of LegenDong/IQIYI_VID_FACE_2019: no {name}")
    return Path(path).resolve()


def released(path: str, module: str):
    """Import a module of the checkout at ``path``."""
    warnings.simplefilter("ignore")
    if not hasattr(np, "math"):
        np.math = math
    if path not in sys.path:
        sys.path.insert(0, path)
    return importlib.import_module(module)


def load_faces(folder: str, reference: str, **_) -> dict:
    """Load the faces of val as its data sets do."""
    load = released(reference, "utils").load_face_from_pickle
    return measure(lambda: load(str(Path(folder, "faces", "feat", "face_val_v2.pickle"))), repeats=1) | {
        "work": "utils.load_face_from_pickle on the same pickle"
    }


def first_batch(folder: str, scale: str, reference: str, **_) -> dict:
    """Make its data set of the train split and take the first batch from its loader."""
    from torch.utils.data import DataLoader

    s = SCALES[scale]
    data_set, transforms = released(reference, "datasets").IQiYiFaceSceneDataset, released(reference, "utils")

    def first():
        found = data_set(
            str(Path(folder, "official")),
            str(Path(folder, "scenes")),
            "train",
            num_frame=s.frames,
            transform=transforms.sep_cat_qds_select_face_scene_transforms,
        )
        loader = DataLoader(found, batch_size=s.batch, shuffle=True, num_workers=WORKERS)
        return next(iter(loader))

    return measure(first) | {
        "work": f"IQiYiFaceSceneDataset and a DataLoader of {WORKERS} processes, same clips and batch"
    }


def epoch(folder: str, scale: str, reference: str, **_) -> dict:
    """Run its training script for three epochs; the second and third count.

    An epoch ends when the script steps its learning rate, so one lasts from step to step.  It reads, trains and reports
    as in 2019, on the device it chooses.  Memory is that of the whole script, its data included.
    """
    from torch.optim import lr_scheduler

    s, ends = SCALES[scale], []
    script = released(reference, "demo_train_face_scene_multi_view")

    class Timed(lr_scheduler.CosineAnnealingLR):
        def step(self, *arguments):
            ends.append(time.perf_counter())
            super().step(*arguments)

    lr_scheduler.CosineAnnealingLR = Timed
    before = reset_peak()
    script.main(
        Namespace(
            seed=0,
            save_dir=str(Path(folder, "checkpoints")),
            face_root=str(Path(folder, "official")),
            scene_root=str(Path(folder, "scenes")),
            face_feat_dim=FACE + 2,
            scene_feat_dim=SCENE,
            num_frame=s.frames,
            batch_size=s.batch,
            num_classes=s.identities + 1,
            learning_rate=0.1,
            epoch=3,
            device=None,
        )
    )
    return {
        "seconds": np.diff(ends[-3:]).tolist(),
        "memory": peak_memory() - before,
        "work": f"its training script, same clips, shapes and batch, {WORKERS} loading processes",
    }


def metric(folder: str, reference: str, **_) -> dict:
    """Score the same files."""
    score = released(reference, "evaluation_map").calculate_map
    return measure(lambda: score(str(Path(folder, "val_gt.txt")), str(Path(folder, "result.txt")))) | {
        "work": "evaluation_map.calculate_map on the same files"
    }
