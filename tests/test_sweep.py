"""Many processes fill one store of records: nothing is lost, nothing is done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import made, of, small

from mmlib import records, retrieve
from mmlib.data.simulate import settings_for, simulate
from mmlib.experiment import Experiment, Training
from mmlib.rank import Fallback
from mmlib.records import claim, clear_partial, fetch, fetch_or_run, library_hash, open_store, remove_locks, run, share

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

    monkeypatch.setattr(records, "run", fake)
    return calls


def full(*_):
    raise OSError(28, "No space left on device")


# -- fetching ------------------------------------------------------------------------------------------------


def test_stored_record_is_fetched_without_running(store, cache, monkeypatch):
    first = fetch_or_run([of(store)])
    monkeypatch.setattr(records, "run", lambda *_, **__: pytest.fail("it was run again"))
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
    monkeypatch.setattr(records, "library_hash", lambda: "changed")
    fetch_or_run([of(store)])
    assert len(done) == 2


def test_interrupted_set_resumes_at_the_arm_it_was_in(store, done, monkeypatch):
    arms = [of(store, scale=float(scale)) for scale in range(1, 5)]
    counting = records.run

    def interrupted(asked, store, **options):
        if asked == arms[2]:
            raise KeyboardInterrupt
        return counting(asked, store, **options)

    monkeypatch.setattr(records, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_or_run(arms)
    monkeypatch.setattr(records, "run", counting)
    done.clear()
    assert len(fetch_or_run(arms)) == 4
    assert [asked for asked, _ in done] == arms[2:]


def test_failed_write_leaves_no_record(store, done, cache, monkeypatch):
    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        fetch_or_run([of(store)])
    assert [path for path in cache.rglob("*") if path.is_file() and path.parent.name != "locks"] == []


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


def test_worlds_with_settings_are_deleted_after_use(done, drawn, cache):
    fetch_or_run([Experiment(settings=SMALL, seed=seed) for seed in (0, 1)])
    assert all(not ran.path.exists() for _, ran in done)
    assert list((cache / "passing").iterdir()) == [] and not (cache / "worlds").exists()


def test_worlds_with_settings_are_deleted_after_an_interrupt(drawn, cache, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_or_run([Experiment(settings=SMALL)])
    assert len(drawn) == 1 and list((cache / "passing").iterdir()) == []


def test_what_a_killed_process_left_of_a_world_is_swept(done, drawn, cache):
    asked = Experiment(settings=SMALL)
    left = cache / "passing" / records._world_name(asked) / ".world.partial-1"
    left.mkdir(parents=True)
    fetch_or_run([asked])
    assert len(drawn) == 1 and list((cache / "passing").iterdir()) == []


def test_settings_that_are_the_calibrated_ones_share_the_world_that_stays(done, drawn, cache):
    plain = Experiment(profile="tiny")
    fetch_or_run([plain, replace(plain, settings=(("warp", settings_for("tiny").warp),))])
    assert len(drawn) == len(done) == 1 and len(list((cache / "worlds").iterdir())) == 1


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
        [Experiment(settings=(*SMALL, ("no_face", share)), seed=seed) for share in (0, 0.1) for seed in (0, 1)]
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


def test_world_that_another_process_draws_meanwhile_is_opened(cache, drawn):
    asked = Experiment(profile="tiny", settings=SMALL, seed=3)
    name = records._world_name(asked)
    with ThreadPoolExecutor() as pool:
        with claim(records._records() / "locks" / f"draw-{name}.lock"):
            waiting = pool.submit(open_store, asked)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            path = simulate(cache / "worlds" / name, *asked.world()).path
        world = waiting.result(timeout=60)
    assert world.path == path and world.meta["provenance"]["seed"] == 3 and drawn == []


def test_half_a_world_is_removed_before_it_is_drawn(cache, drawn):
    asked = Experiment(profile="tiny", settings=SMALL)
    left = cache / "worlds" / f".{records._world_name(asked)}.partial-1"
    left.mkdir(parents=True)
    assert open_store(asked).path.parent == left.parent and not left.exists()


def test_world_that_cannot_be_drawn_is_an_error(cache, monkeypatch):
    monkeypatch.setattr(records, "simulate", full)
    with pytest.raises(OSError, match="No space"):
        open_store(Experiment(profile="tiny"))


def test_open_store_opens_the_given_one(store):
    assert open_store(of(store)).path == store.path


# -- branches -----------------------------------------------------------------------------------------------


@pytest.fixture
def fitted(monkeypatch):
    """Write down what is trained: the modality and the member."""
    calls, plain = [], retrieve.fit_together

    def spy(wanted, store, **options):
        calls.extend((asked.modality, member) for asked, member in wanted)
        return plain(wanted, store, **options)

    monkeypatch.setattr(retrieve, "fit_together", spy)
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


def measured(record):
    return record.key, record.ap, record.measures, record.breakdown, record.losses


def test_experiments_of_one_branch_are_grouped_in_their_order(patchy):
    one, two = small(patchy), small(patchy, hidden=16)
    asked = [one, two, replace(one, scale=2.0), replace(two, members=(1,)), replace(one, combine="cosine")]
    assert records._by_branch(asked) == [[asked[0], asked[2], asked[4]], [asked[1], asked[3]]]


def test_members_of_one_branch_are_trained_once(patchy, cache, fitted):
    fetch_or_run(rankings_of(patchy))
    assert sorted(fitted, key=str) == [("face", 0), ("face", 1), ("face", 2), (None, 0), (None, 3)]


def test_sharing_members_does_not_change_a_record(patchy, cache):
    asked = rankings_of(patchy)
    together = fetch_or_run(asked)
    assert [measured(record) for record in together] == [measured(run(one, patchy)) for one in asked]


def test_members_of_other_branches_are_not_kept(patchy, cache, monkeypatch):
    given, plain = [], records.run
    monkeypatch.setattr(
        records, "run", lambda *a, trained, **o: given.append(set(trained)) or plain(*a, trained=trained, **o)
    )
    one, two = small(patchy, members=(0, 1)), small(patchy, hidden=16)
    fetch_or_run([one, two, replace(one, scale=2.0)])
    assert given == [set(), {(one.branch(), 0), (one.branch(), 1)}, set()]


def test_trainings_are_counted_once_with_those_of_second_models(patchy):
    assert records._trainings(rankings_of(patchy)) == 5
    assert records._trainings([small(patchy, members=(0, 4)), small(patchy, hidden=16, members=(0,))]) == 3


class Pool:
    """Run tasks here and write them down, in the place of a pool of processes."""

    tasks: list = []

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, batches):
        Pool.tasks = [list(task.values()) for batch in batches for task in batch.values()]
        return [function(batch) for batch in batches]


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(records, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(records.torch, "get_num_threads", lambda: 2)
    Pool.tasks = []
    return Pool


def test_pool_gets_branches_whole_with_the_longest_first(patchy, cache, fitted, pool):
    short, long = small(patchy, hidden=16, members=(0, 1, 2)), rankings_of(patchy)
    records = fetch([short, *long], device="cpu")
    assert pool.tasks == [long, [short]] and len(fitted) == 5 + 3
    assert [record.key for record in records] == [one.key() for one in (short, *long)]
    assert records == fetch([short, *long], device="cpu") and len(fitted) == 8


def test_pool_is_left_alone_for_few_trainings_or_one_branch(patchy, cache, pool):
    fetch([small(patchy, members=(0, 1)), small(patchy, hidden=16)], device="cpu")
    assert pool.tasks == []
    fetch([small(patchy, members=tuple(range(9)))], device="cpu")
    assert pool.tasks == []


# -- seeds of an arm -----------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """Train as many members in one pass as a GPU would, and write down the seeds and members of each pass."""
    calls, plain = [], retrieve.fit_together

    def spy(wanted, store, **options):
        calls.append([(asked.seed, member) for asked, member in wanted])
        return plain(wanted, store, **options)

    monkeypatch.setattr(retrieve, "fit_together", spy)
    monkeypatch.setitem(records.TOGETHER, "cpu", 4)
    return calls


def seeds_of(store, **options):
    return [small(store, seed=seed, **options) for seed in (0, 1, 2)]


def test_seeds_of_an_arm_are_trained_together_and_give_the_records_of_each_alone(patchy, cache, passes):
    asked = seeds_of(patchy, members=(0, 1), fallback=Fallback(share=0.2))
    asked = [e for pair in zip(asked, seeds_of(patchy, hidden=16)) for e in pair]  # two arms, by seed
    records = fetch_or_run(asked, device="cpu")
    both = [(seed, member) for seed in (0, 1, 2) for member in (0, 1)]
    assert passes == [both[:4], both[4:], [(0, 0), (1, 0), (2, 0)], [(0, 0), (1, 0), (2, 0)]]
    passes.clear()
    for record, e in zip(records, asked):
        alone = run(e, patchy, device="cpu")
        np.testing.assert_allclose(record.losses, alone.losses, rtol=1e-3)
        assert record.measures == pytest.approx(alone.measures, abs=0.02) and record.key == alone.key


def test_seeds_that_are_stored_or_claimed_are_not_trained_again(patchy, cache, passes):
    asked = seeds_of(patchy)
    fetch_or_run(asked[:1], device="cpu")
    assert passes == [[(0, 0)]]
    passes.clear()
    name = next(iter(records._missing(asked[1:2])))
    with claim(records._records() / "locks" / f"{name}.lock"):
        batch = next(iter(records._batches(records._missing(asked), "cpu")))
        assert not records._make(batch, device="cpu", wait=0)
    assert passes == [[(2, 0)]] and [records.is_stored(e) for e in asked] == [True, False, True]


def test_worlds_of_different_seeds_are_not_trained_together(passes):
    asked = [Experiment(profile="tiny", seed=seed) for seed in (0, 1)]
    assert [len(batch) for batch in records._batches(records._missing(asked), "cpu")] == [1, 1]


# -- claims --------------------------------------------------------------------------------------------------


def start(code, *arguments, threads=1, **options):
    """Start Python code in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        **options,
    )


def wait_for(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too soon"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.005)


HOLD = """
import sys, time
from pathlib import Path
from mmlib.records import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_claim_of_another_process_is_respected_until_it_is_killed(tmp_path):
    path = tmp_path / "locks" / "one.lock"
    process = start(HOLD, path)
    assert process.stdout.readline() == "held\n"
    with claim(path, 0) as held:
        assert not held
    remove_locks(path.parent)
    assert path.exists()
    process.kill()
    process.wait()
    with claim(path, 0) as held:
        assert held
    remove_locks(path.parent)
    assert not path.exists()


def test_claim_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError):
        with claim(tmp_path / "lock"):
            raise KeyError
    with claim(tmp_path / "lock", 0) as held:
        assert held


def test_claimed_tasks_are_passed_over_and_come_back():
    tried, claimed = [], {"a": 2, "c": 1}  # how often each is found claimed

    def attempt(tasks, wait):
        for task in tasks:
            tried.append((task, wait))
            claimed[task] = claimed.get(task, 0) - 1
            yield claimed[task] < 0

    share(["a", "b", "c"], attempt)
    assert tried == [("a", 0), ("b", 0), ("c", 0), ("a", 0), ("c", 0), ("a", 0)]


def test_claims_are_waited_for_when_nothing_else_is_left():
    waits = []

    def attempt(tasks, wait):
        waits.append(wait)
        return [len(waits) > 2]

    share(["a"], attempt)
    assert waits == [0, records.PATIENCE, records.PATIENCE]


def test_only_what_is_half_written_of_a_file_is_removed(tmp_path):
    for name in (".a.json.partial-1", ".b.json.partial-1", "a.json"):
        (tmp_path / name).touch()
    clear_partial(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.partial-1", "a.json"]


# -- many processes ------------------------------------------------------------------------------------------


SWEEP = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_sweep import asked_of
from mmlib import sweep
records = getattr(sweep, sys.argv[3])(asked_of(Path(sys.argv[2]), int(sys.argv[4])), device="cpu")
print(json.dumps([[record.key, record.ap, record.made] for record in records]))
"""
HERE = Path(__file__).parent


def asked_of(path, epochs):
    """Two records a branch of eight, two records in each of two passing worlds, and one in a world that stays."""

    class At:
        pass

    At.path = path
    brief = Training(epochs=epochs, batch=16, frames=4, lr=1e-2)
    trained = [
        small(At, hidden=hidden, members=(0, 1), scale=scale, training=brief)
        for hidden in range(8, 16)
        for scale in (5.0, 10.0)
    ]
    plain = Experiment(profile="tiny", classifier="class means", aggregator="mean")
    passing = [
        replace(plain, settings=SMALL, seed=seed, aggregator=name) for seed in (0, 1) for name in ("mean", "norm")
    ]
    return [*trained, *passing, plain]


def journal(cache):
    """The lines of all journals: (event, key, process)."""
    lines = [json.loads(line) for path in cache.rglob("*.jsonl") for line in path.read_text().splitlines()]
    return [(line["event"], line["key"], line["process"]) for line in lines]


def test_killed_sweep_is_finished_by_two_processes_and_nothing_runs_twice(patchy, cache):
    records = cache / "records" / library_hash()
    both = [start(SWEEP, HERE, patchy.path, "fetch_or_run", 40) for _ in range(2)]
    # Each in the middle of a record.
    wait_for(
        lambda: len({process for *_, process in journal(cache)}) == 2 and len(list(records.glob("*.json"))) >= 3,
        both[0],
    )
    for process in both:
        process.kill()
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 3 <= len(before) < 21
    (records / f".{next(iter(before)).name}.partial-1").touch()  # of a record that is there: nobody's task any more
    begun = journal(cache)

    both = [start(SWEEP, HERE, patchy.path, "fetch_or_run", 40) for _ in range(2)]
    printed = [json.loads(process.communicate(timeout=300)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1] and len(printed[0]) == 21

    after = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert len(after) == 21 and {path: after[path] for path in before} == before
    again = Counter(journal(cache)) - Counter(begun)
    assert {key for _, key, _ in again} == {path.stem for path in after.keys() - before.keys()}
    assert Counter(event for event, _, _ in again.elements()) == {"began": 21 - len(before), "stored": 21 - len(before)}
    assert {process for *_, process in again} <= {process.pid for process in both}
    assert not list((cache / "passing").iterdir()) and len(list((cache / "worlds").iterdir())) == 1


def test_half_a_record_is_removed_when_the_record_is_made(store, done, cache):
    left = cache / "records" / library_hash() / f".{of(store).key()}.json.partial-1"
    left.parent.mkdir(parents=True)
    left.touch()
    fetch_or_run([of(store)])
    assert not left.exists()


def test_record_that_another_process_made_is_not_made_again(store, done, cache):
    """Between the look for what is missing and the claim."""
    asked = of(store)
    ((name, task),) = records._missing([asked]).items()
    fetch_or_run([asked])
    assert records._make({name: task}, device="cpu", wait=0) and len(done) == 1


def test_branch_that_another_process_holds_is_left_to_it(store, done, cache):
    asked = [of(store, shrinkage=shrinkage) for shrinkage in (0.1, 0.2)]
    tasks = records._missing(asked)
    first, second = tasks
    with ThreadPoolExecutor() as pool, claim(records._records() / "locks" / f"{first}.lock"):
        assert not records._make({first: tasks[first]}, device="cpu", wait=0) and done == []
        waiting = pool.submit(fetch_or_run, asked)
        deadline = time.monotonic() + 60
        while not records.is_stored(asked[1]):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        records._path(asked[0].key()).write_bytes(records._path(asked[1].key()).read_bytes())
    assert len(waiting.result()) == 2 and [one for one, _ in done] == asked[1:]


def is_running(process):
    """A process that nobody has asked for its status is a zombie, and runs no more."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc says whether a process runs")
def test_workers_end_with_the_process_that_started_them(patchy, cache):
    parent = start(SWEEP, HERE, patchy.path, "fetch", 1_000_000, threads=2, start_new_session=True)
    try:
        wait_for(lambda: len({process for *_, process in journal(cache)}) == 2, parent)
        workers = {process for *_, process in journal(cache)}
        assert parent.pid not in workers and all(map(is_running, workers))
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 30
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.05)
    finally:
        try:
            os.killpg(parent.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
