"""Compute a number once and keep it as a record.

:func:`fetch_or_run` returns the stored record of an experiment's key or makes it.  Records live under ``MMLIB_CACHE``
(else the user's cache folder), in a folder named after :func:`library_hash`: an edit of code that decides numbers
starts an empty one, an edit of prose or figures does not.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_dir
from tqdm.auto import tqdm

from mmlib import ensemble, metrics
from mmlib.clips.calibration import QUALITY_EDGES
from mmlib.clips.simulate import simulate
from mmlib.clips.store import ClipStore
from mmlib.experiment import Experiment, torch_device
from mmlib.retrieval import Retrieval, retrieve, training_clips

PACKAGE = Path(__file__).parent
RESULTS = PACKAGE.parent / "book" / "results"  # committed records
DECIDING = ("clips/arrays.py", "clips/sampling.py", "clips/store.py", "clips/writer.py", "clips/calibration.py",
            "clips/simulate.py", "aggregate.py", "losses.py", "models.py", "ensemble.py", "train.py", "rank.py", "metrics.py",
            "experiment.py", "retrieval.py", "runs.py")
LENGTH_EDGES = [1, 5, 10, 15, 20, 30, 40, 241]  # frames
PERCENTILE_EDGES = [*QUALITY_EDGES, 40, 60, 80, 100]
WRONG_EDGES = [0, 1e-9, .1, .25, .5, .8, 1.001]  # share of frames


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
    digest.update((PACKAGE / "clips" / "clips_per_identity_joint.csv").read_bytes())
    return digest.hexdigest()[:12]


_OWN_IMPORT = "('ImportFrom', [('module', \"'mmlib"


def _tree(node):
    """Reduce a syntax tree to what every supported Python version agrees on: names and non-empty fields."""
    if isinstance(node, list):
        # A string that stands alone is a docstring or does nothing.
        return [_tree(item) for item in node
                if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)
                        and isinstance(item.value.value, str))]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, _tree(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return type(node).__name__, fields


# -- running --------------------------------------------------------------------------------------------------------


def open_store(experiment: Experiment) -> ClipStore:
    """Open the experiment's store, drawing its world first if it is not in the cache."""
    if not experiment.simulated:
        return ClipStore.open(experiment.data)
    settings, seed = experiment.world()
    said = json.dumps([asdict(settings), seed, library_hash()], sort_keys=True)
    path = cache_folder() / "worlds" / hashlib.sha256(said.encode()).hexdigest()[:20]
    try:
        return ClipStore.open(path) if path.exists() else simulate(path, settings, seed)
    except OSError:  # another process may have drawn the same world meanwhile
        if not path.exists():
            raise
        return ClipStore.open(path)


def fetch_or_run(experiments: Iterable[Experiment], *, device: str = "auto", progress: bool = False) -> list[Record]:
    """Return the records of experiments in their order, running those that are not stored.

    Worlds whose settings differ from the calibrated ones are many and drawn for a few runs each, so they are
    deleted after use; the others stay in the cache.
    """
    experiments = list(experiments)
    folder = cache_folder() / "records" / library_hash()
    paths = {experiment: folder / f"{experiment.key()}.json" for experiment in experiments}
    # By path, because experiments that differ in what has no meaning share a record.
    missing = list({path: experiment for experiment, path in paths.items() if not path.exists()}.values())
    passing = [e for e in missing if e.simulated and e.settings]
    bar = tqdm(total=len(missing), desc="run", unit="arm", disable=not progress, mininterval=1)

    def make(group: list[Experiment], store: ClipStore) -> None:
        trained = {}  # of one branch at a time: members are many
        for experiment in group:
            record = run(experiment, store, device=device, progress=progress, trained=trained)
            _write(paths[experiment], json.dumps(asdict(record)).encode())
            bar.update()

    for group in _by_branch(e for e in missing if e not in passing):
        make(group, open_store(group[0]))
    for world in dict.fromkeys(e.world() for e in passing):
        with tempfile.TemporaryDirectory(prefix="mmlib-") as scratch:
            store = simulate(Path(scratch) / "world", *world)
            for group in _by_branch(e for e in passing if e.world() == world):
                make(group, store)
    bar.close()
    return [Record(**json.loads(paths[experiment].read_text())) for experiment in experiments]


def _by_branch(experiments: Iterable[Experiment]) -> list[list[Experiment]]:
    """Group experiments that share their trained members."""
    groups: dict[Experiment, list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault(experiment.branch(), []).append(experiment)
    return list(groups.values())


def fetch_all(experiments: Iterable[Experiment], *, device: str = "auto") -> list[Record]:
    """Do what ``fetch_or_run`` does, with one process a core where that pays: many short trainings on a CPU.

    Small matrices leave a second thread idle, a second process not.  Worlds that stay are drawn first, so that no two
    processes draw the same one; those of the sensitivity grid are drawn by the process that needs them.
    """
    experiments = list(experiments)
    workers = min(os.cpu_count() or 1, 8)
    missing = [e for e in dict.fromkeys(experiments) if not is_stored(e)]
    kept = [e for e in missing if not (e.simulated and e.settings)]
    tasks = _by_branch(kept)
    worlds: dict[object, list[Experiment]] = {}
    for experiment in missing:
        if experiment not in kept:
            worlds.setdefault(experiment.world(), []).append(experiment)
    # The longest first, so that no process is left with a long one at the end.
    tasks = sorted([*tasks, *worlds.values()], key=_trainings, reverse=True)
    pays = sum(map(_trainings, tasks)) >= 4 * workers and len(tasks) >= workers
    if workers > 1 and pays and torch_device(device).type == "cpu":
        for experiment in {(e.data, e.profile, e.seed): e for e in kept}.values():
            open_store(experiment)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(_store_records, tasks, [device] * len(tasks)):
                pass
    return fetch_or_run(experiments, device=device)


def _trainings(experiments: list[Experiment]) -> int:
    """Count the members that a group of experiments trains."""
    first = {(e.branch(), member) for e in experiments for member in e.members}
    second = {(e.second().branch(), member) for e in experiments if e.fallback for member in e.fallback.members}
    return len(first | second)


def is_stored(experiment: Experiment) -> bool:
    """Say whether the cache holds the experiment's record, made by this library."""
    return (cache_folder() / "records" / library_hash() / f"{experiment.key()}.json").exists()


def _store_records(experiments: list[Experiment], device: str) -> None:
    fetch_or_run(experiments, device=device)


def run(experiment: Experiment, store: ClipStore, *, device: str = "auto", progress: bool = False,
        trained: dict | None = None) -> Record:
    """Retrieve, score, and make the record; ``trained`` as for ``retrieve``."""
    found = retrieve(experiment, store, device=device, progress=progress, trained=trained)
    model = found.members[0].model
    identity, ap = store.identity_of(found.gallery), found.ap
    labelled = identity >= 0
    right = found.predicted == identity
    precision = metrics.clip_precision(found.ranking, found.hits, len(found.gallery))
    measures = {"map_at_100": float(ap.mean()), "top1": float(found.hits[:, 0].mean()),
                "clip_top1": float(right[labelled].mean()), "train_clips": len(found.members[0].clips),
                "gallery_clips": len(found.gallery), "queries": len(found.queries),
                "identities": len(store.identities),
                "parameters": sum(p.numel() for p in model.parameters()) if found.members[0].losses else 0}
    measures |= _of_members(experiment, store, found)
    clips = found.gallery[labelled]
    return Record(
        key=experiment.key(), library=library_hash(), experiment=asdict(experiment), simulated=store.meta["simulated"],
        measures=measures, ap=[round(float(a), 6) for a in ap],
        breakdown=_breakdown(store, experiment.modality, clips, right[labelled], precision[labelled]),
        losses=[round(x, 5) for x in found.members[0].losses], seconds=found.seconds,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        device=torch.cuda.get_device_name() if torch_device(device).type == "cuda" else "CPU",
        made=datetime.now(UTC).isoformat(timespec="seconds"), commit=_commit())


def _of_members(experiment: Experiment, store: ClipStore, found: Retrieval) -> dict[str, float]:
    """Measure an ensemble and what its members lack; empty for one model without contexts."""
    out = {f"train_without_{name}": int((store.modalities[name].count[found.members[0].clips] == 0).sum())
           for name in experiment.context}
    out |= {f"gallery_without_{name}": int((store.modalities[name].count[found.gallery] == 0).sum())
            for name in experiment.context}
    if len(found.members) > 1:
        trained = store.identity_of(training_clips(experiment, store))
        lost = [ensemble.lost_identities(trained, store.identity_of(member.clips)) for member in found.members]
        scored = (found.by_member >= 0).all(0) & (store.identity_of(found.gallery) >= 0)
        right = found.by_member[:, scored] == store.identity_of(found.gallery[scored])
        out |= {"lost_identities": float(np.mean(lost)), "member_clip_top1": float(right.mean()),
                "disagreement": ensemble.disagreement(found.by_member[:, scored])}
    return out


def _breakdown(store: ClipStore, modality: str | None, clips: np.ndarray, right: np.ndarray,
               precision: np.ndarray) -> dict[str, list[list[float]]]:
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
        out[name] = [[low, high, int(chosen.sum()), round(float(right[chosen].mean()), 5),
                      round(float(precision[chosen].mean()), 5)] for low, high, chosen in rows if chosen.any()]
    return out


# -- records --------------------------------------------------------------------------------------------------------


def write_results(path: str | Path, records: Iterable[Record]) -> None:
    """Write records for committing: gzipped JSON, one record a line, the same bytes for the same records."""
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    _write(Path(path), gzip.compress(lines.encode(), mtime=0))


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


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@cache
def _commit() -> str:
    """Return the short commit of the repository the library lies in, with + if files differ; else ``none``."""
    try:
        git = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
