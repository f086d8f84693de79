"""Say everything that decides a number, compute it once, and keep it as a record.

An :class:`Experiment` hashes to a key; :func:`fetch_or_run` returns the stored record of that key or makes it.  Records
live under ``MMLIB_CACHE`` (else the user's cache folder), in a folder named after :func:`library_hash`: an edit of
code that decides numbers starts an empty one, an edit of prose or figures does not.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_dir
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from mmlib import metrics, rank
from mmlib.clips.calibration import QUALITY_EDGES
from mmlib.clips.simulate import Settings, settings_for, simulate
from mmlib.clips.store import ClipStore
from mmlib.models import LEARNED, NEEDS_SCORES, IdentityModel, make_aggregator, within_class_whitening
from mmlib.train import Training, pooled_features, train

PACKAGE = Path(__file__).parent
RESULTS = PACKAGE.parent / "book" / "results"  # committed records
DECIDING = ("clips/arrays.py", "clips/sampling.py", "clips/store.py", "clips/writer.py", "clips/calibration.py",
            "clips/simulate.py", "aggregate.py", "losses.py", "models.py", "train.py", "rank.py", "metrics.py",
            "experiment.py")
CLASSIFIERS = ("nearest", "class means", "whitened means", "linear", "mlp")
TRAINED = ("linear", "mlp")
LENGTH_EDGES = [1, 5, 10, 15, 20, 30, 40, 241]  # frames
PERCENTILE_EDGES = [*QUALITY_EDGES, 40, 60, 80, 100]
WRONG_EDGES = [0, 1e-9, .1, .25, .5, .8, 1.001]  # share of frames


@dataclass(frozen=True)
class Experiment:
    """One run of one system on one data set.

    data: ``"simulated"``, or the path of a clip store (then ``profile`` and ``settings`` have no meaning).  settings:
    (name, value) pairs that override the simulator's.  seed: the world and its training; on a given store the
    training alone.  classifier: ``nearest`` (cosine to the nearest training clip of an identity), ``class means``,
    ``whitened means`` (class means after WCCN), ``linear`` (a trained cosine classifier), ``mlp`` (behind a
    residual MLP).  concat: as in ``IdentityModel``.  scale: of the cosines inside the softmax that makes scores of
    clips comparable.  shrinkage: of the within-class covariance.
    """

    data: str = "simulated"
    profile: str = "quick"
    settings: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    modality: str = "face"
    aggregator: str = "quality"
    classifier: str = "mlp"
    concat: str = "none"
    hidden: int = 512
    dropout: float = .5
    shrinkage: float = .1
    scale: float = 30.0
    training: Training = field(default_factory=Training)

    def __post_init__(self):
        if self.classifier not in CLASSIFIERS:
            raise ValueError(f"classifier must be one of {', '.join(CLASSIFIERS)}, got {self.classifier!r}")
        if self.aggregator in LEARNED and self.classifier not in TRAINED:
            raise ValueError(f"aggregator {self.aggregator!r} is learned, so classifier cannot be {self.classifier!r}")

    @property
    def simulated(self) -> bool:
        return self.data == "simulated"

    def world(self) -> tuple[Settings, int]:
        """Return the settings and seed of the simulated world."""
        return settings_for(self.profile, **dict(self.settings)), self.seed

    def key(self) -> str:
        """Hash what decides the number; a store counts by its content, not by where it lies."""
        said = asdict(self)
        if self.classifier not in TRAINED:  # what has no meaning must not make two records of one number
            for name in ("training", "hidden", "dropout"):
                said.pop(name)
        if self.simulated:
            said["settings"] = asdict(self.world()[0])
        else:
            said |= {"data": fingerprint(self.data), "profile": None, "settings": None}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Record:
    """What a run leaves: enough to redo every figure and comparison without training.

    measures: map_at_100, top1 (queries whose first clip is right), clip_top1 (labelled clips recognised), counts.
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


# -- keys and places ------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of simulated worlds and records: ``MMLIB_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("MMLIB_CACHE") or user_cache_dir("mmlib", appauthor=False))


@cache
def library_hash() -> str:
    """Hash the modules that decide numbers, as syntax trees without docstrings, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in DECIDING:
        digest.update(repr(_tree(ast.parse((PACKAGE / name).read_text()))).encode())
    digest.update((PACKAGE / "clips" / "clips_per_identity_joint.csv").read_bytes())
    return digest.hexdigest()[:12]


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


def fingerprint(path: str | Path) -> str:
    """Hash a store: its description, its tables and a sample of the rows of every array."""
    path = Path(path)
    store = ClipStore.open(path)
    digest = hashlib.sha256()
    for name in ("store.json", "clips.parquet", "identities.parquet"):
        digest.update((path / name).read_bytes())
    for modality in store.modalities.values():
        for array in (modality.feature, *modality.columns.values()):
            digest.update(np.ascontiguousarray(array[:: max(1, len(array) // 1000)]).tobytes())
    return digest.hexdigest()[:20]


def as_seeds(seeds: str | int | Iterable[int]) -> list[int]:
    """Read the ``seeds`` parameter of a chapter; papermill's command line hands a list over as text."""
    if isinstance(seeds, str):
        try:
            seeds = json.loads(seeds)
        except ValueError:
            raise ValueError(f"seeds must be a list of integers such as [0, 1], got {seeds!r}") from None
    seeds = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    if not seeds or not all(type(s) is int and s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different integers >= 0, at least one, got {seeds!r}")
    return seeds


# -- running --------------------------------------------------------------------------------------------------------


def open_store(experiment: Experiment) -> ClipStore:
    """Open the experiment's store, drawing its world first if it is not in the cache."""
    if not experiment.simulated:
        return ClipStore.open(experiment.data)
    settings, seed = experiment.world()
    said = json.dumps([asdict(settings), seed, library_hash()], sort_keys=True)
    path = cache_folder() / "worlds" / hashlib.sha256(said.encode()).hexdigest()[:20]
    return ClipStore.open(path) if path.exists() else simulate(path, settings, seed)


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
    passing = sorted((e for e in missing if e.simulated and e.settings), key=lambda e: (e.settings, e.seed))
    bar = tqdm(total=len(missing), desc="run", unit="arm", disable=not progress, mininterval=1)

    def make(experiment: Experiment, store: ClipStore) -> None:
        _write(paths[experiment], json.dumps(asdict(run(experiment, store, device=device))).encode())
        bar.update()

    for experiment in missing:
        if experiment not in passing:
            make(experiment, open_store(experiment))
    for world in dict.fromkeys(replace(e, **_ANY) for e in passing):
        with tempfile.TemporaryDirectory(prefix="mmlib-") as scratch:
            store = simulate(Path(scratch) / "world", *world.world())
            for experiment in passing:
                if replace(experiment, **_ANY) == world:
                    make(experiment, store)
    bar.close()
    return [Record(**json.loads(paths[experiment].read_text())) for experiment in experiments]


# Sets an experiment's fields that do not decide its world to one value.
_ANY = dict(modality="face", aggregator="mean", classifier="mlp", concat="none", hidden=0, dropout=0.0, shrinkage=0.0,
            scale=1.0, training=Training())


@dataclass(frozen=True)
class Retrieval:
    """What a system retrieves: gallery (N,) positions of the val clips in the store, queries (Q,) identity codes,
    ranking (Q, K) gallery rows with -1 beyond the end, hits (Q, K) bool, relevant (Q,) labelled val clips of each query,
    predicted (N,) the best identity of each clip.

    Clips that lack the modality are not in the gallery but count as relevant: the official denominator.
    """

    gallery: np.ndarray
    queries: np.ndarray
    ranking: np.ndarray
    hits: np.ndarray
    relevant: np.ndarray
    predicted: np.ndarray
    model: IdentityModel
    train_clips: np.ndarray
    losses: list[float]
    seconds: dict[str, float]

    @property
    def ap(self) -> np.ndarray:
        return metrics.average_precision(self.hits, self.relevant)


def retrieve(experiment: Experiment, store: ClipStore, *, device: str = "auto", progress: bool = False) -> Retrieval:
    """Train if there is something to train, and rank the val clips for every identity."""
    began = time.perf_counter()
    model, train_clips, history = fit(experiment, store, device=torch_device(device), progress=progress)
    trained = time.perf_counter()
    gallery = store.select("val", having=experiment.modality)
    identity = store.identity_of(gallery)
    relevant = np.bincount(store.identity_of(store.select("val", labelled=True)), minlength=len(store.identities))
    queries = np.flatnonzero(relevant)
    if not len(queries) or not len(gallery):
        raise ValueError(f"{store.path}: no labelled val clip, or none with {experiment.modality!r}: nothing to rank")
    predicted = torch.full((len(gallery),), -1)
    blocks = _note_best(list_scores(experiment, store, model, train_clips, gallery), predicted)
    ranking = rank.top_k(blocks).clip.cpu().numpy()[queries]
    hits, _ = metrics.match_ranking(ranking, identity, queries)
    seconds = {"fit": round(trained - began, 3), "rank": round(time.perf_counter() - trained, 3)}
    return Retrieval(gallery, queries, ranking, hits, relevant[queries], predicted.numpy(), model, train_clips, history,
                     seconds)


def run(experiment: Experiment, store: ClipStore, *, device: str = "auto", progress: bool = False) -> Record:
    """Retrieve, score, and make the record."""
    found = retrieve(experiment, store, device=device, progress=progress)
    identity, ap = store.identity_of(found.gallery), found.ap
    labelled = identity >= 0
    right = found.predicted == identity
    precision = metrics.clip_precision(found.ranking, found.hits, len(found.gallery))
    measures = {"map_at_100": float(ap.mean()), "top1": float(found.hits[:, 0].mean()),
                "clip_top1": float(right[labelled].mean()), "train_clips": len(found.train_clips),
                "gallery_clips": len(found.gallery), "queries": len(found.queries),
                "identities": len(store.identities),
                "parameters": sum(p.numel() for p in found.model.parameters()) if found.losses else 0}
    clips = found.gallery[labelled]
    return Record(
        key=experiment.key(), library=library_hash(), experiment=asdict(experiment), simulated=store.meta["simulated"],
        measures=measures, ap=[round(float(a), 6) for a in ap],
        breakdown=_breakdown(store, experiment.modality, clips, right[labelled], precision[labelled]),
        losses=[round(x, 5) for x in found.losses], seconds=found.seconds,
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        device=torch.cuda.get_device_name() if torch_device(device).type == "cuda" else "CPU",
        made=datetime.now(UTC).isoformat(timespec="seconds"), commit=_commit())


def torch_device(name: str) -> torch.device:
    """Return the device of a chapter's ``device`` parameter: ``auto`` is a GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def fit(experiment: Experiment, store: ClipStore, *, device: torch.device,
        progress: bool = False) -> tuple[IdentityModel, np.ndarray, list[float]]:
    """Return the model, its training clips and its loss by epoch (empty where nothing is trained)."""
    e = experiment
    clips = store.select("train", labelled=True, having=e.modality)
    if not len(clips):
        raise ValueError(f"{store.path}: no labelled train clip has {e.modality!r}, so nothing can be trained")
    _require_scores(e, store)
    torch.manual_seed(e.seed)
    width = store.modalities[e.modality].feature.shape[1]
    model = IdentityModel(make_aggregator(e.aggregator, width), len(store.identities), dropout=e.dropout,
                          hidden=e.hidden if e.classifier == "mlp" else 0, concat=e.concat).to(device)
    label = torch.from_numpy(store.identity_of(clips)).to(device)
    pooled = pooled_features(model, store, clips, e.modality, seed=e.seed)
    if e.classifier == "whitened means":
        unit = F.normalize(pooled, dim=1)
        model.centre = unit.mean(0)
        model.whitening = within_class_whitening(unit, label, shrinkage=e.shrinkage)
        pooled = pooled_features(model, store, clips, e.modality, seed=e.seed)
    model.start_from_class_means(pooled, label)
    if e.classifier not in TRAINED:
        return model.eval(), clips, []
    return model, clips, train(model, store, clips, e.training, seed=e.seed, modality=e.modality, progress=progress)


def list_scores(experiment: Experiment, store: ClipStore, model: IdentityModel, train_clips: np.ndarray,
                gallery: np.ndarray) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield (gallery rows, scores (n, C)) as ``rank.top_k`` takes them."""
    with torch.no_grad():
        embedded = model.embed(pooled_features(model, store, gallery, experiment.modality, seed=experiment.seed))
        prototype = model.prototype.detach()
        if experiment.classifier != "nearest":
            yield from rank.cosine_scores(embedded, prototype, scale=experiment.scale)
            return
        known = model.embed(pooled_features(model, store, train_clips, experiment.modality, seed=experiment.seed))
        label = torch.from_numpy(store.identity_of(train_clips)).to(known.device)
        for rows, cosine in rank.cosine_scores(embedded, known):
            nearest = torch.full((len(rows), len(prototype)), -1.0, device=known.device)
            nearest.scatter_reduce_(1, label.expand(len(rows), -1), cosine, "amax")
            yield rows, torch.log_softmax(experiment.scale * nearest, 1)


def _note_best(blocks: Iterable[tuple[Tensor, Tensor]], best: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Pass blocks on, writing the best identity of every clip into ``best`` (N,) on the way."""
    for rows, scores in blocks:
        best[rows.cpu()] = scores.argmax(1).cpu()
        yield rows, scores


def missing_scores(experiment: Experiment, store: ClipStore) -> list[str]:
    """Name the scores that the experiment's arm needs and the store lacks."""
    if experiment.aggregator not in NEEDS_SCORES and experiment.concat == "none":
        return []
    ordering = experiment.aggregator == "best half" and experiment.concat == "none"
    wanted = ["quality"] if ordering else ["quality", "det"]
    return [name for name in wanted if name not in store.modalities[experiment.modality].columns]


def _require_scores(experiment: Experiment, store: ClipStore) -> None:
    if experiment.modality not in store.modalities:
        raise ValueError(f"{store.path}: no modality {experiment.modality!r}, it has {', '.join(store.modalities)}")
    if missing := missing_scores(experiment, store):
        raise ValueError(f"{store.path}: {experiment.aggregator!r} needs {' and '.join(missing)} scores of "
                         f"{experiment.modality!r}, and the store has none")


def _breakdown(store: ClipStore, modality: str, clips: np.ndarray, right: np.ndarray,
               precision: np.ndarray) -> dict[str, list[list[float]]]:
    """Group labelled gallery clips by length, quality and share of wrong frames; see ``Record``."""
    source = store.modalities[modality]
    known = {"frames": (source.count[clips], LENGTH_EDGES)}
    if "quality" in source.columns and len(clips):
        mean = clip_means(store, modality, "quality")[clips]
        known["quality"] = (mean.argsort().argsort() / len(clips) * 100, PERCENTILE_EDGES)
    if "wrong" in source.columns:
        known["wrong"] = (clip_means(store, modality, "wrong")[clips], WRONG_EDGES)
    out = {}
    for name, (value, edges) in known.items():
        group = np.digitize(value, edges) - 1
        rows = [(low, high, group == i) for i, (low, high) in enumerate(zip(edges, edges[1:]))]
        out[name] = [[low, high, int(chosen.sum()), round(float(right[chosen].mean()), 5),
                      round(float(precision[chosen].mean()), 5)] for low, high, chosen in rows if chosen.any()]
    return out


def clip_means(store: ClipStore, modality: str, column: str) -> np.ndarray:
    """Average a per-frame column over the frames of each clip, (N,); NaN for a clip without frames."""
    source = store.modalities[modality]
    total = np.concatenate([[0], np.cumsum(source.columns[column], dtype=float)])
    with np.errstate(invalid="ignore"):
        return (total[source.start + source.count] - total[source.start]) / source.count


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
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


@cache
def _commit() -> str:
    """Return the short commit of the repository the library lies in, with + if files differ; else ``none``."""
    try:
        git = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
