import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmlib.data import pictures as reader
from mmlib.data.images import count_converted, index_images
from mmlib.data.pictures import DECODED, EVALUATION, decode, image_batches
from mmlib.data.render import render_scenes
from mmlib.data.simulate import settings_for, simulate

SHAPES = {"a": (20, 10), "b": (10, 31), "c": (12, 12), "d": (90, 7), "f": (10, 10)}  # width and height; e has none


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("world") / "store", settings_for("tiny", identities=12), seed=1)


@pytest.fixture(scope="module")
def rendered(world, tmp_path_factory):
    return index_images(render_scenes(world, tmp_path_factory.mktemp("pictures") / "img", size=32).folder, world)


@pytest.fixture
def images(bare, tmp_path):
    """Noise of several shapes, two pictures a clip; the second one of clip c is grey."""
    rng = np.random.default_rng(0)
    for clip, (width, height) in SHAPES.items():
        (tmp_path / "img" / clip).mkdir(parents=True)
        for number in (1, 2):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).convert("L" if (clip, number) == ("c", 2) else "RGB")
            picture.save(tmp_path / "img" / clip / f"{number}.png")
    return index_images(tmp_path / "img", bare)


def batch_of(images, clips, **options):
    (found,) = image_batches(images, [np.array(clips)], **{"size": 8, "resize": 10, "seed": 0} | options)
    return found


def assert_same(one, other):
    assert one.clips.tolist() == other.clips.tolist() and one.number.tolist() == other.number.tolist()
    assert one.modes == other.modes and (one.pixels == other.pixels).all()


def left(folder):
    return [path.name for path in folder.iterdir()] if folder.exists() else []


# -- batches -------------------------------------------------------------------------------------------------


def test_asking_for_a_clip_without_image_names_it(images):
    with pytest.raises(ValueError, match="clip e has no image"):
        batch_of(images, [0, 4])


def test_a_batch_is_bytes_with_channels_last_in_memory(images):
    pixels = batch_of(images, [0, 1, 2]).pixels
    assert (tuple(pixels.shape), pixels.dtype) == ((3, 3, 8, 8), reader.torch.uint8)
    assert pixels.is_contiguous(memory_format=reader.torch.channels_last)


def test_conversions_are_counted_by_mode(images):
    modes = Counter(mode for epoch in range(8) for mode in batch_of(images, [0, 2], epoch=epoch).modes)
    assert set(modes) == {"RGB", "L"}
    assert count_converted(modes) == f"converted to RGB: {modes['L']} of mode L"


def test_centre_crop_is_the_centre_and_is_not_flipped(bare, tmp_path):
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(20), np.arange(10)[:, None]
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    cropped = batch_of(index_images(tmp_path, bare), [0]).pixels[0]
    assert cropped[0, 0].tolist() == list(range(6, 14))
    assert cropped[1, :, 0].tolist() == list(range(1, 9))


def test_training_crops_move_and_half_of_them_are_flipped(bare, tmp_path):
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(0, 200, 10), np.arange(0, 200, 20)[:, None]
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    listed = index_images(tmp_path, bare)
    drawn = [batch_of(listed, [0], epoch=epoch).pixels[0].numpy().astype(int) for epoch in range(200)]
    row, column = np.array([crop[0, 0] for crop in drawn]), np.array([crop[1, :, 0] for crop in drawn])
    assert abs((row[:, 0] > row[:, -1]).mean() - 0.5) < 4 * 0.5 / 200**0.5  # four standard errors
    assert row.min() < 10 and row.max() > 180  # from edge to edge
    assert column.min() < 2 and column.max() > 178 and (np.diff(column) > 0).all()


def test_the_picture_of_a_clip_depends_on_seed_and_epoch_but_not_on_its_batch(rendered):
    clips = rendered.present[:20]
    whole = batch_of(rendered, clips, epoch=3)
    for rows in (slice(0, 7), slice(7, 20)):
        part = batch_of(rendered, clips[rows], epoch=3)
        assert (part.pixels == whole.pixels[rows]).all() and (part.number == whole.number[rows]).all()
    assert not (batch_of(rendered, clips, epoch=4).pixels == whole.pixels).all()
    assert not (batch_of(rendered, clips, epoch=3, seed=9).pixels == whole.pixels).all()
    several = [clip for clip in rendered.present if len(rendered.files[clip]) > 1]
    drawn = [batch_of(rendered, several, seed=seed, epoch=EVALUATION).number for seed in range(8)]
    assert (np.ptp(drawn, axis=0) > 0).mean() > 0.8  # by chance all eight agree for 1 clip in 128 of two pictures


def test_loading_processes_change_no_picture(rendered):
    groups = [rendered.present[:3], rendered.present[3:6]]
    ways = [list(image_batches(rendered, groups, size=8, resize=10, seed=0, epoch=0, workers=n)) for n in (0, 1)]
    for one, other in zip(*ways, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named_in_one_line(images, workers):
    for number in (1, 2):
        (images.folder / "b" / f"{number}.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"^.*[12]\.png: image of clip b: not a picture \(2 bytes\)$") as error:
        list(image_batches(images, [[0], [1]], size=8, resize=10, seed=0, workers=workers))
    assert "\n" not in str(error.value)


def test_processes_are_for_large_pictures_and_share_the_cores(images, monkeypatch):
    asked = []

    class Loader:
        def __init__(self, *_, num_workers, **__):
            asked.append(num_workers)

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(reader, "DataLoader", Loader)
    monkeypatch.setattr(os, "cpu_count", lambda: 40)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for size in (64, 224):
        list(image_batches(images, [[0]] * 9, size=size, resize=256, seed=0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    list(image_batches(images, [[0]] * 9, size=224, resize=256, seed=0))
    assert asked == [0, 32, 5]


# -- decoded once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [EVALUATION, 0, 1])
@pytest.mark.parametrize(("size", "resize"), [(8, 10), (10, 10), (7, 25)])
def test_batches_from_the_map_are_those_from_the_files_to_the_last_bit(images, tmp_path, epoch, size, resize):
    decoded = decode(images, tmp_path / "map", images.present, resize=resize)
    shape = {"size": size, "resize": resize, "epoch": epoch}
    files = batch_of(images, images.present, **shape)
    for path in images.folder.rglob("*.png"):
        path.unlink()  # from the map alone
    assert_same(batch_of(images, images.present, decoded=decoded, **shape), files)


def test_batches_of_rendered_pictures_from_the_map_are_those_from_the_files(rendered, tmp_path):
    decoded = decode(rendered, tmp_path / "map", rendered.present, resize=32)
    for epoch in range(3):
        shape = {"size": 28, "resize": 32, "epoch": epoch}
        assert_same(
            batch_of(rendered, rendered.present, decoded=decoded, **shape),
            batch_of(rendered, rendered.present, **shape),
        )


def test_the_map_holds_every_picture_once_and_says_how_much_that_is(images, tmp_path):
    decoded = decode(images, tmp_path / "map", images.present, resize=10)
    # 20 x 10, 10 x 31, 12 x 12, 90 x 7 and 10 x 10 with a shorter side of 10, and none longer than 20
    pixels = 2 * 10 * (20 + 20 + 10 + 20 + 10)
    assert decoded.pixels.shape == (pixels, 3)
    assert (tmp_path / "map" / "pixels.npy").stat().st_size == decoded.pixels.nbytes + 128  # the header of a .npy file
    assert decoded.line() == f"decoded: 10 pictures of 5 clips, {3 * pixels / 1e9:.2f} GB"
    assert decoded.picture(1, 1)[0].shape == (20, 10, 3) and decoded.picture(4, 0) is None


def test_loading_processes_change_no_decoded_picture(images, tmp_path):
    ways = [decode(images, tmp_path / f"map{n}", images.present, resize=10, workers=n) for n in (0, 1)]
    assert (ways[0].pixels == ways[1].pixels).all() and (ways[0].shape == ways[1].shape).all()


def test_pictures_are_decoded_once(images, tmp_path, monkeypatch):
    first = decode(images, tmp_path / "map", images.present, resize=10)
    monkeypatch.setattr(reader, "read_image", lambda *_: pytest.fail("decoded again"))
    again = decode(images, tmp_path / "map", images.present, resize=10)
    assert (again.pixels == first.pixels).all() and again.mode.tolist() == first.mode.tolist()


@pytest.mark.parametrize("change", ["file", "resize", "clips", "name"])
def test_other_pictures_are_decoded_anew(images, bare, tmp_path, change):
    first = decode(images, tmp_path / "map", images.present, resize=10)
    clips, resize = images.present, 10
    if change == "file":
        Image.new("RGB", (40, 10), (1, 2, 3)).save(images.path(0, 0))
    elif change == "name":
        images.path(0, 0).rename(images.folder / "a" / "3.png")
        images = index_images(images.folder, bare)
    elif change == "clips":
        clips = clips[:2]
    else:
        resize = 11
    again = decode(images, tmp_path / "map", clips, resize=resize)
    assert again.pixels.shape != first.pixels.shape or (again.pixels != first.pixels).any()
    assert_same(batch_of(images, clips, resize=resize, decoded=again), batch_of(images, clips, resize=resize))
    assert sorted(left(tmp_path)) == ["img", "map"]


def test_what_does_not_fit_is_read_from_its_files(images, tmp_path):
    decoded = decode(images, tmp_path / "map", images.present, resize=10, most=2 * 3 * 10 * (20 + 20) + 5)
    assert (decoded.first >= 0).tolist() == [True, True, False, False, False, False]
    assert_same(batch_of(images, images.present, decoded=decoded), batch_of(images, images.present))


def test_a_map_of_another_size_is_refused(images, tmp_path):
    decoded = decode(images, tmp_path / "map", images.present, resize=12)
    with pytest.raises(ValueError, match="resize must be that of the decoded pictures, 12, got 10"):
        batch_of(images, [0], decoded=decoded)


@pytest.mark.parametrize(("content", "reason"), [(b"no", r"not a picture \(2 bytes\)"), (None, "missing")])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_decoded_is_named_and_leaves_nothing(images, tmp_path, content, reason, workers):
    images.path(3, 1).write_bytes(content) if content else images.path(3, 1).unlink()
    with pytest.raises(ValueError, match=rf"2\.png: image of clip d: {reason}") as error:
        decode(images, tmp_path / "map", images.present, resize=10, workers=workers)
    assert "\n" not in str(error.value) and left(tmp_path) == ["img"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_decoding_leaves_nothing(images, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(reader.ArrayStream, "append", fail)
    with pytest.raises(error):
        decode(images, tmp_path / "map", images.present, resize=10)
    assert left(tmp_path) == ["img"]


def test_a_map_cut_short_is_refused_by_name(images, tmp_path):
    decode(images, tmp_path / "map", images.present, resize=10)
    with open(tmp_path / "map" / "pixels.npy", "r+b") as file:
        file.truncate(500)
    with pytest.raises(ValueError, match=r"pixels\.npy: 500 bytes where"):
        decode(images, tmp_path / "map", images.present, resize=10)


def test_a_folder_of_something_else_is_not_replaced(images, tmp_path):
    (tmp_path / "map").mkdir()
    (tmp_path / "map" / "mine").write_text("")
    with pytest.raises(FileExistsError, match=f"holds no {DECODED}"):
        decode(images, tmp_path / "map", images.present, resize=10)
    assert left(tmp_path / "map") == ["mine"]
