import base64
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from conftest import made
from matplotlib.colors import to_rgb
from PIL import Image
from torch.nn import functional as F

from mmlib import figures, scene, scene_training
from mmlib.data.images import index_images
from mmlib.data.render import REGIONS, render_scenes
from mmlib.data.simulate import settings_for as world_for
from mmlib.data.simulate import simulate
from mmlib.data.store import ClipStore
from mmlib.retrieve import retrieve
from mmlib.studies import scene as reading
from mmlib.studies.scene import Maps, Scenes

SMALL = scene.settings_for("narrow_seresnext14", epochs=1, size=32, resize=36, batch=16, lr=0.02, backbone_lr=0.01)


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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hashed():
    """Hash the code before threads do: Python 3.11 cannot parse in two at once."""
    return scene_training.code_hash()


def test_region_effects_are_means_over_places_of_a_region():
    regions = np.zeros((2, 2, 10), np.int8)
    regions[:, 1] = REGIONS.index("figure")
    maps = np.zeros((2, 2, 10))
    maps[0, 0], maps[1, 0] = 0.2, 0.4  # the wall, above means of 0.1 and 0.2
    effect = reading.region_effect(Maps(np.zeros((2, 2, 10, 3)), maps, regions)).set_index("region")
    assert effect["effect"].to_dict() == pytest.approx({"wall": 0.15, "figure": -0.15})
    assert effect["share"].to_dict() == pytest.approx({"wall": 0.5, "figure": 0.5})


# -- what the chapter reads ----------------------------------------------------------------------------------


def nearest(*rows):
    names = ["show", "set", "channel", "family"]
    return pd.DataFrame(rows, columns=[*names, *(f"nearest {name}" for name in names)])


CONFUSED = nearest(
    (0, 0, 1, 1, 0, 0, 1, 1), (0, 1, 1, 1, 0, 2, 1, 1), (0, 0, 1, 1, 3, 0, 2, 1), (3, 0, 2, 1, 4, 0, 2, 5)
)


def test_confusions_are_counted_by_hand():
    causes = reading.confusion_causes(CONFUSED)
    assert (causes["show"], causes["set"], causes["family"], causes["channel"]) == (0.5, 0.5, 0.5, 0.5)
    # shows 0 and 3; of the nearest clips 0, 0, 3, 4 those of other shows are 3, 4 and 0, 0, 4
    assert causes["channel chance"] == pytest.approx(1 / 5)
    assert causes["family chance"] == pytest.approx(3 / 5)
    pairs = reading.confused_pairs(CONFUSED)
    assert pairs[["show", "taken for", "clips", "same channel", "same colours"]].values.tolist() == [
        [0, 3, 1, "no", "yes"],
        [3, 4, 1, "yes", "no"],
    ]


def test_rows_of_the_confusion_table_sum_to_one():
    table = reading.show_confusion(CONFUSED, shows=2)  # 0 and 3 take part in two confusions, 4 in one
    assert table.columns.tolist() == [0, 3, "other"]
    assert table.loc[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert table.loc[3].tolist() == [0, 0, 1]


def test_pictures_that_another_run_is_rendering_are_waited_for(world, cache, hashed, monkeypatch):
    calls, plain = [], reading.render_scenes
    both = threading.Barrier(2)

    def fetch(_):
        both.wait()
        return reading._rendered(world, 36)

    monkeypatch.setattr(reading, "render_scenes", lambda *a, **o: (calls.append(a), time.sleep(0.5), plain(*a, **o)))
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(fetch, range(2))
    assert len(calls) == 1 and one == other and (one / reading.ABOUT).exists()


@pytest.fixture(scope="module")
def scenes(world, images, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        run = scene_training.fetch_or_train(world, images, SMALL, seed=0, device="cpu")
        yield Scenes(0, world, images, run, rendered=36)


def test_features_are_compared_on_the_same_queries(scenes, monkeypatch):
    stores = reading.feature_stores(scenes)
    assert list(stores) == ["simulated vectors", "fine-tuned network", "thumbnail", "untrained network", "show and set"]
    truth = ClipStore.open(stores["show and set"])
    rows = truth.batch(truth.select(having="scene"), "scene").feature[:, 0]
    place = scenes.store.clips.loc[truth.select(having="scene"), ["show", "set"]].to_numpy()
    same = (place[:, None] == place[None]).all(-1)
    assert ((F.normalize(rows) @ F.normalize(rows).T > 0.999).numpy() == same).all()
    plain = reading.fetch

    def quick(asked, device):  # MLPs take too long here
        return plain([replace(each, classifier="class means") for each in asked], device=device)

    monkeypatch.setattr(reading, "fetch", quick)
    table = reading.feature_table([scenes], "cpu").set_index("feature")
    queries = len(np.unique(scenes.store.identity_of(scenes.store.select("val", labelled=True))))
    assert set(table.index) == set(stores) and set(table["n"]) == {queries}
    assert table.loc["fine-tuned network", "difference"] == 0 and table[["top1", "mlp"]].notna().all(axis=None)


def test_seeds_on_one_store_are_no_worlds(world, monkeypatch):
    def ran(asked, device):
        measures = {"map_at_100": 0.15, "top1": 0.5}
        return [made(each, key=str(each.seed), ap=[0.1, 0.2], measures=measures) for each in asked]

    monkeypatch.setattr(reading, "fetch", ran)
    monkeypatch.setattr(reading, "feature_stores", lambda each: {"simulated vectors": each.store.path})
    assert world.meta["simulated"]
    for other, over in ((world, "identities"), (replace(world, path=world.path.parent), "worlds")):
        table = reading.feature_table([Scenes(0, world), Scenes(1, other)])
        assert table["interval"].tolist() == [over]


@pytest.fixture(scope="module")
def found(scenes):
    store = scenes.run.store
    return retrieve(scenes.experiment(store.path), store, device="cpu")


def test_retrieved_pictures_are_marked_as_the_ranking_says(scenes, found):
    frame = reading.retrieved_pictures(scenes, found, rows=2, known=1, top=3)
    trained = np.isin(found.queries, scenes.store.identity_of(found.members[0].clips))
    best = np.flatnonzero((found.relevant >= 3) & trained)
    best = best[np.argsort(-found.ap[best], kind="stable")][0]
    marks = frame["mark"].iloc[:4].tolist()
    assert marks == ["", *("right" if hit else "wrong" for hit in found.hits[best][:3])]
    assert frame["picture"].iloc[0].shape == (32, 32, 3)
    names = scenes.store.clips["clip"].to_numpy()
    assert frame["clip"].iloc[1:4].tolist() == names[found.gallery[found.ranking[best][:3]]].tolist()


def test_wrong_clips_are_split_by_the_shows_of_their_identity(scenes, found):
    said = reading.wrong_from_known_shows(scenes, found, depth=4)
    clips = scenes.store.clips
    wrong, chance = [], []
    for place, query in enumerate(found.queries):
        known = set(clips["show"][[c for c in found.members[0].clips if clips["identity"][c] == query]])
        first = found.gallery[found.ranking[place][:4]]
        missed = [clips["show"][c] in known for c in first if clips["identity"][c] != query]
        if known and missed:
            wrong += missed
            others = [clips["show"][c] in known for c in found.gallery if clips["identity"][c] != query]
            chance.append(np.mean(others))
    assert said == pytest.approx({"found": np.mean(wrong), "chance": np.mean(chance), "clips": len(wrong)})


def test_nearest_shows_are_those_of_the_nearest_train_clip(scenes):
    table, store = reading.nearest_shows(scenes), scenes.run.store
    train, val = (store.select(split, having="scene") for split in ("train", "val"))
    feature = {split: store.batch(c, "scene").feature[:, 0] for split, c in (("train", train), ("val", val))}
    cosine = F.normalize(feature["val"]) @ F.normalize(feature["train"]).T
    nearest = train[cosine.argmax(1).numpy()]
    assert table["show"].tolist() == store.clips["show"][val].tolist()
    assert table["nearest set"].tolist() == store.clips["set"][nearest].tolist()
    shows = table.groupby("show")["channel"].nunique()
    assert len(table) == len(val) and (shows == 1).all()  # a show has one channel


def test_maps_are_of_clips_that_the_network_recognises(scenes):
    maps = reading.occlusion_maps(scenes, clips=1)
    assert len(maps.maps) == len(maps.pictures) == len(maps.regions) == 1
    assert maps.maps.shape[1:] == maps.regions.shape[1:] == (32, 32)
    store = scenes.store
    asked = np.intersect1d(store.select("val", labelled=True), scenes.images.present)
    (batch,) = scenes.pictures(asked, SMALL.size, SMALL.resize)
    with torch.inference_mode():
        right = scenes.run.model(batch.pixels).argmax(1).numpy() == store.identity_of(batch.clips)
    pictures = batch.pixels.permute(0, 2, 3, 1).numpy()[right]
    assert right.any() and (maps.pictures == pictures[:1]).all()


def test_settings_stand_beside_those_that_are_described(scenes):
    table = reading.settings_frame(scenes).set_index("setting")
    assert table.loc["epochs"].tolist() == ["20", "1"] and table.loc["lr"].tolist() == ["0.1", "0.02"]
    counted = table.loc[["clips with a picture", "clips without one, left out"], "on this page"]
    assert counted.tolist() == [str(len(scenes.store) - 1), "1"]


def test_without_pictures_the_page_has_the_store_alone(bare):
    (only,) = reading.open_scenes(str(bare.path), "tiny", [0], "", SMALL, 60, "cpu")
    assert only.run is None and reading.feature_table([only]).empty and reading.settings_frame(only).empty
    assert reading.sample_pictures(only).empty and reading.retrieved_pictures(only, None).empty
    said = {**reading.wrong_from_known_shows(only, None), **reading.confusion_causes(reading.nearest_shows(only))}
    assert said.pop("clips") == 0 and np.isnan(list(said.values())).all()
    assert reading.show_confusion(reading.nearest_shows(only)).empty
    maps = reading.occlusion_maps(only)
    assert len(maps.maps) == 0 and reading.region_effect(maps).empty


def test_images_without_their_store_are_refused():
    with pytest.raises(ValueError, match="images belong to the clips of a store"):
        reading.open_scenes("simulated", "tiny", [0], "img/", SMALL, 60, "cpu")


# -- drawings ------------------------------------------------------------------------------------------------


@pytest.fixture
def ax():
    plt.switch_backend("Agg")
    yield plt.figure().gca()
    plt.close("all")


def test_pictures_are_framed_by_their_mark(ax):
    picture = np.zeros((2, 2, 3), np.uint8)
    frame = pd.DataFrame(
        {"row": ["a", "a", "a", "b"], "picture": [picture] * 4, "mark": ["", "right", "wrong", "right"]}
    )
    figures.picture_rows(frame, ax)
    assert len(ax.images) == 4 and [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    frames = [(patch.get_xy(), to_rgb(patch.get_edgecolor())) for patch in ax.patches]
    assert [(int(x), int(y)) for (x, y), _ in frames] == [(1, 0), (2, 0), (0, 1)]
    assert frames[0][1] == frames[2][1] != frames[1][1]


def test_a_drawing_holds_its_pictures_in_their_own_size_and_says_which_they_are(ax):
    picture = np.random.default_rng(0).integers(100, 140, (64, 64, 3), np.uint8)
    picture[20:40] += 60
    frame = pd.DataFrame({"row": "a", "clip": list("abcdefgh"), "picture": [picture] * 8, "mark": "right"})
    figures.picture_rows(frame, ax)
    wide = BeautifulSoup(figures.drawing(ax.figure), "html.parser")
    narrow = BeautifulSoup(wide.find(class_="narrow").extract().text, "html.parser")
    for form in (wide, narrow):
        held = [image["xlink:href"].partition("base64,")[2] for image in form.find_all("image")]
        shown = [Image.open(io.BytesIO(base64.b64decode(text))) for text in held]
        assert [(each.format, each.size) for each in shown] == [("JPEG", (64, 64))] * 8
        assert np.abs(np.asarray(shown[0], float) - picture).mean() < 12  # coloured noise is what JPEG keeps least
    assert wide.find(class_="data").text.splitlines()[:3] == ["row,clip,mark", "a,a,right", "a,b,right"]
    assert 250 < float(narrow.svg["width"].rstrip("pt")) <= 72 * 4.2 < 600 < float(wide.svg["width"].rstrip("pt"))


def test_without_pictures_the_drawings_say_so(ax):
    none = pd.DataFrame()
    drawn = [
        figures.picture_rows(none, ax),
        figures.show_confusion(none, ax),
        figures.occlusion_maps(np.empty(0), np.empty(0), ax),
    ]
    assert all("no pictures" in [text.get_text() for text in each.texts] for each in drawn)


def test_occlusion_maps_share_one_scale_about_zero(ax):
    maps = np.array([np.full((4, 4), 0.1), np.full((4, 4), -0.3)])
    figures.occlusion_maps(np.full((2, 4, 4, 3), 128, np.uint8), maps, ax)
    assert ax.figure.axes[1].get_xlim() == (-0.3, 0.3)
    for_, against = (image.get_array()[0, 0].astype(int) for image in ax.images[2:])
    assert (
        for_[0] > for_[2] and against[0] < against[2] and for_.sum() > against.sum()
    )  # red for, a darker blue against
