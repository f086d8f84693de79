import os
import re
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from scipy import ndimage
from typer.testing import CliRunner

from mmlib.cli import app
from mmlib.data import detector, faces, foreign
from mmlib.data.detector import ANCHORS, TEMPLATE, RetinaFace, align, detect, load_detector
from mmlib.data.embedder import Embedder, Quality
from mmlib.data.faces import FaceSettings, import_faces, list_faces, read_video
from mmlib.data.images import index_images
from mmlib.data.store import ClipStore

av = pytest.importorskip("av", reason="PyAV is not installed (extra faces)")
cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed (extra faces)")

SMALL = {"architecture": "test_resnet", "width": 8, "size": 32}  # a network for tests


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    state = timm.create_model(SMALL["architecture"], num_classes=SMALL["width"]).state_dict()
    save_file(state, folder / "embedder.safetensors")
    torch.save(state, folder / "embedder.pth")
    torch.save(RetinaFace().state_dict(), folder / "detector.pth")
    return folder


def find_red(network, pictures, long):
    """In the place of a detector: a face is a red rectangle."""
    found = []
    for picture in pictures:
        red = (picture[..., 0] > 180) & (picture[..., 1:].max(-1) < 90)
        places = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(ndimage.label(red)[0])]
        places = [place for place in places if place[2] - place[0] > 3]
        rows = np.zeros((len(places), 15), np.float32)
        for row, (x, y, right, bottom) in zip(rows, places):
            row[:5] = x, y, right, bottom, 0.9
            row[5:] = (np.array(TEMPLATE) / 112 * [right - x, bottom - y] + [x, y]).ravel()
        found.append(rows)
    return found


@pytest.fixture
def red(monkeypatch):
    monkeypatch.setattr(faces, "detect", find_red)


def draw(*boxes, size=(160, 120), mode="RGB"):
    """Draw a picture with red faces at (x, y, side)."""
    picture = Image.new("RGB", size, (90, 120, 90))
    for x, y, side in boxes:
        ImageDraw.Draw(picture).rectangle((x, y, x + side - 1, y + side - 1), (255, 0, 0))
    return picture.convert(mode)


def save_video(path, pictures, rate=24, sound=False):
    with av.open(str(path), "w") as container:
        if sound:
            stream = container.add_stream("mp2", rate=48000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 1152), np.int16), format="s16", layout="stereo")
            frame.sample_rate = 48000
        else:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "yuv420p"
            stream.bit_rate = 4_000_000
        for picture in pictures:
            container.mux(stream.encode(frame if sound else av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


@pytest.fixture
def people(tmp_path):
    """Ann: a video, a photograph and a clip of two; Bob: three photographs; Eve: one."""
    folder = tmp_path / "people"
    for name in (
        "ann/photo.jpg",
        "ann/two/2.jpg",
        "ann/two/10.jpg",
        "bob/a.jpg",
        "bob/b.png",
        "bob/c.jpg",
        "eve/x.jpg",
    ):
        save(folder / name, draw((20, 10, 40)))
    save_video(folder / "ann/film.mp4", [draw((20 + at, 10, 40)) for at in range(24)])
    return folder


def run(folder, networks, **options):
    names = [name for name in FaceSettings.__dataclass_fields__ if name in options]
    settings = {"detector": networks / "detector.pth"} | SMALL | {name: options.pop(name) for name in names}
    settings = FaceSettings(**{"weights": networks / "embedder.safetensors"} | settings)
    report = import_faces(folder, folder.parent / "store", settings, **options)
    return ClipStore.open(folder.parent / "store"), report


def frames_of(store, clip, column=None):
    at, face = store.clips["clip"].tolist().index(clip), store.modalities["face"]
    rows = slice(face.start[at], face.start[at] + face.count[at])
    return face.feature[rows] if column is None else face.columns[column][rows]


def assert_refused(folder, networks, message, **options):
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        run(folder, networks, **options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.parent.iterdir()) == before


def test_videos_photographs_and_folders_become_clips(people, weights, red):
    store, report = run(people, weights)
    assert sorted(store.clips["clip"]) == ["ann-film", "ann-photo", "ann-two", "bob-a", "bob-b", "bob-c", "eve-x"]
    assert store.identities.tolist() == ["ann", "bob"] and report.untrained == []
    split = store.clips.set_index("clip")
    assert split.loc["eve-x"].tolist() == ["val", -1]
    for name in ("ann", "bob"):
        assert sorted(split[split.index.str.startswith(name)]["split"]) == ["train", "train", "val"]
    assert [len(frames_of(store, clip)) for clip in ("ann-film", "ann-photo", "ann-two")] == [8, 1, 2]
    assert frames_of(store, "ann-two", "frame").tolist() == [0, 1]
    assert store.modalities["face"].feature.shape == (15, 8)
    np.testing.assert_allclose(frames_of(store, "bob-b", "box"), [[20, 10, 60, 50]])
    np.testing.assert_allclose(frames_of(store, "bob-b", "det"), 0.9, rtol=1e-6)
    assert "column quality" in report.absent
    assert any("rounded up, to train" in line and "by seed 0" in line for line in report.lines())
    assert not any("nothing to score" in line for line in report.lines())


def test_the_seed_decides_which_clips_train(people, weights, red):
    splits = [tuple(list_faces(people, seed)[0].query("identity == 'bob'")["split"]) for seed in range(20)]
    assert len(set(splits)) == 3


def test_the_store_says_what_made_it(people, weights, red):
    said = run(people, weights)[0].meta["provenance"]
    assert said["weights"]["name"] == "embedder.safetensors" and len(said["detector"]["sha256"]) == 64
    assert (said["rate"], said["size"], said["quality"]) == (8.0, 32, None)
    assert "by seed 0" in said["split"]


def test_threads_do_not_change_a_store(people, weights, red):
    made = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            made.append(run(people, weights, overwrite=True)[0].fingerprint)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert made[0] == made[1]


def test_a_face_is_cut_and_embedded_as_one_by_one(people, weights, red):
    store, _ = run(people, weights)
    film = frames_of(store, "ann-film")
    embed = Embedder(weights / "embedder.safetensors", "test_resnet", 8, 32, 0.5, 0.5)
    for row, picture in zip(film, read_video(people / "ann/film.mp4", 8)):
        crop = align(picture, find_red(None, [picture], 0)[0][:, 5:].reshape(-1, 5, 2), 32)
        np.testing.assert_allclose(row, embed(crop)[0], atol=2e-3)


@pytest.mark.parametrize(
    "orientation, back", [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)]
)
def test_a_photograph_is_turned_as_its_orientation_says(tmp_path, weights, red, orientation, back):
    upright = draw((20, 10, 40))
    stored = upright.transpose(back) if back is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for clip in "ab":
        save(tmp_path / f"people/ann/{clip}.jpg", stored, exif=exif, quality=95)
    store, _ = run(tmp_path / "people", weights)
    np.testing.assert_allclose(frames_of(store, "ann-a", "box"), [[20, 10, 60, 50]], atol=1)


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "RGB"])
def test_pictures_of_any_mode_are_read_whatever_their_name_says(tmp_path, weights, monkeypatch, mode):
    seen = []

    def look(network, pictures, long):
        seen.extend(pictures)
        return find_red(network, [np.asarray(draw((20, 10, 40)))] * len(pictures), long)

    monkeypatch.setattr(faces, "detect", look)
    for clip in "ab":
        save(tmp_path / f"people/ann/{clip}.jpg", draw((20, 10, 40), mode=mode), format="PNG")
    run(tmp_path / "people", weights)
    expected = np.asarray(draw((20, 10, 40), mode=mode).convert("RGB"))
    for picture in seen:
        np.testing.assert_array_equal(picture, expected)


def test_of_several_faces_the_largest_is_taken(tmp_path, weights, red):
    for clip in "ab":
        save(tmp_path / f"people/ann/{clip}.png", draw((5, 5, 20), (60, 40, 50), (120, 5, 30)))
    store, report = run(tmp_path / "people", weights)
    np.testing.assert_allclose(frames_of(store, "ann-a", "box"), [[60, 40, 110, 90]])
    assert any("2, 0 without a face, 2 with several" in line for line in report.lines())


def test_a_larger_face_that_is_less_sure_is_left(tmp_path, weights, monkeypatch):
    def unsure(network, pictures, long):
        found = find_red(network, pictures, long)
        for rows in found:
            rows[np.prod(rows[:, 2:4] - rows[:, :2], 1).argmax(), 4] = 0.85
        return found

    monkeypatch.setattr(faces, "detect", unsure)
    for clip in "ab":
        save(tmp_path / f"people/ann/{clip}.png", draw((5, 5, 20), (60, 40, 50), (120, 5, 30)))
    store, _ = run(tmp_path / "people", weights)
    np.testing.assert_allclose(frames_of(store, "ann-a", "box"), [[120, 5, 150, 35]])


def test_in_a_video_a_face_is_followed(tmp_path, weights, red):
    folder = tmp_path / "people/ann"
    folder.mkdir(parents=True)
    nothing = draw()
    film = [draw((10, 10, 40)), nothing, *(draw((12 + at, 12, 30), (100, 40, 50)) for at in range(4))]
    for clip in "ab":
        save_video(folder / f"{clip}.mp4", film, rate=8)
    store, report = run(tmp_path / "people", weights)
    left = frames_of(store, "ann-a", "box")[:, 0]
    np.testing.assert_allclose(left, [10, 12, 13, 14, 15], atol=2)
    assert frames_of(store, "ann-a", "frame").tolist() == [0, 2, 3, 4, 5]
    assert any("12, 2 without a face, 8 with several" in line for line in report.lines())


def test_a_clip_without_a_face_stands_in_the_store_without_frames(people, weights, red):
    for at in range(3):
        save(people / f"ann/none/{at}.jpg", draw())
    store, report = run(people, weights)
    assert len(frames_of(store, "ann-none")) == 0 and len(store) == 8
    assert "without a face" in "".join(report.lines()) and any("3 without a face" in line for line in report.notes)


def test_what_is_left_out_is_named(people, weights, red):
    for at in range(12):
        save(people / f"ann/none/{at}.jpg", draw())
    save_video(people / "bob/film.mp4", [draw()] * 3 + [draw((20, 10, 40))] * 3, rate=8)
    (people / "bob/notes.txt").write_text("x")
    spoil(people, "text.png")
    _, report = run(people, weights, skip_bad_files=True)
    left = pd.read_csv(people.parent / "store/left-out.csv", keep_default_na=False)
    named = [(str(people / f"ann/none/{at}.jpg"), "", "no face") for at in range(12)]
    named += [(str(people / "bob/film.mp4"), str(at), "no face") for at in range(3)]
    named.append((str(people / "bob/notes.txt"), "", "neither a picture nor a video by its name"))
    assert {*named} < {*map(tuple, left.to_numpy())} and len(left) == len(named) + 1
    assert [row.path for row in left.itertuples() if "not a picture" in row.why] == [str(people / "ann/text.png")]
    said = [line for line in report.lines() if line.startswith("no face: ")]
    assert said == [f"no face: {path}" for path, *_ in named[:10]]
    assert (
        f"left out: 17 pictures, files or folders, each named in {people.parent / 'store/left-out.csv'}"
        in report.lines()
    )


def test_a_video_is_named_once_with_its_frames_without_a_face(people, weights, red):
    save_video(people / "bob/film.mp4", [draw()] * 3 + [draw((20, 10, 40))] * 3, rate=8)
    _, report = run(people, weights)
    assert f"no face: {people / 'bob/film.mp4'}, 3 frames" in report.lines()


def test_empty_folders_are_named_and_counted(people, weights, red):
    for name in ("zoe", "ann/none", "hid"):
        (people / name).mkdir()
    (people / "hid/.hidden").touch()
    _, report = run(people, weights)
    empty = [str(people / name) for name in ("ann/none", "hid", "zoe")]
    left = pd.read_csv(people.parent / "store/left-out.csv", keep_default_na=False)
    assert [*map(tuple, left.to_numpy())] == [(path, "", "an empty folder") for path in empty]
    assert f"refused: 3 records, an empty folder; first: {empty[0]}" in report.lines()


def test_blanks_that_become_underscores_are_said_once(people, weights, red):
    (people / "ann").rename(people / "ann ash")
    (people / "bob/a.jpg").rename(people / "bob/a b.jpg")
    store, report = run(people, weights)
    assert store.identities.tolist() == ["ann_ash", "bob"] and "bob-a_b" in [*store.clips["clip"]]
    said = "mended: 2 names with blanks, which became underscores; first: ann ash is ann_ash"
    assert [line for line in report.lines() if "blanks" in line] == [said]


def test_nothing_left_out_leaves_no_list(people, weights, red):
    _, report = run(people, weights)
    assert not (people.parent / "store/left-out.csv").exists()
    assert not any(
        line.startswith(("left out", "no face", "passed over", "mended", "refused")) for line in report.lines()
    )


def test_no_face_anywhere_is_refused(tmp_path, weights, red):
    save(tmp_path / "people/ann/a.jpg", draw())
    assert_refused(tmp_path / "people", weights, "people: no face in any of 1 pictures")


def spoil(people, kind):
    (people / "ann").mkdir(parents=True, exist_ok=True)
    if kind == "cut.jpg":
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 255, (99, 99, 3), np.uint8)).save(people / "ann/cut.jpg")
        (people / "ann/cut.jpg").write_bytes((people / "ann/cut.jpg").read_bytes()[:3000])
    elif kind == "sound.mp4":
        save_video(people / "ann/sound.mp4", range(9), sound=True)
    else:
        (people / "ann" / kind).write_bytes(b"no picture" * 9)


@pytest.mark.parametrize(
    "kind, why",
    [("cut.jpg", "truncated"), ("text.png", "not a picture"), ("sound.mp4", "no video stream"), ("text.mov", "video")],
)
def test_a_file_that_cannot_be_read_is_named_or_left_out_and_counted(people, weights, red, kind, why):
    spoil(people, kind)
    assert_refused(people, weights, f"ann/{kind}: .*{why}")
    store, report = run(people, weights, skip_bad_files=True)
    assert len(store) == 7 and not store.clips["clip"].str.contains(kind.split(".")[0]).any()
    assert any(line.startswith("refused: 1 records") and kind in line for line in report.lines())


def test_what_is_no_picture_by_its_name_is_counted(people, weights, red):
    (people / "bob/notes.txt").write_text("x")
    _, report = run(people, weights)
    assert any("notes.txt" in line and "1 records" in line for line in report.lines())


def test_files_of_a_system_are_passed_over_and_counted(people, weights, red):
    before = run(people, weights)[0].fingerprint
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "ann/THUMBS.DB", "ann/two/.DS_Store", "ann/._photo.jpg"):
        (people / name).write_text("x")
    save(people / "__MACOSX/a.jpg", draw((20, 10, 40)))
    store, report = run(people, weights, overwrite=True)
    assert store.fingerprint == before
    (said,) = [line for line in report.lines() if line.startswith("passed over: 7 ")]
    assert str(people) in said and not any("refused" in line for line in report.lines())


def test_progress_is_told_in_lines_where_there_is_no_bar(people, weights, red, monkeypatch):
    monkeypatch.setattr(foreign, "OFTEN", 0)
    said = []
    run(people, weights, say=said.append)
    assert re.fullmatch(r"faces, files: 8 of 8, [\d.]+ a second, about 0 s left", said[-1])


def test_a_file_in_no_persons_folder_is_refused(people, weights, red):
    save(people / "lost.jpg", draw())
    assert_refused(people, weights, "lost.jpg: lies in no person's folder")


def test_names_lose_their_blanks_and_keep_their_letters(tmp_path, weights, red):
    for name in ("Anna  Ågren/my film", "王 菲/1"):
        for clip in "ab":
            save(tmp_path / f"people/{name}{clip}.jpg", draw((20, 10, 40)))
    store, _ = run(tmp_path / "people", weights)
    assert store.identities.tolist() == ["Anna_Ågren", "王_菲"]
    assert set(store.clips["clip"]) == {"Anna_Ågren-my_filma", "Anna_Ågren-my_filmb", "王_菲-1a", "王_菲-1b"}


@pytest.mark.parametrize(
    "names, message",
    [
        (["ann b/x.jpg", "ann_b/y.jpg"], "identity ann_b would be both ann b and ann_b"),
        (["ann/x y.jpg", "ann/x_y.png"], "clip ann-x_y would be both x y.jpg and x_y.png"),
        (["ann-b/c.jpg", "ann/b-c.jpg"], "clip ann-b-c would be both b-c.jpg and c.jpg"),
        (["ann/x.jpg", "ann/x.png"], "clip ann-x would be both x.jpg and x.png"),
        (["ann.mp4/x.jpg", "ann.mp4/y.jpg"], "identity 'ann.mp4'"),
        ([], "holds no picture"),
    ],
)
def test_names_that_cannot_be_are_refused(tmp_path, weights, red, names, message):
    (tmp_path / "people").mkdir()
    for name in names:
        save(tmp_path / "people" / name, draw((20, 10, 40)))
    assert_refused(tmp_path / "people", weights, message)


def test_a_missing_folder_is_named(tmp_path, weights):
    assert_refused(tmp_path / "nobody", weights, "nobody: no such folder")


def write_table(people, rows, columns=("path", "clip", "identity", "split")):
    pd.DataFrame(rows, columns=columns).to_csv(people.parent / "table.csv", index=False)
    return people.parent / "table.csv"


def test_a_table_says_what_is_whose(people, weights, red):
    rows = [("bob/b.png", "c2", "ann", "test"), ("ann/film.mp4", "c1", "", "train"), ("bob/a.jpg", "c2", "ann", "test")]
    store, _ = run(people, weights, table=write_table(people, rows))
    assert store.clips.to_dict("list") == {"clip": ["c1", "c2"], "split": ["train", "test"], "identity": [-1, 0]}
    assert len(frames_of(store, "c1")) == 8 and frames_of(store, "c2", "frame").tolist() == [0, 1]
    assert store.meta["provenance"]["split"]["name"] == "table.csv"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([("bob/b.png", "c", "ann", "dev")], "row 1: clip c: split is 'dev'"),
        ([("bob/z.png", "c", "ann", "val")], "z.png: .*missing"),
        ([("", "c", "ann", "val")], "row 1: clip c: path is"),
        ([("ann/film.mp4", "c", "a", "val"), ("bob/b.png", "c", "a", "val")], "film.mp4: clip c has another file"),
        ([("ann/gone.mp4", "c", "a", "val")], "gone.mp4"),
        ([("bob/b.png", "c", "a", "val"), ("bob/b.png", "d", "a", "train")], "b.png: stands in two rows, .* clip d"),
    ],
)
def test_a_bad_row_of_a_table_is_named(people, weights, red, rows, message):
    assert_refused(people, weights, message, table=write_table(people, rows))


def test_a_table_without_a_column_is_refused(people, weights, red):
    table = write_table(people, [("bob/b.png", "c", "val")], ["path", "clip", "split"])
    assert_refused(people, weights, "table.csv: no column identity", table=table)


def test_whole_pictures_are_kept_where_scene_reads_them(people, weights, red):
    scenes = people.parent / "scenes"
    store, report = run(people, weights, scenes=scenes)
    images = index_images(scenes, store)
    assert len(images.present) == 7 and images.unknown == 0
    count = dict(zip(images.clips, map(len, images.files)))
    assert (count["ann-film"], count["ann-two"], count["bob-a"]) == (1, 2, 1)
    with Image.open(scenes / "ann-two/1.jpg") as picture:
        assert picture.size == (160, 120)
    assert any("scene pictures: 8" in line for line in report.lines())


def test_a_clip_that_is_no_folder_is_refused_with_scenes(people, weights, red):
    table = write_table(people, [("bob/b.png", "a/b", "ann", "val")])
    assert_refused(people, weights, "clip a/b: is no name for a folder", table=table, scenes=people.parent / "scenes")


@pytest.mark.parametrize("rate, number", [(8, 16), (24, 48), (100, 48), (1, 2), (5, 10)])
def test_a_video_gives_so_many_frames_a_second(tmp_path, rate, number):
    save_video(tmp_path / "film.mp4", [Image.new("RGB", (64, 48), (5 * at,) * 3) for at in range(48)])
    grey = np.array([frame.mean() for frame in read_video(tmp_path / "film.mp4", rate)])
    times = np.arange(number) / min(rate, 24)
    np.testing.assert_allclose(grey, 5 * np.ceil(times * 24 - 1e-6), atol=4)


def test_frames_of_a_video_are_searched_at_half_the_size_where_faces_are_large(people, weights, monkeypatch):
    asked = []

    def look(network, pictures, long):
        asked.extend([long] * len(pictures))
        return find_red(network, pictures, long)

    monkeypatch.setattr(faces, "detect", look)
    run(people, weights, detect_size=600)  # 40 of 160 pixels are 75 of 300
    assert sorted(asked) == [300] * 8 + [600] * 7
    asked.clear()
    run(people, weights, detect_size=480, overwrite=True)
    assert sorted(asked) == [240] * 8 + [480] * 15
    save_video(people / "ann/film.mp4", [draw()] * 8, rate=8)
    asked.clear()
    run(people, weights, detect_size=600, overwrite=True)
    assert sorted(asked) == [300] * 8 + [600] * 15


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_video_is_turned_as_it_says(tmp_path, turn):
    upright = draw((20, 10, 40))
    stored = upright.rotate(turn, expand=True)  # as a camera stores it that is held so
    save_video(tmp_path / "plain.mp4", [stored] * 9, rate=8)
    with av.open(str(tmp_path / "plain.mp4")) as source, av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                film.mux(packet)
    turn_matrix(tmp_path / "film.mp4", turn)
    frames = [*read_video(tmp_path / "film.mp4", 8)]
    assert len(frames) == 9
    for frame in frames:
        assert frame.shape == (120, 160, 3)
        assert np.abs(frame.astype(int) - np.asarray(upright)).mean() < 12


def turn_matrix(path, turn):
    """Write into the header of a video's track that it is shown turned clockwise by so many degrees."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix of nine numbers stands after 40 bytes
    angle = np.radians(turn)
    a, b = round(np.cos(angle)) * 65536, round(np.sin(angle)) * 65536
    content[at : at + 36] = struct.pack(">9i", a, b, 0, -b, a, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(content))


def test_a_video_that_breaks_off_gives_what_is_good_and_says_so(tmp_path, people, weights, red, monkeypatch):
    def breaks(path, rate):
        yield np.asarray(draw((20, 10, 40)))
        yield ValueError(f"{path}: video, after 1 frames: broken")

    monkeypatch.setattr(faces, "read_video", breaks)
    assert_refused(people, weights, "film.mp4: video, after 1 frames")
    store, report = run(people, weights, skip_bad_files=True)
    assert len(frames_of(store, "ann-film")) == 1 and any("after 1 frames" in line for line in report.lines())


@pytest.fixture
def crops(tmp_path):
    """Ann and Bob, two crops of 48 pixels each."""
    for name in ("ann/a", "ann/b", "bob/a", "bob/b"):
        save(tmp_path / f"people/{name}.png", draw((20, 10, 20), size=(48, 48)))
    return tmp_path / "people"


def test_crops_that_are_aligned_are_taken_as_they_are(crops, weights):
    store, report = run(crops, weights, detector=None)
    assert [*store.modalities["face"].columns] == ["frame"]
    assert report.absent == ["column det", "column quality"]
    embed = Embedder(weights / "embedder.safetensors", "test_resnet", 8, 32, 0.5, 0.5)
    with Image.open(crops / "bob/b.png") as picture:
        crop = np.array(picture.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(frames_of(store, "bob-b"), embed(crop[None]), atol=2e-3)


def test_of_crops_nothing_is_said_that_a_detector_would_say(crops, weights, monkeypatch):
    _, report = run(crops, weights, detector=None)
    assert "pictures: 4" in report.lines() and not any("several" in line for line in report.lines())
    monkeypatch.setattr(faces, "detect", find_red)
    _, report = run(crops, weights, overwrite=True)
    assert sum("several" in line for line in report.lines()) == 2


def test_a_crop_that_is_not_square_is_refused_or_left_out(crops, weights):
    save(crops / "bob/c.png", draw(size=(48, 36)))
    assert_refused(crops, weights, "c.png: clip bob-c is 48 x 36 pixels; an aligned crop is square", detector=None)
    store, report = run(crops, weights, detector=None, skip_bad_files=True)
    assert len(store) == 4 and any("48 x 36" in line and "1 records" in line for line in report.lines())


def test_features_are_held_a_few_batches_at_once_and_written_in_order(people, weights, red, monkeypatch):
    expected = run(people, weights)[0]
    seen = []
    spill = faces.Taken._spill

    def look(self, most):
        spill(self, most)
        seen.append(len(self._jobs))

    for name, value in {"BATCH": 2, "WAITING": 1, "BLOCK": 3 * 8}.items():
        monkeypatch.setattr(faces, name, value)
    monkeypatch.setattr(faces.Taken, "_spill", look)
    store, _ = run(people, weights, overwrite=True)
    assert len(seen) > 7 and max(seen) == 1
    np.testing.assert_allclose(store.modalities["face"].feature, expected.modalities["face"].feature, atol=2e-3)
    np.testing.assert_array_equal(store.modalities["face"].columns["box"], expected.modalities["face"].columns["box"])


def test_an_interrupt_leaves_nothing(people, weights, red, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(faces.Taken, "embedded", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(people, weights, scenes=people.parent / "scenes")
    assert [path.name for path in people.parent.iterdir()] == ["people"]


def test_weights_of_every_kind_embed_alike(weights):
    crops = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    how = ("test_resnet", 8, 32, 0.5, 0.5)
    kinds = [Embedder(weights / f"embedder.{kind}", *how)(crops) for kind in ("safetensors", "pth")]
    np.testing.assert_array_equal(*kinds)
    network = timm.create_model("test_resnet", num_classes=8)
    network.load_state_dict(torch.load(weights / "embedder.pth"))
    with torch.no_grad():
        pixels = torch.from_numpy(crops).permute(0, 3, 1, 2) / 255
        expected = network.eval()((pixels - 0.5) / 0.5)
    np.testing.assert_allclose(kinds[0], expected, atol=1e-4)


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def message(*fields):
    """Encode (number, value) as protocol buffers do: an int, or text, or bytes."""
    coded = b""
    for number, value in fields:
        if isinstance(value, int):
            coded += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            coded += varint(number << 3 | 2) + varint(len(value)) + value
    return coded


def write_onnx(path, matrix):
    """Write a network that flattens what it is given and multiplies it with `matrix`."""

    def described(name, *shape):
        dims = message(*((1, message((1, number))) for number in shape))
        return message((1, name), (2, message((1, message((1, 1), (2, dims))))))

    axis = message((1, "axis"), (3, 1), (20, 2))
    flat = message((1, "x"), (2, "flat"), (4, "Flatten"), (5, axis))
    product = message((1, "flat"), (1, "w"), (2, "y"), (4, "MatMul"))
    raw = matrix.astype("<f4").tobytes()
    w = message((1, matrix.shape[0]), (1, matrix.shape[1]), (2, 1), (8, "w"), (9, raw))
    shapes = ((11, described("x", 1, 3, 4, 4)), (12, described("y", 1, matrix.shape[1])))
    graph = message((1, flat), (1, product), (2, "g"), (5, w), *shapes)
    path.write_bytes(message((1, 8), (7, graph), (8, message((1, ""), (2, 13)))))


def test_an_onnx_file_embeds(tmp_path):
    matrix = np.random.default_rng(0).normal(size=(48, 5))
    write_onnx(tmp_path / "net.onnx", matrix)
    embed = Embedder(tmp_path / "net.onnx", "", 5, 4, 0.5, 0.25)
    crops = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3), np.uint8)
    expected = ((crops / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2).reshape(3, -1) @ matrix
    for n in (3, 1, 2):
        np.testing.assert_allclose(embed(crops[:n]), expected[:n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": "none.safetensors"}, "none.safetensors: no such file"),
        ({"detector": "none.pth"}, "none.pth: no such file"),
        ({"quality": "none.pb"}, "none.pb: no such file"),
        ({"weights": "module.pth"}, "module.pth: not a readable file of weights .*[Ww]eights.only"),
        ({"weights": "detector.pth"}, "detector.pth: of another architecture"),
        ({"detector": "embedder.pth"}, "embedder.pth: of another architecture"),
        ({"weights": "text.safetensors"}, "text.safetensors: not a readable"),
        ({"weights": "text.onnx"}, "text.onnx: not a network that OpenCV reads"),
        ({"quality": "text.pb"}, "text.pb: not a network that OpenCV reads"),
        ({"quality": "text.onnx"}, "text.onnx: not a .pb file"),
        ({"width": 9}, "embedder.safetensors: of another architecture"),
        ({"architecture": "resnet_of_nobody"}, "architecture 'resnet_of_nobody'"),
        ({"rate": 0.0}, "rate must be above 0, got 0.0"),
        ({"rate": float("nan")}, "rate must be above 0, got nan"),
    ],
)
def test_networks_that_cannot_be_used_are_refused(people, weights, red, change, message):
    folder = people.parent / "networks"
    folder.mkdir()
    for path in weights.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    torch.save(timm.create_model("test_resnet", num_classes=8), folder / "module.pth")
    for name in ("text.safetensors", "text.onnx", "text.pb"):
        (folder / name).write_text("no network\n" * 9)
    change = {name: folder / of if isinstance(of, str) and "." in of else of for name, of in change.items()}
    assert_refused(people, folder, message, **change)


@pytest.mark.parametrize("module", ["av", "cv2"])
def test_a_package_that_is_not_installed_is_named(people, weights, monkeypatch, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    assert_refused(
        people,
        weights,
        rf"{detector.PACKAGES[module]} is not installed: pip install".replace("(", r"\(").replace(")", r"\)"),
    )


def test_the_command_says_what_it_did_and_refuses_in_one_line(people, weights, red):
    embedder = ["--weights", weights / "embedder.safetensors", "--architecture", "test_resnet", "--width", 8]
    command = [*map(str, ["import-faces", people, people.parent / "store", *embedder, "--size", 32])]
    done = CliRunner().invoke(app, [*command, "--detector", str(weights / "detector.pth")])
    assert done.exit_code == 0 and "face: 15 frames of 8 dimensions" in done.output
    spoil(people, "cut.jpg")
    refused = CliRunner().invoke(app, [*command, "--detector", str(weights / "detector.pth"), "--overwrite"])
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1 and "cut.jpg" in refused.stderr
    both = CliRunner().invoke(app, [*command, "--aligned", "--detector", str(weights / "detector.pth")])
    assert both.exit_code == 1 and "--aligned" in both.stderr


# The detector


class Planted(torch.nn.Module):
    """Answers with scores, boxes and points (A, ...) for every picture."""

    def __init__(self, height, width, **found):
        super().__init__()
        number = sum(2 * -(-height // stride) * -(-width // stride) for stride in ANCHORS)
        self.score, self.box, self.points = torch.zeros(number), torch.zeros(number, 4), torch.zeros(number, 10)
        for anchor, score in found.items():
            self.score[int(anchor[1:])] = score

    def forward(self, pixels):
        return tuple(part.expand(len(pixels), *part.shape) for part in (self.score, self.box, self.points))


def test_an_anchor_is_decoded_into_pixels_of_the_picture():
    network = Planted(64, 128, a5=0.9)  # third place of the first row, the larger side: (20, 4), 32
    network.box[5] = torch.tensor([1.0, -2.0, 5 * np.log(2), 0.0])
    network.points[5] = torch.tensor([0, 0, 10, 0, 0, 10, -10, 0, 0, -10])
    picture = np.zeros((100, 256, 3), np.uint8)  # at 128 pixels 128 x 50, 7 below the upper edge
    (row,) = detect(network, [picture], 128)[0]
    x, y = 20 + 3.2, 4 - 6.4
    box = np.array([x - 32, y - 16, x + 32, y + 16]).reshape(2, 2)
    points = np.array([(20, 4), (52, 4), (20, 36), (-12, 4), (20, -28)])
    np.testing.assert_allclose(row[:4], ((box - [0, 7]) * 2).ravel(), rtol=1e-5)
    np.testing.assert_allclose(row[4], 0.9, rtol=1e-6)
    np.testing.assert_allclose(row[5:], ((points - [0, 7]) * 2).ravel(), rtol=1e-5)


def test_the_best_of_faces_that_overlap_is_kept_and_the_faint_are_left_out():
    network = Planted(64, 64, a1=0.8, a3=0.9, a15=0.7, a9=0.4)  # the first two overlap by 24 of 40
    rows = detect(network, [np.zeros((64, 64, 3), np.uint8)], 64)[0]
    np.testing.assert_allclose(rows[:, 4], [0.9, 0.7], rtol=1e-6)


def test_anchors_stand_on_the_strides():
    anchors = detector._anchors(64, 96).numpy()
    assert len(anchors) == 2 * (8 * 12 + 4 * 6 + 2 * 3)
    assert anchors[:3].tolist() == [[4, 4, 16], [4, 4, 32], [12, 4, 16]]
    assert anchors[-1].tolist() == [80, 48, 512]


def test_a_store_of_nobody_to_search_for_says_so(people, weights, red):
    for name in ("ann", "bob"):
        shutil.rmtree(people / name)
    assert any("there is nothing to score" in line for line in run(people, weights)[1].lines())


def test_pictures_of_any_size_are_found_in_as_alone(weights):
    rng = np.random.default_rng(0)
    network = load_detector(weights / "detector.pth")
    pictures = [rng.integers(0, 256, shape, np.uint8) for shape in [(40, 60, 3), (60, 40, 3), (80, 120, 3), (1, 50, 3)]]
    together = detect(network, pictures, 64, least=0.3)
    for picture, rows in zip(pictures, together):
        alone = detect(network, [picture], 64, least=0.3)[0]
        assert len(rows) == len(alone) > 0
        np.testing.assert_allclose(rows, alone, rtol=1e-3, atol=1e-3)


def test_batch_norms_are_made_part_of_convolutions(weights):
    plain = RetinaFace()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    torch.save(plain.eval().state_dict(), weights / "other.pth")
    fused = load_detector(weights / "other.pth")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for one, other in zip(plain(pixels), fused(pixels)):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.fixture
def ultra(tmp_path, monkeypatch):
    """UltraFace whose network answers with what is given, and keeps what it is asked."""

    class Answers:
        net = SimpleNamespace(getUnconnectedOutLayersNames=lambda: ["scores", "boxes"])

        def __init__(self, path, read):
            assert read == "readNetFromONNX"

        def __call__(self, blob, *outputs):
            assert outputs == ("scores", "boxes") and blob.shape[1:] == (3, 240, 320)
            self.blob = blob
            return tuple(np.repeat(of, len(blob), 0) for of in self.answer)

    monkeypatch.setattr(detector, "Graph", Answers)
    return load_detector(tmp_path / "ultra.onnx")


def test_boxes_of_ultraface_are_of_the_picture_with_points_in_them(ultra):
    scores = np.array([[[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]]], np.float32)
    boxes = [[0.25, 0.5, 0.5, 0.75], [0.26, 0.5, 0.5, 0.75], [0.75, 0, 1, 0.25], [0, 0, 1, 1]]
    ultra.graph.answer = scores, np.array([boxes], np.float32)
    pictures = [np.full((300, 400, 3), 255, np.uint8), np.full((300, 200, 3), 255, np.uint8)]
    for rows in detect(ultra, pictures, 640):  # grey beside the second makes it as wide as the first
        np.testing.assert_allclose(rows[:, :5], [[100, 150, 200, 225, 0.9], [300, 0, 400, 75, 0.7]], rtol=1e-5)
        points = rows[0, 5:].reshape(5, 2)
        np.testing.assert_allclose(points, np.array(detector.BOXED) * [100, 75] + [100, 150], rtol=1e-5)
    assert detect(ultra, [], 640) == []  # OpenCV makes no batch of none
    assert (ultra.graph.blob[0] == 1).all()
    assert (ultra.graph.blob[1, :, :, :160] == 1).all() and (ultra.graph.blob[1, :, :, 161:] == 0).all()


def test_a_network_that_is_no_ultraface_is_refused(tmp_path):
    write_onnx(tmp_path / "net.onnx", np.ones((48, 5)))
    with pytest.raises(ValueError, match=r"net.onnx: of another architecture.* no scores and boxes"):
        load_detector(tmp_path / "net.onnx")


@pytest.mark.parametrize("turn, scale", [(0, 1), (0.5, 2), (-2.5, 0.7), (np.pi, 3)])
def test_a_face_is_brought_to_the_template(turn, scale):
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = np.array(TEMPLATE) @ matrix.T
    points += 30 - points.min(0)
    picture = np.zeros((400, 400, 3), np.uint8)
    for at, (x, y) in enumerate(points):
        cv2.circle(picture, (round(x), round(y)), round(3 * scale), (50 * (at + 1),) * 3, -1)
    for size in (112, 56):
        (crop,) = align(picture, points[None], size)
        for at, (x, y) in enumerate(np.array(TEMPLATE) * size / 112):
            assert abs(int(crop[round(y), round(x), 0]) - 50 * (at + 1)) <= 2


def test_points_that_fall_together_make_a_crop():
    assert align(np.zeros((50, 50, 3), np.uint8), np.full((1, 5, 2), 20.0), 112).shape == (1, 112, 112, 3)


# Real faces


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    if "MMLIB_REAL_DATA" not in os.environ:
        pytest.skip("MMLIB_REAL_DATA names no folder with frames of real faces")
    folder = Path(os.environ["MMLIB_REAL_DATA"])
    if not (folder / "ytf-frames.tar").exists():
        pytest.skip("MMLIB_REAL_DATA has no ytf-frames.tar")
    import tarfile

    table = pd.read_parquet(folder / "ytf/frames.parquet")
    rows = np.flatnonzero(table["align"] == "detector")[::40]
    paths = dict(zip(table["path"].iloc[rows], rows))
    pictures = {}
    with tarfile.open(folder / "ytf-frames.tar") as tar:
        for member in tar:
            if member.name.removeprefix("./") in paths:
                with Image.open(tar.extractfile(member)) as picture:
                    pictures[paths[member.name.removeprefix("./")]] = np.asarray(picture.convert("RGB"))
    return folder, table, pictures


def test_detector_finds_what_the_table_has(real):
    folder, table, pictures = real
    network = load_detector(folder / "retinaface-mobilenet0.25.pth")
    points = np.load(folder / "ytf/landmarks5.npy")
    error, difference = [], []
    for row, picture in pictures.items():
        found = detect(network, [picture], 320)[0]
        distance = np.abs(found[:, 5:].reshape(-1, 5, 2) - points[row]).mean((1, 2)) / table["eye_px"][row]
        error.append(distance.min())
        difference.append(abs(found[distance.argmin(), 4] - table["det"][row]))
    # the table is of PNG, the pictures here of JPEG; on a grid that is not centred the error is 0.02
    assert np.median(error) < 0.005 and max(error) < 0.03
    assert np.median(difference) < 5e-5 and max(difference) < 2e-3


def test_crops_of_the_tables_points_embed_and_score_as_the_table_has(real):
    folder, table, pictures = real
    points, expected = (np.load(folder / f"ytf/{name}.npy") for name in ("landmarks5", "edgeface"))
    rows = [*pictures]
    crops = np.concatenate([align(pictures[row], points[row][None], 112) for row in rows])
    embed = Embedder(folder / "edgeface-xs.safetensors", "edgenext_x_small", 512, 112, 0.5, 0.5)
    ours, theirs = embed(crops), expected[rows].astype(np.float32)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    # README of the data: JPEG against PNG, mean .995, 1st percentile .972
    assert cosine.mean() > 0.99 and cosine.min() > 0.95
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1), rtol=0.1)
    score = Quality(folder / "lightqnet-dm100.pb")(crops)
    assert np.median(np.abs(score - table["quality"].iloc[rows])) < 0.003
    assert np.corrcoef(score, table["quality"].iloc[rows])[0, 1] > 0.98


def test_real_frames_become_the_store_of_the_table(real, tmp_path):
    folder, table, pictures = real
    for row, picture in pictures.items():
        save(
            tmp_path / "people" / table["identity"][row].replace("_", " ") / f"{row}.jpg",
            Image.fromarray(picture),
            quality=95,
        )
    names = {
        "weights": "edgeface-xs.safetensors",
        "detector": "retinaface-mobilenet0.25.pth",
        "quality": "lightqnet-dm100.pb",
    }
    settings = FaceSettings(**{name: folder / of for name, of in names.items()}, detect_size=320)
    import_faces(tmp_path / "people", tmp_path / "store", settings)
    store = ClipStore.open(tmp_path / "store")
    assert len(store) == len(pictures) == len(store.modalities["face"].feature)
    done = store.meta["provenance"]["quality"]
    assert (done["name"], done["scale"], done["mapped"]) == ("lightqnet-dm100.pb", "challenge", "by rank")
    rows = store.clips["clip"].str.split("-").str[-1].astype(int)
    face = store.modalities["face"]
    close = np.abs(face.columns["det"][face.start] - table["det"].iloc[rows].to_numpy()) < 0.01
    assert close.mean() > 0.8
    score = pd.Series(face.columns["quality"][face.start])
    assert score.max() > 60 and score.corr(table["quality"].iloc[rows].reset_index(drop=True), "spearman") > 0.8
