"""Records: the code they hang on, what they hold, their files, and many processes that fill one store of them."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import made, of, small

from mmlib import claims, records, retrieve
from mmlib.claims import claim
from mmlib.data.simulate import settings_for, simulate
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment, Training
from mmlib.rank import Fallback
from mmlib.records import Record, code_hash, fetch, library_hash, open_store, read_results, run, write_results
from mmlib.retrieve import training_clips

SMALL = (("identities", 12),)


def full(*_):
    raise OSError(28, "No space left on device")


# -- the hash of code ----------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Hash modules given by their text, each with one beside it that defines what they import."""
    monkeypatch.setattr(records, "PACKAGE", tmp_path)

    def hashed(**modules):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        return code_hash(tuple(f"{name}.py" for name in modules))

    return hashed


@pytest.mark.parametrize(
    "one, two",
    [
        ('def f():\n    """Say."""\n    return 1', "def f():\n    return 1"),
        ('"""Module."""\nx = 1  # why', "x = 1"),
        ('class A:\n    """A."""\n    y: int = 2', "class A:\n    y: int = 2"),
        ("x = (1 +\n     2)", "x = 1 + 2"),
        ("def f(): pass\ndef g(): pass", "def g(): pass\ndef f(): pass"),
        ("import os\nimport sys", "import sys\nimport os"),
    ],
)
def test_hash_is_blind_to_prose_layout_and_place(package, one, two):
    assert package(a=one) == package(a=two)


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
def test_hash_sees_code(package, one, two):
    assert package(a=one) != package(a=two)


POOLS = "def mean(x): return x\ndef norm(x): return -x"


@pytest.mark.parametrize(
    "one, two",
    [
        ("from mmlib.pools import mean", "from mmlib.pools import norm as mean"),
        ("from mmlib.pools import mean, norm", "from mmlib.pools import mean as norm, norm as mean"),
        ("from mmlib.pools import mean", "from numpy import mean"),
        ("from .pools import mean", "from .pools import norm as mean"),
        ("from math import cos", "from math import sin as cos"),
        ("import numpy as np", "import pandas as np"),
        ("def f():\n    from mmlib.pools import mean", "def f():\n    from mmlib.pools import norm as mean"),
    ],
)
def test_hash_sees_what_an_import_binds(package, one, two):
    for elsewhere in ("", two):  # even if another module does the same
        first, second = (package(pools=POOLS, a=f"{text}\ny = mean(1)", b=elsewhere) for text in (one, two))
        assert first != second


def test_hash_sees_which_of_two_functions_of_one_name_is_imported(package):
    both = {"a": "def f(): return 1", "b": "def f(): return 2"}
    one, two = (package(**both, c=f"from mmlib.{module} import f\ny = f()") for module in both)
    assert one != two


def test_hash_sees_which_of_two_modules_has_which_value(package):
    assert package(a="BLOCK = 1", b="BLOCK = 2") != package(a="BLOCK = 2", b="BLOCK = 1")


def test_hash_is_blind_to_the_module_of_a_function(package):
    function = "def f(x): return np.sort(x)"
    before = package(a=f"import numpy as np\n{function}", b="y = 1", c="from mmlib.a import f\nz = f(1)")
    after = package(a="", b=f"import numpy as np\ny = 1\n{function}", c="from mmlib.b import f\nz = f(1)")
    user = package(
        a="from mmlib.b import f", b=f"import numpy as np\ny = 1\n{function}", c="from mmlib.a import f\nz = f(1)"
    )
    assert before == after == user


def test_hash_of_a_table_is_that_of_its_bytes(package, tmp_path):
    (tmp_path / "table.csv").write_text("1,1")
    one = code_hash(("table.csv",))
    (tmp_path / "table.csv").write_text("1,2")
    assert code_hash(("table.csv",)) != one


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library to edit; call it for its hash."""
    copy = shutil.copytree(records.PACKAGE, tmp_path / "mmlib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(records, "PACKAGE", copy)
    return copy


def test_hash_of_the_library_hangs_on_what_decides_numbers_and_on_nothing_else(library):
    before = library_hash()
    assert library_hash.__wrapped__() == before and len(before) == 12  # wherever it lies
    for name in ("figures.py", "records.py", "claims.py", "submit.py"):
        (library / name).write_text("x = 1")
    for name in records.DECIDING:
        if name.endswith(".py"):
            path = library / name
            path.write_text(path.read_text().replace('"""', '"""Or so: ', 1) + "\n# The end.\n")
    assert library_hash.__wrapped__() == before
    for name, old, new in (
        ("data/clips_per_identity_joint.csv", "1,1,1137", "1,1,1136"),
        ("train.py", "import mean_pool", "import norm_pool as mean_pool"),
    ):
        path, text = library / name, (library / name).read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert library_hash.__wrapped__() != before
        path.write_text(text)


def test_modules_that_decide_numbers_import_none_that_does_not():
    known = {name.removesuffix(".py").replace("/", ".") for name in records.DECIDING}
    known.add("data.submission.check_names")  # it refuses names, and decides nothing
    for name in records.DECIDING:
        if name.endswith(".py"):
            for node in ast.walk(ast.parse((records.PACKAGE / name).read_text())):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mmlib":
                    inside = node.module.removeprefix("mmlib").lstrip(".")
                    wanted = {inside} if inside in known else {f"{inside}.{a.name}".lstrip(".") for a in node.names}
                    refuses = {"data.submission.check_names"}  # and changes nothing
                    assert wanted - refuses <= known, name


# -- what a record holds -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def class_means(store):
    return retrieve.retrieve(of(store), store), run(of(store), store)


@pytest.mark.parametrize("group", ["frames", "quality", "wrong"])
def test_breakdown_counts_every_labelled_gallery_clip_once(store, class_means, group):
    found, record = class_means
    clips, top1, precision = np.array(record.breakdown[group])[:, 2:].T
    assert clips.sum() == np.sum(store.identity_of(found.gallery) >= 0)
    assert clips @ top1 / clips.sum() == pytest.approx(record.measures["clip_top1"], abs=1e-4)
    assert clips @ precision == pytest.approx(found.ap @ found.relevant, abs=0.01)


def test_breakdown_by_length_puts_clips_between_its_edges(store, class_means):
    gallery = store.select("val", labelled=True, having="face")
    count = store.modalities["face"].count[gallery]
    for low, high, clips, _, _ in class_means[1].breakdown["frames"]:
        assert clips == sum(low <= n < (high or np.inf) for n in count)


@pytest.fixture(scope="module")
def extreme(tmp_path_factory):
    """Val clips of 1, 240, 241, 500 and no frames, with shares of wrong frames and qualities at the ends of a range."""
    count = np.array([2, 2, 1, 240, 241, 500, 0])
    split, identity = ["train"] * 2 + ["val"] * 5, [0, 1, 0, 1, 0, 1, 0]
    clips = pd.DataFrame({"clip": list("abcdefg"), "split": split, "identity": identity})
    rng, frames = np.random.default_rng(0), count.sum()
    wrong = np.repeat([0, 0, 1, 1, 0, 0.5, 0], count)
    path = tmp_path_factory.mktemp("extreme") / "store"
    with ClipStore.create(path, simulated=False, provenance={}) as writer:
        columns = {"quality": np.zeros(frames), "det": np.ones(frames), "wrong": wrong}
        writer.append("face", rng.normal(size=(frames, 8)).astype(np.float16), **columns)
        writer.finish(clips, ["7", "8"], {"face": (count.cumsum() - count, count)})
    return ClipStore.open(path)


def test_no_clip_of_any_length_is_lost_in_a_breakdown(extreme):
    record = run(of(extreme), extreme)
    back = json.loads(json.dumps(asdict(record)), parse_constant=pytest.fail)  # JSON has no infinity
    assert record.breakdown.keys() == {"frames", "quality", "wrong"}
    assert all(sum(row[2] for row in rows) == 4 for rows in back["breakdown"].values())
    assert {(low, high): clips for low, high, clips, *_ in back["breakdown"]["frames"]} == {(1, 5): 1, (40, None): 3}


def test_training_beats_chance_and_keeps_its_losses(store):
    record = run(of(store, "mlp", training=Training(epochs=2, batch=64)), store)
    assert len(record.losses) == 2 and record.measures["parameters"] > 0
    assert record.measures["clip_top1"] > 10 / 30


def test_untrained_record_has_no_losses_and_no_parameters(class_means):
    record = class_means[1]
    assert record.losses == [] and record.measures["parameters"] == 0


def test_same_experiment_gives_the_same_record(patchy):
    one, two = (run(small(patchy, members=(0, 1)), patchy) for _ in range(2))
    assert measured(one) == measured(two)


def test_store_without_truth_has_no_breakdown_by_wrong_frames(bare):
    record = run(of(bare), bare)
    assert record.breakdown.keys() == {"frames", "quality"} and not record.simulated


def test_row_of_a_record_is_flat(store):
    row = made(replace(of(store), settings=(("no_face", 0.1),))).row()
    assert row["no_face"] == 0.1 and row["training.epochs"] == Training().epochs and row["classifier"] == "class means"


def measured(record):
    return record.key, record.ap, record.measures, record.breakdown, record.losses


def test_record_of_an_ensemble_survives_json(patchy):
    record = run(small(patchy, members=(0, 1), fallback=Fallback(share=0.2)), patchy)
    back = Record(**json.loads(json.dumps(asdict(record))))
    assert replace(back, experiment={}) == replace(record, experiment={})
    assert back.experiment["fallback"]["share"] == 0.2 and back.experiment["members"] == [0, 1]


@pytest.mark.parametrize("kind", ["seeds", "bagging", "stratified", "views"])
def test_measures_of_an_ensemble_are_those_of_a_slow_count(patchy, kind):
    asked = small(patchy, ensemble=kind, members=(0, 1, 2))
    found = retrieve.retrieve(asked, patchy)
    measures = records.record_of(asked, patchy, found).measures
    everyone = {patchy.identity_of(clip) for clip in training_clips(asked, patchy)}
    lost = [len(everyone - {patchy.identity_of(clip) for clip in member.clips}) for member in found.members]
    labelled = [
        (row, patchy.identity_of(clip)) for row, clip in enumerate(found.gallery) if patchy.identity_of(clip) >= 0
    ]
    right = [[found.by_member[member, row] == code for row, code in labelled] for member in range(3)]
    differ = [
        [found.by_member[a, row] != found.by_member[b, row] for row, _ in labelled] for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    assert measures["lost_identities"] == pytest.approx(np.mean(lost))
    assert measures["member_clip_top1"] == pytest.approx(np.mean(right))
    assert measures["disagreement"] == pytest.approx(np.mean(differ)) and np.mean(differ) > 0
    combined = np.mean([found.predicted[row] == code for row, code in labelled])
    assert measures["clip_top1"] == pytest.approx(combined)


def test_bagging_that_loses_identities_says_how_many(patchy):
    """A branch whose every identity has one clip loses about a third of them."""
    split = np.where(patchy.clips["split"] == "train", "test", "val").astype(object)
    split[:30:6] = "train"
    few = replace(patchy, clips=patchy.clips.assign(split=split))
    asked = small(few, ensemble="bagging", members=(0, 1, 2, 3))
    found = retrieve.retrieve(asked, few)
    lost = records.record_of(asked, few, found).measures["lost_identities"]
    kept = [len(np.unique(member.clips)) for member in found.members]
    assert len(training_clips(asked, few)) == 5 and lost == pytest.approx(5 - np.mean(kept)) and lost > 0
    assert run(replace(asked, ensemble="stratified"), few).measures["lost_identities"] == 0


def test_members_are_measured_on_clips_that_they_can_score(patchy):
    asked, trained = small(patchy, members=(0, 1), fallback=Fallback(share=0.2)), {}
    plain = run(replace(asked, fallback=None), patchy, trained=trained)
    mixed = run(asked, patchy, trained=trained)
    assert mixed.measures["gallery_clips"] > plain.measures["gallery_clips"]
    for name in ("member_clip_top1", "disagreement", "lost_identities"):
        assert mixed.measures[name] == plain.measures[name]
    # What has no face has no length of one.
    labelled = patchy.identity_of(patchy.select("val", labelled=True, having="face"))
    assert sum(row[2] for row in mixed.breakdown["frames"]) == len(labelled)


def test_one_model_has_no_measures_of_an_ensemble(class_means):
    assert not {"lost_identities", "member_clip_top1", "disagreement"} & class_means[1].measures.keys()


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


def test_missing_file_of_records_is_none(results):
    assert read_results("absent.json.gz") == []


@pytest.mark.parametrize("spoil", [lambda content: b"not gzip", lambda content: b"", lambda content: content[:-20]])
def test_broken_file_of_records_is_refused_by_name(results, spoil):
    write_results(results, [made(Experiment())])
    results.write_bytes(spoil(results.read_bytes()))
    with pytest.raises(ValueError, match="some.json.gz: not a file of records"):
        read_results("some.json.gz")


def test_breakdowns_of_earlier_records_are_read(results):
    """The last group of lengths had an edge, 241 frames, and lost the clips beyond."""
    write_results(results, [made(Experiment(), breakdown={"frames": [[30, 40, 2, 0.5, 0.5], [40, 241, 2, 0.5, 0.5]]})])
    assert read_results("some.json.gz")[0].breakdown["frames"][1][:2] == [40, 241]


# -- fetching ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def done(monkeypatch, cache):
    """Let every run succeed at once, and write down what was run on which store."""
    calls = []
    monkeypatch.setattr(retrieve, "retrieve", lambda asked, store, **_: calls.append((asked, store)))
    monkeypatch.setattr(records, "record_of", lambda asked, *_: made(asked))
    return calls


def test_record_is_made_once_and_holds_what_was_run(store, cache, monkeypatch):
    (first,) = fetch([of(store)])
    monkeypatch.setattr(retrieve, "retrieve", lambda *_, **__: pytest.fail("it was run again"))
    assert fetch([of(store)]) == [first]
    monkeypatch.undo()
    assert measured(first) == measured(run(of(store), store)) and first.library == library_hash()


def test_records_come_in_the_order_asked_for(store, done):
    asked = [of(store, scale=float(scale)) for scale in (3, 1, 2, 1)]
    assert [record.experiment["scale"] for record in fetch(asked)] == [3, 1, 2, 1]


def test_experiments_of_one_key_run_once(store, done):
    assert len(fetch([of(store), of(store, hidden=8), of(store)])) == 3 and len(done) == 1


def test_another_library_runs_again(store, done, monkeypatch):
    fetch([of(store)])
    monkeypatch.setattr(records, "library_hash", lambda: "changed")
    fetch([of(store)])
    assert len(done) == 2


def test_interrupted_set_resumes_at_the_arm_it_was_in(store, done, monkeypatch):
    arms = [of(store, scale=float(scale)) for scale in range(1, 5)]
    counting = retrieve.retrieve

    def interrupted(asked, store, **options):
        if asked == arms[2]:
            raise KeyboardInterrupt
        return counting(asked, store, **options)

    monkeypatch.setattr(retrieve, "retrieve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(arms)
    monkeypatch.setattr(retrieve, "retrieve", counting)
    done.clear()
    assert len(fetch(arms)) == 4
    assert [asked for asked, _ in done] == arms[2:]


def test_failed_write_leaves_no_record(store, done, cache, monkeypatch):
    monkeypatch.setattr(claims.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        fetch([of(store)])
    assert [path for path in cache.rglob("*") if path.is_file() and path.parent.name != "locks"] == []


def test_folder_without_flock_is_refused_before_anything_is_made(store, done, cache, monkeypatch):
    """A lock that a killed process leaves behind would be waited for without end."""
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(ValueError, match=f"^{cache}.*Function not implemented"):
        fetch([of(store)])
    assert done == []


# -- worlds --------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Write down the worlds that are drawn."""
    calls = []

    def spy(path, settings, seed, **options):
        calls.append((settings, seed))
        return simulate(path, settings, seed, **options)

    monkeypatch.setattr(records, "simulate", spy)
    return calls


def test_passing_worlds_are_drawn_once_each_used_by_their_arms_and_deleted(done, drawn, cache):
    shares, seeds, names = (0, 0.1), (0, 1), ("mean", "norm")
    fetch(
        [
            Experiment(settings=(*SMALL, ("no_face", share)), seed=seed, aggregator=name)
            for name in names
            for share in shares
            for seed in seeds
        ]
    )
    assert len(drawn) == 4 and len(done) == 8
    for asked, world in done:
        said = world.meta["provenance"]
        assert (said["settings"]["no_face"], said["seed"]) == (dict(asked.settings)["no_face"], asked.seed)
        assert not world.path.exists()
    assert list((cache / "passing").iterdir()) == [] and not (cache / "worlds").exists()


def test_passing_worlds_are_deleted_after_an_interrupt(drawn, cache, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(retrieve, "retrieve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch([Experiment(settings=SMALL)])
    assert len(drawn) == 1 and list((cache / "passing").iterdir()) == []


def test_what_a_killed_process_left_of_a_world_is_swept(done, drawn, cache):
    asked = Experiment(settings=SMALL)
    left = cache / "passing" / records._world_name(asked) / ".world.partial-1"
    left.mkdir(parents=True)
    fetch([asked])
    assert len(drawn) == 1 and list((cache / "passing").iterdir()) == []


def test_calibrated_worlds_stay_whatever_way_their_settings_are_said(done, drawn, cache):
    plain = Experiment(profile="tiny")
    fetch([plain, replace(plain, settings=(("warp", settings_for("tiny").warp),))])
    fetch([replace(plain, aggregator="norm")])
    assert (len(drawn), len(done)) == (1, 2) and len(list((cache / "worlds").iterdir())) == 1


def test_given_store_is_used_whatever_the_settings(store, done, drawn):
    fetch([of(store, settings=SMALL)])
    assert [ran.path for _, ran in done] == [store.path] and drawn == [] and open_store(of(store)).path == store.path


def test_world_that_another_process_draws_meanwhile_is_opened(cache, drawn, store):
    asked = Experiment(profile="tiny", settings=SMALL, seed=3)
    name = records._world_name(asked)
    with ThreadPoolExecutor() as pool:
        with claim(records._records() / "locks" / f"draw-{name}.lock"):
            waiting = pool.submit(open_store, asked)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            shutil.copytree(store.path, cache / "worlds" / name)
        assert waiting.result(timeout=60).path == cache / "worlds" / name and drawn == []


def test_half_a_world_is_removed_before_it_is_drawn(cache, drawn):
    asked = Experiment(profile="tiny", settings=SMALL)
    left = cache / "worlds" / f".{records._world_name(asked)}.partial-1"
    left.mkdir(parents=True)
    assert open_store(asked).path.parent == left.parent and not left.exists()


def test_world_that_cannot_be_drawn_is_an_error(cache, monkeypatch):
    monkeypatch.setattr(records, "simulate", full)
    with pytest.raises(OSError, match="No space"):
        open_store(Experiment(profile="tiny"))


# -- members -------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """Write down what is trained, pass by pass: seed, modality and member."""
    calls, plain = [], retrieve._started

    def spy(*arguments):
        for group in plain(*arguments):
            calls.append([(branch.seed, branch.modality, number) for branch, number in group])
            yield group

    monkeypatch.setattr(retrieve, "_started", spy)
    return calls


def rankings_of(store):
    """Experiments of one branch: members, ways to combine them, and fallbacks."""
    return [
        small(store, members=(0,)),
        small(store, members=(0, 1, 2)),
        small(store, members=(2, 1), combine="ranks"),
        small(store, members=(1,), combine="cosine"),
        small(store, members=(0, 1), fallback=Fallback(share=0.2)),
        small(store, members=(0,), fallback=Fallback(share=0.1, members=(0, 3))),
    ]


def test_members_of_one_branch_are_trained_once_and_their_records_are_those_of_each_alone(patchy, cache, passes):
    asked = rankings_of(patchy)
    together = fetch(asked)
    trained = [("face", 0), ("face", 1), ("face", 2), (None, 0), (None, 3)]
    assert sorted([one[1:] for group in passes for one in group], key=str) == trained
    assert [measured(record) for record in together] == [measured(run(one, patchy)) for one in asked]


def test_members_that_no_other_record_needs_are_not_kept(patchy, cache, monkeypatch):
    given, plain = [], retrieve.retrieve
    monkeypatch.setattr(
        retrieve, "retrieve", lambda *a, trained, **o: given.append(set(trained)) or plain(*a, trained=trained, **o)
    )
    one, two = small(patchy, members=(0, 1)), small(patchy, hidden=16)
    fetch([one, two, replace(one, members=(1,), scale=2.0), replace(one, members=(1, 2))])
    first, second = ((one.branch(), number) for number in (0, 1))
    assert given == [set(), {second}, {second}, set()] and first not in set.union(*given)


def test_processes_that_pay_have_four_trainings_each(monkeypatch):
    monkeypatch.setattr(records.torch, "get_num_threads", lambda: 16)
    assert [records.workers(number, "cpu") for number in (0, 1, 7, 8, 16, 31, 32, 1000)] == [1, 1, 1, 2, 4, 7, 8, 8]
    monkeypatch.setattr(records, "is_helper", lambda: True)
    assert records.workers(1000, "cpu") == 1


@pytest.mark.parametrize("threads, helpers", [(1, 0), (2, 1), (8, 1)])
def test_other_processes_help_with_many_trainings_of_several_branches(patchy, cache, monkeypatch, threads, helpers):
    asked = [small(patchy, hidden=16, members=(0, 1, 2)), *rankings_of(patchy)]
    ordered, helped = [], []

    @contextmanager
    def helping(number, function):
        helped.append((number, function))
        yield

    monkeypatch.setattr(records, "helped", helping)
    monkeypatch.setattr(records, "_make", lambda tasks, wait, **_: ordered.extend(tasks.values()) or (1, {}))
    monkeypatch.setattr(records.torch, "get_num_threads", lambda: threads)
    with pytest.raises(FileNotFoundError):  # nobody has made them
        fetch(asked, device="cpu")
    ((number, function),) = helped
    assert number == helpers and (function.func, function.args, function.keywords) == (
        fetch,
        (asked,),
        {"device": "cpu"},
    )
    assert [list(task.values()) for task in ordered] == [asked[1:], asked[:1]]  # the longest first


def seeds_of(store, **options):
    return [small(store, seed=seed, **options) for seed in (0, 1, 2)]


def test_seeds_of_an_arm_are_trained_together_and_give_the_records_of_each_alone(patchy, cache, passes, monkeypatch):
    monkeypatch.setitem(retrieve.TOGETHER, "cpu", 4)  # as on a GPU
    asked = seeds_of(patchy, members=(0, 1), fallback=Fallback(share=0.2))
    asked = [e for pair in zip(asked, seeds_of(patchy, hidden=16)) for e in pair]  # two arms, by seed
    together = fetch(asked, device="cpu")
    both = [(seed, "face", number) for seed in (0, 1, 2) for number in (0, 1)]
    alone = [[(seed, modality, 0) for seed in (0, 1, 2)] for modality in ("face", None)]
    assert sorted(passes, key=str) == sorted([both[:4], both[4:], *alone], key=str)
    passes.clear()
    for record, e in zip(together, asked):
        one = run(e, patchy, device="cpu")
        np.testing.assert_allclose(record.losses, one.losses, rtol=1e-3)
        assert record.measures == pytest.approx(one.measures, abs=0.02) and record.key == one.key


def test_seeds_that_are_stored_or_claimed_are_not_trained_again(patchy, cache, passes, monkeypatch):
    monkeypatch.setitem(retrieve.TOGETHER, "cpu", 4)
    keys = {e: e.key() for e in seeds_of(patchy)}
    asked = list(keys)
    fetch(asked[:1], device="cpu")
    passes.clear()
    ((name, task),) = records._missing({asked[1]: keys[asked[1]]}).items()
    with claim(records._records() / "locks" / f"{name}.lock"):
        (batch,) = records._batches(records._missing(keys), "cpu")
        assert records._make(batch, 0, device="cpu") == (1, {name: task})
    assert passes == [[(2, "face", 0)]] and [records._path(key).exists() for key in keys.values()] == [
        True,
        False,
        True,
    ]


def test_worlds_of_different_seeds_are_not_trained_together(cache, monkeypatch):
    monkeypatch.setitem(retrieve.TOGETHER, "cpu", 4)
    keys = {e: e.key() for e in (Experiment(profile="tiny", seed=seed) for seed in (0, 1))}
    assert [len(batch) for batch in records._batches(records._missing(keys), "cpu")] == [1, 1]


# -- many processes ------------------------------------------------------------------------------------------


SWEEP = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_records import asked_of, measured, noting
from mmlib import records
noting(Path(sys.argv[3]))
made = records.fetch(asked_of(Path(sys.argv[2])), device="cpu")
print([measured(record) for record in made])
"""
HERE = Path(__file__).parent


def asked_of(path):
    """Two records a branch of four, two records in each of two passing worlds, and one in a world that stays."""

    class At:
        pass

    At.path = path
    brief = Training(epochs=10, batch=16, frames=4, lr=1e-2)
    trained = [
        small(At, hidden=hidden, members=(0, 1), scale=scale, training=brief)
        for hidden in range(8, 12)
        for scale in (5.0, 10.0)
    ]
    plain = Experiment(profile="tiny", classifier="class means", aggregator="mean")
    passing = [
        replace(plain, settings=SMALL, seed=seed, aggregator=name) for seed in (0, 1) for name in ("mean", "norm")
    ]
    return [*trained, *passing, plain]


def noting(folder):
    """Leave a file for every record that this process begins to make."""
    plain = retrieve.retrieve

    def noted(asked, *arguments, **options):
        (folder / f"{asked.key()}-{os.getpid()}").touch()
        return plain(asked, *arguments, **options)

    retrieve.retrieve = noted


def sweep(path, notes):
    command = [sys.executable, "-c", SWEEP, str(HERE), str(path), str(notes)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE)


def test_killed_sweep_is_finished_by_two_processes_and_nothing_runs_twice(patchy, cache, tmp_path, monkeypatch):
    folder, before, after = cache / "records" / library_hash(), tmp_path / "before", tmp_path / "after"
    before.mkdir(), after.mkdir()
    killed = sweep(patchy.path, before)
    deadline = time.monotonic() + 180
    while len([*folder.glob("*.json")]) < 2 or len([*before.iterdir()]) < 3:  # in the middle of a record
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    there = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert 2 <= len(there) < 13
    (folder / f".{next(iter(there)).name}.partial-1").touch()  # of a record that is there: nobody's task any more

    other = sweep(patchy.path, after)
    monkeypatch.setattr(retrieve, "retrieve", retrieve.retrieve)
    noting(after)
    mine = fetch(asked_of(patchy.path), device="cpu")
    printed = other.communicate(timeout=300)[0]
    assert other.returncode == 0 and printed == f"{[measured(record) for record in mine]}\n"
    every = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert len(every) == 13 and {path: every[path] for path in there} == there
    assert sorted(path.name.split("-")[0] for path in after.iterdir()) == sorted(p.stem for p in every.keys() - there)
    assert not list((cache / "passing").iterdir()) and len(list((cache / "worlds").iterdir())) == 1


def test_half_a_record_is_removed_when_the_record_is_made(store, done, cache):
    left = cache / "records" / library_hash() / f".{of(store).key()}.json.partial-1"
    left.parent.mkdir(parents=True)
    left.touch()
    fetch([of(store)])
    assert not left.exists()


def test_record_that_another_process_made_is_not_made_again(store, done, cache):
    """Between the look for what is missing and the claim."""
    missing = records._missing({of(store): of(store).key()})
    fetch([of(store)])
    assert records._make(missing, 0, device="cpu") == (1, {}) and len(done) == 1


def test_branch_that_another_process_holds_is_left_to_it(store, done, cache):
    asked = [of(store, shrinkage=shrinkage) for shrinkage in (0.1, 0.2)]
    first = next(iter(records._missing({e: e.key() for e in asked})))
    one, two = (records._path(e.key()) for e in asked)
    with ThreadPoolExecutor() as pool, claim(records._records() / "locks" / f"{first}.lock"):
        waiting = pool.submit(fetch, asked)
        deadline = time.monotonic() + 60
        while not two.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        one.write_bytes(two.read_bytes())
    assert len(waiting.result()) == 2 and [one for one, _ in done] == asked[1:]
