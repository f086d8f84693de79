import hashlib

import numpy as np
import pandas as pd
import pytest

from mmlib.data import features as module
from mmlib.data.features import group_photographs, import_features
from mmlib.data.store import ClipStore


def table_of(**columns):
    """Two clips of ann in train and val, one of nobody; rows in no order, columns replaced by `columns`."""
    return pd.DataFrame(
        {
            "clip": ["b", "a", "b", "c", "a"],
            "frame": [3, 2, 1, 0, 1],
            "identity": ["ann", "ann", "ann", None, "ann"],
            "split": ["val", "train", "val", "val", "train"],
            "quality": [0.3, 0.2, 0.1, 0.0, 0.5],
        }
        | columns
    )


ARRAY = np.arange(5, dtype=np.float32)[:, None] + np.array([0, 0.25, 100], np.float32)


def run(tmp_path, table=None, array=ARRAY, *, kind="csv", raw=False, **options):
    table = table_of() if table is None else table
    path = tmp_path / f"table.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    data = tmp_path / ("array.bin" if raw else "array.npy")
    array.astype("<f4").tofile(data) if raw else np.save(data, array)
    report = import_features(path, data, tmp_path / "store", **options)
    return ClipStore.open(tmp_path / "store"), report


def assert_refused(tmp_path, message, *args, **options):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *args, **options)
    assert not [path for path in tmp_path.iterdir() if "store" in path.name]


@pytest.mark.parametrize("options", [{}, {"kind": "parquet"}, {"raw": True, "width": 3}])
@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_rows_in_any_order_become_clips_with_sorted_frames(tmp_path, monkeypatch, options, block):
    monkeypatch.setattr(module, "BLOCK", block)
    store, _ = run(tmp_path, **options)
    assert store.clips.to_dict("list") == {
        "clip": ["a", "b", "c"],
        "split": ["train", "val", "val"],
        "identity": [0, 0, -1],
    }
    batch = store.batch([0, 1, 2])
    np.testing.assert_array_equal(batch.feature[0], ARRAY[[4, 1]])
    np.testing.assert_array_equal(batch.feature[1], ARRAY[[2, 0]])
    np.testing.assert_array_equal(batch.feature[2, :1], ARRAY[[3]])
    np.testing.assert_allclose(batch.quality[1], [0.1, 0.3], rtol=1e-6)
    assert store.identities.tolist() == ["ann"]


def test_report_says_what_was_found_and_which_score_is_missing(tmp_path):
    store, report = run(tmp_path)
    assert store.batch([0]).det is None
    assert (report.clips, report.nameless) == ({"train": 1, "val": 2}, {"train": 0, "val": 1})
    assert (report.frames, report.width, report.identities, report.absent) == (5, 3, 1, ["det"])
    assert "no column det: the store has no such score" in report.lines()


def test_store_says_where_it_comes_from(tmp_path):
    store, _ = run(tmp_path)
    digest = hashlib.sha256((tmp_path / "table.csv").read_bytes()).hexdigest()
    assert store.meta["simulated"] is False
    assert store.meta["provenance"]["table"] == {
        "name": "table.csv",
        "bytes": (tmp_path / "table.csv").stat().st_size,
        "sha256": digest,
    }
    assert store.meta["provenance"]["array"]["name"] == "array.npy"


def test_whole_number_identities_with_gaps_stay_whole(tmp_path):
    store, _ = run(tmp_path, table_of(identity=[7, 7, 7, None, 7]), kind="parquet")
    assert store.identities.tolist() == ["7"]


def test_someone_may_be_called_na(tmp_path):
    store, _ = run(tmp_path, table_of(identity=["NA", "NA", "NA", "", "NA"]))
    assert store.identities.tolist() == ["NA"] and store.clips["identity"].tolist() == [0, 0, -1]


def test_windows_line_ends_and_mp4_are_read(tmp_path):
    np.save(tmp_path / "array.npy", ARRAY[:2])
    text = "\ufeffclip,frame,identity,split\r\na.mp4,1,ann ,train\r\na.mp4,2,ann,train\r\n\r\n"
    (tmp_path / "table.csv").write_bytes(text.encode())
    import_features(tmp_path / "table.csv", tmp_path / "array.npy", tmp_path / "store")
    store = ClipStore.open(tmp_path / "store")
    assert store.clips["clip"].tolist() == ["a"] and store.identities.tolist() == ["ann"]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"identity": ["ann", "ann", "bob", None, "ann"]}, "clip b has identity bob and ann"),
        ({"identity": ["ann", "ann", None, None, "ann"]}, "clip b has identity nan and ann"),
        ({"split": ["val", "train", "train", "val", "train"]}, "clip b has split train and val"),
        ({"frame": [1, 2, 1, 0, 1]}, "row 3: clip b has frame 1 and 1"),
        ({"frame": [3, 2, -1, 0, 1]}, "row 3: clip b: frame is -1"),
        ({"frame": [3, 2, 1.5, 0, 1]}, "row 3: clip b: frame is 1.5"),
        ({"frame": ["x", 2, 1, 0, 1]}, "row 1: clip b: frame is x"),
        ({"split": ["val", "dev", "val", "val", "train"]}, "row 2: clip 'a': split is 'dev'"),
        ({"clip": ["b", None, "b", "c", "a"]}, "row 2: .*clip is"),
        ({"quality": [0.3, 0.2, np.inf, 0.0, 0.5]}, "row 3: clip b: quality is inf"),
        ({"quality": [0.3, None, 0.1, 0.0, 0.5]}, "row 2: clip a: quality is nan"),
    ],
)
def test_a_bad_cell_is_refused_with_its_clip_and_value(tmp_path, columns, message):
    assert_refused(tmp_path, f"table.csv, .*{message}", table_of(**columns))


def test_a_missing_column_is_named(tmp_path):
    assert_refused(tmp_path, "table.csv: no column identity, split", table_of()[["clip", "frame"]])


@pytest.mark.parametrize("value", [np.nan, np.inf, 65520, -1e6])
def test_a_number_that_float16_cannot_hold_is_refused(tmp_path, value):
    array = ARRAY.copy()
    array[2, 1] = value
    assert_refused(tmp_path, f"array.npy, row 3: clip b, frame 1: feature is {value:.0f}.* at position 1", array=array)


@pytest.mark.parametrize(
    "array, message",
    [
        (ARRAY[:4], "array.npy: 4 rows, but .*table.csv has 5"),
        (ARRAY[0], r"float32 \(3,\), expected floats \(F, D\)"),
        (ARRAY.astype(np.int32), "int32"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(tmp_path, array, message):
    assert_refused(tmp_path, message, array=array)


@pytest.mark.parametrize(
    "width, message",
    [
        (None, "width: None"),
        (0, "width: 0"),
        (4, "array.bin: 60 bytes are not whole rows of 4 float32"),
        (5, "array.bin: 3 rows, but .* has 5"),
    ],
)
def test_a_raw_array_needs_its_width(tmp_path, width, message):
    assert_refused(tmp_path, message, raw=True, width=width)


def test_an_npy_of_another_width_than_given_is_refused(tmp_path):
    assert_refused(tmp_path, r"expected floats \(F, 4\)", width=4)


@pytest.mark.parametrize("name", ["table.csv", "array.npy", "array.bin", "table.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    table_of().to_csv(tmp_path / "table.csv", index=False)
    np.save(tmp_path / "array.npy", ARRAY)
    table = name if name.startswith("table") else "table.csv"
    array = name if name.startswith("array") else "array.npy"
    (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"{name}: missing"):
        import_features(tmp_path / table, tmp_path / array, tmp_path / "store", width=3)


@pytest.mark.parametrize("content", [b"", b"clip,frame\n\xff,1\n", b'a,b\n"'])
def test_a_table_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "table.csv").write_bytes(content)
    np.save(tmp_path / "array.npy", ARRAY)
    with pytest.raises(ValueError, match="table.csv: "):
        import_features(tmp_path / "table.csv", tmp_path / "array.npy", tmp_path / "store")


def test_a_truncated_parquet_is_refused(tmp_path):
    table_of().to_parquet(tmp_path / "table.parquet")
    (tmp_path / "table.parquet").write_bytes((tmp_path / "table.parquet").read_bytes()[:-5])
    np.save(tmp_path / "array.npy", ARRAY)
    with pytest.raises(ValueError, match="table.parquet: not a readable table"):
        import_features(tmp_path / "table.parquet", tmp_path / "array.npy", tmp_path / "store")


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["array.npy", "table.csv"]


@pytest.mark.parametrize("number", [4, 5, 6, 7, 9, 11, 12, 20, 23, 41])
def test_half_the_photographs_go_to_train_in_clips_of_two_to_five(number):
    for seed in range(20):
        table = group_photographs(["ann"] * number, seed)
        assert (table["split"] == "train").sum() == (number + 1) // 2
        assert table.groupby("clip").size().between(2, 5).all()
        assert (table.groupby("clip")["split"].nunique() == 1).all() and (table["identity"] == "ann").all()
        for _, frame in table.groupby("clip")["frame"]:
            assert sorted(frame) == list(range(len(frame)))


def test_the_number_of_clips_varies_and_photographs_are_shuffled():
    tables = [group_photographs(["ann"] * 20, seed) for seed in range(20)]
    assert {table["clip"].nunique() for table in tables} > {5, 6, 7}
    assert len({tuple(table["split"]) for table in tables}) == 20


@pytest.mark.parametrize("number", [1, 2, 3])
def test_too_few_photographs_make_one_distractor(number):
    table = group_photographs(["ann"] * 4 + ["bob"] * number, 0)[4:]
    assert table["clip"].nunique() == 1 and set(table["split"]) == {"val"} and table["identity"].isna().all()


def test_rows_of_the_grouping_are_those_of_the_names():
    names = np.random.default_rng(0).permutation(["ann"] * 7 + ["bob"] * 4 + ["eve"] * 4)
    table = group_photographs(names, 0)
    assert table["identity"].tolist() == names.tolist() and table.index.tolist() == list(range(15))


def test_the_same_seed_groups_alike():
    names = ["ann"] * 9 + ["bob"] * 8
    pd.testing.assert_frame_equal(group_photographs(names, 3), group_photographs(names, 3))
    assert not group_photographs(names, 3).equals(group_photographs(names, 4))


def test_the_number_of_a_clip_tells_nothing_of_its_identity():
    table = group_photographs(np.repeat([f"{person:03d}" for person in range(300)], 4), 0)
    number = table["clip"].str[-5:].astype(int)
    assert abs(np.corrcoef(number, table["identity"].astype(int))[0, 1]) < 0.15  # sd 0.04 over 600 clips
