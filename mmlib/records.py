"""The record of every number: make it, say which library made it, read and write committed ones.

Records live under ``MMLIB_CACHE`` (else the user's cache folder), in a folder named after :func:`library_hash`: an edit
of code that decides numbers starts an empty one, an edit of prose or figures does not.  ``mmlib.records`` fills it.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_dir
from tqdm.auto import tqdm

from mmlib import ensemble, metrics
from mmlib.data.calibration import QUALITY_EDGES
from mmlib.data.simulate import settings_for, simulate
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment, torch_device
from mmlib.retrieve import TOGETHER, Retrieval, add_members, retrieve, training_clips

PACKAGE = Path(__file__).parent
RESULTS = PACKAGE.parent / "book" / "results"  # committed records
DECIDING = (
    "data/store.py",
    "data/writer.py",
    "data/calibration.py",
    "data/simulate.py",
    "aggregate.py",
    "losses.py",
    "models.py",
    "ensemble.py",
    "train.py",
    "rank.py",
    "metrics.py",
    "experiment.py",
    "retrieve.py",
    "records.py",
)
LENGTH_EDGES = [1, 5, 10, 15, 20, 30, 40, 241]  # frames
PERCENTILE_EDGES = [*QUALITY_EDGES, 40, 60, 80, 100]
WRONG_EDGES = [0, 1e-9, 0.1, 0.25, 0.5, 0.8, 1.001]  # share of frames


@dataclass(frozen=True)
class Record:
    """What a run leaves: enough to redo every figure and comparison without training.

    measures: map_at_100, top1 (queries whose first clip is right), clip_top1 (labelled clips recognised), counts; of an
    ensemble the mean over members of the identities lost and of clip_top1, and the share of clips on which two members
    disagree.
    ap: average precision of each query, in the order of the store's identities.  breakdown: for groups of clips by
    ``frames``, ``quality`` (percentile) and, where known, ``wrong`` (share of frames of another person): lower edge,
    upper edge, clips, top-1, and their mean precision (``metrics.clip_precision``, of which MAP is a mean).
    """

    key: str
    library: str
    experiment: dict
    simulated: bool
    measures: dict[str, float]
    ap: list[float]
    breakdown: dict[str, list[list[float]]]
    losses: list[float]
    seconds: dict[str, float]
    versions: dict[str, str]
    device: str
    made: str
    commit: str

    def row(self) -> dict:
        """Return the experiment's fields and the measures as one flat row."""
        training = {f"training.{name}": value for name, value in self.experiment["training"].items()}
        settings = {name: value for name, value in self.experiment["settings"]}
        return {**self.experiment, **training, **settings, **self.measures, "simulated": self.simulated}


def cache_folder() -> Path:
    """Return the folder of simulated worlds and records: ``MMLIB_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("MMLIB_CACHE") or user_cache_dir("mmlib", appauthor=False))


@cache
def library_hash() -> str:
    """Hash what stands in the modules that decide numbers, 12 hexadecimal digits.

    As syntax trees without docstrings, sorted, and without the imports of the library's own modules: in which of them
    a function stands, and in which place, decides nothing.
    """
    digest = hashlib.sha256()
    parts = [repr(part) for name in DECIDING for part in _tree(ast.parse((PACKAGE / name).read_text()).body)]
    for part in sorted(part for part in parts if not part.startswith(_OWN_IMPORT)):
        digest.update(part.encode() + b"\0")
    digest.update((PACKAGE / "data" / "clips_per_identity_joint.csv").read_bytes())
    return digest.hexdigest()[:12]


_OWN_IMPORT = "('ImportFrom', [('module', \"'mmlib"


def code_hash(names: tuple[str, ...]) -> str:
    """Hash modules of the package, 12 hexadecimal digits, as syntax trees without docstrings."""
    parts = sorted(repr(part) for name in names for part in _tree(ast.parse((PACKAGE / name).read_text()).body))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _tree(node):
    """Reduce a syntax tree to what every supported Python version agrees on: names and non-empty fields."""
    if isinstance(node, list):
        # A string that stands alone is a docstring or does nothing.
        return [
            _tree(item)
            for item in node
            if not (
                isinstance(item, ast.Expr)
                and isinstance(item.value, ast.Constant)
                and isinstance(item.value.value, str)
            )
        ]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, _tree(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return type(node).__name__, fields


# -- running --------------------------------------------------------------------------------------------------------


def run(
    experiment: Experiment,
    store: ClipStore,
    *,
    device: str = "auto",
    progress: bool = False,
    trained: dict | None = None,
) -> Record:
    """Retrieve, score, and make the record; ``trained`` as for ``retrieve``."""
    found = retrieve(experiment, store, device=device, progress=progress, trained=trained)
    model = found.members[0].model
    identity, ap = store.identity_of(found.gallery), found.ap
    labelled = identity >= 0
    right = found.predicted == identity
    precision = metrics.clip_precision(found.ranking, found.hits, len(found.gallery))
    measures = {
        "map_at_100": float(ap.mean()),
        "top1": float(found.hits[:, 0].mean()),
        "clip_top1": float(right[labelled].mean()),
        "train_clips": len(found.members[0].clips),
        "gallery_clips": len(found.gallery),
        "queries": len(found.queries),
        "identities": len(store.identities),
        "parameters": sum(p.numel() for p in model.parameters()) if found.members[0].losses else 0,
    }
    measures |= _of_members(experiment, store, found)
    clips = found.gallery[labelled]
    return Record(
        key=experiment.key(),
        library=library_hash(),
        experiment=asdict(experiment),
        simulated=store.meta["simulated"],
        measures=measures,
        ap=[round(float(a), 6) for a in ap],
        breakdown=_breakdown(store, experiment.modality, clips, right[labelled], precision[labelled]),
        losses=[round(x, 5) for x in found.members[0].losses],
        seconds=found.seconds,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        device=torch.cuda.get_device_name() if torch_device(device).type == "cuda" else "CPU",
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
    )


def _of_members(experiment: Experiment, store: ClipStore, found: Retrieval) -> dict[str, float]:
    """Measure an ensemble and what its members lack; empty for one model without contexts."""
    out = {
        f"train_without_{name}": int((store.modalities[name].count[found.members[0].clips] == 0).sum())
        for name in experiment.context
    }
    out |= {
        f"gallery_without_{name}": int((store.modalities[name].count[found.gallery] == 0).sum())
        for name in experiment.context
    }
    scored = (found.by_member >= 0).all(0) & (store.identity_of(found.gallery) >= 0)
    if len(found.members) > 1 and scored.any():
        trained = store.identity_of(training_clips(experiment, store))
        lost = [ensemble.lost_identities(trained, store.identity_of(member.clips)) for member in found.members]
        right = found.by_member[:, scored] == store.identity_of(found.gallery[scored])
        out |= {
            "lost_identities": float(np.mean(lost)),
            "member_clip_top1": float(right.mean()),
            "disagreement": ensemble.disagreement(found.by_member[:, scored]),
        }
    return out


def _breakdown(
    store: ClipStore, modality: str | None, clips: np.ndarray, right: np.ndarray, precision: np.ndarray
) -> dict[str, list[list[float]]]:
    """Group labelled gallery clips by length, quality and share of wrong frames; see ``Record``."""
    modality = modality or "face"
    if modality not in store.modalities:
        return {}
    source = store.modalities[modality]
    has = source.count[clips] > 0
    clips, right, precision = clips[has], right[has], precision[has]
    known = {"frames": (source.count[clips], LENGTH_EDGES)}
    if "quality" in source.columns and len(clips):
        mean = store.clip_means(modality, "quality")[clips]
        known["quality"] = (mean.argsort().argsort() / len(clips) * 100, PERCENTILE_EDGES)
    if "wrong" in source.columns:
        known["wrong"] = (store.clip_means(modality, "wrong")[clips], WRONG_EDGES)
    out = {}
    for name, (value, edges) in known.items():
        group = np.digitize(value, edges) - 1
        rows = [(low, high, group == i) for i, (low, high) in enumerate(zip(edges, edges[1:]))]
        out[name] = [
            [
                low,
                high,
                int(chosen.sum()),
                round(float(right[chosen].mean()), 5),
                round(float(precision[chosen].mean()), 5),
            ]
            for low, high, chosen in rows
            if chosen.any()
        ]
    return out


# -- records --------------------------------------------------------------------------------------------------------


def write_results(path: str | Path, records: Iterable[Record]) -> None:
    """Write records for committing: gzipped JSON, one record a line, the same bytes for the same records."""
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    write_whole(Path(path), gzip.compress(lines.encode(), mtime=0))


def read_results(name: str) -> list[Record]:
    """Read committed records by the name of their file in ``book/results``; none if there is no such file."""
    path = RESULTS / name
    if not path.exists():
        return []
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path}: not a file of records (it is empty)")
    try:
        return [Record(**json.loads(line)) for line in gzip.decompress(content).splitlines()]
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file of records ({error})") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@cache
def commit() -> str:
    """Return the short commit of the repository the library lies in, with + if files differ; else ``none``."""
    try:
        git = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


PATIENCE = 1.0  # seconds to wait for a claim, once every task that is left is claimed by others
Task = TypeVar("Task")
Tasks = dict[str, dict[str, Experiment]]  # experiments by the name of their claim, then by the key of their record


# -- claims ---------------------------------------------------------------------------------------------------------


@contextmanager
def claim(path: Path, wait: float = -1) -> Iterator[bool]:
    """Hold the lock file ``path`` for a block, and yield whether it is held.

    wait: seconds to wait for another process to let go of it; below 0 without end.  The file stays.  On a shared folder
    the file system must carry ``flock`` from machine to machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def share(tasks: Iterable[Task], attempt: Callable[[list[Task], float], Iterable[bool]]) -> None:
    """Do tasks that other processes may be doing too: those that are free first, the others when they become free.

    attempt: from tasks and the seconds to wait for the claim of each, to whether each is done.  A task that another
    process had claimed is attempted again, as that process may have died.
    """
    tasks, wait = list(tasks), 0.0
    while tasks:
        left = [task for task, done in zip(tasks, attempt(tasks, wait)) if not done]
        wait = PATIENCE if len(left) == len(tasks) else 0.0
        tasks = left


def remove_locks(folder: Path) -> None:
    """Remove the lock files in a folder that nobody holds; a process that has just opened one notices that it is gone."""
    for path in folder.glob("*.lock"):
        with claim(path, 0) as held, suppress(OSError):  # not every system removes a file that is open
            if held:
                path.unlink()


def clear_partial(path: Path) -> None:
    """Remove what killed processes left of ``path`` half written; only for a process that has claimed it."""
    for left in path.parent.glob(f".{path.name}.partial-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


# -- worlds ---------------------------------------------------------------------------------------------------------


def open_store(experiment: Experiment) -> ClipStore:
    """Open the experiment's store, drawing its world first if it is not in the cache."""
    if not experiment.simulated:
        return ClipStore.open(experiment.data)
    name = _world_name(experiment)
    path = cache_folder() / "worlds" / name
    if not path.exists():
        with claim(_records() / "locks" / f"draw-{name}.lock"):
            if not path.exists():  # another process may have drawn it meanwhile
                clear_partial(path)
                return simulate(path, *experiment.world())
    return ClipStore.open(path)


@contextmanager
def _opened(experiment: Experiment) -> Iterator[ClipStore]:
    """Open the store for a block; a passing world is drawn for it, by whoever has claimed it, and deleted."""
    if not _is_passing(experiment):
        yield open_store(experiment)
        return
    folder = cache_folder() / "passing" / _world_name(experiment)
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        yield simulate(folder / "world", *experiment.world())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_passing(experiment: Experiment) -> bool:
    """Worlds whose settings differ from the calibrated ones are many, and drawn for a few runs each."""
    return experiment.simulated and experiment.world()[0] != settings_for(experiment.profile)


def _world_name(experiment: Experiment) -> str:
    settings, seed = experiment.world()
    said = json.dumps([asdict(settings), seed, library_hash()], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:20]


# -- records --------------------------------------------------------------------------------------------------------


def fetch_or_run(experiments: Iterable[Experiment], *, device: str = "auto", progress: bool = False) -> list[Record]:
    """Return the records of experiments in their order, running those that are not stored.

    Worlds whose settings differ from the calibrated ones are deleted after use; the others stay in the cache.  What
    another process is making is waited for.
    """
    experiments = list(experiments)
    tasks = _missing(experiments)
    with tqdm(total=sum(map(len, tasks.values())), desc="run", unit="arm", disable=not progress, mininterval=1) as bar:

        def attempt(batches: list[Tasks], wait: float) -> Iterator[bool]:
            for batch in batches:
                done = _make(batch, device=device, wait=wait, progress=progress)
                bar.update(done * sum(map(len, batch.values())))
                yield done

        share(_batches(tasks, device), attempt)
    return [Record(**json.loads(_path(experiment.key()).read_text())) for experiment in experiments]


def fetch(experiments: Iterable[Experiment], *, device: str = "auto") -> list[Record]:
    """Do what ``fetch_or_run`` does, with a process in the place of a thread where that pays: many trainings on a CPU.

    Small matrices leave a second thread idle, a second process not.  The threads are those that torch would take, at most
    eight; ``OMP_NUM_THREADS`` sets them.  The processes end with the one that started them.
    """
    experiments = list(experiments)
    workers = min(torch.get_num_threads(), 8)
    tasks = _missing(experiments)
    trainings = {name: _trainings(task.values()) for name, task in tasks.items()}
    pays = sum(trainings.values()) >= 4 * workers and len(tasks) >= workers
    if workers > 1 and pays and torch_device(device).type == "cpu":
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_begin_worker) as pool:
            # The longest first, so that no process is left with a long one at the end.
            share(
                sorted(tasks, key=trainings.get, reverse=True),
                lambda names, wait: pool.map(
                    partial(_make, device=device, wait=wait), [{name: tasks[name]} for name in names]
                ),
            )
    return fetch_or_run(experiments, device=device)


def is_stored(experiment: Experiment) -> bool:
    """Say whether the cache holds the experiment's record, made by this library."""
    return _path(experiment.key()).exists()


def stored(profile: str) -> list[Record]:
    """Return the records in the cache of a profile's whole, calibrated worlds, made by this library, in order of keys."""
    found = (Record(**json.loads(path.read_text())) for path in sorted(_records().glob("*.json")))
    return [
        record
        for record in found
        if record.experiment["data"] == "simulated"
        and record.experiment["profile"] == profile
        and not record.experiment["settings"]
    ]


def _records() -> Path:
    return cache_folder() / "records" / library_hash()


def _path(key: str) -> Path:
    return _records() / f"{key}.json"


def _missing(experiments: Iterable[Experiment]) -> Tasks:
    """Sort experiments without a record into what one process makes, by the name of its claim, then by key.

    That is a passing world, or else a branch: experiments that share their trained members.  The claim follows from the
    record's key, so that no record has two.
    """
    names: dict[object, str] = {}
    tasks: Tasks = {}
    for experiment in dict.fromkeys(experiments):
        key = experiment.key()
        if _path(key).exists():
            continue
        unit = experiment.world() if _is_passing(experiment) else experiment.branch()
        if unit not in names:
            names[unit] = f"branch-{unit.key()}" if isinstance(unit, Experiment) else f"world-{_world_name(experiment)}"
        # By key, because experiments that differ in what has no meaning share a record.
        tasks.setdefault(names[unit], {}).setdefault(key, experiment)
    return tasks


def _batches(tasks: Tasks, device: str) -> list[Tasks]:
    """Put tasks together whose models a GPU trains in one pass: the seeds of an arm on a given store.

    Simulated worlds of different seeds have different identities, and a CPU is full with one model.
    """
    arms: dict[object, Tasks] = {}
    for name, task in tasks.items():
        branch = next(iter(task.values())).branch()
        alone = branch.simulated or TOGETHER[torch_device(device).type] == 1
        arms.setdefault(name if alone else replace(branch, seed=0), {})[name] = task
    return list(arms.values())


def _make(tasks: Tasks, *, device: str, wait: float, progress: bool = False) -> bool:
    """Claim tasks on one store and make the records that they lack; say whether there was no other process at any."""
    with ExitStack() as stack:
        locks = {name: _records() / "locks" / f"{name}.lock" for name in tasks}
        held = {name for name, lock in locks.items() if stack.enter_context(claim(lock, wait))}
        missing = {
            experiment: (locks[name], _path(key))
            for name in tasks
            if name in held
            for key, experiment in tasks[name].items()
            if not _path(key).exists()
        }
        if missing:
            with _opened(next(iter(missing))) as store:
                trained: dict = {}
                if len({experiment.seed for experiment in missing}) > 1:
                    second = [e.second() for e in missing if e.fallback]
                    add_members([*missing, *second], store, trained, device=device, progress=progress)
                for group in _by_branch(missing):
                    for experiment in group:
                        lock, path = missing[experiment]
                        clear_partial(path)
                        _note(lock, "began", path.stem)
                        record = run(experiment, store, device=device, progress=progress, trained=trained)
                        write_whole(path, json.dumps(asdict(record)).encode())
                        _note(lock, "stored", path.stem)
                    for key in [key for key in trained if key[0].seed == group[0].seed]:
                        del trained[key]  # members, and what they make of a gallery, are many
    return held == tasks.keys()


def _note(lock: Path, event: str, key: str) -> None:
    """Add a line to the journal of a claim, which only its holder writes."""
    line = {
        "event": event,
        "key": key,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "process": os.getpid(),
    }
    with lock.with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _by_branch(experiments: Iterable[Experiment]) -> list[list[Experiment]]:
    """Group experiments that share their trained members."""
    groups: dict[Experiment, list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault(experiment.branch(), []).append(experiment)
    return list(groups.values())


def _trainings(experiments: Iterable[Experiment]) -> int:
    """Count the members that a group of experiments trains."""
    trained = set()
    for e in experiments:
        trained |= {(e.branch(), member) for member in e.members}
        trained |= {(e.second().branch(), member) for member in e.fallback.members} if e.fallback else set()
    return len(trained)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone; killed, it could not tell its workers to end."""
    multiprocessing.parent_process().join()
    os._exit(1)
