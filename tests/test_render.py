import json

import numpy as np
import pytest

from mmlib.data import render
from mmlib.data.images import index_images, read_image
from mmlib.data.render import REGIONS, Studio, picture_size, render_scenes
from mmlib.data.simulate import settings_for, simulate
from mmlib.data.store import ClipStore

SIZE = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("world") / "store", settings_for("tiny", identities=12), seed=1)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "img"
    assert render_scenes(world, folder, size=SIZE) == len(Studio(world).clip)
    return folder


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_rendered_pictures_belong_to_the_clips_and_say_what_they_are(world, folder):
    images = index_images(folder, world)
    assert len(images.present) == len(world) and not images.unknown and not images.other
    assert {len(files) for files in images.files} == {1, 2, 3}
    assert picture_size(images, world) == SIZE and json.loads((folder / render.ABOUT).read_text())["simulated"]
    image, mode = read_image(images.path(0, 0), "x")
    assert (image.size, mode) == ((SIZE, SIZE), "RGB")


def test_the_same_world_gives_the_same_pictures_and_a_store_is_not_touched(world, folder, tmp_path):
    before = contents(world.path)
    render_scenes(world, tmp_path / "img", size=SIZE)
    assert contents(tmp_path / "img") == contents(folder)
    assert contents(world.path) == before


def test_a_world_keeps_its_pictures_from_one_library_to_the_next(world):
    # as first rendered: mean colours and pixels of each region of four pictures, but for rounding
    picture, region = (part[:4] for part in Studio(world).draw(render.BLOCK, SIZE))
    colour = [[135.22, 80.8, 116.78], [135.65, 80.01, 117.64], [139.42, 77.47, 118.76], [99.44, 74.51, 101.66]]
    assert np.abs(picture.mean((1, 2)) - colour).max() < 0.1
    pixels = [[344, 0, 325, 163, 192], [380, 0, 280, 172, 192], [427, 0, 247, 158, 192], [355, 59, 269, 149, 192]]
    found = np.stack([(region == place).sum((1, 2)) for place in range(len(REGIONS))], 1)
    assert np.abs(found - pixels).max() <= 2


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
