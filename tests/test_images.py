import json
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmlib.data import render
from mmlib.data.images import count_converted, index_images, read_image
from mmlib.data.pictures import image_batches
from mmlib.data.render import REGIONS, Studio, picture_size, render_scenes
from mmlib.data.simulate import settings_for, simulate
from mmlib.data.store import ClipStore

SIZE = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("world") / "store", settings_for("tiny", identities=12), seed=1)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    return render_scenes(world, tmp_path_factory.mktemp("pictures") / "img", size=SIZE).folder


def save(path, mode="RGB", size=(20, 10), value=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)
    return path


def batch_of(images, clips, **options):
    (found,) = image_batches(images, [np.array(clips)], **{"size": 8, "resize": 10, "seed": 0} | options)
    return found


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


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
    (tmp_path / "a" / ".hidden.jpg").write_text("")
    found = index_images(tmp_path, bare)
    assert (found.present.tolist(), found.unknown, found.other) == ([0], 1, 1)
    assert found.lines()[0] == "images: 1 of 1 clips; 5 clips without any, left out"
    assert len(found.lines()) == 3


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_any_image_of_the_clips_is_refused_by_name(bare, tmp_path, made):
    if made:
        save(tmp_path / "img" / "nobody" / "1.jpg")
    with pytest.raises(ValueError, match=r"img: (no such folder|holds no image .* such as a/1\.jpg)"):
        index_images(tmp_path / "img", bare)


def test_asking_for_a_clip_without_image_names_it(bare, tmp_path):
    save(tmp_path / "a" / "1.jpg")
    with pytest.raises(ValueError, match="clip c has no image"):
        batch_of(index_images(tmp_path, bare), [2])


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


def test_conversions_are_counted_by_mode(bare, tmp_path):
    for clip, mode in zip("abc", ("RGB", "L", "CMYK")):
        save(tmp_path / clip / "1.jpg", mode, value=0 if mode == "L" else None)
    modes = Counter(batch_of(index_images(tmp_path, bare), [0, 1, 2]).modes)
    assert count_converted(modes) == "converted to RGB: 1 of mode CMYK, 1 of mode L"
    assert count_converted(Counter(RGB=3)) == ""


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


# -- rendered pictures ---------------------------------------------------------------------------------------


def test_rendered_pictures_belong_to_the_clips_and_say_what_they_are(world, folder):
    images = index_images(folder, world)
    assert len(images.present) == len(world) and not images.unknown and not images.other
    assert {len(files) for files in images.files} == {1, 2, 3}
    assert picture_size(images, world) == SIZE and json.loads((folder / render.ABOUT).read_text())["simulated"]
    image, mode = read_image(images.path(0, 0), "x")
    assert (image.size, mode) == ((SIZE, SIZE), "RGB")


def test_the_same_world_gives_the_same_pictures_and_a_store_is_not_touched(world, folder, tmp_path):
    before = contents(world.path)
    assert contents(render_scenes(world, tmp_path / "img", size=SIZE).folder) == contents(folder)
    assert contents(world.path) == before


def altered(world, **columns):
    return ClipStore(world.path, world.meta, world.clips.assign(**columns), world.identities, world.modalities)


def test_pictures_do_not_depend_on_who_is_in_the_clip(world):
    clips = np.random.default_rng(0).permutation(len(world))
    other = altered(world, identity=world.clips["identity"].to_numpy()[clips], latent_quality=0.0)
    assert (Studio(other).draw(0, SIZE)[0] == Studio(world).draw(0, SIZE)[0]).all()


@pytest.mark.parametrize("column", ["show", "set"])
def test_pictures_depend_on_the_show_and_on_the_set(world, column):
    value = world.clips[column].to_numpy()
    swapped = altered(world, **{column: np.where(value == 0, 1, np.where(value == 1, 0, value))})
    one, other = (Studio(store).draw(0, SIZE)[0] for store in (world, swapped))
    changed = (one != other).any((1, 2, 3))
    clip = Studio(world).clip[: len(one)]
    assert changed[np.isin(value[clip], (0, 1))].mean() > 0.95  # a set may differ where the camera does not look
    assert not changed[~np.isin(value[clip], (0, 1))].any()


def test_pictures_of_one_show_are_more_alike_than_those_of_two(world):
    studio = Studio(world)
    picture = np.concatenate([studio.draw(first, SIZE)[0] for first in range(0, len(studio.clip), render.BLOCK)])
    once = studio.first
    colour = picture[once].mean((1, 2)) / 255
    distance = ((colour[:, None] - colour[None]) ** 2).sum(-1) ** 0.5
    show = world.clips["show"].to_numpy()
    same = show[:, None] == show[None]
    different = ~same
    np.fill_diagonal(same, False)
    assert distance[same].mean() < 0.8 * distance[different].mean()


def test_regions_say_where_things_are(world):
    studio = Studio(world)
    _, region = studio.draw(0, SIZE)
    assert set(np.unique(region)) == set(range(len(REGIONS)))
    bar = region == REGIONS.index("caption bar")
    assert not bar[:, : SIZE // 2].any() and bar[:, -1].any(1).mean() > 0.3
    few = np.array([0, len(world) - 1, 3])
    drawn = studio.regions(few, np.zeros(3, int), SIZE)
    assert (drawn[[0, 2]] == region[studio.first[few[[0, 2]]]]).all()


def test_pictures_of_another_world_are_refused(folder, tmp_path):
    other = simulate(tmp_path / "other", settings_for("tiny", identities=12), seed=2)
    with pytest.raises(ValueError, match="simulated world of seed 1, not of the clips"):
        picture_size(index_images(folder, other), other)


def test_a_store_that_is_not_simulated_cannot_be_rendered(bare, tmp_path):
    with pytest.raises(ValueError, match="no column 'show'"):
        render_scenes(bare, tmp_path / "img")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_rendering_leaves_nothing(world, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Studio, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render_scenes(world, tmp_path / "img")
    assert not list(tmp_path.iterdir())
