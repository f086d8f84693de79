"""From an experiment to its ranking: train its members, score and rank the clips of a split, measure what was found."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmlib import ensemble, metrics, rank
from mmlib.aggregate import AGGREGATORS, NEEDS_SCORES
from mmlib.data.calibration import QUALITY_EDGES
from mmlib.data.store import ClipStore
from mmlib.experiment import TRAINED, TRAINED_ON, Experiment, torch_device
from mmlib.models import IdentityModel, kept_width, seeded, within_class_whitening
from mmlib.threads import one_thread
from mmlib.train import classes_of, pooled_features, train_together

Key = tuple[Experiment, int]  # a branch, and the number of a member
Trained = dict[Key, "Member"]
BLOCK = 1024  # clips of a split that are embedded and scored at a time
DEPTH = 1000  # clips of a member's ranking that take part in a fusion of ranks
# Members trained in one batched pass.  It fills a GPU; a CPU is full with one, and one by one a killed run loses less.
TOGETHER = {"cuda": 16, "cpu": 1}
LENGTH_EDGES = [1, 5, 10, 15, 20, 30, 40, None]  # frames; None is no edge
PERCENTILE_EDGES = [*QUALITY_EDGES, 40, 60, 80, 100]
WRONG_EDGES = [0, 1e-9, 0.1, 0.25, 0.5, 0.8, 1.001]  # share of frames


def missing_scores(e: Experiment, store: ClipStore) -> list[str]:
    """Name the scores that the experiment's arm needs and the store lacks."""
    if e.modality is None:
        return []
    wanted, appended = set(), e.concat in ("normalised", "raw")
    if e.aggregator in NEEDS_SCORES or appended:
        wanted = {"quality"} if e.aggregator == "best half" and not appended else {"quality", "det"}
    if e.fallback and e.fallback.by == "quality":
        wanted.add("quality")
    return [name for name in ("quality", "det") if name in wanted - {*store.modalities[e.modality].columns}]


def require(e: Experiment, store: ClipStore) -> None:
    """Refuse a store that lacks a modality or scores that the experiment needs."""
    for name in (e.modality, *e.context, *(e.fallback.context if e.fallback else ())):
        if name is not None and name not in store.modalities:
            raise ValueError(f"{store.path}: no modality {name!r}, it has {', '.join(store.modalities)}")
    if missing := missing_scores(e, store):
        needs = f"{e.aggregator!r} needs {' and '.join(missing)} scores of {e.modality!r}"
        raise ValueError(f"{store.path}: {needs}, and the store has none")


def _having(e: Experiment, store: ClipStore, split: str, **kind) -> np.ndarray:
    """Return the clips of a split that have the experiment's modality, or, where it has none, one of its contexts."""
    sources = e.context if e.modality is None else (e.modality,)
    return np.unique(np.concatenate([store.select(split, having=name, **kind) for name in sources]))


def training_clips(e: Experiment, store: ClipStore) -> np.ndarray:
    """Return the clips that can be trained on: labelled, with the modality or a context, and distractors if asked."""
    clips = _having(e, store, "train", labelled=True)
    if not len(clips):
        what = " or ".join(e.context) if e.modality is None else e.modality
        raise ValueError(f"{store.path}: no labelled train clip has {what}, so nothing can be trained")
    if e.distractors in TRAINED_ON:
        having = _having(e, store, "val", labelled=False)
        clips = np.concatenate([clips, np.intersect1d(training_distractors(e, store), having)])
    return clips


def training_distractors(e: Experiment, store: ClipStore) -> np.ndarray:
    """Return a random half of the distractors in val, which have the modality or not."""
    distractors = store.select("val", labelled=False)
    return np.sort(np.random.default_rng([e.seed, 6]).permutation(distractors)[: len(distractors) // 2])


def gallery_of(e: Experiment, store: ClipStore) -> np.ndarray:
    """Return the clips of its split that the experiment's model can score: with its modality, or else a context."""
    gallery = _having(e, store, e.split)
    return gallery if e.distractors == "all" else np.setdiff1d(gallery, training_distractors(e, store))


def ranked_gallery(e: Experiment, store: ClipStore) -> np.ndarray:
    """Return the clips that the experiment ranks: its gallery and what its fallback alone can score; refuse none."""
    require(e, store)
    gallery = gallery_of(e, store)
    if not len(gallery):
        what = e.modality or " or ".join(e.context)
        raise ValueError(f"{store.path}: no {e.split} clip with {what!r}: nothing to rank")
    if e.fallback and e.fallback.absent is not None:
        gallery = np.union1d(gallery, gallery_of(e.second(), store))
    return gallery


def make_model(e: Experiment, store: ClipStore, member: int = 0) -> IdentityModel:
    """Return a member's model before it has seen a clip."""
    widths = {name: source.feature.shape[1] for name, source in store.modalities.items()}
    discard = (member, e.regions) if e.ensemble == "views" else None
    with seeded(ensemble.member_seed(e.seed, member)):
        return IdentityModel(
            None if e.modality is None else AGGREGATORS[e.aggregator](kept_width(widths[e.modality], discard)),
            len(store.identities) + e.has_class_of_nobody,
            dropout=e.dropout,
            hidden=e.hidden if e.classifier == "mlp" else 0,
            concat=e.concat,
            head=e.head,
            contexts={name: widths[name] for name in e.context},
            context_dim=e.context_dim,
            raw_contexts=e.context_scale == "raw",
            layers=e.layers,
            start=e.start,
            gated=e.fusion == "gated" and e.modality is not None,
            discard=discard,
        )


@dataclass(eq=False)
class Member:
    """A trained model: clips (n,) it was trained on, losses by epoch, seconds it took."""

    experiment: Experiment
    store: ClipStore
    model: IdentityModel
    clips: np.ndarray
    losses: list[float]
    seconds: float
    _embedded: dict[int, tuple[np.ndarray, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def embed(self, clips: np.ndarray) -> Tensor:
        """Return the embeddings of clips (n, dim); those of a block of a ranking are kept for the next one."""
        e, known = self.experiment, self._embedded.get(clips[0])
        if known is None or not np.array_equal(known[0], clips):
            pooled = pooled_features(self.model, self.store, clips, e.modality, seed=e.seed, block=4_096)
            self._embedded[clips[0]] = known = (clips, self.model.embed(pooled))
        return known[1]

    @torch.no_grad()
    def cosines(self, clips: np.ndarray) -> Tensor:
        """Compare clips (n,) with every identity, (n, C); a class of distractors comes last."""
        embedded = self.embed(clips)
        if self.experiment.classifier != "nearest":
            return self.model.compare(embedded)
        known, label = self.embed(self.clips), torch.from_numpy(self.store.identity_of(self.clips)).to(embedded.device)
        nearest = torch.full((len(clips), len(self.model.prototype)), -1.0, device=embedded.device)
        return nearest.scatter_reduce_(1, label.expand(len(clips), -1), embedded @ known.T, "amax")


def members_of(e: Experiment) -> list[Key]:
    """Name the members that an experiment ranks with, those of its fallback's model last."""
    models = [e, *([e.second()] if e.fallback else [])]
    return [(model.branch(), member) for model in models for member in model.members]


def fit(experiment: Experiment, store: ClipStore, member: int = 0, **options) -> Member:
    """Train one member of an experiment; options as for ``train_members``."""
    return train_members([(experiment, member)], store, **options)[experiment, member]


def train_members(wanted: Iterable[Key], store: ClipStore, *, device: str = "auto", progress: bool = False) -> Trained:
    """Train members; those of one size, of experiments that differ in their seeds alone, in one batched pass."""
    trained: Trained = {}
    at = torch_device(device)
    with one_thread(at):
        for group in _started(wanted, store, at):
            began, members = time.perf_counter(), list(group.values())
            e, models, clips = members[0].experiment, [m.model for m in members], [m.clips for m in members]
            seeds = [ensemble.member_seed(branch.seed, number) for branch, number in group]
            if e.classifier in TRAINED:
                options: dict = {"seeds": seeds, "modality": e.modality, "loss": e.loss, "progress": progress}
                for member, history in zip(members, train_together(models, store, clips, e.training, **options)):
                    member.losses = history
                    member.seconds += (time.perf_counter() - began) / len(members)
            trained |= group
    return trained


def _started(wanted: Iterable[Key], store: ClipStore, device: torch.device) -> Iterator[Trained]:
    """Yield members before their training, in groups that can be trained in one pass."""
    waiting: dict[tuple, Trained] = {}
    for branch, number in dict.fromkeys(wanted):
        member = _start(branch, store, number, device)
        # Regions of a width that the blocks do not divide differ by one dimension.
        kind = (replace(branch, seed=0), len(member.clips), *(p.shape for p in member.model.parameters()))
        group = waiting.setdefault(kind, {})
        group[branch, number] = member
        if len(group) == TOGETHER[device.type]:
            yield waiting.pop(kind)
    yield from waiting.values()


def _start(e: Experiment, store: ClipStore, member: int, device: torch.device) -> Member:
    """Return a member before its training."""
    require(e, store)
    began, clips = time.perf_counter(), training_clips(e, store)
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
    return Member(e, store, model.eval(), clips, [], time.perf_counter() - began)


@dataclass(frozen=True)
class Retrieval:
    """What a system says of a gallery, and how that agrees with the labels of the split.

    gallery (N,): clips of the store that something can score.  best, score (C, K): the best gallery rows of every
    identity, -1 beyond the end.  predicted (N,): the best identity of each clip; by_member (M, N): that of each member,
    -1 where it has no part in the score.  queries (Q,): identities with labelled clips; ranking, hits (Q, K): of those;
    relevant (Q,): how many, in the gallery or not, as the official AP divides.
    """

    gallery: np.ndarray
    best: np.ndarray
    score: np.ndarray
    predicted: np.ndarray
    by_member: np.ndarray
    members: list[Member]
    queries: np.ndarray
    ranking: np.ndarray
    hits: np.ndarray
    relevant: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ap(self) -> np.ndarray:
        return metrics.average_precision(self.hits, self.relevant)


def retrieve(e: Experiment, store: ClipStore, *, trained: Trained | None = None, **options) -> Retrieval:
    """Train what there is to train, and rank the clips of the experiment's split, some of which must have labels.

    trained: members of earlier calls on the same store; new ones are added.  options: as for ``train_members``.
    """
    trained = {} if trained is None else trained
    if not len(store.select(e.split, labelled=True)):
        raise ValueError(f"{store.path}: no labelled {e.split} clip: nothing to score")
    ranked_gallery(e, store)  # refuses what cannot be ranked before anything is trained
    began, keys = time.perf_counter(), members_of(e)
    trained.update(train_members([key for key in keys if key not in trained], store, **options))
    waited = time.perf_counter() - began
    found = rank_clips(e, store, trained)
    fit, rest = sum(trained[key].seconds for key in keys), time.perf_counter() - began - waited
    return replace(found, seconds={"fit": round(fit, 3), "rank": round(rest, 3), "waited": round(waited, 3)})


def blocks_of(e: Experiment, store: ClipStore, gallery: np.ndarray) -> list[np.ndarray]:
    """Cut the rows of a gallery at every BLOCK clips of the split, so that no block hangs on what models can score."""
    block = (gallery - store.select(e.split)[0]) // BLOCK
    return np.split(np.arange(len(gallery)), np.flatnonzero(np.diff(block)) + 1)


def rank_clips(e: Experiment, store: ClipStore, trained: Trained, part: slice = slice(None)) -> Retrieval:
    """Rank the clips of the experiment's split for every identity with its trained members.

    part: of the blocks; their rankings merge into that of the whole (``rank.merge``), unless fused by ranks.
    """
    gallery, every = ranked_gallery(e, store), [trained[key] for key in members_of(e)]
    blocks, shares = blocks_of(e, store, gallery)[part], _shares(e, store, gallery)
    members, second = every[: len(e.members)], every[len(e.members) :]
    predicted, by_member = np.full(len(gallery), -1), np.full((len(members), len(gallery)), -1)
    device, classes = members[0].model.prototype.device, len(store.identities)

    def said(models: list[Member], rows: np.ndarray) -> Iterator[Tensor]:
        for place, member in enumerate(models):
            cosines = member.cosines(gallery[rows])
            if models is members:
                by_member[place, rows] = cosines[:, :classes].argmax(1).cpu()
            yield cosines

    def scored(first: list[Member], how: str) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in blocks:
            scores = torch.zeros(len(rows), classes, device=device)
            for models, share in zip((first, second), shares):
                at = np.flatnonzero(share[rows])
                if len(at):
                    score = rank.combine_scores(said(models, rows[at]), how, scale=e.scale)[:, :classes]
                    weight = torch.from_numpy(share[rows[at]]).to(score)
                    scores[torch.from_numpy(at).to(device)] += weight[:, None] * score
            if first is members:
                predicted[rows] = scores.argmax(1).cpu()
            yield torch.from_numpy(rows).to(device), scores

    with one_thread(device):
        if e.combine == "ranks":
            for _ in scored(members, "log softmax"):  # for the predictions
                pass
            found = rank.fuse_ranks(rank.top_k(scored([member], "log softmax"), k=DEPTH) for member in members)
        else:
            found = rank.top_k(scored(members, e.combine))
    best, score = found.clip.cpu().numpy(), found.score.cpu().numpy()
    queries, relevant = np.unique(store.identity_of(store.select(e.split, labelled=True)), return_counts=True)
    hits = metrics.match_ranking(best[queries], store.identity_of(gallery), queries)
    return Retrieval(gallery, best, score, predicted, by_member, members, queries, best[queries], hits, relevant)


def _shares(e: Experiment, store: ClipStore, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of the first and second model in the score of every clip, (N,); 0 where one cannot score it."""
    known, weight = np.isin(gallery, gallery_of(e, store)), np.zeros(len(gallery))
    if e.fallback and e.modality:
        weight[known] = e.fallback.weights(store.clip_means(e.modality, e.fallback.by)[gallery[known]])
        weight[~known] = e.fallback.absent or 0
        weight[~np.isin(gallery, gallery_of(e.second(), store))] = 0
    return np.where(known, 1 - weight, 0), weight


def measure(e: Experiment, store: ClipStore, found: Retrieval) -> tuple[dict[str, float], dict[str, list]]:
    """Return the measures and the breakdown of a record, which says what they are."""
    first = found.members[0]
    identity = store.identity_of(found.gallery)
    labelled, right = identity >= 0, found.predicted == identity
    measures = {
        "map_at_100": float(found.ap.mean()),
        "top1": float(found.hits[:, 0].mean()),
        "clip_top1": float(right[labelled].mean()),
        "train_clips": len(first.clips),
        "gallery_clips": len(found.gallery),
        "queries": len(found.queries),
        "identities": len(store.identities),
        "parameters": sum(p.numel() for p in first.model.parameters()) if first.losses else 0,
    }
    for part, clips in (("train", first.clips), ("gallery", found.gallery)):
        for name in e.context:
            measures[f"{part}_without_{name}"] = int((store.modalities[name].count[clips] == 0).sum())
    scored = (found.by_member >= 0).all(0) & labelled
    if len(found.members) > 1 and scored.any():
        trained = store.identity_of(training_clips(e, store))
        lost = [len(np.setdiff1d(trained, store.identity_of(member.clips))) for member in found.members]
        measures |= {
            "lost_identities": float(np.mean(lost)),
            "member_clip_top1": float((found.by_member[:, scored] == identity[scored]).mean()),
            "disagreement": ensemble.disagreement(found.by_member[:, scored]),
        }
    return measures, _breakdown(store, e.modality or "face", found, labelled)


def _breakdown(store: ClipStore, modality: str, found: Retrieval, labelled: np.ndarray) -> dict[str, list]:
    """Group labelled gallery clips by length, quality and share of wrong frames."""
    if modality not in store.modalities:
        return {}
    source = store.modalities[modality]
    rows = np.flatnonzero(labelled & (source.count[found.gallery] > 0))
    clips = found.gallery[rows]
    right = (found.predicted == store.identity_of(found.gallery))[rows]
    precision = metrics.clip_precision(found.ranking, found.hits, len(found.gallery))[rows]
    known: dict[str, tuple[np.ndarray, Sequence]] = {"frames": (source.count[clips], LENGTH_EDGES)}
    if "quality" in source.columns and len(clips):
        mean = store.clip_means(modality, "quality")[clips]
        known["quality"] = (mean.argsort().argsort() / len(clips) * 100, PERCENTILE_EDGES)
    if "wrong" in source.columns:
        known["wrong"] = (store.clip_means(modality, "wrong")[clips], WRONG_EDGES)
    out = {}
    for name, (value, edges) in known.items():
        group = np.digitize(value, edges[1:-1])  # the first and the last hold what lies beyond them: none is lost
        out[name] = [
            [edges[i], edges[i + 1], int(at.sum()), *(round(float(of[at].mean()), 5) for of in (right, precision))]
            for i, at in ((i, group == i) for i in np.unique(group).tolist())
        ]
    return out
