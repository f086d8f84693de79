import base64
import collections
import copyreg
import datetime
import decimal
import errno
import json
import os
import pathlib
import pickle
import sys
import tracemalloc
import types
import warnings
import zlib
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data import write_faces
from mmlib.aggregate import AGGREGATORS
from mmlib.data import iqiyi
from mmlib.data.iqiyi import LAYOUTS, export_folder, import_folder, pickle_path
from mmlib.data.pickles import Spool, read_pickle
from mmlib.data.store import ClipStore

# Faces of three val clips as Python 2.7.18 with numpy 1.16.6 pickled them (cPickle, protocol 2):
# 1 with frames 10 and 12, 3 with none, 11 with frame 11; feature, box and scores as in GENUINE.
PYTHON2 = zlib.decompress(
    base64.b64decode(
        "eNprYKotZNQIFfUM9Iz0jA/zdIkPc/SJNwADw9hCJo3YQmaNUCZDg0KW2EJWDXf7Hwxg4O7AAGPYOUAZLhCRVHf7N2dA4Ky7gx9E"
        "KDmvNLegUi85vyhVL7c0pyQzsagosZIrvig1OT+vuKSoNLmEq5ANooorLwUiW8juzdAaypjUHlTIoeHN6MvA1ApVkVJSWZDKVcgZ"
        "ypRm5M3gzQhUwaXhzRzKaOPn5+f1HwjAhDdDSVJnCAML0AGeo3AUjsKRCkuSUmMLuUHlmFEhT2whL8nlmD9EKIMtA1Eo8UELpQwu"
        "aCHjNQpH4SgcqRBYyKRib0gZx2IVNwQ2sPhjCwVA5ZJhoWBsoZCGOwOsOIIzHMRgDAl4ufQCKnSAB0u5JIxeLlmMwlE4CkcqBJZL"
        "iaV6ADrUEIU="
    )
)
GENUINE = {
    "IQIYI_VID_VAL_0000001": [
        (10, [1.5, 2.0, 30.25, 40.0], 0.9, 60.0, 10),
        (12, [1.5, 2.0, 30.25, 40.0], 0.9, 62.0, 12),
    ],
    "IQIYI_VID_VAL_0000003": [],
    "IQIYI_VID_VAL_0000011": [(11, [0.0, 0.0, 5.5, 6.0], 0.75, -3.5, 0.5)],
}
VAL_TRUTH = "1 VAL_1.mp4 VAL_3.mp4 \n2 \n3 VAL_2.mp4 \n"
TRAIN_TRUTH = "TRAIN_1.mp4 3\nTRAIN_2.mp4 9\n"


def feature(value=1.0, width=512, dtype=np.float16):
    return np.full(width, value, dtype)


def face(frame=10, box=(1.0, 2.0, 3.0, 4.0), det=0.9, quality=50.0, feat=None):
    return [b"%d" % frame, list(box), det, quality, feature(frame) if feat is None else feat]


def dump(path, value, protocol=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol))


@pytest.fixture
def spool(tmp_path):
    with open(tmp_path / "spool", "w+b") as file:
        yield Spool(file, "float16", 512)


@pytest.fixture
def folder(tmp_path):
    """Three clips of train, one unlabelled, and five of val, two of them distractors, one without a face."""
    folder = tmp_path / "official"
    dump(
        pickle_path(folder, "face", "train"),
        {b"TRAIN_1": [face(1), face(1), face(7)], b"TRAIN_2": [face(2)], b"TRAIN_3": [face(3)]},
    )
    dump(
        pickle_path(folder, "face", "val"),
        {b"VAL_%d" % i: [face(i), face(i + 10)] for i in range(1, 5)} | {b"VAL_5": []},
    )
    (folder / "train_gt.txt").write_text(TRAIN_TRUTH)
    (folder / "val_gt.txt").write_text(VAL_TRUTH)
    return folder


def run(folder, **options):
    """Import `folder` to the store beside it."""
    return import_folder(folder, folder.parent / "store", progress=False, **options)


def frames(report):
    return {name: len(modality.feature) for name, modality in report.store.modalities.items()}


def read(path, spool):
    with open(path, "rb", buffering=0) as file:
        return read_pickle(path, file, spool)


def assert_refused(folder, message, **options):
    """The import stops with one line that matches `message`, and leaves nothing."""
    with pytest.raises(ValueError, match=message) as caught:
        run(folder, **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def put_val(folder, clip, value):
    """Replace one clip's value in the val faces."""
    path = pickle_path(folder, "face", "val")
    dump(path, pickle.loads(path.read_bytes()) | {clip: value})


def load_as_published(path, encoding="bytes"):
    """Load as the published loaders do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy has moved the functions that old pickles name
        with open(path, "rb") as file:
            return pickle.load(file, encoding=encoding)


# What is read


def test_identities_are_those_of_val_in_order_then_those_of_train(folder):
    run(folder)
    assert ClipStore.open(folder.parent / "store").identities.tolist() == ["1", "2", "3", "9"]


def test_clips_get_split_identity_and_frames(folder):
    run(folder)
    store = ClipStore.open(folder.parent / "store")
    assert store.clips["clip"].tolist() == [
        "TRAIN_1",
        "TRAIN_2",
        "TRAIN_3",
        "VAL_1",
        "VAL_2",
        "VAL_3",
        "VAL_4",
        "VAL_5",
    ]
    assert store.clips["identity"].tolist() == [2, 3, -1, 0, 2, 0, -1, -1]
    faces = store.modalities["face"]
    assert faces.count.tolist() == [3, 1, 1, 2, 2, 2, 2, 0]
    batch = store.batch([0, 4])
    assert batch.feature[0, :, 0].tolist() == [1, 1, 7] and batch.feature[1, :2, 511].tolist() == [2, 12]
    assert faces.columns["frame"][batch.rows[0]].tolist() == [1, 1, 7]
    assert faces.columns["box"][0].tolist() == [1, 2, 3, 4]
    assert store.meta["simulated"] is False


def test_report_counts_what_was_found(folder):
    report = run(folder)
    assert (report.refused, report.damaged) == ({}, 0)
    assert report.absent[:3] == ["img/", "feat/face_test.pickle", "feat/head_train.pickle"]
    assert report.lines()[:3] == [
        "train: 3 clips, 1 without an identity, 0 without a face",
        "val: 5 clips, 2 without an identity, 1 without a face",
        "face: 13 frames of 512 dimensions",
    ]


def test_identities_that_no_train_clip_has_are_counted_and_named(folder):
    report = run(folder)
    assert report.untrained == ["1", "2"]
    assert "4 identities, 2 without a train clip: 1, 2" in report.lines()


def scenes(*values):
    return {b"VAL_1": [(index, feature(value, 2048, np.float32)) for index, value in enumerate(values)]}


def test_scenes_that_float16_loses_are_stored_and_counted(folder):
    dump(pickle_path(folder, "scene", "val"), scenes(1e-9, 1e-6, 0, 1, 1, 1, 1e-3))
    report = run(folder)
    assert (report.damaged, report.vanished) == (2, 1)
    assert any("2 frames, 1 of them" in line for line in report.lines())
    assert ClipStore.open(folder.parent / "store").modalities["scene"].feature[0].tolist() == [0] * 2048


def test_scenes_of_which_float16_loses_most_are_refused(folder):
    dump(pickle_path(folder, "scene", "val"), scenes(1e-9, 1e-8, 0, 1))
    assert_refused(folder, "scene_val.pickle: too small for float16.* 2 of 4 rows")


def test_an_identity_that_cannot_be_written_back_is_refused_before_any_pickle_is_read(folder, monkeypatch):
    monkeypatch.setattr(iqiyi, "read_pickle", lambda *_: pytest.fail("read for nothing"))
    (folder / "train_gt.txt").write_text(TRAIN_TRUTH + "TRAIN_3.mp4 \ufeff7\n")
    assert_refused(folder, r"identity '\\ufeff7'")


def test_a_pickle_of_python2_is_read(folder):
    pickle_path(folder, "face", "val").write_bytes(PYTHON2)
    (folder / "val_gt.txt").write_text("1 IQIYI_VID_VAL_0000011.mp4 \n3\n")
    run(folder)
    store = ClipStore.open(folder.parent / "store")
    val = store.select("val")
    assert store.clips["clip"].iloc[val].tolist() == list(GENUINE)
    faces = store.modalities["face"]
    for clip, expected in zip(val, GENUINE.values()):
        rows = slice(faces.start[clip], faces.start[clip] + faces.count[clip])
        read = [faces.columns[name][rows].tolist() for name in ("frame", "box", "det", "quality")]
        assert list(zip(*read)) == [record[:4] for record in expected]
        assert (faces.feature[rows] == np.array([record[4] for record in expected]).reshape(-1, 1)).all()


def test_other_modalities_and_the_test_split_are_taken_where_present(folder):
    dump(pickle_path(folder, "head", "train"), {b"TRAIN_1": [face(5)[:3] + [feature(5)]]})
    dump(pickle_path(folder, "body", "val"), {b"VAL_5": [face(6)[:2] + [feature(6)]]})
    dump(pickle_path(folder, "audio", "val"), {b"VAL_5": feature(7)})
    dump(pickle_path(folder, "scene", "val"), {b"VAL_6": [(3, feature(0.1, 2048, np.float32))]})
    dump(pickle_path(folder, "face", "test"), {b"TEST_1": [face(9)]})
    report = run(folder)
    store = ClipStore.open(folder.parent / "store")
    assert frames(report) == {"face": 14, "head": 1, "body": 1, "audio": 1, "scene": 1}
    assert store.clips["split"].value_counts().to_dict() == {"train": 3, "val": 6, "test": 1}
    names = store.clips["clip"].to_numpy(object)
    assert {m: names[store.select(having=m)].tolist() for m in ("head", "body", "audio", "scene")} == {
        "head": ["TRAIN_1"],
        "body": ["VAL_5"],
        "audio": ["VAL_5"],
        "scene": ["VAL_6"],
    }
    assert store.modalities["scene"].feature[0, 0] == np.float16(0.1)
    assert store.modalities["scene"].columns["frame"].tolist() == [3]
    assert list(store.modalities["audio"].columns) == []


def test_clip_names_may_carry_mp4(folder):
    dump(pickle_path(folder, "face", "train"), {b"TRAIN_1.mp4": [face(1)], "TRAIN_2": [face(1)]})
    run(folder)
    assert ClipStore.open(folder.parent / "store").clips["clip"].tolist()[:2] == ["TRAIN_1", "TRAIN_2"]


@pytest.mark.parametrize("where", ["faces", "scenes", "truth", "nowhere", "everywhere"])
def test_mp4_means_the_same_in_faces_scenes_and_truth(folder, where):
    ends = {place: ".mp4" * (where in (place, "everywhere")) for place in ("faces", "scenes", "truth")}
    for split, clips in (("train", 3), ("val", 4)):
        names = [f"{split.upper()}_{number}" for number in range(1, clips + 1)]
        faces = {(name + ends["faces"]).encode(): [face(2)] for name in names}
        scene = {name + ends["scenes"]: [(3, feature(0.1, 2048, np.float32))] for name in names}
        dump(pickle_path(folder, "face", split), faces)
        dump(folder / f"scene_infos_{split}.pickle", scene, 4)
    (folder / "train_gt.txt").write_text(TRAIN_TRUTH.replace(".mp4", ends["truth"]))
    (folder / "val_gt.txt").write_text(VAL_TRUTH.replace(".mp4", ends["truth"]))
    store = run(folder).store
    assert store.clips["clip"].tolist() == ["TRAIN_1", "TRAIN_2", "TRAIN_3", "VAL_1", "VAL_2", "VAL_3", "VAL_4"]
    assert store.clips["identity"].tolist() == [2, 3, -1, 0, 2, 0, -1]
    assert {name for name, of in store.modalities.items() if (of.count == 1).all()} == {"face", "scene"}


def rewrap(kind, clips):
    """Give clips of faces another outside, which holds the same."""
    if kind in (collections.OrderedDict, dict):
        return kind(clips)
    if kind is collections.defaultdict:
        return collections.defaultdict(list, clips)
    return {clip: [kind(*record) for record in records] for clip, records in clips.items()}


def with_scalars(frame, box, det, quality, feat):
    return [np.int64(frame), [np.float32(x) for x in box], np.float32(det), np.float64(quality), feat]


def with_arrays(frame, box, det, quality, feat):
    return [np.array(frame.decode()), np.array(box, np.float32), det, np.array([quality]), feat]


def with_texts(frame, box, det, quality, feat):
    return (np.bytes_(frame), tuple(box), np.float64(det), quality, feat)


def turned(frame, box, det, quality, feat):
    return [frame.decode(), np.array(box, ">f8"), np.array(det, ">f4"), quality, feat.astype(">f2")]


def mapped(frame, box, det, quality, feat):
    return [np.str_(frame.decode()), box, det, quality, feat.view(np.memmap)]


def boxed(frame, box, det, quality, feat):
    return [float(frame), [np.array(box[0]), np.array([box[1]]), np.longdouble(box[2]), box[3]], det, quality, feat]


def as_column(frame, box, det, quality, feat):
    return [np.float32(frame), np.array(box).reshape(4, 1), det, quality, feat]


def of_objects(frame, box, det, quality, feat):
    return [frame, np.array(box, object), det, quality, feat]


def read_only(frame, box, det, quality, feat):
    feat.flags.writeable = False
    return [int(frame), box, det, quality, feat]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "kind",
    [
        dict,
        collections.OrderedDict,
        collections.defaultdict,
        with_scalars,
        with_arrays,
        with_texts,
        turned,
        mapped,
        boxed,
        as_column,
        of_objects,
        read_only,
    ],
)
def test_what_a_modern_python_writes_reads_the_same(tmp_path, folder, kind, protocol):
    clips = {b"VAL_%d" % i: [face(i, det=0.5), face(i + 10, det=0.25)] for i in range(1, 5)} | {b"VAL_5": []}
    dump(pickle_path(folder, "face", "val"), rewrap(kind, clips), protocol)
    run(folder)
    store = ClipStore.open(folder.parent / "store")
    faces = store.modalities["face"]
    rows = np.concatenate([np.arange(n) + s for s, n in zip(faces.start, faces.count)][3:])
    assert store.clips["clip"].tolist()[3:] == [clip.decode() for clip in clips]
    assert faces.count.tolist()[3:] == [2, 2, 2, 2, 0]
    records = [record for of in clips.values() for record in of]
    for name, of in zip(("frame", "box", "det", "quality", "feature"), zip(*records)):
        read = faces.feature if name == "feature" else faces.columns[name]
        np.testing.assert_array_equal(read[rows], np.array(list(map(int, of)) if name == "frame" else of))


@pytest.mark.parametrize("factory", [int, dict, set, object])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_a_defaultdict_would_make_is_no_reason_to_refuse_it(folder, factory, protocol):
    clips = collections.defaultdict(factory, {b"VAL_%d" % i: [face(i)] for i in range(1, 6)})
    dump(pickle_path(folder, "face", "val"), clips, protocol)
    assert frames(run(folder)) == {"face": 5 + 5}


@pytest.mark.parametrize("protocol", [2, 5])
def test_an_object_may_be_shared_across_a_whole_pickle(folder, protocol):
    box, feat, last = [1.0, 2.0, 3.0, 4.0], feature(3), face(20)
    last[1] = box
    many = [face(10, box=box) for _ in range(17_000)]
    many[0][1] = box
    clips = {b"VAL_1": [face(1, feat=feat)], b"VAL_2": many, b"VAL_3": [last], b"VAL_4": [face(1, feat=feat)]}
    dump(pickle_path(folder, "face", "val"), clips, protocol)
    assert frames(run(folder)) == {"face": 5 + 17_003}
    store = ClipStore.open(folder.parent / "store")
    batch = store.batch([3, 5, 6])
    assert batch.feature[:, 0, 0].tolist() == [3, 20, 3]
    assert store.modalities["face"].columns["box"][batch.rows[1, 0]].tolist() == box


@pytest.mark.parametrize("written", ["python 2", "protocol 5", "exported"])
def test_reading_holds_no_features_in_memory(tmp_path, spool, written):
    clips = {f"VAL_{i}": [face(10 + j) for j in range(20)] for i in range(200)}
    path = tmp_path / "faces.pickle"
    if written == "python 2":
        write_faces(path, clips.items())
    elif written == "exported":
        iqiyi.write_pickle(path, ((clip.encode(), records) for clip, records in clips.items()))
    else:
        dump(path, {clip.encode(): records for clip, records in clips.items()}, 5)
    del clips
    tracemalloc.start()
    try:
        loaded, foreign = read(path, spool)
        peak = tracemalloc.get_traced_memory()[1] - 2 * 2**20  # the files' own buffers
    finally:
        tracemalloc.stop()
    assert len(loaded) == 200 and spool.rows == 4000 and not foreign
    assert peak / spool.rows < 1000  # the feature alone takes 1024


# What is refused: pickles as programs


def short(text):
    return b"\x8c%c" % len(text) + text


def attacks(canary):
    command = f"touch {canary}".encode()
    argument = b"U%c" % len(command) + command
    return {
        "os.system": b"\x80\x02cos\nsystem\n" + argument + b"\x85R.",
        "posix.system": b"\x80\x04" + short(b"posix") + short(b"system") + b"\x93" + argument + b"\x85R.",
        "builtins.eval": b"\x80\x04"
        + short(b"builtins")
        + short(b"eval")
        + b"\x93"
        + short(b"open('" + str(canary).encode() + b"', 'w')")
        + b"\x85R.",
        "__builtin__.eval": b"\x80\x02c__builtin__\neval\n" + argument + b"\x85R.",
        "subprocess.Popen": b"(" + argument + b"isubprocess\nPopen\n.",
        "numpy.load": b"\x80\x02cnumpy\nload\n" + argument + b"\x85R.",
        "numpy.core.multiarray._reconstruct.__globals__": b"\x80\x04"
        + short(b"numpy.core.multiarray")
        + short(b"_reconstruct.__globals__")
        + b"\x93.",
        "copyreg._reconstructor": b"\x80\x02ccopyreg\n_reconstructor\n.",
    }


@pytest.mark.parametrize("name", attacks("x"))
def test_names_outside_the_allow_list_are_refused_and_nothing_runs(folder, tmp_path, name):
    canary = tmp_path / "official/canary"
    pickle_path(folder, "face", "val").write_bytes(attacks(canary)[name])
    assert_refused(folder, rf"face_val_v2.pickle: .*{name.replace('__builtin__', 'builtins')}.*nothing was run")
    assert not canary.exists()


@pytest.mark.parametrize("name", attacks("x"))
@pytest.mark.parametrize("skip_bad_records", [False, True])
def test_a_name_outside_of_all_records_is_refused_too(folder, name, skip_bad_records):
    canary = folder / "canary"
    popped = attacks(canary)[name].removesuffix(b".") + b"0"
    pickle_path(folder, "face", "val").write_bytes(popped + PYTHON2[2:])
    (folder / "val_gt.txt").write_text("1 IQIYI_VID_VAL_0000011.mp4 \n3\n")
    assert_refused(
        folder,
        rf"face_val_v2.pickle: .*{name.replace('__builtin__', 'builtins')}.*nothing was run",
        skip_bad_records=skip_bad_records,
    )
    assert not canary.exists()


class Attack:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Method:
    """Is made by a method."""

    def __reduce__(self):
        return collections.Counter.fromkeys, ("ab",)


FOREIGN = {
    "method": Method(),
    "date": datetime.date(2019, 1, 1),
    "Decimal": decimal.Decimal("0.5"),
    "deque": collections.deque([1.0, 2.0, 3.0, 4.0]),
    "SimpleNamespace": types.SimpleNamespace(x=1.0),
    "PurePosixPath": pathlib.PurePosixPath("a/b"),
    "matrix": np.matrix([1.0, 2.0, 3.0, 4.0]),
    "datetime64": np.datetime64(5, "s"),
    "mkdir": Attack,
    "type": int,
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", FOREIGN)
def test_something_else_in_a_record_is_not_made_and_its_record_is_named(folder, name, protocol):
    canary = folder / "canary"
    value = Attack(canary) if name == "mkdir" else FOREIGN[name]
    clips = {b"VAL_%d" % i: [face(i)] for i in range(1, 6)} | {
        b"VAL_2": [face(2), [b"3", value, *face()[2:]], face(99)]
    }
    dump(pickle_path(folder, "face", "val"), clips, protocol)
    shown = {"method": "(getattr|Counter.fromkeys)", "type": "(long|int)", "datetime64": "numpy.<M8"}.get(name, name)
    assert_refused(folder, rf"clip VAL_2, record 2 \(frame b'3'\): box .*{shown}.*--skip-bad-records")
    assert frames(run(folder, skip_bad_records=True)) == {"face": 5 + 6}
    assert not canary.exists()


def known_objects():
    """All that a pickle may get that is not plain: programs that leave one on the stack."""
    names = ["numpy ndarray", "numpy dtype", "_codecs encode", "__builtin__ list", "collections OrderedDict"]
    names += [f"numpy.core.multiarray {name}" for name in ("_reconstruct", "scalar")] + [
        "numpy.core.numeric _frombuffer"
    ]
    programs = {name: b"c" + name.replace(" ", "\n").encode() + b"\n" for name in [*names, "os environ"]}
    dtype = programs["numpy dtype"] + b"U\x02f2K\0K\1\x87R"
    array = programs[names[5]] + programs["numpy ndarray"] + b"K\0\x85U\x01b\x87R"
    return programs | {"a dtype": dtype, "an array": array, "a foreign object": programs["os environ"] + b")R"}


def everything_of_ours():
    """Every attribute of every module of ours, and of its classes and functions, as it is now."""
    found = {}
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "mmlib"]:
        for name, value in list(vars(module).items()):
            found[module.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {(module.__name__, name, key): id(of) for key, of in vars(value).items()}
            if isinstance(value, types.FunctionType):
                inside = (value.__defaults__, value.__kwdefaults__, value.__code__, dict(vars(value)))
                found[module.__name__, name, "inside"] = inside
    return found


@pytest.mark.parametrize("kind", known_objects())
def test_a_pickle_changes_nothing_of_ours(tmp_path, spool, kind):
    path, before, environment = tmp_path / "p", everything_of_ours(), dict(os.environ)
    states = [b"K\1b", b"K\1a", b"(K\1K\2e", b"K\1K\2s", b"(K\1K\2u"]
    for name in ("__dict__", "__defaults__", "__kwdefaults__", "__class__", "_call", "code", "x"):
        slot = b"}X" + len(name).to_bytes(4, "little") + name.encode() + b"}s"
        states += [b"N" + slot + b"\x86b", slot + b"b"]
    for state in states:
        path.write_bytes(b"\x80\x02" + known_objects()[kind] + state + b"0}.")
        try:
            assert read(path, spool)[0] == {}
        except ValueError as error:
            assert "not a pickle of features" in str(error)
    assert everything_of_ours() == before and dict(os.environ) == environment
    path.write_bytes(PYTHON2)
    assert [clip.decode() for clip in read(path, spool)[0]] == list(GENUINE)


def test_extension_codes_lead_to_nothing_live_and_leave_nothing(folder, tmp_path):
    canary = folder / "canary"
    code = 0x7FFFFFF0
    live = b"\x80\x02\x84" + code.to_bytes(4, "little")
    copyreg.add_extension("os", "mkdir", code)
    try:
        assert pickle.loads(live + b".") is os.mkdir  # and from now on it is cached
        path = pickle_path(folder, "face", "val")
        path.write_bytes(live + b"X" + len(str(canary)).to_bytes(4, "little") + str(canary).encode() + b"\x85R.")
        assert_refused(folder, "os.mkdir")
        assert not canary.exists()
        assert pickle.loads(live + b".") is os.mkdir
    finally:
        copyreg.remove_extension("os", "mkdir", code)


def test_memory_that_runs_out_is_no_fault_of_the_file(folder, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Spool, "add", fail)
    with pytest.raises(MemoryError, match="face_train_v2.pickle"):
        run(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_list_that_holds_itself_is_refused_at_once(folder):
    wide = []
    wide.extend([wide] * 1000)
    put_val(folder, b"VAL_2", [face(2), wide])
    assert frames(run(folder, skip_bad_records=True)) == {"face": 5 + 7}


def test_the_attack_would_run_if_it_were_let(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(attacks(canary)["os.system"], encoding="bytes")
    assert canary.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02U\x01aQ.",
        b"Pname\n.",  # persistent ids
        b"\x80\x02cnumpy\nndarray\n)R.",  # the stand-ins called in unexpected ways
        b"\x80\x02cnumpy\nndarray\n)\x81.",
        b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",
        b"\x80\x02cnumpy\ndtype\n)R.",
        b"\x80\x02cnumpy\ndtype\nU\x02f2\x85R}b.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00U\x01b\x87R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00U\x01b\x87RK\x01b.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86R.",
        b"\x80\x02h\x05.",
        b"\x80\x02}K\x01s.",
        b"\x80\x02]]s.",
        b"\xff\xff",
        b"",
        b"\x80\x63.",
        b"not a pickle",
    ],
)
def test_a_pickle_that_makes_no_sense_is_one_clear_error(folder, program):
    pickle_path(folder, "face", "val").write_bytes(program)
    assert_refused(folder, "face_val_v2.pickle: ")


@pytest.mark.parametrize(
    "value, named",
    [
        ([], r"holds \[\], not a dict"),
        ({1: []}, "clip name 1 is not printable"),
        ({b"\xff": []}, "is not printable"),
        ({b"A\nB": []}, r"clip name b'A\\nB' is not printable text without spaces"),
        ({b"VAL_1": [], b"VAL_1.mp4": []}, "clip VAL_1 is named twice"),
    ],
)
def test_a_pickle_of_something_else_is_refused(folder, value, named):
    dump(pickle_path(folder, "face", "val"), value)
    assert_refused(folder, f"face_val_v2.pickle: .*{named}")


@pytest.mark.parametrize("kept", [1, 2, 40, 300, -1025, -1])
def test_a_truncated_pickle_is_refused_with_its_length(folder, kept):
    path = pickle_path(folder, "face", "val")
    path.write_bytes(PYTHON2[:kept])
    assert_refused(folder, rf"face_val_v2.pickle: cut short at byte {len(PYTHON2[:kept])}")


def test_bytes_after_the_pickle_are_refused(folder):
    pickle_path(folder, "face", "val").write_bytes(PYTHON2 + b"xyz")
    assert_refused(folder, "3 bytes after the pickle's end")


@pytest.mark.parametrize("between", [[], [("B", 3)]])
def test_a_clip_named_twice_in_one_pickle_is_refused(folder, between):
    clips = [("X", 1), ("A", 2), *between, ("A", 1), ("Z", 1)]
    write_faces(pickle_path(folder, "face", "val"), [(clip, [face(12)] * frames) for clip, frames in clips])
    assert_refused(
        folder,
        "val_v2.pickle: 2 features are in no record of a clip, as if one were named twice: A "
        ".--skip-bad-records leaves them out.$",
    )


@pytest.mark.parametrize("between", [[], [("B", 3)]])
def test_of_a_clip_named_twice_the_last_can_be_kept(folder, between):
    clips = [("VAL_1", 1), ("VAL_2", 2), *between, ("VAL_2", 1), ("VAL_3", 1)]
    write_faces(pickle_path(folder, "face", "val"), [(clip, [face(12)] * frames) for clip, frames in clips])
    report = run(folder, skip_bad_records=True)
    [(number, first)] = report.refused.values()
    assert number == 2 and first.endswith("named twice: VAL_2")
    assert report.store.modalities["face"].count[-len(clips) + 1 :].sum() == 3 + sum(frames for _, frames in between)


def test_two_keys_of_one_clip_are_both_shown(folder):
    dump(pickle_path(folder, "face", "val"), {b"VAL_1": [face(1)], "VAL_1": [], b"VAL_2": []}, 4)
    assert_refused(folder, "clip VAL_1 is named twice, as b'VAL_1' and 'VAL_1'$")


@pytest.mark.parametrize("name", ["feat/head_train.pickle", "feat/face_test.pickle", "scene_infos_test.pickle"])
def test_a_pickle_without_clips_counts_as_absent(folder, name):
    dump(folder / name, {})
    report = run(folder)
    assert frames(report) == {"face": 13} and f"{name} (no clips)" in report.absent


def test_features_of_no_clip_are_counted(folder):
    one = pickle.dumps(feature(), 2)[2:-1] + pickle.POP
    dump(folder / "feat/body_val.pickle", {})
    (folder / "feat/body_val.pickle").write_bytes(b"\x80\2" + one + b"}.")
    assert_refused(
        folder, "body_val.pickle: 1 features are in no record of a clip, .* .--skip-bad-records leaves them out"
    )
    report = run(folder, skip_bad_records=True)
    assert [n for n, _ in report.refused.values()] == [1] and frames(report) == {"face": 13}


def test_faces_without_clips_are_refused(folder):
    for split in ("train", "val"):
        dump(pickle_path(folder, "face", split), {})
    assert_refused(folder, "official/feat: no clip in the face pickles of train and val")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupt_within_c_code_is_no_fault_of_the_file(folder, monkeypatch, error):
    def fail(*_):  # all that C code says
        raise SystemError("a call returned a result with an exception set") from error

    monkeypatch.setattr(Spool, "add", fail)
    with pytest.raises(type(error)):
        run(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# What is refused: records

NAN, INF = float("nan"), float("inf")
BAD_RECORDS = {
    "dtype": (face(feat=feature(dtype=np.float32)), r"feature is not float16 \(512,\).*: <f4 \(512,\) of 2048 bytes"),
    "width": (face(feat=feature(width=256)), r"<f2 \(256,\) of 512 bytes"),
    "matrix": (face(feat=feature().reshape(1, 512)), r"<f2 \(1, 512\)"),
    "objects": (face(feat=np.array([None])), r".O8 \(1,\)"),
    "no array": (face(feat=[1.0]), r"feature is not .*: \[1.0\]"),
    "nan": (face(feat=np.array([0] * 7 + [NAN] + [0] * 504, np.float16)), "nan at position 7"),
    "infinite": (face(feat=feature(-INF)), "-inf at position 0"),
    "negative box": (face(box=(-1.5, 2.0, 3.0, 4.0)), r"box is not 0 <= x1 .*\[-1.5, 2.0, 3.0, 4.0\]"),
    "reversed box": (face(box=(1.0, 5.0, 3.0, 4.0)), r"\[1.0, 5.0, 3.0, 4.0\]"),
    "nan box": (face(box=(NAN, 2.0, 3.0, 4.0)), r"\[nan, 2.0"),
    "endless box": (face(box=(1.0, 2.0, INF, 4.0)), r"inf, 4.0\]"),
    "box of many digits": (face(box=(1.0, 2.0, 10**5000, 4.0)), "box is not"),
    "feature as box": ([b"10", feature(), *face()[2:]], "box is not .*an array"),
    "box of three as array": (face()[:1] + [np.ones(3)] + face()[2:], r"box is not .*: \[1.0, 1.0, 1.0\]"),
    "score of many digits": (face(det=10**5000), "det is not"),
    "frame of many digits": ([b"9" * 5000, *face()[1:]], "frame is not"),
    "huge box": (face(box=(1.0, 2.0, 10**400, 4.0)), "box is not"),
    "short box": (face(box=(1.0, 2.0, 3.0)), r"\[1.0, 2.0, 3.0\]"),
    "text box": (face(box=(1.0, 2.0, 3.0, b"4")), "b'4'"),
    "integer score": (face(det=1), "det is not a finite float: 1"),
    "infinite score": (face(det=INF), "det is not a finite float: inf"),
    "no score": (face(det=None), "det is not a finite float: None"),
    "frame": ([b"ten", *face()[1:]], "frame is not a number from 0: b'ten'"),
    "negative frame": (face(-3), "frame is not a number from 0: b'-3'"),
    "float frame": ([10.5, *face()[1:]], "frame is not a number from 0: 10.5"),
    "short record": (face()[:4], r"record without its 5 fields: \[b'10'"),
    "no record": (b"face", "record without its 5 fields: b'face'"),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_a_bad_record_is_refused_with_file_clip_and_value(folder, kind):
    record, value = BAD_RECORDS[kind]
    put_val(folder, b"VAL_2", [face(2), record, face(99)])
    assert_refused(folder, rf"face_val_v2.pickle: clip VAL_2, record 2.*: .*{value}")


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_bad_records_can_be_skipped_and_are_counted(folder, kind):
    record, value = BAD_RECORDS[kind]
    put_val(folder, b"VAL_2", [face(2), record, face(99)])
    report = run(folder, skip_bad_records=True)
    [(number, first)] = report.refused.values()
    assert number == 1 and "clip VAL_2, record 2" in first
    store = ClipStore.open(folder.parent / "store")
    clip = store.clips["clip"].tolist().index("VAL_2")
    assert store.batch([clip]).feature[0, :, 0].tolist() == [2, 99]
    assert sum(line.startswith("refused: 1 records") for line in report.lines()) == 1


def test_frames_out_of_order_are_refused(folder):
    put_val(folder, b"VAL_2", [face(5), face(12), face(5)])
    assert_refused(folder, r"val_v2.pickle: clip VAL_2, record 3 \(frame b'5'\): frames out of order: 5 after 12")


def stored(report, clip, *names):
    """Return columns of the faces of a clip, and the first dimension of their features."""
    faces = report.store.modalities["face"]
    at = report.store.clips["clip"].tolist().index(clip)
    rows = slice(faces.start[at], faces.start[at] + faces.count[at])
    return [*(faces.columns[name][rows].tolist() for name in names), faces.feature[rows, 0].tolist()]


@pytest.mark.parametrize("block", [2, iqiyi.BLOCK])
def test_frames_out_of_order_are_sorted_where_bad_records_are_skipped(folder, monkeypatch, block):
    monkeypatch.setattr(iqiyi, "BLOCK", block)
    put_val(folder, b"VAL_1", [face(30), face(10), face(20)])
    put_val(folder, b"VAL_2", [face(5), face(12), face(7), face(12), face(11), face(13)])
    report = run(folder, skip_bad_records=True)
    assert report.refused == {} and frames(report) == {"face": 5 + 3 + 6 + 4}
    assert stored(report, "VAL_1", "frame") == [[10, 20, 30]] * 2
    assert stored(report, "VAL_2", "frame") == [[5, 7, 11, 12, 12, 13]] * 2
    assert stored(report, "VAL_3", "frame") == [[3, 13]] * 2
    [(number, first)] = report.mended.values()
    assert number == 2 and first.endswith("face_val_v2.pickle: clip VAL_1, frames b'30', b'10', b'20'")
    assert [line for line in report.lines() if line.startswith("mended: 2 clips had frames out of order")]


def test_a_bad_record_among_frames_out_of_order_keeps_its_number(folder):
    put_val(folder, b"VAL_2", [face(30), face(20, det=1), [b"x", *face()[1:]], face(10)])
    report = run(folder, skip_bad_records=True)
    assert stored(report, "VAL_2", "frame") == [[10, 30]] * 2
    det, frame = report.refused["det is not a finite float"], report.refused["frame is not a number from 0"]
    assert "VAL_2, record 2 (frame b'20')" in det[1] and "VAL_2, record 3 (frame b'x')" in frame[1]


def test_scenes_out_of_order_are_sorted_as_the_released_code_reads_them(folder):
    dump(pickle_path(folder, "scene", "val"), {"VAL_1": [(i, feature(i, 2048, np.float32)) for i in (7, 3)]})
    report = run(folder)
    scene = report.store.modalities["scene"]
    assert (scene.columns["frame"].tolist(), scene.feature[:, 0].tolist()) == ([3, 7], [3, 7])
    assert "clip VAL_1, frames 7, 3" in report.mended["clips had frames out of order, which were sorted"][1]


@pytest.mark.parametrize("name", ["det", "quality"])
def test_a_score_that_is_nan_is_stored_as_zero_and_counted(folder, name):
    put_val(folder, b"VAL_2", [face(2), face(7, **{name: NAN}), face(8, **{name: NAN}), face(99)])
    report = run(folder)
    values, _ = stored(report, "VAL_2", name)
    assert values[1:3] == [0, 0] and 0 not in (values[0], values[3]) and report.refused == {}
    [(number, first)] = report.mended.values()
    assert number == 2 and first.endswith("face_val_v2.pickle: clip VAL_2, record 2 (frame b'7')")
    assert any(line.startswith(f"mended: 2 records whose {name} is NaN") for line in report.lines())


@pytest.mark.parametrize("aggregator", ["quality", "best half", "learned scores", "attention + scores"])
def test_a_frame_of_unknown_quality_makes_no_clip_feature_nan(folder, aggregator):
    put_val(folder, b"VAL_2", [face(2), face(3, quality=NAN)])
    batch = run(folder).store.batch([4])
    pooled = AGGREGATORS[aggregator](512)(batch.feature, batch.mask, batch.quality, batch.det)
    assert pooled.isfinite().all()
    if aggregator == "quality":
        assert pooled[0, 0] == 2


@pytest.mark.parametrize("path", ["feat", "scene_feat", "."])
def test_scenes_are_found_under_the_released_name(folder, path):
    dump(folder / path / "scene_infos_val.pickle", {"VAL_1.mp4": [(3, feature(2, 2048, np.float32))]}, 3)
    report = run(folder)
    assert frames(report) == {"face": 13, "scene": 1} and "feat/scene_val.pickle" not in report.absent
    assert report.store.clips["clip"].iloc[report.store.select(having="scene")].tolist() == ["VAL_1"]
    assert "scene_infos_val.pickle" in report.store.meta["provenance"]["bytes"]


def test_two_files_of_one_kind_of_scenes_are_refused(folder):
    for path in (pickle_path(folder, "scene", "val"), folder / "scene_infos_val.pickle"):
        dump(path, scenes(1))
    assert_refused(folder, "scene_infos_val.pickle: feat/scene_val.pickle has scene features of val too; keep one")


def test_a_clip_that_is_no_list_is_refused(folder):
    put_val(folder, b"VAL_2", None)
    assert_refused(folder, "clip VAL_2, record 1: record without its 5 fields: None")


@pytest.mark.parametrize("chunk, block", [(1, 100), (100, 1), (2, 3)])
def test_checks_hold_across_chunks_of_clips_and_blocks_of_records(folder, monkeypatch, chunk, block):
    monkeypatch.setattr(iqiyi, "CHUNK", chunk)
    monkeypatch.setattr(iqiyi, "BLOCK", block)
    put_val(folder, b"VAL_3", [face(9), face(box=(-1.0, 0.0, 1.0, 1.0))])
    report = run(folder, skip_bad_records=True)
    assert frames(report) == {"face": 12}
    faces = ClipStore.open(folder.parent / "store").modalities["face"]
    assert faces.count.tolist() == [3, 1, 1, 2, 2, 1, 2, 0]


def test_a_scene_feature_beyond_float16_is_refused(folder):
    dump(pickle_path(folder, "scene", "val"), {b"VAL_1": [(3, feature(70000, 2048, np.float32))]})
    assert_refused(folder, "scene_val.pickle: clip VAL_1, record 1 .*70000.0 at position 0")


def test_an_audio_clip_must_be_one_array(folder):
    dump(pickle_path(folder, "audio", "val"), {b"VAL_1": [feature()]})
    assert_refused(folder, "audio_val.pickle: clip VAL_1, record 1: feature is not float16")


# What is refused: files against each other


@pytest.mark.parametrize("name", ["feat/face_train_v2.pickle", "feat/face_val_v2.pickle", "train_gt.txt", "val_gt.txt"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert_refused(folder, f"{name}: missing")


def test_a_clip_in_two_splits_is_refused(folder):
    dump(pickle_path(folder, "head", "val"), {b"TRAIN_2": []})
    assert_refused(folder, "clip TRAIN_2 is named twice, in the pickles of train and val")


@pytest.mark.parametrize(
    "name, text, named",
    [
        ("train_gt.txt", TRAIN_TRUTH + "TRAIN_8.mp4 1\n", "train_gt.txt, line 3: clip TRAIN_8 has no features"),
        ("val_gt.txt", "1 VAL_1.mp4\n2 VAL_9.mp4\n", "val_gt.txt, line 2: clip VAL_9 has no features"),
        ("val_gt.txt", "1 TRAIN_1.mp4\n", "line 1: clip TRAIN_1 has no features in any pickle of val"),
        ("val_gt.txt", "1 VAL_1.mp4\n2 VAL_1.mp4\n", "line 2: clip VAL_1 is named twice, first on line 1"),
        ("val_gt.txt", "1 VAL_1\n2 VAL_1.mp4\n", "line 2: clip VAL_1 is named twice, first on line 1"),
        ("train_gt.txt", "TRAIN_1 3\nTRAIN_1.mp4 3\n", "line 2: clip TRAIN_1 is named twice, first on line 1"),
        ("train_gt.txt", "3 TRAIN_1\n", "line 1: clip 3 has no features in any pickle of train"),
        ("train_gt.txt", "3 TRAIN_1.mp4\n", "line 1: expected 'CLIP.mp4 IDENTITY'"),
        ("val_gt.txt", "1 VAL_1.mp4 VAL_1.mp4\n", "line 1: clip VAL_1 is named twice, first on line 1"),
        ("val_gt.txt", "1 VAL_1.mp4\n1 VAL_2.mp4\n", "line 2: identity 1 is named twice, first on line 1"),
    ],
)
def test_truth_that_does_not_fit_is_refused(folder, name, text, named):
    (folder / name).write_text(text)
    assert_refused(folder, named)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("target, moment", [(Spool, "add"), (Spool, "read"), (ClipStore, "create")])
def test_an_interrupt_or_a_full_disk_leaves_nothing(folder, monkeypatch, error, target, moment):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(target, moment, fail)
    with pytest.raises(type(error), match="No space left" if error.args else None):
        run(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", [b".mp4", ".mp4"])
def test_a_clip_without_a_name_is_refused_with_its_pickle(folder, name):
    dump(pickle_path(folder, "face", "val"), {name: []}, 4)
    assert_refused(folder, rf"face_val_v2.pickle: clip name {name!r} is not")


def test_values_are_shown_alike_in_every_run_and_cut(folder):
    put_val(folder, b"VAL_2", [[10**5000, *face()[1:]]])
    assert_refused(folder, r"record 1 \(frame an integer of 16610 bits\): frame is not .*: an integer of 16610 bits ")
    put_val(folder, b"VAL_2", [[*face()[:3], datetime.date(2019, 1, 1), feature()]])
    assert_refused(folder, "quality is not a finite float: <datetime.date> ")
    put_val(folder, b"VAL_2", [[face()] * 9] * 9)
    with pytest.raises(ValueError) as caught:
        run(folder)
    assert len(str(caught.value)) < len(str(folder)) + 400


def test_a_clip_in_two_splits_is_found_where_it_is(folder):
    dump(folder / "scene_infos_val.pickle", {"TRAIN_2.mp4": [(3, feature(2, 2048, np.float32))]})
    assert_refused(folder, "TRAIN_2 is named twice, .*val: feat/face_train_v2.pickle, scene_infos_val.pickle")


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff" * 10**4])
def test_an_origin_that_is_none_is_refused_in_short(folder, content):
    (folder / "origin.json").write_bytes(content)
    with pytest.raises(ValueError, match="origin.json: not an origin") as caught:
        run(folder)
    assert len(str(caught.value)) < len(str(folder)) + 200


@pytest.mark.parametrize("skip", [False, True])
def test_every_feature_is_stored_or_counted(folder, skip):
    """Of a clip named twice, in records that are bad, in what is no record: each once, whatever else is bad."""
    bad = [*face(2)[:3], Fraction(1, 2), feature()]
    clips = [(b"VAL_1", [face(1) for _ in range(4)]), (b"VAL_1", [face(1)]), (b"VAL_2", [face(2), bad, face(3, det=1)])]
    clips += [(b"VAL_3", {"a": face(4), "b": face(5)}), (b"VAL_4", [[face(1), face(2)]])]
    repeated = (
        b"\x80\2}" + b"".join(b"".join(pickle.dumps(part, 2)[2:-1] for part in clip) + b"s" for clip in clips) + b"."
    )
    pickle_path(folder, "face", "val").write_bytes(repeated)
    if not skip:
        assert_refused(folder, "VAL_2, record 2")
        return
    report = run(folder, skip_bad_records=True)
    assert [len(stored(report, clip)[0]) for clip in ("VAL_1", "VAL_2", "VAL_3", "VAL_4")] == [1, 1, 0, 0]
    refused = {rule: n for rule, (n, _) in report.refused.items()}
    assert refused["features in no record of a clip"] == 4 + 2 + 2 and sum(refused.values()) == 8 + 4


# Back to the official files


def random_store(path, seed, clips=12):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "clip": [f"CLIP_{i:03d}" for i in range(clips)],
            "split": np.array(["train", "val", "test"])[np.arange(clips) % 3],
            "identity": [-1 if i % 3 == 2 else int(rng.integers(-1, 3)) for i in range(clips)],
        }
    )
    spans = {}
    with ClipStore.create(path, simulated=True, provenance={"seed": seed}) as writer:
        for modality, layout in LAYOUTS.items():
            audio = modality == "audio"
            count = rng.integers(0, 2 if audio else 5, clips)
            frames = int(count.sum())
            low = rng.random((frames, 2)) * 50
            columns = {
                "frame": 10 + np.arange(frames),
                "box": np.hstack([low, low + rng.random((frames, 2))]),
                "det": rng.random(frames),
                "quality": rng.normal(60, 40, frames),
            }
            writer.append(
                modality,
                rng.standard_normal((frames, layout.width)).astype(np.float16),
                **{name: columns[name] for name in layout.fields[:-1]},
            )
            spans[modality] = np.cumsum(count) - count, count
        writer.finish(table, ["4", "8", "15"], spans)
    return ClipStore.open(path)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 999))
def test_store_to_official_files_to_store_changes_nothing(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("round")
    store = random_store(folder / "first", seed)
    export_folder(store, folder / "official")
    run(folder / "official")
    again = ClipStore.open(folder / "store")
    pd.testing.assert_frame_equal(again.clips, store.clips)
    assert again.identities.tolist() == store.identities.tolist()
    assert {**again.meta, "content": ""} == {**store.meta, "content": ""}
    for name, modality in store.modalities.items():
        np.testing.assert_array_equal(again.modalities[name].count, modality.count)
        other = again.modalities[name]
        assert other.columns.keys() == modality.columns.keys()
        for start, there, count in zip(modality.start, other.start, modality.count):
            here, there = slice(start, start + count), slice(there, there + count)
            np.testing.assert_array_equal(other.feature[there], modality.feature[here])
            for column, values in modality.columns.items():
                np.testing.assert_array_equal(other.columns[column][there], values[here])


def test_exported_files_load_as_the_published_loaders_expect(tmp_path):
    store = random_store(tmp_path / "store", 1)
    export_folder(store, tmp_path / "official")
    faces = load_as_published(tmp_path / "official/feat/face_val_v2.pickle")
    assert list(faces) == [name.encode() for name in store.clips["clip"].iloc[store.select("val")]]
    for frame, box, det, quality, feat in (record for clip in faces.values() for record in clip):
        assert type(frame) is bytes and type(det) is float and type(quality) is float and len(box) == 4
        assert feat.dtype == np.float16 and feat.shape == (512,)
    audio = load_as_published(tmp_path / "official/feat/audio_train.pickle")
    assert all(feat.dtype == np.float16 and feat.shape == (512,) for feat in audio.values()) and audio
    scene = load_as_published(tmp_path / "official/feat/scene_test.pickle")
    [(index, feat), *_] = next(filter(None, scene.values()))
    assert type(index) is int and feat.dtype == np.float32 and feat.shape == (2048,)


@pytest.mark.parametrize("encoding", ["bytes", "latin1"])
def test_exported_files_hold_the_genuine_ones(folder, encoding):
    """What Python 2 wrote and its export load alike, but that with latin1 the export's byte strings stay bytes."""
    path = pickle_path(folder, "face", "val")
    path.write_bytes(PYTHON2)
    (folder / "val_gt.txt").write_text("3 \n9 \n")
    run(folder)
    export_folder(ClipStore.open(folder.parent / "store"), folder.parent / "again")
    genuine, again = (
        load_as_published(p, encoding) for p in (path, pickle_path(folder.parent / "again", "face", "val"))
    )
    assert type(again) is dict and list(again) == [clip.encode() for clip in GENUINE]
    for mine, theirs in zip(again.values(), genuine.values(), strict=True):
        for (frame, *rest, feat), (their_frame, *their_rest, their_feat) in zip(mine, theirs, strict=True):
            assert (int(frame), rest) == (int(their_frame), their_rest)
            assert type(frame) is bytes and (encoding == "latin1" or type(their_frame) is bytes)
            assert feat.dtype == their_feat.dtype == np.float16
            np.testing.assert_array_equal(feat, their_feat)


def test_an_export_is_written_clip_by_clip(tmp_path):
    records, made = [face(i) for i in range(100)], []

    def items():
        for i in range(40):
            made.append(tracemalloc.get_traced_memory()[0])
            yield b"VAL_%d" % i, [[*record[:4], record[4] + np.float16(i)] for record in records]

    tracemalloc.start()
    try:
        iqiyi.write_pickle(tmp_path / "p", items())
    finally:
        tracemalloc.stop()
    assert made[-1] - made[1] < 200 * 1024  # 39 clips of 100 features, each of 1024 bytes
    assert len(load_as_published(tmp_path / "p")) == 40


def test_export_refuses_a_store_without_boxes(tmp_path):
    with ClipStore.create(tmp_path / "store", simulated=False, provenance={}) as writer:
        writer.append("face", np.ones((1, 512), np.float16), frame=[0], det=[0.5], quality=[1.0])
        clips = pd.DataFrame({"clip": ["a"], "split": ["val"], "identity": [-1]})
        writer.finish(clips, [], {"face": ([0], [1])})
    with pytest.raises(ValueError, match="face of 512 dimensions with frame, det, quality, .*box"):
        export_folder(ClipStore.open(tmp_path / "store"), tmp_path / "official")
    assert not (tmp_path / "official").exists()


def test_export_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    store = random_store(tmp_path / "store", 1)
    monkeypatch.setattr(iqiyi, "write_val_truth", fail)
    with pytest.raises(KeyboardInterrupt):
        export_folder(store, tmp_path / "official")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_exported_simulation_says_so_when_imported(tmp_path):
    export_folder(random_store(tmp_path / "first", 1), tmp_path / "official")
    assert json.loads((tmp_path / "official/origin.json").read_text())["simulated"] is True


# Text files


def write(tmp_path, text):
    (tmp_path / "file.txt").write_bytes(text.encode())
    return tmp_path / "file.txt"
