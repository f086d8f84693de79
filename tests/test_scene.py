import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from mmlib import cli, records, scene, scene_training
from mmlib.data.images import index_images
from mmlib.data.render import render_scenes
from mmlib.data.simulate import settings_for as world_for
from mmlib.data.simulate import simulate
from mmlib.data.store import ClipStore
from mmlib.scene import SceneSettings, make_model
from mmlib.scene_training import Launch, extract, fine_tune, write_scene_store

ALONE = Launch(0, 1, torch.device("cpu"))
NARROW = "narrow_seresnext14"
SMALL = scene.settings_for(NARROW, epochs=3, size=32, resize=36, batch=16, lr=0.02, backbone_lr=0.01)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("world") / "store", world_for("tiny", identities=8), seed=1)


@pytest.fixture(scope="module")
def images(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "img"
    render_scenes(world, folder, size=36)
    for files in sorted((folder / world.clips["clip"][0]).iterdir()):  # one clip without a picture
        files.unlink()
    return index_images(folder, world)


@pytest.fixture(scope="module")
def trained(world, images):
    model = make_model(SMALL, len(world.identities), seed=0)
    fine_tune(model, world, images, replace(SMALL, epochs=1), ALONE, seed=0)
    return model


@pytest.fixture(scope="module")
def deep():
    """The 50-layer network of timm with its classifier, drawn at random; in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("seresnext50_32x4d", num_classes=5).eval()


def make_backbone(architecture, weights="", seed=0):
    return make_model(scene.settings_for(architecture, weights), 2, seed=seed).backbone


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels(n=4, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def features(model, images, **options):
    """The features of all clips with a picture by position."""
    return {
        clip: row
        for batch, block in extract(model, images, SMALL, seed=0, **options)
        for clip, row in zip(batch.clips.tolist(), block, strict=True)
    }


# -- the network ---------------------------------------------------------------------------------------------


def test_weights_of_timm_give_its_scores_and_2048_features(deep, tmp_path):
    torch.save(deep.state_dict(), tmp_path / "weights.pth")
    backbone = make_backbone("seresnext50_32x4d", str(tmp_path / "weights.pth")).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        feature = backbone(x)
        assert feature.shape == (2, 2048)
        torch.testing.assert_close(deep.fc(feature), deep(x))


def test_weights_are_read_from_safetensors(tmp_path):
    model = make_backbone(NARROW)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = make_backbone(NARROW, str(tmp_path / "weights.safetensors"), seed=1)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_older_files_lack_counters_and_wrap_their_tensors(tmp_path):
    model = make_backbone(NARROW)
    state = {f"module.{key}": value for key, value in model.state_dict().items() if "num_batches" not in key}
    torch.save({"state_dict": state | {"module.last_linear.weight": torch.zeros(3, 3)}}, tmp_path / "old.pth")
    loaded = make_backbone(NARROW, str(tmp_path / "old.pth"), seed=1)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: make_backbone("narrow_seresnext26").state_dict(), r".*layer1\.1\.conv1\.weight"),
        (lambda s: without(s, "layer2.0.conv2.weight"), r".*layer2\.0\.conv2\.weight"),
        (lambda s: s | {"conv1.weight": torch.zeros(8, 3, 7, 7)}, r".*conv1\.weight.*8, 3, 7, 7"),
        (lambda s: {"epoch": 3}, "no state dict"),
        (lambda s: [1, 2], "not a readable file"),
    ],
)
def test_weights_of_another_architecture_are_refused_by_file_and_tensor(tmp_path, change, reason):
    path = tmp_path / "other.pth"
    torch.save(change(make_backbone(NARROW).state_dict()), path)
    with pytest.raises(ValueError, match=rf"other\.pth: .*{reason}"):
        make_backbone(NARROW, str(path))


def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.pth").write_text("not weights\n" * 9)
    for name, reason in (("text.pth", "not a readable file"), ("gone.pth", "no such file")):
        with pytest.raises(ValueError, match=f"{name}: {reason}") as error:
            make_backbone(NARROW, str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_a_download_that_fails_says_so_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host\nand many more lines")

    monkeypatch.setattr(scene.timm, "create_model", fail)
    with pytest.raises(ValueError, match=r"cannot download those of seresnext50_32x4d \(no route to host\); give"):
        make_backbone("seresnext50_32x4d", "pretrained")


def test_there_are_no_published_weights_of_a_narrow_network():
    with pytest.raises(ValueError, match="no pretrained ones of narrow_seresnext14"):
        make_backbone(NARROW, "pretrained")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"architecture": "resnet50"}, "architecture must be one of seresnext50_32x4d.*got 'resnet50'"),
        ({"epochs": 0}, "epochs .* got 0"),
        ({"resize": 100}, "resize must be at least size, 224, got 100"),
        ({"backbone_lr": 0.2}, "backbone_lr .* got 0.2"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        SceneSettings(**options)


def test_layers_are_as_many_as_the_name_says():
    for name in scene.NARROW:
        blocks = [m for m in make_backbone(name).modules() if isinstance(m, scene.Bottleneck)]
        assert name.endswith(f"seresnext{3 * len(blocks) + 2}")
        assert all(block.se is not None and block.conv2.groups == 8 for block in blocks)


def test_every_parameter_gets_a_gradient():
    model = make_model(SMALL, 5, seed=0).train()
    F.cross_entropy(30 * model(pixels()), torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_pixels_are_normalised_as_the_backbone_wants(monkeypatch):
    model = make_model(SMALL, 5, seed=0)
    monkeypatch.setattr(model, "backbone", torch.nn.Identity())
    white = model.features(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(white, (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))


def test_channels_last_changes_a_feature_by_rounding_alone():
    model = make_model(SMALL, 5, seed=0).eval()
    with torch.no_grad():
        plain = model.features(pixels())
        last = model.to(memory_format=torch.channels_last).features(pixels().to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)


def test_mixed_precision_changes_features_by_less_than_two_percent(trained):
    # bfloat16 keeps 8 bits: half a unit is 0.2 %, added up over 14 layers
    with torch.no_grad():
        wide = trained.features(pixels(16))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = trained.features(pixels(16)).float()
    off = (wide - mixed).norm(dim=1) / wide.norm(dim=1)
    assert 1e-4 < off.max() < 0.02  # and it is another arithmetic


def test_gradients_of_mixed_precision_point_where_those_of_float32_do():
    gradients = []
    for mixed in (False, True):
        model = make_model(SMALL, 5, seed=0).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            cosine = model(pixels(16))
        F.cross_entropy(30 * cosine, torch.arange(16) % 5).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    # two random directions of 300,000 parameters have a cosine below 0.01
    assert 0.9 < F.cosine_similarity(*gradients, dim=0) < 0.9999


def test_cosines_are_float32_also_where_the_network_is_not():
    model = make_model(SMALL, 5, seed=0).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        feature, cosine = model.features(pixels()), model(pixels())
    expected = F.normalize(feature.float(), dim=1) @ F.normalize(model.prototype, dim=1).T
    assert cosine.dtype == torch.float32 and torch.equal(cosine, expected.detach())


# -- features ------------------------------------------------------------------------------------------------


def test_a_feature_does_not_depend_on_the_other_clips_of_its_batch(trained, images):
    model = trained.train()  # extraction must see to the mode itself
    large, small = features(model, images, block=64), features(model, images, block=3)
    assert large.keys() == small.keys() == set(images.present.tolist())
    for clip, row in large.items():
        np.testing.assert_allclose(row, small[clip], rtol=5e-3, atol=5e-3)  # float16, and other kernels by batch size


def test_extraction_leaves_the_statistics_of_batch_norm_alone(trained, images):
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    features(trained, images)
    for key, value in trained.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_written_store_has_new_scenes_and_all_else_unchanged(trained, world, images, tmp_path):
    modes = write_scene_store(world, tmp_path / "out", extract(trained, images, SMALL, seed=0, block=7), provenance={})
    out = ClipStore.open(tmp_path / "out")
    expected = features(trained, images)
    assert sum(modes.values()) == len(expected) == len(world) - 1
    assert out.meta["simulated"] and out.meta["provenance"]["source"] == world.meta["provenance"]
    pd.testing.assert_frame_equal(out.clips, world.clips)
    assert out.identities.tolist() == world.identities.tolist()
    for name in ("face", "head", "body", "audio"):
        old, new = world.modalities[name], out.modalities[name]
        assert (old.start == new.start).all() and (old.count == new.count).all()
        assert (old.feature == new.feature).all() and old.columns.keys() == new.columns.keys()
        assert all((old.columns[key] == new.columns[key]).all() for key in old.columns)
    found = out.modalities["scene"]
    assert found.count.tolist() == [int(clip in expected) for clip in range(len(world))]
    for clip, row in expected.items():
        np.testing.assert_allclose(found.feature[found.start[clip]], row, rtol=5e-3, atol=5e-3)


def test_only_the_modalities_asked_for_are_kept(trained, world, images, tmp_path):
    write_scene_store(world, tmp_path / "out", extract(trained, images, SMALL, seed=0), provenance={}, keep=["audio"])
    assert set(ClipStore.open(tmp_path / "out").modalities) == {"audio", "scene"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_extraction_leaves_nothing(trained, world, images, tmp_path, error):
    def blocks():
        yield next(iter(extract(trained, images, SMALL, seed=0, block=5)))
        raise error

    with pytest.raises(error):
        write_scene_store(world, tmp_path / "out", blocks(), provenance={})
    assert not list(tmp_path.iterdir())


def test_a_name_that_no_store_takes_is_refused_before_the_training(world, images, tmp_path, monkeypatch):
    monkeypatch.setattr(scene_training, "fine_tune", lambda *_, **__: pytest.fail("trained for nothing"))
    older = replace(world, identities=np.array(["Ann Lee", *world.identities[1:]], object))
    with pytest.raises(ValueError, match="identity 'Ann Lee'"):
        scene_training.fine_tune_to_store(older, images, SMALL, tmp_path / "out", seed=0, run=ALONE)
    assert not list(tmp_path.iterdir())


def test_a_store_that_exists_is_refused_before_the_training(world, images, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    monkeypatch.setattr(scene_training, "fine_tune", lambda *_, **__: pytest.fail("trained for nothing"))
    with pytest.raises(FileExistsError, match="exists already"):
        scene_training.fine_tune_to_store(world, images, SMALL, tmp_path / "out", seed=0, run=ALONE)


# -- occlusion -----------------------------------------------------------------------------------------------


class Corner(torch.nn.Module):
    """Two identities: the brightness of the upper left pixel, and none."""

    def forward(self, x):
        return torch.stack([x[:, 0, 0, 0].float() / 255, torch.zeros(len(x))], 1)


def test_an_occlusion_map_points_to_what_the_score_is_made_of():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    x[..., 0, 0] = 255
    drop = scene.occlusion(Corner(), x, torch.tensor([0]), patch=4, stride=2)[0]
    lost = 1 - int(255 / 64) / 255  # the patch has the picture's mean colour
    assert drop[:2, :2].allclose(torch.tensor(lost))  # covered by the first patch alone
    assert drop[2, 0].item() == pytest.approx(lost / 2)  # by that and one more
    assert drop[4:].abs().max() == 0 and drop[:, 4:].abs().max() == 0
    assert scene.occlusion(Corner(), x, torch.tensor([1]), patch=4, stride=2).abs().max() == 0


def test_occlusion_reaches_the_edges_and_refuses_what_cannot_be():
    assert scene.occlusion(Corner(), pixels(1, 9), torch.tensor([0]), patch=4, stride=3).isfinite().all()
    for patch, stride in ((4, 5), (10, 2), (3, 0)):
        with pytest.raises(ValueError, match=f"got {patch} and {stride}"):
            scene.occlusion(Corner(), pixels(1, 9), torch.tensor([0]), patch=patch, stride=stride)


# -- kept ---------------------------------------------------------------------------------------------------


def test_a_network_is_trained_once_and_read_back(world, images, cache, monkeypatch):
    first = scene_training.fetch_or_train(world, images, SMALL, seed=0, device="cpu")
    assert sum(first.modes.values()) == len(world) - 1 and set(first.store.modalities) == {"scene"}
    monkeypatch.setattr(scene_training, "fine_tune", lambda *_, **__: pytest.fail("trained again"))
    again = scene_training.fetch_or_train(world, images, SMALL, seed=0, device="cpu")
    assert again.history == first.history
    with torch.no_grad():
        assert torch.equal(again.model(pixels()), first.model(pixels()))


@pytest.fixture
def hashed():
    """Hash the code before threads do: Python 3.11 cannot parse in two at once."""
    return scene_training.code_hash()


def test_two_runs_that_want_one_network_train_it_once(world, images, cache, hashed, monkeypatch):
    calls, plain = [], scene_training.fine_tune
    both = threading.Barrier(2)

    def watched(*arguments, **options):
        calls.append(arguments)
        time.sleep(0.5)  # long enough for the other to come this far, if nothing held it
        return plain(*arguments, **options)

    def fetch(_):
        both.wait()
        return scene_training.fetch_or_train(world, images, replace(SMALL, epochs=1), seed=0, device="cpu")

    monkeypatch.setattr(scene_training, "fine_tune", watched)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(fetch, range(2))
    assert len(calls) == 1 and one.history == other.history and one.folder == other.folder


def test_what_decides_a_network_changes_its_key(world, images, tmp_path):
    weights = tmp_path / "w.pth"
    keys = {
        scene_training.run_key(world, images, SMALL, 0),
        scene_training.run_key(world, images, SMALL, 1),
        scene_training.run_key(world, images, replace(SMALL, epochs=4), 0),
    }
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        keys.add(scene_training.run_key(world, images, scene.settings_for(NARROW, str(weights)), 0))
    assert len(keys) == 5


def test_an_interrupted_training_leaves_nothing(world, images, cache, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scene_training, "fine_tune", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scene_training.fetch_or_train(world, images, SMALL, seed=0, device="cpu")
    assert [path.suffix for path in (cache / "scenes").iterdir()] == [".lock"]
    with pytest.raises(KeyboardInterrupt):
        scene_training.fine_tune_to_store(world, images, SMALL, tmp_path / "out", seed=0, run=ALONE)
    assert not (tmp_path / "out").exists() and not list((cache / "decoded").iterdir())


def test_decoded_pictures_are_kept_in_a_folder_of_ones_own(world, images, cache, tmp_path, monkeypatch):
    seen = []

    def train(model, store, pictures, *_):
        seen.append(pictures)
        return []

    monkeypatch.setattr(scene_training, "fine_tune", train)
    run = replace(ALONE, decoded=tmp_path / "map")
    scene_training.fine_tune_to_store(world, images, SMALL, tmp_path / "out", seed=0, run=run, keep=())
    assert not list((cache / "decoded").iterdir())
    clip = seen[0].present[0]
    assert seen[0].path(clip, 0) == tmp_path / "map" / images.clips[clip] / "0.ppm" and seen[0].path(clip, 0).exists()


def test_the_hash_of_networks_follows_code_and_not_prose(tmp_path, monkeypatch):
    plain = {name: (records.PACKAGE / name).read_text() for name in scene_training.DECIDING}
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(records, "PACKAGE", tmp_path)
    monkeypatch.setattr(records, "DECIDING", ())  # the library under them, which has tests of its own

    def hashed(**changed):
        for name, text in (plain | changed).items():
            (tmp_path / name).write_text(text)
        return scene_training.code_hash.__wrapped__()

    before, own = hashed(), "from mmlib.data.store import ClipStore\n"
    for name, text in plain.items():
        assert hashed(**{name: text.replace('"""', '"""Another word. ', 1)}) == before
        assert hashed(**{name: text.replace("\n\n\n", "\n\n\n# a comment\n\n", 1)}) == before
        assert hashed(**{name: text.replace("\ndef ", "\ndef another(): return 1\n\n\ndef ", 1)}) != before
        assert own in text or name == "scene.py"  # which knows no store
        assert (
            own not in text
            or hashed(**{name: text.replace(own, "from mmlib.data.writer import StoreWriter as ClipStore\n")}) != before
        )


# -- the state of torch --------------------------------------------------------------------------------------


def state():
    flags = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
    cudnn = torch.backends.cudnn
    return (*flags, cudnn.enabled, cudnn.benchmark, cudnn.deterministic), torch.get_rng_state().tolist()


def test_no_function_leaves_the_state_of_torch_changed(world, images, cache):
    before = state()
    model = make_model(SMALL, 5, seed=3)
    assert state() == before
    scene_training.fetch_or_train(world, images, replace(SMALL, epochs=1), seed=0, device="cpu")
    assert state() == before
    for _ in extract(model, images, SMALL, seed=0):
        assert state() == before
    scene.occlusion(model, pixels(2), torch.tensor([0, 1]), patch=32, stride=32)
    assert state() == before


# -- the command line ----------------------------------------------------------------------------------------


def test_the_command_line_renders_trains_and_writes(world, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    drawn = run("render-scenes", world.path, tmp_path / "img", "--size", 32)
    assert drawn.exit_code == 0 and f"of {len(world)} clips" in drawn.stdout
    (tmp_path / "img" / world.clips["clip"][0] / "1.jpg").unlink()
    arguments = ("scene", world.path, tmp_path / "img", tmp_path / "out", "--architecture", NARROW, "--epochs", 1)
    done = run(*arguments, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert "from scratch" in done.stdout and done.stdout.splitlines()[-1].startswith("simulated: ")
    out = ClipStore.open(tmp_path / "out")
    assert set(out.modalities) == set(world.modalities)
    assert out.modalities["scene"].feature.shape[1] == 512
    assert out.meta["provenance"]["scene"]["settings"]["epochs"] == 1
    assert len(json.loads((tmp_path / "out" / "store.json").read_text())["provenance"]["scene"]["history"]) == 1
    again = run(*arguments)
    assert (again.exit_code, again.stdout) == (1, "") and "exists already" in again.stderr


def test_a_device_that_is_not_there_is_refused_in_one_line(world, images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["scene", world.path, images.folder, tmp_path / "out", "--device", "cuda"]
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 1 and not done.stdout and isinstance(done.exception, SystemExit)
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("training", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nAnd a page more.")),
        ("training", None),
        ("extraction", RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
        ("extraction", MemoryError()),
    ],
)
def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(
    when, error, world, images, cache, tmp_path, monkeypatch
):
    def features(model, pixels):
        if model.training == (when == "training"):
            if error:
                raise error
            torch.empty(1 << 60)  # which torch refuses in its own words
        return plain(model, pixels)

    plain = scene.SceneModel.features
    monkeypatch.setattr(scene.SceneModel, "features", features)
    options = ["--architecture", NARROW, "--epochs", "1", "--batch", "20", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, ["scene", str(world.path), str(images.folder), str(tmp_path / "out"), *options])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert "out of memory" in done.stderr and "lower batch" in done.stderr
    assert not (tmp_path / "out").exists() and not list((cache / "decoded").iterdir())


@pytest.mark.parametrize("architecture", ["seresnext50_32x4d", "legacy_seresnext50_32x4d"])
def test_pooled_features_are_not_dropped_in_training(architecture):
    """The network of the 2019 weights has, in timm, a drop rate of its own, and the released code has none."""
    assert make_backbone(architecture).drop_rate == 0
