"""What more than one file of tests uses: the device, two clip stores, experiments on a store, records."""

import os
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from mmlib.data.simulate import settings_for, simulate
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment, Training
from mmlib.records import Record

BRIEF = Training(epochs=1, batch=64)


# Workers share the cores (pytest-xdist), and so do the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
# What some tests wait for, by a word of the reason that they give; how to have it stands in CONTRIBUTING.
WAITED_FOR = {
    "MMLIB_REAL_DATA": "MMLIB_REAL_DATA=folder",
    "snakemake": "snakemake on the PATH",
    "report": "tasks.py book",
    "chromium": "a chromium",
}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def pytest_terminal_summary(terminalreporter):
    """Say in one line what was left out and how to have it."""
    reasons = [str(report.longrepr) for report in terminalreporter.getreports("skipped")]
    missing = [how for word, how in WAITED_FOR.items() if any(word in reason for reason in reasons)]
    if missing:
        terminalreporter.write_line(
            f"Left out, {len(reasons)} skipped, for want of: {'; '.join(missing)} (CONTRIBUTING)"
        )


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("world") / "store", settings_for("tiny", identities=30), seed=0)


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """Two identities, each with two train clips and a val clip of one frame; quality but no det score."""
    clips = pd.DataFrame({"clip": list("abcdef"), "split": ["train"] * 4 + ["val"] * 2, "identity": [0, 0, 1, 1, 0, 1]})
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("bare") / "store"
    with ClipStore.create(path, simulated=False, provenance={}) as writer:
        writer.append("face", rng.normal(size=(6, 8)).astype(np.float16), quality=np.full(6, 50.0))
        writer.finish(clips, ["7", "8"], {"face": (np.arange(6), np.ones(6, int))})
    return ClipStore.open(path)


def of(store, classifier="class means", aggregator="mean", **options):
    """An experiment on a store, which trains nothing unless told."""
    return Experiment(data=str(store.path), classifier=classifier, aggregator=aggregator, **options)


def small(store, **options):
    """An experiment of small networks on a store, with the scene as a context."""
    fixed = dict(
        aggregator="norm",
        hidden=8,
        context=("scene",),
        context_dim=4,
        regions=4,
        combine="softmax",
        scale=5.0,
        training=Training(epochs=1, batch=16, frames=4, lr=1e-2),
    )
    return Experiment(data=str(store.path), **fixed | options)


def made(asked, key="", **known):
    """A record of an experiment that nobody ran."""
    fields = dict(
        key=key or asked.key(),
        library="here",
        experiment=asdict(asked),
        simulated=asked.simulated,
        measures={},
        ap=[0.5],
        breakdown={},
        losses=[],
        seconds={},
        versions={},
        device="CPU",
        made="2024-02-03T04:05:06+00:00",
        commit="abc1234",
    )
    return Record(**fields | known)


@pytest.fixture(scope="session")
def patchy(tmp_path_factory):
    """Six identities and distractors, of which some clips lack the face, some the scene (one or two images), some both.

    The last identity has no train clip.
    """
    rng = np.random.default_rng(0)
    identity = np.concatenate([np.arange(30) // 6, [-1] * 4, np.arange(36) // 6, [-1] * 15])
    split = np.array(["train"] * 34 + ["val"] * 51)
    place = np.arange(len(identity))
    count = {
        "face": np.where(place % 7 == 1, 0, rng.integers(1, 6, len(place))),
        "scene": np.where(place % 4 == 2, 0, 1 + place % 2),
    }
    path = tmp_path_factory.mktemp("patchy") / "store"
    with ClipStore.create(path, simulated=True, provenance={}) as writer:
        for name, dim in (("face", 16), ("scene", 32)):
            owner = place.repeat(count[name])
            centre = np.concatenate([rng.normal(size=(6, dim)), np.zeros((1, dim))])
            feature = centre[identity[owner]] + 1.2 * rng.normal(size=(len(owner), dim))
            scores = {"quality": rng.uniform(5, 150, len(owner)), "det": rng.uniform(0.8, 1, len(owner))}
            writer.append(name, feature.astype(np.float16), **scores if name == "face" else {})
        clips = pd.DataFrame({"clip": [f"c{i:02d}" for i in place], "split": split, "identity": identity})
        writer.finish(clips, list("012345"), {name: (n.cumsum() - n, n) for name, n in count.items()})
    return ClipStore.open(path)


@pytest.fixture(scope="session")
def face_tables(tmp_path_factory):
    """Small tables of faces as of YTF and LFW: people apart, frames of a clip alike in quality, clips not."""
    folder, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    people = [f"Person_{chr(65 + place)}" for place in range(24)]
    clips = [(f"{name}/{video}", name) for place, name in enumerate(people) for video in range(3 + place % 2)]
    rows = {
        "ytf": [(clip, frame, name) for clip, name in clips for frame in range(5)],
        "lfw": [(f"{name}_{k:04d}", 0, name) for place, name in enumerate(people) for k in range(1 + place % 9)],
    }
    for name, of in rows.items():
        (folder / name).mkdir()
        table = pd.DataFrame(of, columns=["clip", "frame", "identity"])
        table["det"] = rng.uniform(0.9, 1, len(table))
        level = table["clip"].map(dict(zip(table["clip"].unique(), rng.uniform(0.2, 0.6, len(table)))))
        table["quality"] = level + rng.uniform(0, 0.01, len(table))
        table.to_parquet(folder / name / "frames.parquet")
        for network, dim in (("edgeface", 20), ("mobilefacenet", 18)):
            centre = 3 * rng.normal(size=(len(people), dim))[[people.index(who) for who in table["identity"]]]
            array = (centre + rng.normal(size=centre.shape)).astype(np.float16)
            np.save(folder / name / f"{network}.npy", array)
    check = pd.DataFrame(clips, columns=["clip", "identity"]).assign(label_check=0.5)
    check.loc[:1, "label_check"] = 0.1
    check.rename_axis("row").to_csv(folder / "ytf/clips.csv")
    np.save(folder / "ytf/scene.npy", rng.normal(size=(len(check), 40)).astype(np.float16))
    return folder
