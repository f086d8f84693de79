import json
import os
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import BRIEF, made, of, small

from mmlib import records
from mmlib.experiment import Experiment, Training
from mmlib.rank import Fallback
from mmlib.records import Record, cache_folder, library_hash, read_results, run, write_results
from mmlib.retrieve import retrieve, training_clips


def full(*_):
    raise OSError(28, "No space left on device")


# -- the hash of the library ---------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library to edit; call it for its hash."""
    copy = shutil.copytree(records.PACKAGE, tmp_path / "mmlib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(records, "PACKAGE", copy)

    def fresh():
        library_hash.cache_clear()
        return library_hash()

    fresh.path = copy
    yield fresh
    library_hash.cache_clear()


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_hash_of_the_library_does_not_depend_on_where_it_lies(library):
    copied = library()
    assert copied == library_hash.__wrapped__() and len(copied) == 12


def test_hash_ignores_docstrings_and_comments(library):
    before = library()
    path = library.path / "runs.py"
    edit(path, '"""The record of every number', '"""The record of each number')
    edit(path, "# frames", "# of frames")
    path.write_text(path.read_text() + "\n\n# The end.\n")
    assert library() == before


@pytest.mark.parametrize(
    "name, old, new", [("figures.py", "MARKERS", "SIGNS"), ("sweep.py", "PATIENCE = 1", "PATIENCE = 2")]
)
def test_hash_ignores_drawing_and_bookkeeping(library, name, old, new):
    before = library()
    edit(library.path / name, old, new)
    assert library() == before


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("train.py", "epochs: int = ", "epochs: int = 1"),
        ("data/simulate.py", "SEGMENT = 8", "SEGMENT = 9"),
        ("data/clips_per_identity_joint.csv", "1,1,1137", "1,1,1136"),
    ],
)
def test_hash_sees_what_decides_numbers(library, name, old, new):
    before = library()
    edit(library.path / name, old, new)
    assert library() != before


@pytest.mark.parametrize(
    "one, two",
    [
        ('def f():\n    """Say."""\n    return 1', "def f():\n    return 1"),
        ('"""Module."""\nx = 1  # why', "x = 1"),
        ('class A:\n    """A."""\n    y: int = 2', "class A:\n    y: int = 2"),
        ("x = (1 +\n     2)", "x = 1 + 2"),
    ],
)
def test_tree_is_blind_to_prose_and_layout(one, two):
    assert records._tree(records.ast.parse(one)) == records._tree(records.ast.parse(two))


@pytest.mark.parametrize(
    "one, two",
    [
        ("x = 1", "x = 2"),
        ("x = 1", "x = 1.0"),
        ("x = 'a'", "x = 'b'"),
        ("f(None)", "f()"),
        ("x = a + b", "x = a - b"),
        ("x = None", "x = 0"),
        ("def f(a=None): return a", "def f(a): return a"),
        ("x = {**a}", "x = {a: a}"),
        ("x = []", "x = ()"),
        ("return_ = [1]", "return_ = []"),
        ("x = f('a')", "x = f('b')"),
    ],
)
def test_tree_sees_code(one, two):
    assert records._tree(records.ast.parse(one)) != records._tree(records.ast.parse(two))


def test_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MMLIB_CACHE")
    assert cache_folder().name == "mmlib"


# -- records -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["frames", "quality", "wrong"])
def test_breakdown_counts_every_labelled_gallery_clip_once(store, group):
    found, record = retrieve(of(store), store), run(of(store), store)
    clips, top1, precision = np.array(record.breakdown[group])[:, 2:].T
    assert clips.sum() == np.sum(store.identity_of(found.gallery) >= 0)
    assert clips @ top1 / clips.sum() == pytest.approx(record.measures["clip_top1"], abs=1e-4)
    assert clips @ precision == pytest.approx(found.ap @ found.relevant, abs=0.01)


def test_breakdown_by_length_puts_clips_between_its_edges(store):
    gallery = store.select("val", labelled=True, having="face")
    count = store.modalities["face"].count[gallery]
    for low, high, clips, _, _ in run(of(store), store).breakdown["frames"]:
        assert clips == sum(low <= n < high for n in count)


def test_training_beats_chance_and_keeps_its_losses(store):
    record = run(of(store, "mlp", training=Training(epochs=2, batch=64)), store)
    assert len(record.losses) == 2 and record.measures["parameters"] > 0
    assert record.measures["clip_top1"] > 10 / 30


def test_untrained_record_has_no_losses_and_no_parameters(store):
    record = run(of(store), store)
    assert record.losses == [] and record.measures["parameters"] == 0


@pytest.mark.parametrize("classifier", ["class means", "mlp"])
def test_same_experiment_gives_the_same_record(store, classifier):
    one, two = (run(of(store, classifier, training=BRIEF), store) for _ in range(2))
    assert (one.ap, one.losses, one.measures) == (two.ap, two.losses, two.measures)


def test_store_without_truth_has_no_breakdown_by_wrong_frames(bare):
    record = run(of(bare), bare)
    assert record.breakdown.keys() == {"frames", "quality"} and not record.simulated


def test_record_survives_json(store):
    record = run(of(store, "mlp", training=BRIEF), store)
    back = Record(**json.loads(json.dumps(asdict(record))))
    assert replace(back, experiment={}) == replace(record, experiment={})
    assert back.experiment == json.loads(json.dumps(record.experiment))


def test_row_of_a_record_is_flat(store):
    row = made(replace(of(store), settings=(("no_face", 0.1),))).row()
    assert row["no_face"] == 0.1 and row["training.epochs"] == Training().epochs and row["classifier"] == "class means"


# -- files of records ----------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path / "some.json.gz"


def test_committed_records_are_read_as_they_were_written(results):
    records = [made(Experiment(), scale, experiment={"scale": scale}) for scale in ("one", "two")]
    write_results(results, records)
    assert read_results("some.json.gz") == records


def test_same_records_give_the_same_bytes(results, monkeypatch):
    write_results(results, [made(Experiment())])
    first = results.read_bytes()
    monkeypatch.setattr("time.time", lambda: 4e9)  # gzip would write the time
    write_results(results, [made(Experiment())])
    assert results.read_bytes() == first


def test_failed_write_keeps_the_committed_records(results, monkeypatch):
    write_results(results, [made(Experiment())])
    before = results.read_bytes()
    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_results(results, [made(Experiment(seed=1))])
    assert results.read_bytes() == before and list(results.parent.iterdir()) == [results]


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_records_are_written_with_the_permissions_of_any_other_file(results, umask):
    before = os.umask(umask)
    try:
        write_results(results, [made(Experiment())])
        results.with_name("other").touch()
    finally:
        os.umask(before)
    assert results.stat().st_mode == results.with_name("other").stat().st_mode


def test_missing_file_of_records_is_none(results):
    assert read_results("absent.json.gz") == []


@pytest.mark.parametrize("content", [b"not gzip", b""])
def test_broken_file_of_records_is_refused_by_name(results, content):
    results.write_bytes(content)
    with pytest.raises(ValueError, match="some.json.gz: not a file of records"):
        read_results("some.json.gz")


def test_truncated_file_of_records_is_refused(results):
    write_results(results, [made(Experiment())])
    results.write_bytes(results.read_bytes()[:-20])
    with pytest.raises(ValueError, match="some.json.gz: not a file of records"):
        read_results("some.json.gz")


def test_hash_ignores_where_a_function_stands(library):
    before = library()
    path, other = library.path / "ensemble.py", library.path / "rank.py"
    text = path.read_text()
    start = text.index("def member_seed(")
    moved = text[start : text.index("def lost_identities(")]
    path.write_text("from mmlib.rank import member_seed\n" + text.replace(moved, ""))
    other.write_text(other.read_text() + "\n\n" + moved)
    assert library() == before


# -- ensembles -----------------------------------------------------------------------------------------------


def measured(record):
    return record.key, record.ap, record.measures, record.breakdown, record.losses


@pytest.mark.parametrize("kind", ["seeds", "bagging", "stratified", "views"])
def test_measures_of_an_ensemble_are_those_of_a_slow_count(patchy, kind):
    asked = small(patchy, ensemble=kind, members=(0, 1, 2))
    record, found = run(asked, patchy), retrieve(asked, patchy)
    everyone = {patchy.identity_of(clip) for clip in training_clips(asked, patchy)}
    lost = [len(everyone - {patchy.identity_of(clip) for clip in member.clips}) for member in found.members]
    labelled = [
        (row, patchy.identity_of(clip)) for row, clip in enumerate(found.gallery) if patchy.identity_of(clip) >= 0
    ]
    right = [[found.by_member[member, row] == code for row, code in labelled] for member in range(3)]
    differ = [
        [found.by_member[a, row] != found.by_member[b, row] for row, _ in labelled] for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    assert record.measures["lost_identities"] == pytest.approx(np.mean(lost))
    assert record.measures["member_clip_top1"] == pytest.approx(np.mean(right))
    assert record.measures["disagreement"] == pytest.approx(np.mean(differ)) and np.mean(differ) > 0
    combined = np.mean([found.predicted[row] == code for row, code in labelled])
    assert record.measures["clip_top1"] == pytest.approx(combined)


def test_bagging_that_loses_identities_says_how_many(patchy):
    """A branch whose every identity has one clip loses about a third of them."""
    few = replace(
        patchy,
        clips=patchy.clips.assign(
            split=[
                "train" if i % 6 == 0 and i < 30 else split
                for i, split in enumerate(np.where(patchy.clips["split"] == "train", "test", "val"))
            ]
        ),
    )
    asked = small(few, ensemble="bagging", members=(0, 1, 2, 3))
    lost = run(asked, few).measures["lost_identities"]
    kept = [len(np.unique(member.clips)) for member in retrieve(asked, few).members]
    assert len(training_clips(asked, few)) == 5 and lost == pytest.approx(5 - np.mean(kept)) and lost > 0
    assert run(replace(asked, ensemble="stratified"), few).measures["lost_identities"] == 0


def test_members_are_measured_on_clips_that_they_can_score(patchy):
    asked = small(patchy, members=(0, 1), fallback=Fallback(share=0.2))
    plain = run(replace(asked, fallback=None), patchy).measures
    mixed = run(asked, patchy).measures
    assert mixed["gallery_clips"] > plain["gallery_clips"]
    for name in ("member_clip_top1", "disagreement", "lost_identities"):
        assert mixed[name] == plain[name]


def test_one_model_has_no_measures_of_an_ensemble(patchy):
    assert not {"lost_identities", "member_clip_top1", "disagreement"} & run(small(patchy), patchy).measures.keys()


def test_breakdown_leaves_out_clips_without_a_face(patchy):
    asked = small(patchy, fallback=Fallback(share=0.2))
    found, record = retrieve(asked, patchy), run(asked, patchy)
    having = patchy.modalities["face"].count[found.gallery] > 0
    clips = np.array(record.breakdown["frames"])[:, 2]
    assert clips.sum() == np.sum(having & (patchy.identity_of(found.gallery) >= 0)) and (~having).any()


def test_record_of_an_ensemble_survives_json(patchy):
    record = run(small(patchy, members=(0, 1), fallback=Fallback(share=0.2)), patchy)
    back = Record(**json.loads(json.dumps(asdict(record))))
    assert measured(back) == measured(record)
    assert back.experiment["fallback"]["share"] == 0.2 and back.experiment["members"] == [0, 1]
