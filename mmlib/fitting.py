"""Train the models that an experiment names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from mmlib import ensemble
from mmlib.clips.store import ClipStore
from mmlib.experiment import TRAINED, Experiment
from mmlib.models import NEEDS_SCORES, IdentityModel, kept_width, make_aggregator, within_class_whitening
from mmlib.train import classes_of, pooled_features, seed_torch, train_together


def fit(experiment: Experiment, store: ClipStore, member: int = 0, *, device: torch.device,
        progress: bool = False) -> tuple[IdentityModel, np.ndarray, list[float]]:
    """Return a member's model, its training clips and its loss by epoch (empty where nothing is trained)."""
    return fit_together([(experiment, member)], store, device=device, progress=progress)[0]


def fit_together(wanted: list[tuple[Experiment, int]], store: ClipStore, *, device: torch.device,
                 progress: bool = False) -> list[tuple[IdentityModel, np.ndarray, list[float]]]:
    """Do what ``fit`` does for several members of experiments that differ in their seeds only, in as few passes as can be.

    Those of one shape, with as many clips, are trained in one (``train.train_together``).
    """
    if len({replace(experiment.branch(), seed=0) for experiment, _ in wanted}) > 1:
        raise ValueError("experiments whose members are trained together may differ in their seeds only")
    e = wanted[0][0]
    require(e, store)
    started = [_start(experiment, store, member, device) for experiment, member in wanted]
    if e.classifier not in TRAINED:
        return [(model.eval(), clips, []) for model, clips in started]
    # Regions of a width that the blocks do not divide differ by one dimension.
    groups: dict[tuple, list[int]] = {}
    for place, (model, clips) in enumerate(started):
        groups.setdefault((len(clips), *(p.shape for p in model.parameters())), []).append(place)
    losses = [[]] * len(wanted)
    for places in groups.values():
        found = train_together([started[p][0] for p in places], store, [started[p][1] for p in places], e.training,
                               seeds=[ensemble.member_seed(wanted[p][0].seed, wanted[p][1]) for p in places],
                               modality=e.modality, progress=progress)
        for place, history in zip(places, found):
            losses[place] = history
    return [(*one, history) for one, history in zip(started, losses)]


def _start(e: Experiment, store: ClipStore, member: int, device: torch.device) -> tuple[IdentityModel, np.ndarray]:
    """Return a member's model before its training, and its training clips."""
    clips = training_clips(e, store)
    clips = ensemble.member_clips(e.ensemble, clips, store.identity_of(clips), seed=e.seed, member=member)
    model = make_model(e, store, member).to(device)
    label = torch.from_numpy(classes_of(store, clips)).to(device)
    if e.start == "class means" or e.classifier not in TRAINED:
        pooled = pooled_features(model, store, clips, e.modality, seed=e.seed)
        if e.classifier == "whitened means":
            unit = F.normalize(pooled, dim=1)
            model.centre = unit.mean(0)
            model.whitening = within_class_whitening(unit, label, shrinkage=e.shrinkage)
            pooled = pooled_features(model, store, clips, e.modality, seed=e.seed)
        model.start_from_class_means(pooled, label)
    return model, clips


def make_model(experiment: Experiment, store: ClipStore, member: int = 0) -> IdentityModel:
    """Return a member's model before it has seen a clip."""
    e = experiment
    seed_torch(ensemble.member_seed(e.seed, member))
    widths = {name: source.feature.shape[1] for name, source in store.modalities.items()}
    discard = (member, e.regions) if e.ensemble == "views" else None
    aggregator = None if e.modality is None else make_aggregator(e.aggregator, kept_width(widths[e.modality], discard))
    return IdentityModel(aggregator, len(store.identities) + (e.distractors == "class"), dropout=e.dropout,
                         hidden=e.hidden if e.classifier == "mlp" else 0, concat=e.concat, head=e.head,
                         contexts={name: widths[name] for name in e.context}, context_dim=e.context_dim,
                         gated=e.fusion == "gated" and e.modality is not None, discard=discard)


def training_clips(experiment: Experiment, store: ClipStore) -> np.ndarray:
    """Return the clips that can be trained on: labelled, with the modality or a context, and distractors if asked."""
    e = experiment
    sources = e.context if e.modality is None else (e.modality,)
    clips = np.unique(np.concatenate([store.select("train", labelled=True, having=name) for name in sources]))
    if not len(clips):
        raise ValueError(f"{store.path}: no labelled train clip has {' or '.join(sources)}, so nothing can be trained")
    if e.distractors == "class":
        having = np.unique(np.concatenate([store.select("val", labelled=False, having=name) for name in sources]))
        clips = np.concatenate([clips, np.intersect1d(training_distractors(e, store), having)])
    return clips


def training_distractors(experiment: Experiment, store: ClipStore) -> np.ndarray:
    """Return a random half of the distractors in val, which have the modality or not."""
    distractors = store.select("val", labelled=False)
    return np.sort(np.random.default_rng([experiment.seed, 6]).permutation(distractors)[: len(distractors) // 2])


def missing_scores(experiment: Experiment, store: ClipStore) -> list[str]:
    """Name the scores that the experiment's arm needs and the store lacks."""
    e = experiment
    wanted = []
    appended = e.concat in ("normalised", "raw")
    if e.modality is not None and (e.aggregator in NEEDS_SCORES or appended):
        wanted = ["quality"] if e.aggregator == "best half" and not appended else ["quality", "det"]
    if e.fallback and e.fallback.by == "quality" and "quality" not in wanted:
        wanted.append("quality")
    return [name for name in wanted if name not in store.modalities[e.modality].columns]


def require(e: Experiment, store: ClipStore) -> None:
    """Refuse a store that lacks a modality or scores that the experiment needs."""
    asked = [e.modality, *e.context, *(e.fallback.context if e.fallback else ())]
    for name in asked:
        if name is not None and name not in store.modalities:
            raise ValueError(f"{store.path}: no modality {name!r}, it has {', '.join(store.modalities)}")
    if missing := missing_scores(e, store):
        raise ValueError(f"{store.path}: {e.aggregator!r} needs {' and '.join(missing)} scores of "
                         f"{e.modality!r}, and the store has none")
