"""Training by one process, and by several as a launcher starts them, on processors."""

import os
import signal
import socket
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mmlib import cli, scene, scene_training
from mmlib.data.images import decode, index_images
from mmlib.data.render import render_scenes
from mmlib.data.simulate import settings_for as world_for
from mmlib.data.simulate import simulate
from mmlib.data.store import ClipStore
from mmlib.scene_training import Launch, fine_tune, launched, training_clips

ALONE = Launch(0, 1, torch.device("cpu"))
SMALL = scene.settings_for("narrow_seresnext14", epochs=3, size=32, resize=36, batch=16, lr=0.02, backbone_lr=0.01)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("world") / "store", world_for("tiny", identities=8), seed=1)


@pytest.fixture(scope="module")
def images(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "img"
    render_scenes(world, folder, size=36)
    return index_images(folder, world)


@pytest.fixture(scope="module")
def trained(world, images):
    return train(world, images)


def train(world, images, settings=SMALL, run=ALONE):
    """A network and the history of its training."""
    model = scene.make_model(settings, len(world.identities), seed=0)
    return model, fine_tune(model, world, images, settings, run, seed=0)


def assert_same(one, other):
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


# -- one process ---------------------------------------------------------------------------------------------


def test_training_learns_and_ends_in_eval_mode(trained):
    model, history = trained
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert history[2]["loss"] < 0.8 * history[0]["loss"]
    assert history[2]["train"] > 2 / 8  # eight identities
    assert 0 <= history[2]["val"] <= 1 and not model.training


def test_decoded_pictures_and_the_same_seed_give_the_same_network(trained, world, images, tmp_path):
    decoded = decode(images, tmp_path / "map", training_clips(world, images), resize=SMALL.resize)
    model, history = train(world, decoded)
    assert history == trained[1]
    assert_same(model, trained[0])


def test_the_backbone_learns_more_slowly_than_the_head(world, images, monkeypatch):
    def asked(groups, **options):
        body, head = groups
        assert (body["lr"], options["lr"]) == (0.01, 0.02) and "lr" not in head
        assert [p.shape for p in head["params"]] == [(8, 512)] and len(body["params"]) > 20
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim, "SGD", asked)
    with pytest.raises(KeyboardInterrupt):
        train(world, images)


class Flat(torch.nn.Module):
    """A network of one layer, which compiles in seconds."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.layer(x).relu().mean((2, 3))


def test_compiled_features_are_those_of_the_network(world, images, monkeypatch):
    monkeypatch.setattr(scene, "_make_backbone", lambda *_: Flat())
    plain, compiled = torch.compile, []

    def traced(features, *, mode, dynamic):
        compiled.append(mode)
        return plain(features, backend="eager", dynamic=dynamic)  # as the C++ compiler takes half a minute

    monkeypatch.setattr(torch, "compile", traced)
    short = replace(SMALL, epochs=1)
    expected, history = train(world, images, short)
    found, again = train(world, images, short, replace(ALONE, compile_mode="default"))
    assert compiled == ["default"] and again[0]["loss"] == pytest.approx(history[0]["loss"], rel=1e-4)
    assert list(found.state_dict()) == list(expected.state_dict())


def test_an_unknown_way_to_compile_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="compile mode must be one of default, .*, got 'fast'"):
        launched("cpu", compile_mode="fast")


def test_a_machine_without_a_compiler_is_said_in_one_line(world, images, monkeypatch):
    def fail(*_):
        raise torch._dynamo.exc.BackendCompilerFailed(
            fail, RuntimeError("no compiler found\nand many more lines"), None
        )

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with pytest.raises(ValueError, match="torch.compile does not work here") as error:
        train(world, images, SMALL, replace(ALONE, compile_mode="default"))
    assert "\n" not in str(error.value)


def test_a_batch_that_is_too_small_for_its_processes_is_refused(world, images):
    with pytest.raises(ValueError, match="two clips for each of 9 processes, got batches of 1[0-9]"):
        train(world, images, run=Launch(0, 9, torch.device("cpu")))


def test_a_store_without_labelled_train_pictures_is_refused(world, images):
    nobody = ClipStore(world.path, world.meta, world.clips.assign(identity=-1), world.identities, world.modalities)
    with pytest.raises(ValueError, match="no labelled train clip"):
        train(nobody, images)


def test_a_process_that_nobody_launched_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched("cpu") == ALONE and ALONE.share(np.arange(3)).tolist() == [0, 1, 2]


def test_shares_are_consecutive_and_whole():
    shares = [Launch(index, 3, torch.device("cpu")).share(np.arange(8)).tolist() for index in range(3)]
    assert shares == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes on a machine with 2 GPUs"):
        launched("cuda")


# -- several processes ---------------------------------------------------------------------------------------


class Plain(torch.nn.Module):
    """A network without batch norm, which is over a process's share of a batch."""

    num_features = 16

    def __init__(self):
        super().__init__()
        relu = torch.nn.ReLU()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, 2), relu, torch.nn.Conv2d(8, 16, 3, 2), relu)

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def in_a_run(index, count, port, cache, work, *arguments):
    """What a launcher and the command line see to, then ``work``; what it prints goes to ``stderr.txt``."""
    local = {"RANK": index, "WORLD_SIZE": count, "LOCAL_RANK": index, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in local.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MMLIB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)  # more of them would add up in another order
    os.dup2(os.open(Path(cache, f"stderr{index}.txt"), os.O_WRONLY | os.O_CREAT), 2)
    work(*arguments)


@contextmanager
def processes(count, cache, work, *arguments, indices=None, port=None):
    """Start processes of a run, all of them unless only some come; kill at the end what is left of them."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    context = get_context("forkserver")  # which imports once
    context.set_forkserver_preload(["mmlib.scene_training", "accelerate"])
    indices = range(count) if indices is None else indices
    cache.mkdir(exist_ok=True)
    started = [
        context.Process(target=in_a_run, args=(index, count, port, cache, work, *arguments)) for index in indices
    ]
    try:
        for process in started:
            process.start()
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def learn(path, folder, out):
    """All that processes do together, and what each has in the end."""
    store, run = ClipStore.open(path), launched("cpu")
    images = index_images(folder, store)
    # 42 clips in batches of 21: the shares of two processes are not equal
    settings = replace(SMALL, batch=21, epochs=2, lr=0.1, backbone_lr=0.1)
    model, modes = scene_training.fine_tune_to_store(store, images, settings, out / "trained", seed=0, run=run)
    still = scene.make_model(settings, len(store.identities), seed=0)
    blocks = list(
        scene_training.extract(still, images, settings, seed=0, block=20, run=run)
    )  # five, an odd number of turns
    order = np.concatenate([batch.clips for batch, _ in blocks]), np.concatenate([feature for _, feature in blocks])
    scene._make_backbone = lambda *_: Plain()
    start = scene.make_model(settings, len(store.identities), seed=0).state_dict()
    plain, history = train(store, images, settings, run)
    networks = {"deep": model.state_dict(), "plain": plain.state_dict(), "start": start}
    found = {"modes": dict(modes), "history": history, "order": torch.from_numpy(order[0]), "index": run.index}
    torch.save(networks | found | {"features": torch.from_numpy(order[1])}, out / f"{run.index}.pt")


@pytest.fixture(scope="module")
def found(world, images, tmp_path_factory):
    """What each process of a run of one and of a run of two has, and the folder of each run."""
    base, runs = tmp_path_factory.mktemp("runs"), {}
    for count in (1, 2):
        out = base / str(count)
        out.mkdir()
        with processes(count, out / "cache", learn, world.path, images.folder, out) as started:
            for process in started:
                process.join(120)
        said = [path.read_text() for path in (out / "cache").glob("stderr*.txt")]
        assert [process.exitcode for process in started] == [0] * count, said
        runs[count] = [torch.load(out / f"{index}.pt", weights_only=True) for index in range(count)]
    return runs, base


def test_two_processes_train_the_network_that_one_trains(found):
    (alone,), (one, two) = found[0][1], found[0][2]
    assert (one["index"], two["index"]) == (0, 1)
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


def test_every_process_gets_the_features_of_one_to_the_last_bit(found):
    (alone,), others = found[0][1], found[0][2]
    for each in others:
        assert torch.equal(each["order"], alone["order"]) and torch.equal(each["features"], alone["features"])


def test_two_processes_write_one_store_and_leave_nothing_else(found, world):
    out = found[1] / "2"
    store = ClipStore.open(out / "trained")
    assert store.modalities["scene"].count.tolist() == [1] * len(world) and set(store.modalities) == set(
        world.modalities
    )
    assert len(store.meta["provenance"]["scene"]["history"]) == 2
    assert not list((out / "cache" / "decoded").iterdir())
    assert all(each["modes"] == {"RGB": len(world)} for each in found[0][2])


def command(*arguments):
    """The command line with Python's handlers, as ``main`` has them."""
    sys.argv = ["mmlib", *map(str, arguments)]
    cli.main()


def test_a_process_whose_peer_never_comes_says_so_and_can_be_stopped(world, images, tmp_path):
    arguments = ("scene", world.path, images.folder, tmp_path / "out", "--device", "cpu")
    ways = ((0, signal.SIGINT), (0, signal.SIGTERM), (1, signal.SIGTERM))  # the second process has nobody to ask
    runs = [processes(2, tmp_path / f"{n}", command, *arguments, indices=[index]) for n, (index, _) in enumerate(ways)]
    with runs[0] as one, runs[1] as two, runs[2] as three:
        for n, ((process,), (index, number)) in enumerate(zip((one, two, three), ways)):
            said = tmp_path / f"{n}" / f"stderr{index}.txt"
            until = time.monotonic() + 60
            while not (said.exists() and "\n" in said.read_text()) and time.monotonic() < until:
                time.sleep(0.1)
            assert "waiting for 2 processes" in said.read_text() and "minutes" in said.read_text()
            os.kill(process.pid, number)
            process.join(10)
            assert process.exitcode == -number
    assert not (tmp_path / "out").exists()


def impatient(*arguments):
    scene_training.PATIENCE = timedelta(seconds=1)
    command(*arguments)


def test_a_process_whose_peer_never_comes_gives_up_in_one_line(world, images, tmp_path):
    arguments = ("scene", world.path, images.folder, tmp_path / "out", "--device", "cpu")
    runs = [processes(2, tmp_path / f"{index}", impatient, *arguments, indices=[index]) for index in (0, 1)]
    with runs[0] as one, runs[1] as two:
        for index, (process,) in enumerate((one, two)):
            process.join(60)
            said = (tmp_path / f"{index}" / f"stderr{index}.txt").read_text()
            assert process.exitcode == 1 and "in vain" in said and said.count("mmlib: error") == 1
            assert "Traceback" not in said


def failing(cache, *arguments):
    os.environ["MMLIB_CACHE"] = str(cache)
    os.dup2(os.open(cache / f"stderr{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT), 2)
    command(*arguments)


def test_a_process_that_fails_ends_the_run_and_leaves_nothing(world, images, tmp_path):
    clip = world.clips.index[world.clips["identity"] < 0][-1]  # only extracted, by the second of two processes
    kept = {path: path.read_bytes() for path in (images.folder / images.clips[clip]).iterdir()}
    options = ["--architecture", "narrow_seresnext14", "--epochs", "1", "--device", "cpu"]
    arguments = ["scene", world.path, images.folder, tmp_path / "out", *options]
    (tmp_path / "cache").mkdir()
    # what torchrun and accelerate launch run, but for their imports
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", start_method="forkserver")
    config.monitor_interval, config.max_restarts = 0.1, 0
    try:
        for path in kept:
            path.write_bytes(b"no")
        with pytest.raises(ChildFailedError):
            elastic_launch(config, failing)(tmp_path / "cache", *arguments)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    said = [(tmp_path / "cache" / f"stderr{index}.txt").read_text() for index in (0, 1)]
    assert f"image of clip {images.clips[clip]}: not a picture" in said[1]
    assert not any("Traceback" in text for text in said), said[0]
    assert [text.count("mmlib: error") for text in said] in (
        [1, 1],
        [0, 1],
    )  # the first may be stopped before it speaks
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert not list((tmp_path / "cache" / "decoded").iterdir())
