"""What more than one file of tests uses: the device, two clip stores, experiments on a store, records."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from mmlib.clips.simulate import settings_for, simulate
from mmlib.clips.store import ClipStore
from mmlib.experiment import Experiment
from mmlib.runs import Record
from mmlib.train import Training

BRIEF = Training(epochs=1, batch=64)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")),
    ]
)
def device(request):
    return request.param


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("world") / "store", settings_for("tiny", identities=30), seed=0)


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """Two identities, each with two train clips and a val clip of one frame; quality but no det score."""
    clips = pd.DataFrame(
        {"clip": list("abcdef"), "split": ["train"] * 4 + ["val"] * 2, "identity": [0, 0, 1, 1, 0, 1]}
    )
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("bare") / "store"
    with ClipStore.create(path, simulated=False, provenance={}) as writer:
        writer.append("face", rng.normal(size=(6, 8)).astype(np.float16), quality=np.full(6, 50.0))
        writer.finish(clips, ["7", "8"], {"face": (np.arange(6), np.ones(6, int))})
    return ClipStore.open(path)


def of(store, classifier="class means", aggregator="mean", **options):
    """An experiment on a store, which trains nothing unless told."""
    return Experiment(data=str(store.path), classifier=classifier, aggregator=aggregator, **options)


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
