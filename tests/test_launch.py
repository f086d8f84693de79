"""What several processes compute together, started as a user starts them, on processors."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmlib.data.images import index_images
from mmlib.data.render import render_scenes
from mmlib.data.simulate import settings_for, simulate
from mmlib.data.store import ClipStore
from mmlib.launch import Launch, launched

# One thread in each, as more of them would add up in another order.
WORK = """
import json, sys
from collections import deque
from dataclasses import replace
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads(1)
from mmlib import scene, scene_network
from mmlib.data.images import index_images
from mmlib.data.store import ClipStore
from mmlib.launch import launched

class Plain(nn.Module):  # no batch norm, which is over a process's share of a batch
    num_features = 16
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
    def forward(self, x):
        return self.layers(x).mean((2, 3))

world, folder, out = map(Path, sys.argv[1:])
store, run = ClipStore.open(world), launched("cpu")
images = index_images(folder, store)
# 42 clips in batches of 21: the shares of two processes are not equal
settings = scene.settings_for("narrow_seresnext14", size=32, resize=36, batch=21, epochs=2, lr=.1, backbone_lr=.1)
deep, _ = scene.fine_tune(store, images, settings, seed=0, device="cpu")
modes = scene.fine_tune_to_store(store, images, replace(settings, epochs=1), out / "trained", seed=0, device="cpu")
kept = scene.fetch_or_train(store, images, replace(settings, epochs=1), seed=0, device="cpu")
still = scene.make_model(settings, len(store.identities), seed=0)
blocks = scene.extract(still, images, settings, seed=0, block=20)  # five, an odd number of turns
if run.index == 0:
    scene.write_scene_store(store, out / "store", blocks, provenance={}, keep=())
else:
    deque(blocks, maxlen=0)
scene_network.make_backbone = lambda *_: Plain()
start = scene.make_model(settings, len(store.identities), seed=0)
plain, history = scene.fine_tune(store, images, settings, seed=0, device="cpu")
torch.save({"deep": deep.state_dict(), "plain": plain.state_dict(), "start": start.state_dict(), "history": history,
            "modes": dict(modes), "kept": kept.modes, "count": run.count,
            "same": run.same(run.index), "gathered": run.gather(run.index),
            "sum": run.sum(torch.tensor(run.index + 1.)).item()}, out / f"{run.index}.pt")
"""
COMMAND = "from mmlib.cli import main\nmain()\n"


def start(processes, script, *arguments, cache):
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
    environment = os.environ | {
        "MMLIB_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    return subprocess.run(
        [*command, str(script), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("world") / "store", settings_for("tiny", identities=8), seed=1)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    return render_scenes(world, tmp_path_factory.mktemp("pictures") / "img", size=36).folder


@pytest.fixture(scope="module")
def found(world, folder, tmp_path_factory):
    """What each process of a run of one and of a run of two returned, and the folder of each run."""
    base = tmp_path_factory.mktemp("runs")
    (base / "work.py").write_text(WORK)
    runs = {}
    for count in (1, 2):
        out = base / str(count)
        out.mkdir()
        done = start(count, base / "work.py", world.path, folder, out, cache=out / "cache")
        assert done.returncode == 0, done.stderr
        runs[count] = [torch.load(out / f"{index}.pt", weights_only=True) for index in range(count)]
    return runs, base


def test_a_process_that_nobody_launched_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = launched("cpu")
    assert run == Launch(0, 1, torch.device("cpu"))
    assert run.share(np.arange(3)).tolist() == [0, 1, 2] and run.gather("x") == ["x"] and run.same("x") == "x"


def test_shares_are_consecutive_and_whole():
    shares = [Launch(index, 3, torch.device("cpu")).share(np.arange(8)).tolist() for index in range(3)]
    assert shares == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_an_error_of_a_launched_run_clears_away_undisturbed():
    before = signal.getsignal(signal.SIGTERM)
    try:
        for count, expected in ((1, before), (2, signal.SIG_IGN)):
            with pytest.raises(ValueError), Launch(0, count, torch.device("cpu")).orderly():
                raise ValueError
            assert signal.getsignal(signal.SIGTERM) == expected
    finally:
        signal.signal(signal.SIGTERM, before)


def test_processes_know_of_each_other(found):
    one, two = found[0][2]
    assert one["count"] == two["count"] == 2
    assert one["sum"] == two["sum"] == 3 and one["same"] == two["same"] == 0
    assert (one["gathered"], two["gathered"]) == ([0, 1], [])


def test_two_processes_train_the_network_that_one_trains(found):
    (alone,), (one, _) = found[0][1], found[0][2]
    for key, value in alone["plain"].items():
        # float32 sums in another order, over four steps; had each process its own gradients, or were they added up, the
        # difference would be of the order of what was learned
        learned = (value - alone["start"][key]).abs().max()
        assert learned > 1e-3 and (one["plain"][key] - value).abs().max() < 1e-3 * learned, key
    for mine, its in zip(one["history"], alone["history"], strict=True):
        assert mine == pytest.approx(its, rel=1e-4)


def test_every_process_ends_with_the_same_network(found):
    one, two = found[0][2]
    for name in ("plain", "deep"):
        for key, value in one[name].items():
            assert torch.equal(value, two[name][key]), key


def test_two_processes_write_the_store_that_one_writes_to_the_last_bit(found):
    stores = [
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (found[1] / "1/store", found[1] / "2/store")
    ]
    assert "scene/feature.npy" in stores[0] and stores[0] == stores[1]


def test_two_processes_write_and_keep_one_network(found, world):
    out = found[1] / "2"
    assert ClipStore.open(out / "trained").modalities["scene"].count.tolist() == [1] * len(world)
    assert len(json.loads((out / "trained" / "store.json").read_text())["provenance"]["scene"]["history"]) == 1
    (network,) = (path for path in (out / "cache" / "scenes").iterdir() if path.is_dir())  # a lock lies beside it
    assert sorted(path.name for path in network.iterdir()) == ["model.pt", "run.json", "trained"]
    assert not list((out / "cache" / "decoded").iterdir())
    assert all(each[name] == {"RGB": len(world)} for each in found[0][2] for name in ("modes", "kept"))


@pytest.fixture
def spoilt(world, folder):
    """The name of a clip that is only extracted, by the second of two processes, and whose pictures cannot be read."""
    images = index_images(folder, world)
    later = images.present[len(images.present) // 2 + 1 :]  # of two blocks the second
    clip = later[world.identity_of(later) < 0][0]
    kept = {
        images.path(clip, number): images.path(clip, number).read_bytes() for number in range(len(images.files[clip]))
    }
    for path in kept:
        path.write_bytes(b"no")
    yield images.clips[clip]
    for path, content in kept.items():
        path.write_bytes(content)


def test_a_process_that_fails_ends_the_run_and_leaves_nothing(world, folder, spoilt, tmp_path):
    (tmp_path / "run.py").write_text(COMMAND)
    done = start(
        2,
        tmp_path / "run.py",
        "scene",
        world.path,
        folder,
        tmp_path / "out",
        "--architecture",
        "narrow_seresnext14",
        "--epochs",
        "1",
        "--device",
        "cpu",
        cache=tmp_path / "cache",
    )
    assert done.returncode != 0
    assert f"image of clip {spoilt}: not a picture" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["run.py"]
    assert not list((tmp_path / "cache" / "decoded").iterdir())
