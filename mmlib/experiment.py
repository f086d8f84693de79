"""Say everything that decides a number, train what it names, and rank the clips for every identity."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmlib import metrics, rank
from mmlib.clips.simulate import Settings, settings_for
from mmlib.clips.store import ClipStore
from mmlib.models import LEARNED, NEEDS_SCORES, IdentityModel, make_aggregator, within_class_whitening
from mmlib.train import Training, pooled_features, train

CLASSIFIERS = ("nearest", "class means", "whitened means", "linear", "mlp")
TRAINED = ("linear", "mlp")


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


def torch_device(name: str) -> torch.device:
    """Return the device of a chapter's ``device`` parameter: ``auto`` is a GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


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
