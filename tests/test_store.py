import errno
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlib.data import content, writer
from mmlib.data.store import ClipStore, sample_rows
from mmlib.data.writer import nonfinite_rows
from mmlib.experiment import Experiment

COUNT = np.array([4, 0, 6])
START = np.array([0, 4, 4])


def make_store(path, count=COUNT, dim=8, seed=0, **options):
    """Write clips a, b, c, ... alternating over train and val; feature row i starts with i."""
    rng = np.random.default_rng(seed)
    frames = int(count.sum())
    feature = rng.standard_normal((frames, dim)).astype(np.float16)
    feature[:, 0] = np.arange(frames)
    with ClipStore.create(path, simulated=True, provenance={"seed": seed}, **options) as writer:
        for rows in np.array_split(np.arange(frames), 3):  # several blocks
            writer.append("face", feature[rows], frame=rows, quality=rows * 0.5)
        clips = pd.DataFrame(
            {
                "clip": [f"clip{i}" for i in range(len(count))],
                "split": [("train", "val")[i % 2] for i in range(len(count))],
                "identity": [-1 if i % 3 == 1 else 0 for i in range(len(count))],
            }
        )
        writer.finish(clips, ["7"], {"face": (np.cumsum(count) - count, count)})
    return ClipStore.open(path)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def assert_nothing_left(folder):
    assert list(folder.iterdir()) == []


def test_clips_are_sorted_by_split_and_name_with_their_spans(store):
    assert store.clips["clip"].tolist() == ["clip0", "clip2", "clip1"]
    assert store.clips["split"].tolist() == ["train", "train", "val"]
    assert store.modalities["face"].start.tolist() == [0, 4, 4]
    assert store.modalities["face"].count.tolist() == [4, 6, 0]


def test_meta_describes_the_store(store):
    assert store.meta["simulated"] is True
    assert store.meta["provenance"] == {"seed": 0}
    assert store.meta["modalities"]["face"]["frames"] == 10


def test_features_are_mapped_not_read(store):
    assert isinstance(store.modalities["face"].feature, np.memmap)


def test_select_by_split_label_and_modality(store):
    assert store.select("train").tolist() == [0, 1]
    assert store.select(labelled=False).tolist() == [2]
    assert store.select(having="face").tolist() == [0, 1]
    assert store.select("val", labelled=True).tolist() == []
    assert store.identity_of([2, 0]).tolist() == [-1, 0]


def test_batch_pads_with_zeros(store):
    batch = store.batch([0, 1, 2])
    assert batch.feature.shape == (3, 6, 8) and batch.feature.dtype == torch.float32
    assert batch.mask.sum(dim=1).tolist() == [4, 6, 0]
    assert batch.rows[0].tolist() == [0, 1, 2, 3, -1, -1]
    assert not batch.feature[~batch.mask].any() and not batch.quality[~batch.mask].any()


def test_batch_holds_what_was_appended(store):
    batch = store.batch([1])
    assert batch.feature[0, :, 0].tolist() == [4, 5, 6, 7, 8, 9]
    assert batch.quality[0].tolist() == [2, 2.5, 3, 3.5, 4, 4.5]


def test_batch_without_a_score_has_none(store):
    assert store.batch([0]).det is None


def test_batch_does_not_write_to_the_store(store, tmp_path):
    store.batch([0, 1]).feature.fill_(9)
    again = ClipStore.open(tmp_path / "store").modalities["face"].feature[:, 0]
    np.testing.assert_array_equal(again, np.arange(10))


@pytest.mark.parametrize("gap", [slice(0, 0), slice(0, 2), slice(2, 5), slice(6, 8)])
def test_gathered_frames_lack_the_dimensions_of_the_gap(store, gap):
    rows = torch.tensor([[4, 9], [3, -1]])
    out = torch.full((2, 2, 8 - gap.stop + gap.start), -7.0)
    batch = store.on("face").gather(rows, gap=gap, out=out)
    expected = np.delete(np.array(store.modalities["face"].feature, np.float32), np.arange(8)[gap], axis=1)
    assert batch.feature is out and batch.mask.tolist() == [[True, True], [True, False]]
    np.testing.assert_array_equal(out[batch.mask], expected[[4, 9, 3]])
    assert batch.quality[batch.mask].tolist() == [2, 4.5, 1.5] and batch.det is None


def test_modality_is_put_on_a_device_once(store, device):
    assert store.on("face", device) is store.on("face", device)
    assert store.on("face", device).feature.device.type == torch.device(device).type


def test_features_too_large_for_the_device_are_gathered_on_the_host(store, device, monkeypatch):
    monkeypatch.setattr("mmlib.data.store._SHARE", 0)
    resident = store.on("face", device)
    assert resident.feature.device.type == "cpu"
    rows = torch.tensor([[4, 9, -1]], device=device)
    assert resident.gather(rows).feature[0, :2, 0].tolist() == [4, 9]


def test_batch_refuses_an_unknown_modality(store):
    with pytest.raises(ValueError, match="no modality 'audio'"):
        store.batch([0], "audio")


def test_a_store_without_any_frame_opens_and_gives_empty_batches(tmp_path):
    store = make_store(tmp_path / "store", count=np.array([0, 0]))
    batch = store.batch([0, 1], sample="first", frames=3)
    assert batch.feature.shape == (2, 3, 8) and not batch.mask.any()


def test_clip_means_are_those_of_every_clip_alone(store):
    face = store.modalities["face"]
    slow = [
        face.columns["quality"][s : s + n].mean() if n else np.nan for s, n in zip(face.start, face.count, strict=True)
    ]
    assert np.allclose(store.clip_means("face", "quality"), slow, equal_nan=True, rtol=1e-9)


@pytest.mark.parametrize("piece", [1, 24, 2**20])
def test_mean_norm_is_that_of_every_clips_raw_embeddings(store, monkeypatch, piece):
    monkeypatch.setattr("mmlib.data.store._PIECE", piece)
    face, slow = store.modalities["face"], []
    for start, count in zip(face.start, face.count, strict=True):
        norms = [np.linalg.norm(row.astype(float)) for row in face.feature[start : start + count]]
        slow.append(np.mean(norms) if norms else np.nan)
    found = store.clip_means("face", "norm")
    assert np.isnan(found).tolist() == [False, False, True]
    np.testing.assert_allclose(found, slow, rtol=1e-6)


def test_mean_norm_in_float16_is_what_numpy_makes_of_half_precision(tmp_path):
    """As the released code has it: norms of float16 rows, their mean, and the comparison, in float16."""
    rng = np.random.default_rng(0)
    count = rng.integers(1, 9, 300)
    x = rng.normal(size=(count.sum(), 512))
    x *= 8.863 * (1 + 1e-3 * rng.normal(size=(len(x), 1))) / np.linalg.norm(x, axis=1, keepdims=True)
    clips = pd.DataFrame({"clip": [f"c{i}" for i in range(300)], "split": "val", "identity": 0})
    with ClipStore.create(tmp_path / "s", simulated=True, provenance={}) as writer:
        writer.append("face", x.astype(np.float16))
        writer.finish(clips, ["1"], {"face": (count.cumsum() - count, count)})
    store = ClipStore.open(tmp_path / "s")
    face = store.modalities["face"]
    rows = [np.array(face.feature[start : start + n]) for start, n in zip(face.start, face.count)]
    expected = [np.mean(np.linalg.norm(part, axis=1)) for part in rows]
    found, exact = store.clip_means("face", "norm, float16"), store.clip_means("face", "norm")
    assert found.tolist() == [float(value) for value in expected]
    assert {8.859375, 8.8671875} <= {*found}
    assert ((found < 8.867) == (exact < 8.8632815)).mean() > 0.9 and ((found < 8.867) != (exact < 8.867)).sum() > 50


def test_a_score_that_is_not_there_has_no_mean(store):
    with pytest.raises(ValueError, match="face has no det"):
        store.clip_means("face", "det")


def test_mean_norm_of_a_store_without_any_frame_is_nan(tmp_path):
    assert np.isnan(make_store(tmp_path / "s", np.zeros(3, int)).clip_means("face", "norm")).all()


def test_columns_of_truth_keep_their_dtype(tmp_path):
    with ClipStore.create(tmp_path / "s", simulated=True, provenance={}) as writer:
        writer.append("face", np.ones((2, 3), np.float16), wrong=np.array([True, False]))
        clips = pd.DataFrame({"clip": ["a"], "split": ["val"], "identity": [0], "show": ["x"]})
        writer.finish(clips, ["1"], {"face": ([0], [2])})
    store = ClipStore.open(tmp_path / "s")
    assert store.modalities["face"].columns["wrong"].tolist() == [True, False]
    assert store.clips["show"].tolist() == ["x"]


@settings(max_examples=15, deadline=None)
@given(count=st.lists(st.integers(0, 5), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_ragged_clips_survive_the_round_trip(tmp_path_factory, count, seed):
    count = np.array(count)
    store = make_store(tmp_path_factory.mktemp("ragged") / "store", count=count, seed=seed)
    offset = np.cumsum(count) - count
    for position, name in enumerate(store.clips["clip"]):
        clip = int(name.removeprefix("clip"))
        batch = store.batch([position])
        expected = np.arange(offset[clip], offset[clip] + count[clip])
        assert batch.feature[0, batch.mask[0], 0].tolist() == expected.tolist()


# Sampling


def sampled(start, count, sample, frames, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return sample_rows(torch.tensor(start), torch.tensor(count), sample, frames, generator).numpy()


counts = st.lists(st.integers(0, 30), min_size=1, max_size=8).map(np.array)


@settings(max_examples=60, deadline=None)
@given(
    count=counts,
    frames=st.integers(1, 12),
    seed=st.integers(0, 999),
    sample=st.sampled_from(["first", "random", "replace", "draw"]),
)
def test_sampled_rows_belong_to_their_clip(count, frames, seed, sample):
    start = np.cumsum(count) - count + 100
    rows = sampled(start, count, sample, frames, seed)
    assert rows.shape == (len(count), frames)
    for clip, row in enumerate(rows):
        chosen = row[row >= 0]
        assert ((chosen >= start[clip]) & (chosen < start[clip] + count[clip])).all()
        full = sample in ("replace", "draw") and count[clip] > 0
        assert len(chosen) == (frames if full else min(frames, count[clip]))
        assert (row[len(chosen) :] == -1).all()
        if sample in ("first", "random") or (sample == "draw" and count[clip] >= frames):
            assert len(set(chosen)) == len(chosen)


def test_the_same_generator_state_gives_the_same_rows():
    one, other = (sampled(START, COUNT, "draw", 5, 3) for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_random_picks_every_frame_equally_often_in_every_place():
    draws = 6000
    rows = sampled(np.zeros(draws, int), np.full(draws, 5), "random", 3, 0)
    for place in range(3):
        share = np.bincount(rows[:, place], minlength=5) / draws
        np.testing.assert_allclose(share, 0.2, atol=0.026)  # five standard errors


def test_random_picks_every_pair_equally_often():
    draws = 6000
    rows = np.sort(sampled(np.zeros(draws, int), np.full(draws, 4), "random", 2, 0))
    share = np.bincount(rows @ [4, 1], minlength=16)[[1, 2, 3, 6, 7, 11]] / draws
    np.testing.assert_allclose(share, 1 / 6, atol=0.024)


def test_replace_picks_every_frame_equally_often():
    rows = sampled([10], [4], "replace", 8000, 0)
    np.testing.assert_allclose(np.bincount(rows[0] - 10) / 8000, 0.25, atol=0.025)


def test_draw_of_all_frames_is_a_shuffle():
    rows = sampled([0], [40], "draw", 40, 0)[0]
    assert sorted(rows) == list(range(40)) and rows.tolist() != list(range(40))


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("some", 3), "sample: 'some'"),
        (("first", None), "frames: None"),
        (("first", 0), "frames: 0"),
        (("all", 3), "frames: 3"),
        (("random", 3), "generator: None"),
    ],
)
def test_sampling_refuses_what_makes_no_sense(arguments, named):
    with pytest.raises(ValueError, match=named):
        sampled(START, COUNT, *arguments)


# Bad stores


def rewrite_clips(path, **columns):
    table = pd.read_parquet(path / "clips.parquet")
    table.assign(**columns).to_parquet(path / "clips.parquet", index=False)


@pytest.mark.parametrize(
    "columns, named",
    [
        ({"clip": ["a", "a", "b"]}, "clip 'a': named twice"),
        ({"split": ["train", "dev", "val"]}, "clip 'clip2': unknown split dev"),
        ({"identity": [0, 1, -1]}, "clip 'clip2': of 1 identities it has number 1"),
        ({"identity": [0, 0, -2]}, "clip 'clip1': .* number -2"),
        ({"face_start": [0, 5, 4]}, r"clip 'clip2': of 10 rows of face .* 5 and 6"),
        ({"face_start": [-1, 4, 4]}, "clip 'clip0'"),
        ({"face_count": [4, 2**62, 0]}, "clip 'clip2'"),
    ],
)
def test_opening_names_the_clip_that_cannot_be(store, tmp_path, columns, named):
    rewrite_clips(tmp_path / "store", **columns)
    with pytest.raises(ValueError, match=f"clips.parquet: {named}"):
        ClipStore.open(tmp_path / "store")


@pytest.mark.parametrize(
    "name", ["store.json", "clips.parquet", "identities.parquet", "face/feature.npy", "face/quality.npy"]
)
def test_opening_names_a_missing_file(store, tmp_path, name):
    (tmp_path / "store" / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        ClipStore.open(tmp_path / "store")


@pytest.mark.parametrize("name", ["clips.parquet", "face/feature.npy", "face/frame.npy", "store.json"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_opening_names_a_truncated_file(store, tmp_path, name, kept):
    path = tmp_path / "store" / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=name):
        ClipStore.open(tmp_path / "store")


def test_opening_refuses_features_of_another_dtype(store, tmp_path):
    np.save(tmp_path / "store/face/feature.npy", np.zeros((10, 8), np.float32))
    with pytest.raises(ValueError, match=r"feature.npy: <f4 \(10, 8\), store.json says <f2"):
        ClipStore.open(tmp_path / "store")


def test_opening_refuses_another_schema(store, tmp_path):
    path = tmp_path / "store/store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(ValueError, match="store.json: schema 99"):
        ClipStore.open(tmp_path / "store")


def test_opening_refuses_a_repeated_identity(store, tmp_path):
    pd.DataFrame({"identity": ["7", "7"]}).to_parquet(tmp_path / "store/identities.parquet")
    with pytest.raises(ValueError, match="identities.parquet: '7' stands twice"):
        ClipStore.open(tmp_path / "store")


# Writing


FRAMES = np.ones((2, 3), np.float16)


def append(writer, feature=FRAMES, **columns):
    return writer.append("face", feature, **columns)


@pytest.mark.parametrize(
    "feature, named",
    [
        (np.ones((2, 3), np.float32), "must be float16"),
        (np.ones(3, np.float16), "must be float16"),
        (np.array([[1, 2, 3], [1, np.nan, 3]], np.float16), "infinite feature in row 3"),
        (np.array([[np.inf, 2, 3]], np.float16), "infinite feature in row 2"),
        (np.ones((1, 4), np.float16), r"expected rows of float16\[3\], got float16\[4\]"),
    ],
)
def test_append_names_what_it_refuses_and_leaves_nothing(tmp_path, feature, named):
    with (
        pytest.raises(ValueError, match=named),
        ClipStore.create(tmp_path / "s", simulated=False, provenance={}) as writer,
    ):
        append(writer)
        append(writer, feature)
    assert_nothing_left(tmp_path)


def test_append_returns_the_first_row(tmp_path):
    with (
        pytest.raises(RuntimeError, match="unfinished"),
        ClipStore.create(tmp_path / "s", simulated=False, provenance={}) as writer,
    ):
        assert [append(writer), append(writer)] == [0, 2]
    assert_nothing_left(tmp_path)


def test_finish_refuses_spans_beyond_the_rows(tmp_path):
    clips = pd.DataFrame({"clip": ["a"], "split": ["val"], "identity": [-1]})
    with (
        pytest.raises(ValueError, match="clip 'a': of 2 rows"),
        ClipStore.create(tmp_path / "s", simulated=False, provenance={}) as writer,
    ):
        append(writer)
        writer.finish(clips, [], {"face": ([0], [3])})
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("moment", ["append", "finish"])
def test_an_interrupt_or_a_full_disk_leaves_nothing(tmp_path, monkeypatch, error, moment):
    def fail(*_):
        raise error

    monkeypatch.setattr(writer.ArrayStream, moment, fail)
    with pytest.raises(type(error)):
        make_store(tmp_path / "store")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("there", [True, False], ids=["to a store", "to nothing yet"])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path, there):
    target, link = tmp_path / "target", tmp_path / "link"
    if there:
        make_store(target)
    link.symlink_to(target)
    assert make_store(link, seed=1, overwrite=True).meta["provenance"] == {"seed": 1}
    assert link.is_symlink() and ClipStore.open(target).meta["provenance"] == {"seed": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_failed_import_leaves_no_folder_above_it_either(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError), ClipStore.create(tmp_path / "mine/a/b/store", simulated=True, provenance={}):
        raise RuntimeError("stopped")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failed_overwrite_keeps_the_old_store(store, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(writer.ArrayStream, "finish", fail)
    with pytest.raises(type(error)):
        make_store(tmp_path / "store", seed=1, overwrite=True)
    assert ClipStore.open(tmp_path / "store").meta["provenance"] == {"seed": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_existing_store_is_refused_unless_told(store, tmp_path):
    with pytest.raises(FileExistsError, match="store: exists already"):
        make_store(tmp_path / "store", seed=1)
    assert make_store(tmp_path / "store", seed=1, overwrite=True).meta["provenance"] == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_overwriting_spares_a_folder_that_is_no_store(tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds no store.json"):
        make_store(tmp_path / "papers", overwrite=True)
    assert (tmp_path / "papers/thesis.tex").exists()


@pytest.mark.parametrize("column, row", [("clip", 1), ("identity", 0)])
def test_a_name_that_the_text_files_cannot_hold_is_not_stored(tmp_path, column, row):
    clips = pd.DataFrame({"clip": ["a", "b" + " 1" * (column == "clip")], "split": "val", "identity": [0, -1]})
    names = ["Ann Ash" if column == "identity" else "Ann"]
    with (
        pytest.raises(ValueError, match=f"{column} '(b 1|Ann Ash)'"),
        ClipStore.create(tmp_path / "s", simulated=False, provenance={}) as writer,
    ):
        append(writer)
        writer.finish(clips, names, {"face": ([0, 1], [1, 1])})
    assert_nothing_left(tmp_path)


def test_an_older_store_with_such_names_still_opens(store, tmp_path):
    rewrite_clips(tmp_path / "store", clip=["a 1", "b", "c"])
    assert ClipStore.open(tmp_path / "store").clips["clip"].tolist() == ["a 1", "b", "c"]


# The name of the content


def key_of(path):
    return Experiment(data=str(path), classifier="class means", aggregator="mean").key()


def edit(path, name="face/feature.npy", at=-1):
    """Change the last byte of a file of the store in place."""
    data = bytearray((path / name).read_bytes())
    data[at] ^= 1
    with open(path / name, "r+b") as file:
        file.write(data)


def forget(path):
    """Make a store one that was written before stores said what they hold."""
    meta = json.loads((path / "store.json").read_text())
    del meta["content"]
    (path / "store.json").write_text(json.dumps(meta))


def test_one_number_of_one_frame_makes_another_store(tmp_path):
    keys = set()
    for row in (None, 1, 2001, 2999):
        feature = np.ones((3000, 4), np.float16)
        if row is not None:
            feature[row, 2] = 2
        path = tmp_path / str(row)
        with ClipStore.create(path, simulated=False, provenance={}) as writer:
            append(writer, feature)
            writer.finish(
                pd.DataFrame({"clip": ["a"], "split": ["val"], "identity": [0]}), ["1"], {"face": ([0], [3000])}
            )
        keys.add((ClipStore.open(path).fingerprint, key_of(path)))
    assert len({fingerprint for fingerprint, _ in keys}) == len({key for _, key in keys}) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"clip": "b"},
        {"split": "train"},
        {"identity": -1},
        {"name": "8"},
        {"quality": 0.25},
        {"count": 1},
        {"modality": "head"},
        {"simulated": True},
        {"wrong": [False]},
    ],
    ids=str,
)
def test_everything_that_a_store_holds_counts(tmp_path, change):
    found = []
    for number, said in enumerate(({}, change)):
        said = {"clip": "a", "split": "val", "identity": 0, "name": "7", "quality": 0.5, "count": 2} | said
        columns = {"wrong": said["wrong"] * 2} if "wrong" in said else {}
        path, face = tmp_path / str(number), said.get("modality", "face")
        with ClipStore.create(path, simulated=said.get("simulated", False), provenance={}) as writer:
            writer.append(face, np.ones((2, 3), np.float16), quality=[0.5, said["quality"]], **columns)
            clips = pd.DataFrame({key: [said[key]] for key in ("clip", "split", "identity")})
            writer.finish(clips, [said["name"]], {face: ([0], [said["count"]])})
        found.append(ClipStore.open(path).fingerprint)
    assert found[0] != found[1]


def test_where_a_store_comes_from_does_not_count(store, tmp_path):
    shutil.copytree(tmp_path / "store", tmp_path / "other")
    meta = store.meta | {"provenance": {"seed": 1}}
    (tmp_path / "other/store.json").write_text(json.dumps(meta))
    assert ClipStore.open(tmp_path / "other").fingerprint == store.fingerprint


def test_an_older_store_is_named_as_if_it_were_new(store, tmp_path):
    shutil.copytree(tmp_path / "store", tmp_path / "old")
    forget(tmp_path / "old")
    names = {ClipStore.open(tmp_path / "old").fingerprint for _ in range(3)}
    assert names == {store.fingerprint}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", ["face/feature.npy", "face/quality.npy", "clips.parquet"])
def test_an_edit_in_place_is_noticed(store, tmp_path, old, asked, name):
    path = tmp_path / "store"
    before = store.fingerprint
    if not asked:
        (path / content.NOTE).unlink()
    if old:
        forget(path)
    stat = (path / name).stat()
    if name == "clips.parquet":
        rewrite_clips(path, split="val")
    else:
        edit(path, name)
    os.utime(path / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ClipStore.open(path).fingerprint != before


@pytest.mark.parametrize("first", ["edited", "copied"])
def test_a_copy_is_another_store_once_it_is_edited(store, tmp_path, first):
    path, before = tmp_path / "store", store.fingerprint
    if first == "edited":
        edit(path)
    shutil.copytree(path, tmp_path / "copy")
    assert (ClipStore.open(tmp_path / "copy").fingerprint == before) == (first == "copied")
    if first == "copied":
        edit(tmp_path / "copy")
    assert ClipStore.open(tmp_path / "copy").fingerprint != before


def test_a_store_is_read_once_or_never_to_be_named(store, tmp_path, monkeypatch):
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    reads, digest = [], content.hashlib.file_digest
    monkeypatch.setattr(
        content.hashlib, "file_digest", lambda file, name: reads.append(file.name) or digest(file, name)
    )
    assert ClipStore.open(tmp_path / "store").fingerprint and reads == []
    for _ in range(2):
        assert ClipStore.open(tmp_path / "copy").fingerprint == store.fingerprint
        assert len(reads) == 3  # feature, frame, quality


def test_a_folder_that_may_not_be_written_is_named_all_the_same(store, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(content, "write_whole", refuse)
    forget(tmp_path / "store")
    found = ClipStore.open(tmp_path / "store").fingerprint
    assert not (tmp_path / "store" / content.NOTE).exists()
    monkeypatch.undo()
    assert ClipStore.open(tmp_path / "store").fingerprint == found


@pytest.mark.parametrize("note", ["", "{", "[]", '{"content": "x"}', '{"content": "x", "files": {}}'])
def test_a_damaged_note_is_not_believed(store, tmp_path, note):
    before = store.fingerprint
    (tmp_path / "store" / content.NOTE).write_text(note)
    assert ClipStore.open(tmp_path / "store").fingerprint == before


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_nonfinite_rows_finds_both_infinities_and_nan(dtype):
    block = np.zeros((6, 3), dtype)
    block[1, 0], block[3, 2], block[4, 1], block[5] = np.inf, -np.inf, np.nan, [65504, -65504, 6e-8]
    assert nonfinite_rows(block).tolist() == [1, 3, 4]
