"""The record of every number: make it, claim it, say which library made it, read and write committed ones.

Records lie under ``MMLIB_CACHE`` (else the user's cache folder), in a folder named after ``library_hash``: an edit of
code that decides numbers starts an empty one, an edit of prose, of figures or of this module does not.
"""

import ast
import gzip
import hashlib
import json
import platform
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from mmlib import retrieve
from mmlib.claims import cache_folder, claim, clear_partial, helped, is_helper, share
from mmlib.data.content import write_whole
from mmlib.data.simulate import settings_for, simulate
from mmlib.data.store import ClipStore
from mmlib.experiment import Experiment, torch_device

PACKAGE = Path(__file__).parent
RESULTS = PACKAGE.parent / "book" / "results"  # committed records
_DATA = ("clips_per_identity_joint.csv", "calibration.py", "content.py", "simulate.py", "store.py", "writer.py")
_TRAINING = ("aggregate.py", "losses.py", "models.py", "ensemble.py", "train.py", "experiment.py", "threads.py")
DECIDING = (*(f"data/{name}" for name in _DATA), *_TRAINING, "rank.py", "metrics.py", "retrieve.py")
# Of a version of those modules, the earlier ones whose numbers it makes to the last digit: tests/test_same_numbers.py
# makes some again.  A further change of the modules has another hash, and so no such word.
SAME = {"808c87cf84a9": ("309e21c2e79b", "26d800de2643")}
Tasks = dict[str, dict[str, Experiment]]  # experiments by the name of their claim, then by the key of their record


@dataclass(frozen=True)
class Record:
    """What a run leaves: enough to redo every figure and comparison without training.

    measures: map_at_100, top1 (queries whose first clip is right), clip_top1 (labelled clips recognised), counts; of an
    ensemble the mean over members of the identities lost and of clip_top1, and the share of clips on which two members
    disagree.  ap: of each query, in the order of the store's identities.  breakdown: for groups of clips by ``frames``,
    ``quality`` (percentile) and, where known, ``wrong`` (share of frames of another person): lower edge, upper edge or
    None, clips, top-1, and their mean precision (``metrics.clip_precision``, of which MAP is a mean).
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
        settings = dict(self.experiment["settings"])
        return {**self.experiment, **training, **settings, **self.measures, "simulated": self.simulated}


def run(experiment: Experiment, store: ClipStore, *, device: str = "auto", **options) -> Record:
    """Retrieve, and make the record; options as for ``retrieve.retrieve``."""
    return record_of(experiment, store, retrieve.retrieve(experiment, store, device=device, **options), device)


def record_of(experiment: Experiment, store: ClipStore, found: retrieve.Retrieval, device: str = "auto") -> Record:
    """Make the record of what was retrieved."""
    measures, breakdown = retrieve.measure(experiment, store, found)
    return Record(
        key=experiment.key(),
        library=library_hash(),
        experiment=asdict(experiment),
        simulated=store.meta["simulated"],
        measures=measures,
        ap=[round(float(a), 6) for a in found.ap],
        breakdown=breakdown,
        losses=[round(x, 5) for x in found.members[0].losses],
        seconds=found.seconds,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        device=torch.cuda.get_device_name() if torch_device(device).type == "cuda" else "CPU",
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
    )


def is_fresh(record: Record) -> bool:
    """Say whether this library makes the same record."""
    return record.library in (library_hash(), *SAME.get(library_hash(), ()))


@cache
def library_hash() -> str:
    """Hash the modules that decide numbers, 12 hexadecimal digits."""
    return code_hash(DECIDING)


def code_hash(names: tuple[str, ...]) -> str:
    """Hash files of the package, 12 hexadecimal digits: modules by what they do, others by their bytes.

    A module counts as its syntax tree without docstrings.  In which module a definition stands, where there, and behind
    which imports decides nothing.  What a name means does: what its import is of, and, where the modules mean several
    things by one name, which of them means which.
    """
    trees = {name: ast.parse((PACKAGE / name).read_text()) for name in names if name.endswith(".py")}
    parts = {(PACKAGE / name).read_bytes().hex() for name in names if name not in trees}
    nodes = [(node, module) for module, tree in trees.items() for node in tree.body]
    homes = Counter(name for node, _ in nodes for name in _defined(node))
    meant: dict[str, set[tuple[str, str]]] = defaultdict(set)  # by name: what it means, and in which module
    for node, module in nodes:
        own = [(name, name) for name in _defined(node)]
        for word, target in [*own, *_imported(node)]:
            home, _, name = target.rpartition(".")
            meant[word].add((name if home.startswith("mmlib") and homes[name] == 1 else target, module))
        several = any(homes[name] > 1 for name, _ in own)
        parts |= {repr(part) + f" in {module}" * several for part in _tree([node])}
    for word, found in meant.items():
        several = len({target for target, _ in found}) > 1
        parts |= {f"{word} is {target}" + f" in {module}" * several for target, module in found}
    return hashlib.sha256("\0".join(sorted(parts)).encode()).hexdigest()[:12]


def _tree(node):
    """Reduce a syntax tree to what every supported Python version agrees on: names and non-empty fields."""
    if isinstance(node, list):
        return [_tree(part) for part in node if not (_is_text(part) or isinstance(part, ast.Import | ast.ImportFrom))]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, _tree(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return type(node).__name__, fields


def _is_text(node) -> bool:
    """A string that stands alone is a docstring or does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _defined(node: ast.stmt) -> list[str]:
    """Name what a statement defines: a function, a class, or values."""
    targets = getattr(node, "targets", [getattr(node, "target", node)])
    return [name for target in targets if (name := getattr(target, "id", getattr(target, "name", None)))]


def _imported(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """Yield the names that a statement and those inside it import, with the module and the name there."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import | ast.ImportFrom):
            home = "" if isinstance(part, ast.Import) else f"mmlib.{part.module}" if part.level else part.module
            yield from ((alias.asname or alias.name, f"{home}.{alias.name}") for alias in part.names)


@cache
def commit() -> str:
    """Return the short commit of the repository the library lies in, with + if files differ; else ``none``."""
    try:
        git = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def write_results(path: str | Path, records: Iterable[Record]) -> None:
    """Write records for committing: gzipped JSON, one record a line, the same bytes for the same records."""
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    write_whole(Path(path), gzip.compress(lines.encode(), mtime=0))


def read_results(name: str) -> list[Record]:
    """Read committed records by the name of their file in ``book/results``; none if there is no such file."""
    return read_records(RESULTS / name)


def read_records(path: Path) -> list[Record]:
    """Read what ``write_results`` wrote; none if there is no such file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    try:
        if not content:
            raise ValueError("it is empty")
        return [Record(**json.loads(line)) for line in gzip.decompress(content).splitlines()]
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file of records ({error})") from None


def stored(profile: str) -> list[Record]:
    """Return the cached records of a profile's whole, calibrated worlds, made by this library, in order of keys."""
    found = map(_read, sorted(_records().glob("*.json")))
    asked = {"data": "simulated", "profile": profile, "settings": []}
    return [record for record in found if asked.items() <= record.experiment.items()]


def restore(records: Iterable[Record]) -> None:
    """Put written records that this library made into the cache, so that they are not made again."""
    for record in records:
        if is_fresh(record) and not _path(record.key).exists():
            write_whole(_path(record.key), json.dumps(asdict(record)).encode())


def _records() -> Path:
    return cache_folder() / "records" / library_hash()


def _path(key: str) -> Path:
    return _records() / f"{key}.json"


def _read(path: Path) -> Record:
    return Record(**json.loads(path.read_text()))


def open_store(experiment: Experiment) -> ClipStore:
    """Open the experiment's store, drawing its world first if it is not in the cache."""
    if not experiment.simulated:
        return ClipStore.open(experiment.data)
    path = cache_folder() / "worlds" / _world_name(experiment)
    if not path.exists():
        with claim(_records() / "locks" / f"draw-{path.name}.lock"):
            if not path.exists():  # another process may have drawn it meanwhile
                clear_partial(path)
                simulate(path, *experiment.world())
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
    return hashlib.sha256(json.dumps([asdict(settings), seed, library_hash()]).encode()).hexdigest()[:20]


def fetch(experiments: Iterable[Experiment], *, device: str = "auto", progress: bool = False) -> list[Record]:
    """Return the records of experiments in their order, making those that are not stored.

    On a CPU processes share many trainings (``workers``).  Worlds whose settings are not the calibrated ones are
    deleted after use; the others stay in the cache.  What another process is making is waited for.
    """
    experiments = list(experiments)
    keys = {experiment: experiment.key() for experiment in dict.fromkeys(experiments)}
    batches = _batches(_missing(keys), device)
    batches.sort(key=_trainings, reverse=True)  # no process is left with a long one at the end
    helpers = min(workers(sum(map(_trainings, batches)), device), max(1, len(batches))) - 1
    total = sum(len(task) for batch in batches for task in batch.values())
    with tqdm(total=total, desc="run", unit="arm", disable=not progress) as bar:
        with helped(helpers, partial(fetch, experiments, device=device)):
            for made in share(batches, partial(_make, device=device, progress=progress)):
                bar.update(made)
    return [_read(_path(keys[experiment])) for experiment in experiments]


def workers(trainings: int, device: str) -> int:
    """Return how many processes pay for so many trainings: one on a GPU, which it fills, else one for four of them.

    At most eight, and as many as torch has threads (``OMP_NUM_THREADS``), which small matrices leave idle.
    """
    threads = 1 if is_helper() or torch_device(device).type != "cpu" else torch.get_num_threads()
    return max(1, min(threads, 8, trainings // 4))


def _missing(keys: dict[Experiment, str]) -> Tasks:
    """Sort experiments without a record into what one process makes: a passing world, or a branch with its members.

    The name of the claim follows from the record's key, so that no record has two.
    """
    tasks: Tasks = {}
    for experiment, key in keys.items():
        if not _path(key).exists():
            branch = None if _is_passing(experiment) else experiment.branch()
            name = f"branch-{branch.key()}" if branch else f"world-{_world_name(experiment)}"
            # By key, because experiments that differ in what has no meaning share a record.
            tasks.setdefault(name, {}).setdefault(key, experiment)
    return tasks


def _batches(tasks: Tasks, device: str) -> list[Tasks]:
    """Put tasks together whose models a GPU trains in one pass: the seeds of an arm on a given store.

    Simulated worlds of different seeds have different identities, and a CPU is full with one model.
    """
    arms: dict[object, Tasks] = {}
    for name, task in tasks.items():
        branch = next(iter(task.values())).branch()
        alone = branch.simulated or retrieve.TOGETHER[torch_device(device).type] == 1
        arms.setdefault(name if alone else replace(branch, seed=0), {})[name] = task
    return list(arms.values())


def _trainings(tasks: Tasks) -> int:
    """Count the members that tasks train."""
    return len({key for task in tasks.values() for e in task.values() for key in retrieve.members_of(e)})


def _make(tasks: Tasks, wait: float, *, device: str, progress: bool = False) -> tuple[int, Tasks]:
    """Claim tasks on one store and make the records that they lack; return how many they have, and others' tasks."""
    with ExitStack() as stack:
        locks = {name: _records() / "locks" / f"{name}.lock" for name in tasks}
        mine = {name: tasks[name] for name in tasks if stack.enter_context(claim(locks[name], wait))}
        wanted = {e: _path(key) for task in mine.values() for key, e in task.items() if not _path(key).exists()}
        if wanted:
            store = stack.enter_context(_opened(next(iter(wanted))))
            uses, trained = {e: retrieve.members_of(e) for e in wanted}, retrieve.Trained()
            if len({e.seed for e in wanted}) > 1:  # they fill a GPU together
                trained = retrieve.train_members(chain(*uses.values()), store, device=device, progress=progress)
            for e, path in wanted.items():
                clear_partial(path)
                found = retrieve.retrieve(e, store, device=device, progress=progress, trained=trained)
                write_whole(path, json.dumps(asdict(record_of(e, store, found, device))).encode())
                del uses[e]
                for key in trained.keys() - set(chain(*uses.values())):
                    del trained[key]  # members, and what they make of a gallery, are many
    return sum(map(len, mine.values())), {name: task for name, task in tasks.items() if name not in mine}
