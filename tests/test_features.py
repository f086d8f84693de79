import gzip
import hashlib
import io
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch

from mmlib.data import features as module
from mmlib.data.calibration import QUALITY_KNOTS
from mmlib.data.features import import_features
from mmlib.data.foreign import open_array
from mmlib.data.store import ClipStore


def table_of(**columns):
    """Two clips of ann in train and val, one of nobody; rows in no order, columns replaced by `columns`."""
    return pd.DataFrame(
        {
            "clip": ["b", "a", "b", "c", "a"],
            "frame": [3, 2, 1, 0, 1],
            "identity": ["ann", "ann", "ann", None, "ann"],
            "split": ["val", "train", "val", "val", "train"],
            "quality": [90.0, 40.0, 10.0, 0.0, 70.0],
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
    report = import_features(str(path), str(data), str(tmp_path / "store"), **options)
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
    np.testing.assert_allclose(batch.quality[1], [10, 90])
    assert store.identities.tolist() == ["ann"]


def test_report_says_what_was_found_and_which_score_is_missing(tmp_path):
    store, report = run(tmp_path)
    assert store.batch([0]).det is None
    assert report.absent == ["column det"] and report.untrained == []
    said = ["train: 1 clips, 0 without an identity, 0 without a face", "val: 2 clips, 1 without an identity, 0"]
    said += ["face: 5 frames of 3 dimensions", "1 identities, 0 without a train clip", "absent: column det"]
    assert all(any(line.startswith(part) for line in report.lines()) for part in said)


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


def cells(kind, *values):
    return pd.array(values, kind) if kind != "categorical" else pd.Categorical(values)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    "written, ann, bob",
    [
        (cells("float64", 7, 7, 7, np.nan, 12), "7", "12"),  # what a missing cell makes of whole numbers
        (cells("float32", 7, 7, 7, np.nan, 12), "7", "12"),
        (cells("Int64", 7, 7, 7, None, 12), "7", "12"),
        (cells("Float64", 7, 7, 7, None, 12), "7", "12"),
        (cells("int64", 7, 7, 7, 0, 12), "7", "12"),
        (cells("float64", -1, -1, -1, np.nan, 2**53 - 1), "-1", str(2**53 - 1)),
        (cells("float64", 7.5, 7.5, 7.5, np.nan, 12), "7.5", "12.0"),
        (cells("categorical", 7.0, 7.0, 7.0, np.nan, 12.0), "7", "12"),
        (cells("categorical", "x", "x", "x", None, "y"), "x", "y"),
        (cells("boolean", True, True, True, None, False), "True", "False"),
        (cells("bool", True, True, True, True, False), "True", "False"),
        (cells("object", "007", "007", "007", None, "12"), "007", "12"),
        (cells("object", "7", "7", "7", None, "12.0"), "7", "12"),
        (cells("object", "v1.0", "v1.0", "v1.0", None, "1.0"), "v1.0", "1.0"),
        (cells("object", "1e5", "1e5", "1e5", None, "2e5"), "1e5", "2e5"),
    ],
    ids=lambda value: getattr(value, "dtype", None) and f"{value.dtype}-{value[0]}",
)
def test_identities_are_the_same_from_every_format(tmp_path, kind, written, ann, bob):
    table = table_of(identity=written, clip=["b", "a", "b", "c", "d"])
    store, _ = run(tmp_path, table, kind=kind)
    named = dict(zip(store.clips["clip"], store.clips["identity"]))
    assert [store.identities[named[clip]] for clip in "abd"] == [ann, ann, bob]
    assert pd.isna(written[3]) == (named["c"] == -1)


def test_the_same_table_in_two_formats_is_one_store(tmp_path):
    table = table_of(identity=[1.0, 1.0, 1.0, np.nan, 1.0], clip=[20.0, 3.0, 20.0, 100.0, 3.0])
    for kind in ("csv", "parquet"):
        (tmp_path / kind).mkdir()
    stores = [run(tmp_path / kind, table, kind=kind)[0] for kind in ("csv", "parquet")]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert stores[0].clips["clip"].tolist() == ["3", "100", "20"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_number_that_a_float_cannot_hold_is_no_name(tmp_path, kind):
    table = table_of(identity=[2.0**53, 7, 2.0**53, np.nan, 7])
    assert_refused(tmp_path, f"table.{kind}: identity 9007199254740992", table, kind=kind)


def test_bytes_are_text(tmp_path):
    store, _ = run(tmp_path, table_of(identity=[b"ann", b"ann", b"ann", None, b"ann"]), kind="parquet")
    assert store.identities.tolist() == ["ann"]


def test_identities_that_no_train_clip_has_are_named(tmp_path):
    store, report = run(tmp_path, table_of(clip=["b", "a", "b", "c", "d"], identity=["bob", "ann", "bob", None, "ann"]))
    assert store.identities.tolist() == ["ann", "bob"] and report.untrained == ["bob"]
    assert any("bob" in line and "ann" not in line for line in report.lines())


def test_a_folder_that_looks_like_a_partition_adds_no_column(tmp_path):
    (tmp_path / "split=dev").mkdir()
    store, _ = run(tmp_path / "split=dev", kind="parquet")
    assert store.clips["split"].tolist() == ["train", "val", "val"]


BLANKS = ["va 00 0", "va\t1", "va\n1", "va\u00a01", "va\u2003x", "\ufeffva"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("name", BLANKS)
@pytest.mark.parametrize("column", ["clip", "identity"])
def test_a_name_with_blanks_is_refused_with_its_row(tmp_path, column, name, kind):
    columns = {"clip": ["b", "a", "b", name, "a"], "identity": ["ann", "ann", "ann", name, "ann"]}
    table = table_of(**{column: columns[column]})
    assert_refused(tmp_path, f"table.{kind}, row 4: .*{column} is {re.escape(repr(name))}", table, kind=kind)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = table_of().assign(other="ann").rename(columns={"other": "identity"})
    assert_refused(tmp_path, "table.csv: two columns are called identity", table)


def test_an_array_of_no_numbers_is_refused(tmp_path):
    np.save(tmp_path / "none.npy", np.empty((5, 0), np.float32))
    with pytest.raises(ValueError, match=r"none.npy: float32 \(5, 0\), expected floats"):
        open_array(tmp_path / "none.npy")


@pytest.mark.parametrize("name", ["", ".mp4", " ", "\u00a0"])
def test_a_clip_without_a_name_is_refused_with_its_row(tmp_path, name):
    assert_refused(tmp_path, "table.csv, row 4: ", table_of(clip=["b", "a", "b", name, "a"]))


def test_an_identity_that_looks_like_a_clip_is_refused(tmp_path):
    assert_refused(tmp_path, "row 4: clip c: identity is 'x.mp4'", table_of(identity=["a", "a", "a", "x.mp4", "a"]))


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
        ({"frame": ["x", 2, 1, 0, 1]}, "row 1: clip b: frame is 'x'"),
        ({"split": ["val", "dev", "val", "val", "train"]}, "row 2: clip a: split is 'dev'"),
        ({"clip": ["b", None, "b", "c", "a"]}, "row 2: .*clip is"),
        ({"quality": [0.3, 0.2, np.inf, 0.0, 0.5]}, "row 3: clip b: quality is inf"),
        ({"quality": [0.3, None, 0.1, 0.0, 0.5]}, "row 2: clip a: quality is nan"),
        ({"det": [0, 0.5, 1, 1.5, 2]}, r"row 4: clip c: det is 1.5; it must be in \[0, 1\]"),
        ({"det": [0, 0.5, -0.1, 1, 1]}, "row 3: clip b: det is -0.1; it must be"),
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


@pytest.mark.parametrize("block", [1, 10**6])
def test_a_row_of_zeros_is_refused(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    array = ARRAY.copy()
    array[2] = 0
    assert_refused(tmp_path, "array.npy, row 3: clip b, frame 1: feature is 0 at every position", array=array)


@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e-6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_too_small_for_float16_are_refused(tmp_path, scale, dtype):
    array = scale * np.random.default_rng(0).normal(size=(5, 3)).astype(dtype)
    assert_refused(tmp_path, "array.npy: too small for float16.* [45] of 5 rows", array=array)


def test_small_frames_among_others_are_stored_and_counted(tmp_path):
    array = ARRAY.copy()
    array[0], array[3] = 1e-9, [1e-6, 0, 0]
    store, report = run(tmp_path, array=array)
    assert (report.damaged, report.vanished) == (2, 1)
    assert not store.batch([1]).feature[0, 1].any() and store.batch([2]).feature[0, 0].tolist() != [0, 0, 0]
    assert any("2" in line and "1" in line for line in report.lines() if "float16" in line)


@pytest.mark.parametrize("array", [ARRAY, ARRAY * 1e-3, (ARRAY * 1e-7).astype(np.float16)])
def test_what_float16_can_hold_is_not_counted(tmp_path, array):
    _, report = run(tmp_path, array=array)
    assert (report.damaged, report.vanished) == (0, 0)


def test_an_array_in_fortran_order_is_read(tmp_path):
    stores = []
    for order in "CF":
        (tmp_path / order).mkdir()
        stores.append(run(tmp_path / order, array=np.array(ARRAY, order=order))[0])
    assert np.load(tmp_path / "F/array.npy").flags.f_contiguous
    assert stores[0].fingerprint == stores[1].fingerprint


def test_a_npy_under_another_name_is_read(tmp_path):
    run(tmp_path)
    (tmp_path / "array.npy").rename(tmp_path / "array.bin")
    import_features(tmp_path / "table.csv", tmp_path / "array.bin", tmp_path / "again")
    assert ClipStore.open(tmp_path / "again").fingerprint == ClipStore.open(tmp_path / "store").fingerprint


def written(save, *arguments):
    file = io.BytesIO()
    save(file, *arguments)
    return file.getvalue()


OTHERS = {
    "array.npz": written(np.savez, ARRAY),
    "array.pt": written(lambda file: torch.save(torch.from_numpy(ARRAY), file)),
    "array.csv": written(np.savetxt, ARRAY),
    "array.pkl": pickle.dumps(ARRAY),
    "array.p": pickle.dumps(ARRAY, protocol=2),
    "array.parquet": written(lambda file: pd.DataFrame(ARRAY, columns=list("abc")).to_parquet(file)),
    "array.npy.gz": gzip.compress(written(np.save, ARRAY)),
    "array.h5": b"\x89HDF\r\n\x1a\n" + bytes(52),  # as long as five rows of three numbers
    "array.npy": written(np.savez, ARRAY),  # not what its name says
    "array.bin": written(lambda file: torch.save(torch.from_numpy(ARRAY), file)),
}


@pytest.mark.parametrize("width", [None, 1, 3])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_array_is_said_with_how_to_save_one(tmp_path, name, width):
    table_of().to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / name).write_bytes(OTHERS[name])
    with pytest.raises(ValueError, match=f"{name}: .*np.save"):
        import_features(tmp_path / "table.csv", tmp_path / name, tmp_path / "store", width=width)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "array, message",
    [
        (ARRAY[:4], "array.npy: 4 rows, but .*table.csv has 5"),
        (ARRAY[0], r"float32 \(3,\), expected floats \(F, D\)"),
        (ARRAY.astype(np.int32), "int32"),
        (np.array([*ARRAY, None], object)[:5], "array.npy: .*objects"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(tmp_path, array, message):
    assert_refused(tmp_path, message, array=array)


@pytest.mark.parametrize(
    "width, message",
    [
        (None, "array.bin: raw numbers, .*--width.*None"),
        (0, "array.bin: raw numbers, .*--width.*0"),
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


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "to_half", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["array.npy", "table.csv"]


@pytest.mark.parametrize(
    "columns", [{"split": ["z" * 10**4] * 5}, {"split": ["val"] * 5, "identity": [*"abcd", "e" * 10**4]}]
)
def test_a_long_value_is_cut_in_a_message(tmp_path, columns):
    with pytest.raises(ValueError, match=r"table.csv, row \d: .* \.\.\.") as caught:
        run(tmp_path, table_of(**columns))
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("scale, mapped", [("rank", "by rank"), ([(0, 0), (1, 200)], [[0, 0], [1, 200]])])
def test_another_scale_of_quality_is_mapped_said_and_kept(tmp_path, scale, mapped):
    store, report = run(tmp_path, table_of(quality=[0.3, 0.2, 0.1, 0.0, 0.5]), quality_scale=scale)
    quality = store.modalities["face"].columns["quality"]  # of frames whose scores are .5, .2, .1, .3, 0
    by_rank = np.interp([0.9, 0.5, 0.3, 0.7, 0.1], *np.array(QUALITY_KNOTS).T)
    np.testing.assert_allclose(quality, by_rank if scale == "rank" else [100, 40, 20, 60, 0])
    assert store.meta["provenance"]["quality"] == {
        "scale": "challenge",
        "mapped": mapped,
        "from": [0, 0.2, 0.5],
        "to": np.quantile(quality, [0, 0.5, 1]).tolist(),
    }
    assert any(line.startswith("quality: 0 to 0.5 (median 0.2), mapped by") for line in report.lines())


def test_scores_in_the_challenges_units_are_kept_and_said(tmp_path):
    for scale in (None, "challenge"):
        store, report = run(tmp_path, quality_scale=scale, overwrite=True)
        assert store.modalities["face"].columns["quality"].tolist() == [70, 40, 10, 90, 0]
        assert store.meta["provenance"]["quality"]["mapped"] == "as given"
        assert any("quality: 0 to 90 (median 40), as given" in line for line in report.lines())


def test_scores_of_another_scale_are_refused_until_it_is_said(tmp_path):
    table = table_of(quality=[0.3, 0.2, 0.1, 0.0, 0.5])
    assert_refused(tmp_path, r"table.csv: quality: scores from 0 to 0.5, .*--quality-scale", table)
    store, _ = run(tmp_path, table, quality_scale="challenge")
    assert store.modalities["face"].columns["quality"].max() == 0.5


def test_a_table_without_quality_has_no_scale(tmp_path):
    table = table_of().drop(columns="quality")
    store, report = run(tmp_path, table)
    assert "quality" not in store.meta["provenance"] and not report.notes
    (tmp_path / "other").mkdir()
    assert_refused(tmp_path / "other", "table.csv: no column quality", table, quality_scale="rank")
