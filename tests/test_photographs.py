import hashlib
import os
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from typer.testing import CliRunner

from benchmarks.degrade import STRENGTHS, choose_frames, degrade
from mmlib.cli import app
from mmlib.data import foreign, photographs
from mmlib.data.detector import TEMPLATE, RetinaFace, load_detector, load_weights
from mmlib.data.embedder import Embedder, MobileFaceNet
from mmlib.data.photographs import check_labels, make_tables
from mmlib.data.public import import_public

cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed (extra faces)")

PEOPLE = {"Ann_Lee": 3, "Bob_Ó": 2, "Eve": 2}
POINTS = np.array(TEMPLATE) / 112


def find_red(network, pictures, long, least=0.5):
    """In the place of a detector: faces are red rectangles, the first the best."""
    found = []
    for picture in pictures:
        red = (picture[..., 0] > 180) & (picture[..., 1:].max(-1) < 90)
        places = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(ndimage.label(red)[0])]
        rows = np.zeros((len(places), 15), np.float32)
        for row, (x, y, right, bottom) in zip(rows, places):
            row[:5] = x, y, right, bottom, 0.9
            row[5:] = (POINTS * [right - x, bottom - y] + [x, y]).ravel()
        found.append(rows)
    return found


class Brightness:
    """In the place of the quality network."""

    def __init__(self, path):
        pass

    def __call__(self, crops):
        return crops.mean((1, 2, 3)) / 255


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(photographs, "detect", find_red)
    monkeypatch.setattr(photographs, "Quality", Brightness)
    how = {"edgeface": ("test_resnet", 8, 112, 0.5, 0.5), "mobilefacenet": ("test_resnet", 4, 112, 0.5, 0.5)}
    monkeypatch.setattr(photographs, "HOW", how)


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    for path, width in (("edgeface/edgeface_xs_q.pt", 8), ("mobilefacenet/068.ckpt", 4)):
        (folder / path).parent.mkdir()
        torch.save(timm.create_model("test_resnet", num_classes=width).state_dict(), folder / path)
    for path in ("lightqnet/lightqnet-dm100.pb", "retinaface/mobilenet0.25_Final.pth"):
        (folder / path).parent.mkdir()
        torch.save(RetinaFace().state_dict(), folder / path)
    return folder


def draw(*boxes, size=(160, 120)):
    picture = Image.new("RGB", size, (90, 120, 90))
    for x, y, side in boxes:
        ImageDraw.Draw(picture).rectangle((x, y, x + side - 1, y + side - 1), (255, 0, 0))
    return picture


def save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


@pytest.fixture
def ytf(tmp_path, networks):
    """Frames as published: a face at 20 + clip, 10 + frame; points of the training frames say so."""
    sources = shutil.copytree(networks, tmp_path / "sources")
    keypoints = {"training": {}, "test": {}}
    for name, clips in PEOPLE.items():
        for clip in range(clips):
            for part, number in [("training", k) for k in range(3)] + [("test", k) for k in range(2)]:
                frame = number + 3 * (part == "test")
                file = f"{name}_{clip}{number}.jpg"
                save(sources / "ytf/data" / part / file, draw((20 + clip, 10 + frame, 40)), format="PNG")
                if part == "training":
                    points = np.zeros((68, 2))
                    for at, where in zip(photographs.FIVE, POINTS):
                        points[at] = where * 40 + [20 + clip, 10 + frame]
                    keypoints[part][file] = points.ravel()
    for part, rows in keypoints.items():
        table = pd.DataFrame.from_dict(rows, orient="index", columns=[str(k) for k in range(136)])
        table.to_csv(sources / f"ytf/data/{part}_frames_keypoints.csv")
    return sources


def make(sources, name="ytf", **options):
    folder = sources.parent / "faces"
    lines = make_tables(name, sources, folder, **{"scenes": False} | options)
    return folder / name, lines


def assert_refused(sources, message, name="ytf", **options):
    with pytest.raises(ValueError, match=message) as caught:
        make(sources, name, **options)
    assert "\n" not in str(caught.value) and not (sources.parent / "faces").exists()


def test_published_frames_become_tables(ytf, small):
    made, lines = make(ytf)
    table = pd.read_parquet(made / "frames.parquet")
    assert len(table) == 35 and any("35 photographs" in line for line in lines)
    expected = [(f"{name}/{clip}", k, name) for name, n in PEOPLE.items() for clip in range(n) for k in range(5)]
    assert table[["clip", "frame", "identity"]].to_records(index=False).tolist() == expected
    points = np.load(made / "landmarks5.npy")
    where = np.array([[20 + int(clip[-1]), 10 + frame] for clip, frame, _ in expected])
    np.testing.assert_allclose(points, POINTS * 40 + where[:, None], atol=1e-3)
    np.testing.assert_allclose(table["det"], 0.9)
    np.testing.assert_allclose(table["eye_px"], 40 * np.linalg.norm(POINTS[0] - POINTS[1]), rtol=1e-4)
    assert [np.load(made / f"{kind}.npy").shape for kind in ("edgeface", "mobilefacenet")] == [(35, 8), (35, 4)]
    assert [path.name for path in made.parent.iterdir()] == ["ytf"]


def test_progress_is_told_in_lines_where_there_is_no_bar(ytf, small, monkeypatch):
    monkeypatch.setattr(foreign, "OFTEN", 0)
    said = []
    make(ytf, say=said.append)
    ends = [line for line in said if re.fullmatch(r"\w+: 35 of 35, [\d.]+ a second, about 0 s left", line)]
    assert [line.split(":")[0] for line in ends] == ["find", "score", "edgeface", "mobilefacenet"]


def test_a_line_comes_now_and_then_and_not_beside_a_bar(monkeypatch):
    for progress, expected in ((False, ["find: 64 of 100, 4.0 a second, about 9 s left"]), (True, [])):
        clock = iter([0, 10, 16, 20])
        monkeypatch.setattr(foreign, "time", SimpleNamespace(perf_counter=partial(next, clock)))
        said = []
        items = foreign.watch("abc", "find", [32, 32, 36], progress=progress, say=said.append)
        assert [*items] == [*"abc"] and said == expected


def test_what_is_made_is_read_as_ready_tables_are(ytf, small):
    made, _ = make(ytf)
    store = import_public("ytf", made.parent, ytf.parent / "store", scene=None).store
    assert len(store) == 7 and store.modalities["face"].feature.shape == (35, 8)


def test_packed_frames_make_the_same_tables(ytf, small):
    made, _ = make(ytf)
    packed = shutil.copytree(ytf, ytf.parent / "packed/sources", ignore=shutil.ignore_patterns("ytf"))
    plain = ytf.parent / "plain"
    rows = []
    for part in ("training", "test"):
        given = ytf / f"ytf/data/{part}_frames_keypoints.csv"
        for file, points in pd.read_csv(given, index_col=0).iterrows():
            rows.append((f"frames/{file[:-7]}/{file[-6]}/{part}{file[-5]}.jpg", *points))
        for path in (ytf / "ytf/data" / part).iterdir():
            save(
                plain / f"frames/{path.name[:-7]}/{path.name[-6]}/{part}{path.name[-5]}.jpg",
                Image.open(path),
                format="PNG",
            )
    pd.DataFrame(rows).to_csv(plain / "landmarks.csv", index=False)
    with tarfile.open(packed / "ytf-frames.tar", "w") as tar:
        for path in plain.iterdir():
            tar.add(path, path.name)
    other, _ = make(packed)
    ours, theirs = (pd.read_parquet(of / "frames.parquet").drop(columns="path") for of in (made, other))
    pd.testing.assert_frame_equal(ours, theirs)
    for name in ("edgeface", "mobilefacenet", "landmarks5"):
        np.testing.assert_array_equal(np.load(made / f"{name}.npy"), np.load(other / f"{name}.npy"))
    assert [path.name for path in other.parent.iterdir()] == ["ytf"]
    whole = (packed / "ytf-frames.tar").read_bytes()
    (packed / "ytf-frames.tar").write_bytes(whole[: len(whole) // 2])
    shutil.rmtree(other.parent)
    assert_refused(packed, "ytf-frames.tar: not a whole archive")


def test_photographs_of_cfp_are_aligned_on_the_face_that_the_points_show(tmp_path, networks, small):
    sources = shutil.copytree(networks, tmp_path / "sources")
    data = sources / "cfp/dataset-cfp/Data"
    for pose, number in (("frontal", 1), ("profile", 1)):
        save(data / f"Images/001/{pose}/0{number}.jpg", draw((20, 10, 30), (100, 60, 50)), quality=95)
        points = data / f"Fiducials/001/{pose}/0{number}.txt"
        points.parent.mkdir(parents=True)
        middle = (35, 25) if pose == "frontal" else (125, 85)
        np.savetxt(points, np.full((30, 2), middle), delimiter=",")
    (data / "list_name.txt").write_text("50 Cent\nBob\n")
    made, _ = make(sources, "cfp")
    table = pd.read_parquet(made / "frames.parquet")
    assert table["name"].tolist() == ["50 Cent"] * 2 and table["pose"].tolist() == ["frontal", "profile"]
    left = np.load(made / "landmarks5.npy")[:, 0]
    np.testing.assert_allclose(left, [POINTS[0] * 30 + [20, 10], POINTS[0] * 50 + [100, 60]], atol=1.5)
    assert table["clip"].tolist() == ["001/frontal/01", "001/profile/01"]


def test_crops_of_lfw_are_taken_as_they_are_found_in_or_not(tmp_path, networks, small):
    sources = shutil.copytree(networks, tmp_path / "sources")
    for name, boxes in (("Ann_Lee", [(30, 30, 50)]), ("Ö_Bob", [])):
        save(sources / f"lfw/data/{name}/{name}_0001.jpg", draw(*boxes, size=(112, 112)), quality=95)
    made, _ = make(sources, "lfw")
    table = pd.read_parquet(made / "frames.parquet")
    assert table["clip"].tolist() == ["Ann_Lee_0001", "Ö_Bob_0001"]
    np.testing.assert_allclose(table["det"], [0.9, 0])
    embed = Embedder(sources / "edgeface/edgeface_xs_q.pt", *photographs.HOW["edgeface"])
    crop = np.array(Image.open(sources / "lfw/data/Ann_Lee/Ann_Lee_0001.jpg"))
    np.testing.assert_allclose(np.load(made / "edgeface.npy")[0], embed(crop[None])[0], atol=2e-3)


def test_what_cannot_be_read_is_named_and_nothing_is_left(ytf, small):
    bad = ytf / "ytf/data/test/Eve_11.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    assert_refused(ytf, "Eve_11.jpg: image of clip Eve/1: ")
    save(bad, draw(), format="PNG")
    assert_refused(ytf, "Eve_11.jpg: no face is found in it")
    shutil.rmtree(ytf / "ytf")
    assert_refused(ytf, "ytf/data: missing, and there is no ytf-frames.tar either")
    (ytf / "ytf/data").mkdir(parents=True)
    assert_refused(ytf, "ytf: no photographs of ytf")


def test_networks_that_are_missing_or_others_are_named(ytf, small):
    weights = ytf / "mobilefacenet/068.ckpt"
    shutil.copyfile(ytf / "retinaface/mobilenet0.25_Final.pth", weights)
    assert_refused(ytf, "068.ckpt: of another architecture")
    torch.save(timm.create_model("test_resnet", num_classes=4), weights)
    assert_refused(ytf, "068.ckpt: not a readable file of weights .*[Ww]eights.only")
    (ytf / "SHA256SUMS").write_text(f"{hashlib.sha256(b'').hexdigest()}  mobilefacenet/068.ckpt\n")
    assert_refused(ytf, r"068.ckpt: its sha256 is [0-9a-f]{64}, but SHA256SUMS lists")
    assert_refused(ytf, "lite0/.*: missing, .*; it is for scene features, and --scene none does without", scenes=True)
    weights.unlink()
    assert_refused(ytf, "068.ckpt: missing, and there is no mobilefacenet-068.ckpt either")


def test_an_interrupt_leaves_nothing(ytf, small, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(photographs, "check_labels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(ytf)
    assert not (ytf.parent / "faces").exists()


def test_a_label_is_checked_by_the_other_clips_of_its_person():
    table = pd.DataFrame({"clip": ["a/0", "a/0", "a/1", "a/2"], "identity": "a"})
    features = np.array([[2, 0], [0, 5], [3, 0], [0, -1]], np.float16)
    checks = check_labels(table, features)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(checks["label_check"], [0, half / 2, -half / 2], atol=1e-3)
    assert checks["clip"].tolist() == ["a/0", "a/1", "a/2"]


def test_the_command_makes_tables_once_of_photographs_that_are_there(ytf, small, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(ytf.parent / "cache"))
    command = ["fetch", "ytf", "STORE", "--folder", str(ytf), "--scene", "none"]
    outputs = []
    for at in range(2):
        command[2] = str(ytf.parent / f"store{at}")
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert "face: 35 frames of 8 dimensions" in done.output
        outputs.append(done.output)
    assert "tables: 35 photographs" in outputs[0] and "tables: made before" in outputs[1]
    refused = CliRunner().invoke(app, ["fetch", "ultraface", str(ytf.parent / "other")])
    assert refused.exit_code == 1 and "ultraface: a network" in refused.stderr


# Networks


def test_mobilefacenet_reads_the_middle_of_a_crop_and_loads_its_own_names(tmp_path):
    torch.manual_seed(0)
    state = MobileFaceNet().state_dict()
    assert len(state) == 333 and state["blocks.12.conv.0.weight"].shape == (512, 128, 1, 1)
    assert state["linear7.conv.weight"].shape == (512, 1, 7, 6)
    torch.save({"epoch": 68, "net_state_dict": state}, tmp_path / "068.ckpt")
    embed = Embedder(tmp_path / "068.ckpt", "mobilefacenet", 128, 112, 0.5, 0.5)
    crops = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    plain = MobileFaceNet().eval()
    plain.load_state_dict(state)
    with torch.no_grad():
        expected = plain(torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1)
    found = embed(crops)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    crops[:, :, :8], crops[:, :, 104:] = 0, 255
    np.testing.assert_array_equal(embed(crops), found)
    del state["linear1.bn.bias"]
    torch.save({"net_state_dict": state}, tmp_path / "068.ckpt")
    with pytest.raises(ValueError, match="068.ckpt: of another architecture"):
        Embedder(tmp_path / "068.ckpt", "mobilefacenet", 128, 112, 0.5, 0.5)


@pytest.mark.filterwarnings("ignore")
def test_int8_weights_are_loaded_as_numbers(tmp_path):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3, bias=False))
    packed = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear})
    torch.save({f"model.{name}": value for name, value in packed.state_dict().items()}, tmp_path / "q.pt")
    found = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3, bias=False))
    load_weights(found, tmp_path / "q.pt")
    for at in (0, 2):
        step = plain[at].weight.abs().max() / 127
        assert (found[at].weight - plain[at].weight).abs().max() <= step
        assert not torch.equal(found[at].weight, plain[at].weight)
    torch.testing.assert_close(found[0].bias, plain[0].bias)


# Degraded frames


@pytest.mark.parametrize("kind", STRENGTHS)
def test_a_stronger_degradation_is_further_from_the_crop(kind):
    rng = np.random.default_rng(0)
    crop = cv2.GaussianBlur(rng.integers(0, 256, (112, 112, 3), np.uint8), (0, 0), 2)
    crop = cv2.normalize(crop, None, 0, 255, cv2.NORM_MINMAX)
    off = []
    for strength in STRENGTHS[kind]:
        changed = [degrade(crop, kind, strength, np.random.default_rng(seed)) for seed in range(8)]
        assert all(of.shape == crop.shape and of.dtype == np.uint8 for of in changed)
        off.append(np.mean([np.abs(of.astype(int) - crop).mean() for of in changed]))
    assert off[0] > 0 and (np.diff(off) > 0).all()


def test_a_degradation_is_what_it_says():
    crop, rng = np.full((112, 112, 3), 60, np.uint8), np.random.default_rng(0)
    for share in STRENGTHS["occlusion"]:
        hidden = [(degrade(crop, "occlusion", share, rng) == 128).all(-1).mean() for _ in range(20)]
        np.testing.assert_allclose(hidden, share, atol=0.02)
    light = {int(degrade(crop, "exposure", 1, np.random.default_rng(seed))[0, 0, 0]) for seed in range(9)}
    assert light == {round(60 * 2 ** (1 / 2.2)), round(60 / 2 ** (1 / 2.2))}
    with pytest.raises(ValueError, match="kind 'rain'"):
        degrade(crop, "rain", 1, rng)


def test_a_share_of_each_clip_is_chosen_and_a_larger_one_has_it_all():
    clip = pd.Series(np.repeat([f"c{at}" for at in range(40)], 5))
    chosen = [choose_frames(clip, share).reshape(40, 5) for share in (0, 0.2, 0.4, 0.6, 1)]
    for number, of in zip((0, 1, 2, 3, 5), chosen):
        assert (of.sum(1) == number).all()
    for less, more in zip(chosen, chosen[1:]):
        assert (less <= more).all()
    assert len({tuple(row) for row in chosen[1]}) == 5 and (choose_frames(clip, 0.4, 1) != chosen[2].ravel()).any()
    with pytest.raises(ValueError, match="share must be in"):
        choose_frames(clip, 1.5)


# Real faces


@pytest.fixture(scope="session")
def real():
    folder = Path(os.environ.get("MMLIB_REAL_DATA", "."))
    if not (folder / "ytf-frames.tar").exists():
        pytest.skip("MMLIB_REAL_DATA names no folder with photographs of real faces")
    return folder


def cosine(a, b):
    a, b = a.astype(float), b.astype(float)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("name, step, low", [("ytf", 29, 0.95), ("cfp", 35, 0.999), ("lfw", 40, 0.999)])
def test_real_photographs_make_the_tables_that_are_given(real, tmp_path, name, step, low, monkeypatch):
    listed = photographs.list_photographs

    def sample(*of):
        table, points = listed(*of)
        rows = np.flatnonzero(np.unique(table["clip"], return_inverse=True)[1] % step == 0)
        return table.iloc[rows].reset_index(drop=True), points[rows]

    monkeypatch.setattr(photographs, "list_photographs", sample)
    lines = make_tables(name, real, tmp_path, scenes=False)
    assert "sha256 of every file as listed" in lines or any("not in SHA256SUMS" in line for line in lines)
    ours, given = (pd.read_parquet(folder / name / "frames.parquet") for folder in (tmp_path, real))
    rows = given.reset_index().set_index(["clip", "frame"])["index"].loc[[*zip(ours["clip"], ours["frame"])]]
    assert len(ours) > 150 and (np.diff(rows) > 0).all()
    given = given.loc[rows].reset_index(drop=True)
    assert (ours["identity"] == given["identity"]).all()
    for kind in photographs.HOW:
        close = cosine(np.load(tmp_path / name / f"{kind}.npy"), np.load(real / name / f"{kind}.npy")[rows])
        assert close.mean() > 0.995 and close.min() > low - 0.05 * (name == "ytf")
    assert ours["quality"].corr(given["quality"], "spearman") > 0.98
    assert np.abs(ours["det"] - given["det"]).median() < 1e-3


def test_real_boxes_of_ultraface_hold_the_points(real):
    detector = load_detector(real / "ultraface-RFB-320.onnx")
    points, off = np.load(real / "ytf/landmarks5.npy"), []
    with tarfile.open(real / "ytf-frames.tar") as tar:
        for row, path in list(enumerate(pd.read_parquet(real / "ytf/frames.parquet")["path"]))[::300]:
            picture = np.asarray(Image.open(tar.extractfile(path)).convert("RGB"))
            (found,) = photographs.detect(detector, [picture], 0)
            eye = np.linalg.norm(points[row, 0] - points[row, 1])
            distance = np.linalg.norm(found[:, 5:].reshape(-1, 5, 2) - points[row], axis=2).mean(1) / eye
            off.append(distance.min(initial=9))
    # they stand for an upright face that looks ahead
    assert len(off) == 20 and np.median(off) < 0.4 and max(off) < 1
