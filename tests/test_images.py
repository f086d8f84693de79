import os
import shutil
import struct
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmlib.data import images as reader
from mmlib.data.images import (
    DECODED,
    EVALUATION,
    count_converted,
    crop_picture,
    decode,
    fit_picture,
    image_batches,
    index_images,
    read_image,
)

SHAPES = {"a": (20, 10), "b": (10, 31), "c": (12, 12), "d": (90, 7), "f": (10, 10)}  # width and height; e has none


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


def save(path, mode="RGB", size=(20, 10), value=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)
    return path


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def batch_of(images, clips, **options):
    (found,) = image_batches(images, [np.array(clips)], **{"size": 8, "resize": 10, "seed": 0} | options)
    return found


def assert_same(one, other):
    assert one.clips.tolist() == other.clips.tolist() and one.number.tolist() == other.number.tolist()
    assert (one.pixels == other.pixels).all()


def left(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# -- which files ---------------------------------------------------------------------------------------------


def test_images_of_a_clip_are_in_the_order_of_their_numbers(bare, tmp_path):
    for name in ("10.jpg", "2.JPG", "1.png", "cover.jpeg"):
        save(tmp_path / "a" / name, format="PNG" if name.endswith("png") else "JPEG")
    assert index_images(tmp_path, bare).files[0] == ("1.png", "2.JPG", "10.jpg", "cover.jpeg")


def test_clips_without_images_and_stray_files_are_counted(bare, tmp_path):
    save(tmp_path / "a" / "1.jpg")
    save(tmp_path / "nobody" / "1.jpg")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("")
    for hidden in (".hidden.jpg", "Thumbs.db"):
        (tmp_path / "a" / hidden).write_text("")
    found = index_images(tmp_path, bare)
    assert (found.present.tolist(), found.unknown, found.other) == ([0], 1, 1)
    assert found.lines()[0] == "images: 1 of 1 clips; 5 clips without any, left out"
    assert len(found.lines()) == 3


def test_images_are_known_by_name_and_content_and_not_by_place(images, tmp_path):
    copied = replace(images, folder=shutil.copytree(images.folder, tmp_path / "copy"))
    digests = [images.digest(images.present), copied.digest(copied.present)]
    with open(copied.path(3, 1), "r+b") as file:
        file.write(b"?")
    digests += [copied.digest(copied.present), copied.digest(copied.present[:3]), images.digest(images.present[:3])]
    assert digests[0] == digests[1] != digests[2] and digests[3] == digests[4] != digests[0]


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_any_image_of_the_clips_is_refused_by_name(bare, tmp_path, made):
    if made:
        save(tmp_path / "img" / "nobody" / "1.jpg")
    with pytest.raises(ValueError, match=r"img: (no such folder|holds no image .* such as a/1\.jpg)"):
        index_images(tmp_path / "img", bare)


# -- what is in them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "rgb"),
    [
        ("L", 90, "jpg", (90, 90, 90)),
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
        ("RGBA", (10, 200, 30, 0), "png", (10, 200, 30)),
        ("LA", (70, 0), "png", (70, 70, 70)),
        ("1", 1, "png", (255, 255, 255)),
        ("I;16", 0x4080, "png", (0x40, 0x40, 0x40)),
    ],
)
def test_pictures_of_another_mode_become_rgb(tmp_path, mode, value, suffix, rgb):
    image, found = read_image(save(tmp_path / f"1.{suffix}", mode, value=value), "a")
    assert (image.mode, found) == ("RGB", mode)
    assert np.abs(np.asarray(image).astype(int) - rgb).max() <= 4  # JPEG rounds


def test_palette_with_transparent_colours_gives_no_warning(tmp_path, recwarn):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 250, 5, 5])
    palette.save(tmp_path / "1.png", transparency=bytes([0, 128]))
    assert read_image(tmp_path / "1.png", "a")[0].getpixel((0, 0)) == (250, 5, 5)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not a picture"), (b"GIF? no", "not a picture"), ("cut", "truncated"), ("gone", "missing")],
)
def test_a_file_that_cannot_be_read_is_named_with_its_clip(tmp_path, content, reason):
    path = save(tmp_path / "7.jpg", size=(64, 64))
    if content == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30] if content == "cut" else content)
    with pytest.raises(ValueError, match=rf"7\.jpg: image of clip abc: (?i:.*{reason})") as error:
        read_image(path, "abc")
    assert "\n" not in str(error.value)


def test_a_picture_that_claims_a_billion_pixels_is_refused(tmp_path):
    save(tmp_path / "1.png")
    raw = bytearray((tmp_path / "1.png").read_bytes())
    raw[16:24] = struct.pack(">II", 40_000, 40_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(bytes(raw[12:29])))
    (tmp_path / "1.png").write_bytes(raw)
    with pytest.raises(ValueError, match=r"1\.png: image of clip a: .*pixels"):
        read_image(tmp_path / "1.png", "a")


def test_floating_point_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1\.tif: image of clip a: pixels of mode F"):
        read_image(save(tmp_path / "1.tif", "F", value=0.5), "a")


# -- one size, and a crop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((30, 20), (15, 10)),
        ((20, 30), (10, 15)),
        ((7, 7), (10, 10)),
        ((50, 20), (20, 10)),
        ((1, 1), (10, 10)),
        ((20_000, 1), (20, 10)),
        ((1, 20_000), (10, 20)),
    ],
)
def test_the_shorter_side_is_as_asked_and_the_longer_at_most_twice_that(shape, expected):
    pixels = np.asarray(fit_picture(Image.new("RGB", shape[::-1], (9, 8, 7)), 10))
    assert pixels.shape == (*expected, 3) and (pixels == (9, 8, 7)).all()


def test_a_picture_of_the_right_size_is_not_touched():
    picture = noise(10, 14)
    assert (np.asarray(fit_picture(Image.fromarray(picture), 10)) == picture).all()


def test_of_a_very_long_picture_the_middle_is_taken():
    pixels = np.zeros((10, 50, 3), np.uint8)
    pixels[:, 15:35] = 200  # two squares, in the middle
    fitted = np.asarray(fit_picture(Image.fromarray(pixels), 10))
    assert fitted.shape == (10, 20, 3) and (fitted == 200).all()


def cropped(picture, place, flip, size):
    return crop_picture(Image.fromarray(picture), size, np.array(place, float), flip)


def test_a_crop_at_whole_pixels_is_a_copy():
    picture = noise(12, 20)
    assert (cropped(picture, [0.5, 0.25], False, 8) == picture[1:9, 6:14]).all()  # from column 6 and row 1


def test_half_a_pixel_is_the_mean_of_two():
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[:, :, 0] = [0, 100, 50]
    assert cropped(picture, [0.5, 0], False, 2)[:, :, 0].tolist() == [[50, 75]] * 2


@pytest.mark.parametrize(("size", "height", "width"), [(56, 64, 64), (8, 9, 10), (1, 3, 3), (30, 30, 41), (8, 19, 11)])
def test_crops_between_pixels_are_interpolated(size, height, width):
    rng = np.random.default_rng(size)
    for seed in range(10):
        picture, place = noise(height, width, seed), rng.random(2)
        left, top = (np.array([width, height]) - size) * place
        across, down = (
            np.minimum(int(at) + np.arange(size + 1), side - 1) for at, side in ((left, width), (top, height))
        )
        fine = picture[down][:, across].astype(float)
        fine = fine[:, :-1] * (1 - left % 1) + fine[:, 1:] * (left % 1)
        fine = fine[:-1] * (1 - top % 1) + fine[1:] * (top % 1)
        # rounded twice, once an axis
        assert np.abs(cropped(picture, place, False, size) - fine).max() <= 1.01


def test_a_flipped_crop_is_the_crop_mirrored():
    picture, place = noise(12, 20), [0.3, 0.7]
    assert (cropped(picture, place, True, 8) == cropped(picture, place, False, 8)[:, ::-1]).all()


# -- batches -------------------------------------------------------------------------------------------------


def test_asking_for_a_clip_without_image_names_it(images):
    with pytest.raises(ValueError, match="clip e has no image"):
        batch_of(images, [0, 4])


def test_a_batch_is_bytes_with_channels_last_in_memory(images):
    pixels = batch_of(images, [0, 1, 2]).pixels
    assert (tuple(pixels.shape), pixels.dtype) == ((3, 3, 8, 8), torch.uint8)
    assert pixels.is_contiguous(memory_format=torch.channels_last)


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


def test_the_picture_of_a_clip_depends_on_seed_and_epoch_but_not_on_its_batch(images):
    clips = images.present
    whole = batch_of(images, clips, epoch=3)
    for rows in (slice(0, 2), slice(2, 5)):
        part = batch_of(images, clips[rows], epoch=3)
        assert (part.pixels == whole.pixels[rows]).all() and (part.number == whole.number[rows]).all()
    assert not (batch_of(images, clips, epoch=4).pixels == whole.pixels).all()
    assert not (batch_of(images, clips, epoch=3, seed=9).pixels == whole.pixels).all()
    drawn = [batch_of(images, clips, seed=seed, epoch=EVALUATION).number for seed in range(12)]
    assert np.ptp(drawn, axis=0).all()  # by chance all twelve agree for 1 clip in 2048


def test_loading_processes_change_no_picture(images):
    groups = [images.present[:3], images.present[3:]]
    ways = [list(image_batches(images, groups, size=8, resize=10, seed=0, epoch=0, workers=n)) for n in (0, 1)]
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


def test_a_loading_process_that_the_system_kills_is_said_in_one_line(images, monkeypatch):
    class Loader:
        def __init__(self, *_, **__):
            pass

        def __iter__(self):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.\nand more lines")
            yield

    monkeypatch.setattr(reader, "DataLoader", Loader)
    with pytest.raises(MemoryError, match=r"loads pictures \(DataLoader worker .*Bus error") as error:
        batch_of(images, [0])
    assert "\n" not in str(error.value)


def test_batches_leave_the_generator_of_torch_alone(images):
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(image_batches(images, [images.present] * 2, size=8, resize=10, seed=0, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


# -- decoded once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [EVALUATION, 0, 1])
@pytest.mark.parametrize(("size", "resize"), [(8, 10), (10, 10), (7, 25)])
def test_decoded_batches_are_those_from_the_files_to_the_last_bit(images, tmp_path, epoch, size, resize):
    decoded = decode(images, tmp_path / "map", images.present, resize=resize)
    shape = {"size": size, "resize": resize, "epoch": epoch}
    files = batch_of(images, images.present, **shape)
    for path in images.folder.rglob("*.png"):
        path.unlink()  # from what was decoded alone
    assert_same(batch_of(decoded, images.present, **shape), files)


def test_clips_that_are_not_decoded_are_read_from_their_files(images, tmp_path):
    decoded = decode(images, tmp_path / "map", images.present[:2], resize=10)
    images.path(0, 0).unlink()
    images.path(0, 1).unlink()
    assert decoded.present.tolist() == images.present.tolist()
    assert_same(batch_of(decoded, images.present[1:]), batch_of(images, images.present[1:]))
    assert batch_of(decoded, [0]).clips.tolist() == [0]


def test_loading_processes_change_no_decoded_picture(images, tmp_path, monkeypatch):
    folders = [tmp_path / "map0", tmp_path / "map1"]
    for workers, folder in enumerate(folders):
        monkeypatch.setattr(reader, "_workers", lambda *_, number=workers: number)
        decode(images, folder, images.present, resize=10)
    found = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.ppm")} for folder in folders]
    assert found[0] == found[1] and len(found[0]) == 10


def test_pictures_are_decoded_once(images, tmp_path, monkeypatch):
    first = decode(images, tmp_path / "map", images.present, resize=10)
    monkeypatch.setattr(reader, "read_image", lambda *_: pytest.fail("decoded again"))
    assert decode(images, tmp_path / "map", images.present, resize=10) == first


@pytest.mark.parametrize("change", ["file", "content", "resize", "clips", "name"])
def test_other_pictures_are_decoded_anew(images, bare, tmp_path, change):
    first = save(images.path(0, 0), value=(1, 2, 3))
    before = first.stat()
    decode(images, tmp_path / "map", images.present, resize=10)
    (tmp_path / "map" / "old").write_text("")
    clips, resize = images.present, 10
    if change == "file":
        save(first, size=(40, 10))
    elif change == "content":
        save(first, value=(3, 2, 1))
        os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert first.stat().st_size == before.st_size
    elif change == "name":
        images.path(0, 0).rename(images.folder / "a" / "3.png")
        images = index_images(images.folder, bare)
    elif change == "clips":
        clips = clips[:2]
    else:
        resize = 11
    again = decode(images, tmp_path / "map", clips, resize=resize)
    assert not (tmp_path / "map" / "old").exists()
    assert_same(batch_of(again, clips, resize=resize), batch_of(images, clips, resize=resize))
    assert left(tmp_path) == ["img", "map"]


def test_pictures_that_might_not_fit_are_read_from_their_files(images, tmp_path):
    most = 10 * 3 * 10 * 20  # ten of two squares, the longest there can be
    assert decode(images, tmp_path / "map", images.present, resize=10, most=most - 1) == images
    assert left(tmp_path) == ["img"]
    assert decode(images, tmp_path / "map", images.present, resize=10, most=most) != images


@pytest.mark.parametrize(("content", "reason"), [(b"no", r"not a picture \(2 bytes\)"), (None, "missing")])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_decoded_is_named_and_leaves_nothing(
    images, tmp_path, monkeypatch, content, reason, workers
):
    monkeypatch.setattr(reader, "_workers", lambda *_: workers)
    images.path(3, 1).write_bytes(content) if content else images.path(3, 1).unlink()
    with pytest.raises(ValueError, match=rf"2\.png: image of clip d: {reason}") as error:
        decode(images, tmp_path / "map", images.present, resize=10)
    assert "\n" not in str(error.value) and left(tmp_path) == ["img"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_decoding_leaves_nothing(images, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(reader, "fit_picture", fail)
    with pytest.raises(error):
        decode(images, tmp_path / "map", images.present, resize=10)
    assert left(tmp_path) == ["img"]


def test_a_decoded_file_cut_short_is_refused_by_name(images, tmp_path):
    decoded = decode(images, tmp_path / "map", images.present, resize=10)
    for number in (0, 1):
        with open(tmp_path / "map" / "a" / f"{number}.ppm", "r+b") as file:
            file.truncate(100)
    with pytest.raises(ValueError, match=r"map.a.[01]\.ppm: image of clip a: .*truncated"):
        batch_of(decoded, [0])


def test_a_folder_of_something_else_is_not_replaced(images, tmp_path):
    (tmp_path / "map").mkdir()
    (tmp_path / "map" / "mine").write_text("")
    with pytest.raises(FileExistsError, match=f"holds no {DECODED}"):
        decode(images, tmp_path / "map", images.present, resize=10)
    assert left(tmp_path / "map") == ["mine"]
