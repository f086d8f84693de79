import json
import os
import shutil
import tempfile
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import BRIEF, made, of

from mmlib import runs
from mmlib.clips.simulate import simulate
from mmlib.experiment import Experiment
from mmlib.retrieval import retrieve
from mmlib.runs import (
    Record,
    cache_folder,
    fetch_or_run,
    library_hash,
    open_store,
    read_results,
    run,
    write_results,
)
from mmlib.train import Training

SMALL = (("identities", 12),)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def done(monkeypatch, cache):
    """Let every run succeed at once, and write down what was run on which store."""
    calls = []

    def fake(asked, store, **_):
        calls.append((asked, store))
        return made(asked)

    monkeypatch.setattr(runs, "run", fake)
    return calls


def full(*_):
    raise OSError(28, "No space left on device")


# -- the hash of the library ---------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library to edit; call it for its hash."""
    copy = shutil.copytree(runs.PACKAGE, tmp_path / "mmlib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(runs, "PACKAGE", copy)

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
    path = library.path / "train.py"
    edit(path, '"""One training loop', '"""The training loop')
    edit(path, "# dropout", "# of dropout")
    path.write_text(path.read_text() + "\n\n# The end.\n")
    assert library() == before


def test_hash_ignores_figures(library):
    before = library()
    edit(library.path / "figures.py", "MARKERS", "SIGNS")
    assert library() == before


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("train.py", "epochs: int = ", "epochs: int = 1"),
        ("clips/simulate.py", "SEGMENT = 8", "SEGMENT = 9"),
        ("clips/clips_per_identity_joint.csv", "1,1,1137", "1,1,1136"),
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
    assert runs._tree(runs.ast.parse(one)) == runs._tree(runs.ast.parse(two))


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
    assert runs._tree(runs.ast.parse(one)) != runs._tree(runs.ast.parse(two))


# -- fetching ------------------------------------------------------------------------------------------------


def test_stored_record_is_fetched_without_running(store, cache, monkeypatch):
    first = fetch_or_run([of(store)])
    monkeypatch.setattr(runs, "run", lambda *_, **__: pytest.fail("it was run again"))
    assert fetch_or_run([of(store)]) == first


def test_record_holds_what_was_run(store, cache):
    direct, fetched = run(of(store), store), fetch_or_run([of(store)])[0]
    assert (fetched.ap, fetched.measures, fetched.breakdown) == (direct.ap, direct.measures, direct.breakdown)
    assert fetched.key == of(store).key() and fetched.library == library_hash()


def test_records_come_in_the_order_asked_for(store, done):
    asked = [of(store, scale=float(scale)) for scale in (3, 1, 2, 1)]
    assert [record.experiment["scale"] for record in fetch_or_run(asked)] == [3, 1, 2, 1]


def test_experiments_of_one_key_run_once(store, done):
    records = fetch_or_run([of(store), of(store, hidden=8), of(store)])
    assert len(done) == 1 and len(records) == 3


def test_another_library_runs_again(store, done, monkeypatch):
    fetch_or_run([of(store)])
    monkeypatch.setattr(runs, "library_hash", lambda: "changed")
    fetch_or_run([of(store)])
    assert len(done) == 2


def test_interrupted_set_resumes_at_the_arm_it_was_in(store, done, monkeypatch):
    arms = [of(store, scale=float(scale)) for scale in range(1, 5)]
    counting = runs.run

    def interrupted(asked, store, **options):
        if asked == arms[2]:
            raise KeyboardInterrupt
        return counting(asked, store, **options)

    monkeypatch.setattr(runs, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_or_run(arms)
    monkeypatch.setattr(runs, "run", counting)
    done.clear()
    assert len(fetch_or_run(arms)) == 4
    assert [asked for asked, _ in done] == arms[2:]


def test_failed_write_leaves_no_record(store, done, cache, monkeypatch):
    monkeypatch.setattr(runs.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        fetch_or_run([of(store)])
    assert [path for path in cache.rglob("*") if path.is_file()] == []


# -- worlds --------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Write down the worlds that are drawn; temporary ones go to a folder of their own."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    calls = []

    def spy(path, settings, seed, **options):
        calls.append((settings, seed))
        return simulate(path, settings, seed, **options)

    monkeypatch.setattr(runs, "simulate", spy)
    return calls


def test_worlds_with_settings_are_deleted_after_use(done, drawn, cache, tmp_path):
    fetch_or_run([Experiment(settings=SMALL, seed=seed) for seed in (0, 1)])
    assert all(not ran.path.exists() for _, ran in done)
    assert list((tmp_path / "scratch").iterdir()) == [] and not (cache / "worlds").exists()


def test_worlds_with_settings_are_deleted_after_an_interrupt(drawn, cache, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_or_run([Experiment(settings=SMALL)])
    assert len(drawn) == 1 and list((tmp_path / "scratch").iterdir()) == []


def test_arms_of_one_world_draw_it_once(done, drawn):
    fetch_or_run(
        [
            Experiment(settings=SMALL, seed=seed, aggregator=name)
            for name in ("mean", "norm", "quality")
            for seed in (0, 1)
        ]
    )
    assert [seed for _, seed in drawn] == [0, 1] and len(done) == 6


def test_every_arm_runs_in_its_own_world(done, drawn):
    fetch_or_run(
        [
            Experiment(settings=(*SMALL, ("no_face", share)), seed=seed)
            for share in (0, 0.1)
            for seed in (0, 1)
        ]
    )
    for asked, world in done:
        said = world.meta["provenance"]
        assert (said["settings"]["no_face"], said["seed"]) == (dict(asked.settings)["no_face"], asked.seed)


def test_calibrated_worlds_stay_in_the_cache(done, drawn, cache):
    fetch_or_run([Experiment(profile="tiny", aggregator=name) for name in ("mean", "norm")])
    fetch_or_run([Experiment(profile="tiny", aggregator="quality")])
    assert len(drawn) == 1 and len(list((cache / "worlds").iterdir())) == 1


def test_given_store_is_used_whatever_the_settings(store, done, drawn):
    fetch_or_run([of(store, settings=SMALL)])
    assert [ran.path for _, ran in done] == [store.path] and drawn == []


def test_world_that_another_process_draws_meanwhile_is_opened(cache, monkeypatch):
    asked = Experiment(profile="tiny", settings=SMALL, seed=3)

    def overtaken(path, settings, seed):
        simulate(path, settings, seed)
        return simulate(path, settings, seed)

    monkeypatch.setattr(runs, "simulate", overtaken)
    world = open_store(asked)
    assert world.path.parent == cache / "worlds" and world.meta["provenance"]["seed"] == 3
    assert open_store(asked).path == world.path and len(list((cache / "worlds").iterdir())) == 1


def test_world_that_cannot_be_drawn_is_an_error(cache, monkeypatch):
    monkeypatch.setattr(runs, "simulate", full)
    with pytest.raises(OSError, match="No space"):
        open_store(Experiment(profile="tiny"))


def test_cache_lies_where_the_environment_says(cache, monkeypatch):
    assert cache_folder() == cache
    monkeypatch.delenv("MMLIB_CACHE")
    assert cache_folder().name == "mmlib"


def test_open_store_opens_the_given_one(store):
    assert open_store(of(store)).path == store.path


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
    assert (
        row["no_face"] == 0.1
        and row["training.epochs"] == Training().epochs
        and row["classifier"] == "class means"
    )


# -- files of records ----------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    return tmp_path / "some.json.gz"


def test_committed_records_are_read_as_they_were_written(results, done, store):
    records = fetch_or_run([of(store, scale=float(scale)) for scale in (1, 2)])
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
    monkeypatch.setattr(runs.os, "replace", full)
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
