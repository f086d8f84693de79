"""Rank the clips for every identity by the models of an experiment, and hold the ranking against the labels."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmlib import ensemble, metrics, rank
from mmlib.aggregate import NEEDS_SCORES, make_aggregator
from mmlib.data.store import ClipStore
from mmlib.experiment import TRAINED, Experiment, torch_device
from mmlib.models import IdentityModel, kept_width, seeded, within_class_whitening
from mmlib.rank import combine_scores, fuse_ranks
from mmlib.train import classes_of, pooled_features, train_together


class Member:
    """A trained model over the gallery of its experiment: model, clips (n,) trained on, losses by epoch, seconds."""

    def __init__(
        self,
        experiment: Experiment,
        store: ClipStore,
        model: IdentityModel,
        clips: np.ndarray,
        losses: list[float],
        seconds: float,
    ):
        self.experiment, self.store = experiment, store
        self.model, self.clips, self.losses, self.seconds = model, clips, losses, seconds

    @cached_property
    def embedded(self) -> Tensor:
        """The embeddings of the gallery of its experiment, (N, dim)."""
        return self._embed(gallery_of(self.experiment, self.store))

    @cached_property
    def _known(self) -> tuple[Tensor, Tensor]:
        known = self._embed(self.clips)
        return known, torch.from_numpy(self.store.identity_of(self.clips)).to(known.device)

    @torch.no_grad()
    def _embed(self, clips: np.ndarray) -> Tensor:
        e = self.experiment
        return self.model.embed(pooled_features(self.model, self.store, clips, e.modality, seed=e.seed))

    @torch.no_grad()
    def cosines(self, rows: Tensor) -> Tensor:
        """Compare gallery rows (n,) with every identity, (n, C); a class of distractors comes last."""
        embedded = self.embedded[rows]
        if self.experiment.classifier != "nearest":
            return self.model.compare(embedded)
        known, label = self._known
        nearest = torch.full((len(rows), len(self.model.prototype)), -1.0, device=known.device)
        return nearest.scatter_reduce_(1, label.expand(len(rows), -1), embedded @ known.T, "amax")


def gallery_of(experiment: Experiment, store: ClipStore) -> np.ndarray:
    """Return the clips of its split that the experiment's model can score: those with its modality, or with a context."""
    e = experiment
    sources = e.context if e.modality is None else (e.modality,)
    gallery = np.unique(np.concatenate([store.select(e.split, having=name) for name in sources]))
    return gallery if e.distractors == "all" else np.setdiff1d(gallery, training_distractors(e, store))


def ranked_gallery(experiment: Experiment, store: ClipStore) -> np.ndarray:
    """Return the clips that the experiment ranks: its gallery and what its fallback alone can score; refuse none."""
    e = experiment
    require(e, store)
    gallery = gallery_of(e, store)
    if not len(gallery):
        raise ValueError(
            f"{store.path}: no {e.split} clip with {e.modality or ' or '.join(e.context)!r}: nothing to rank"
        )
    if e.fallback and e.fallback.absent is not None:
        gallery = np.union1d(gallery, gallery_of(e.second(), store))
    return gallery


@dataclass(frozen=True)
class Ranked:
    """What a system says of a gallery: gallery (N,) positions of clips in the store, ranking (C, K) the best gallery rows
    of every identity with -1 beyond the end, score (C, K) theirs, predicted (N,) the best identity of each clip,
    by_member (M, N) that of each member, of clips whose score it has a part in, else -1.  A clip that nothing can score
    is not in the gallery.
    """

    gallery: np.ndarray
    ranking: np.ndarray
    score: np.ndarray
    predicted: np.ndarray
    by_member: np.ndarray
    members: list[Member]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Retrieval(Ranked):
    """What a system retrieves: as ``Ranked``, of the queries (Q,), identity codes with labelled val clips: ranking (Q, K),
    hits (Q, K) bool, relevant (Q,) the number of those clips, which counts clips outside the gallery too: the official
    denominator.
    """

    queries: np.ndarray
    hits: np.ndarray
    relevant: np.ndarray

    @property
    def ap(self) -> np.ndarray:
        return metrics.average_precision(self.hits, self.relevant)


def retrieve(
    experiment: Experiment,
    store: ClipStore,
    *,
    device: str = "auto",
    progress: bool = False,
    trained: MutableMapping | None = None,
) -> Retrieval:
    """Rank the val clips for every identity, as ``rank_clips``, and hold them against their labels."""
    relevant = np.bincount(
        store.identity_of(store.select(experiment.split, labelled=True)), minlength=len(store.identities)
    )
    queries = np.flatnonzero(relevant)
    if not len(queries):
        raise ValueError(f"{store.path}: no labelled {experiment.split} clip: nothing to score")
    found = rank_clips(experiment, store, device=device, progress=progress, trained=trained)
    ranking = found.ranking[queries]
    hits, _ = metrics.match_ranking(ranking, store.identity_of(found.gallery), queries)
    return Retrieval(
        found.gallery,
        ranking,
        found.score[queries],
        found.predicted,
        found.by_member,
        found.members,
        found.seconds,
        queries,
        hits,
        relevant[queries],
    )


def rank_clips(
    experiment: Experiment,
    store: ClipStore,
    *,
    device: str = "auto",
    progress: bool = False,
    trained: MutableMapping | None = None,
    rows: slice | None = None,
) -> Ranked:
    """Train if there is something to train, and rank the clips of the experiment's split for every identity.

    trained: members of earlier calls on the same store, by ``(branch, member)``; new ones are added.  rows: of the
    gallery, the others are left out of the ranking; from and to multiples of BLOCK the scores are those of the whole.
    """
    e, trained = experiment, {} if trained is None else trained
    if rows is not None and e.combine == "ranks":
        raise ValueError("rows of a gallery cannot be ranked apart with combine 'ranks', which fuses whole rankings")
    gallery = ranked_gallery(e, store)
    began = time.perf_counter()
    add_members([e, *([e.second()] if e.fallback else [])], store, trained, device=device, progress=progress)
    members = [trained[e.branch(), member] for member in e.members]
    second = [trained[e.second().branch(), member] for member in e.fallback.members] if e.fallback else []
    fitted = time.perf_counter()
    predicted = np.full(len(gallery), -1)
    by_member = np.full((len(members), len(gallery)), -1)
    blocks = _score_blocks(e, store, members, second, gallery, predicted, by_member, rows)
    if e.combine == "ranks":
        for _ in blocks:  # for the predictions
            pass
        every = torch.arange(len(gallery), device=members[0].model.prototype.device).split(BLOCK)
        classes = len(store.identities)
        ranking = fuse_ranks(
            rank.top_k(((r, torch.log_softmax(e.scale * m.cosines(r), 1)[:, :classes]) for r in every), k=DEPTH)
            for m in members
        )
    else:
        ranking = rank.top_k(blocks)
    seconds = {
        "fit": round(sum(m.seconds for m in members + second), 3),
        "rank": round(time.perf_counter() - fitted, 3),
        "waited": round(fitted - began, 3),
    }
    return Ranked(
        gallery, ranking.clip.cpu().numpy(), ranking.score.cpu().numpy(), predicted, by_member, members, seconds
    )


BLOCK = 2048  # clips scored at a time
DEPTH = 1000  # clips of a member's ranking that take part in a fusion of ranks


# Members trained in one batched pass.  It fills a GPU; a CPU is full with one, and one by one a killed run loses less.
TOGETHER = {"cuda": 16, "cpu": 1}


def add_members(
    experiments: Iterable[Experiment],
    store: ClipStore,
    trained: MutableMapping,
    *,
    device: str = "auto",
    progress: bool = False,
) -> None:
    """Train the members of experiments that are not among ``trained`` yet, those that differ in number or seed together."""
    at = torch_device(device)
    arms: dict[Experiment, list[tuple[Experiment, int]]] = {}
    for branch, member in dict.fromkeys((e.branch(), member) for e in experiments for member in e.members):
        if (branch, member) not in trained:
            arms.setdefault(replace(branch, seed=0), []).append((branch, member))
    for missing in arms.values():
        for first in range(0, len(missing), TOGETHER[at.type]):
            group = missing[first : first + TOGETHER[at.type]]
            began = time.perf_counter()
            fitted = fit_together(group, store, device=at, progress=progress)
            seconds = (time.perf_counter() - began) / len(group)
            for (branch, member), found in zip(group, fitted):
                trained[branch, member] = Member(branch, store, *found, seconds)


def _score_blocks(
    e: Experiment,
    store: ClipStore,
    members: list[Member],
    second: list[Member],
    gallery: np.ndarray,
    predicted: np.ndarray,
    by_member: np.ndarray,
    part: slice | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (gallery rows, scores (n, C)) as ``rank.top_k`` takes them, and note the best identities on the way."""
    device = members[0].model.prototype.device
    first_rows = _rows_in(gallery, gallery_of(e, store))
    second_rows = _rows_in(gallery, gallery_of(e.second(), store)) if second else np.full(len(gallery), -1)
    weight = _second_weight(e, store, gallery, first_rows, second_rows)
    how = "log softmax" if e.combine == "ranks" else e.combine
    asked = np.arange(len(gallery))[part or slice(None)]
    for block in np.split(asked, range(BLOCK, len(asked), BLOCK)):
        scores = torch.zeros(len(block), len(store.identities), device=device)
        for group, rows, share in ((members, first_rows, 1 - weight), (second, second_rows, weight)):
            at = np.flatnonzero((rows[block] >= 0) & (share[block] != 0)) if group else block[:0]
            if not len(at):
                continue
            chosen = torch.from_numpy(rows[block[at]]).to(device)
            cosines = (member.cosines(chosen) for member in group)
            if group is members:
                cosines = _noting(cosines, by_member, block[at], scores.shape[1])
            part = combine_scores(cosines, how, scale=e.scale)[:, : scores.shape[1]]
            scores[torch.from_numpy(at).to(device)] += torch.from_numpy(share[block[at]]).to(part)[:, None] * part
        predicted[block] = scores.argmax(1).cpu()
        yield torch.from_numpy(block).to(device), scores


def _noting(cosines: Iterable[Tensor], by_member: np.ndarray, at: np.ndarray, identities: int) -> Iterator[Tensor]:
    """Pass on what each member says, writing its best identity of every clip into ``by_member``."""
    for member, cosine in enumerate(cosines):
        by_member[member, at] = cosine[:, :identities].argmax(1).cpu()
        yield cosine


def _rows_in(gallery: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return where each clip of a gallery stands in another one, -1 if nowhere."""
    place = np.minimum(np.searchsorted(known, gallery), len(known) - 1)
    return np.where(known[place] == gallery, place, -1)


def _second_weight(
    e: Experiment, store: ClipStore, gallery: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Return the weight of the second model for every gallery clip (N,); a clip that it cannot score has 0."""
    weight = np.zeros(len(gallery))
    if e.fallback is None:
        return weight
    has = first >= 0
    clips = gallery[has]
    weight[has] = e.fallback.weights(store.clip_means(e.modality, e.fallback.by)[clips])
    weight[~has] = e.fallback.absent or 0
    return np.where(second >= 0, weight, 0)


def fit(
    experiment: Experiment, store: ClipStore, member: int = 0, *, device: torch.device, progress: bool = False
) -> tuple[IdentityModel, np.ndarray, list[float]]:
    """Return a member's model, its training clips and its loss by epoch (empty where nothing is trained)."""
    return fit_together([(experiment, member)], store, device=device, progress=progress)[0]


def fit_together(
    wanted: list[tuple[Experiment, int]], store: ClipStore, *, device: torch.device, progress: bool = False
) -> list[tuple[IdentityModel, np.ndarray, list[float]]]:
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
        found = train_together(
            [started[p][0] for p in places],
            store,
            [started[p][1] for p in places],
            e.training,
            seeds=[ensemble.member_seed(wanted[p][0].seed, wanted[p][1]) for p in places],
            modality=e.modality,
            progress=progress,
        )
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
    widths = {name: source.feature.shape[1] for name, source in store.modalities.items()}
    discard = (member, e.regions) if e.ensemble == "views" else None
    with seeded(ensemble.member_seed(e.seed, member)):
        return IdentityModel(
            None if e.modality is None else make_aggregator(e.aggregator, kept_width(widths[e.modality], discard)),
            len(store.identities) + (e.distractors == "class"),
            dropout=e.dropout,
            hidden=e.hidden if e.classifier == "mlp" else 0,
            concat=e.concat,
            head=e.head,
            contexts={name: widths[name] for name in e.context},
            context_dim=e.context_dim,
            gated=e.fusion == "gated" and e.modality is not None,
            discard=discard,
        )


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
        raise ValueError(
            f"{store.path}: {e.aggregator!r} needs {' and '.join(missing)} scores of "
            f"{e.modality!r}, and the store has none"
        )
