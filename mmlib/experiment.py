"""Say everything that decides a number: an experiment, and the key it hashes to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from pandas import Interval
from torch import Tensor
from torch.nn import functional as F

from mmlib import losses
from mmlib.aggregate import AGGREGATORS, CONCATS, LEARNED
from mmlib.data.simulate import Settings, settings_for
from mmlib.data.store import SAMPLES, ClipStore
from mmlib.rank import COMBINE, Fallback, refuse_other, refuse_outside

CLASSIFIERS = ("nearest", "class means", "whitened means", "linear", "mlp")
TRAINED = ("linear", "mlp")
FEWEST = 12  # identities of a world that a chapter draws
TRAINED_ON = ("class", "class, no margin", "class, down-weighted", "negatives")  # forms of training on distractors
DOWN_WEIGHT = 0.2  # of a clip of a down-weighted class, beside 1 of the others
NEGATIVE = 0.35  # cosine above which a distractor is pushed away from an identity, where it has no class
KINDS = ("seeds", "views", "bagging", "stratified")
CHOICES = {
    "aggregator": tuple(AGGREGATORS),
    "classifier": CLASSIFIERS,
    "concat": CONCATS,
    "head": ("cosine", "dot"),
    "fusion": ("concat", "gated"),
    "start": ("class means", "random", "xavier"),
    "layers": ("study", "released"),
    "context_scale": ("unit", "raw"),
    "distractors": ("all", "held out", *TRAINED_ON),
    "split": ("val", "test"),
    "ensemble": KINDS,
    "combine": COMBINE,
}
POSITIVE, FROM_ZERO, FROM_ONE = (Interval(low, np.inf, end) for low, end in ((0, "neither"), (0, "left"), (1, "left")))


@dataclass(frozen=True)
class Training:
    """What decides a training run.

    batch: clips; frames: frames drawn a clip and step, by ``sample`` of ``ClipStore.batch``; lr of the MLP and
    classifier, and of the aggregator (whose gradients are some orders smaller), both falling to 0 along a cosine;
    margin in radians, 0 for a plain (cosine) softmax; scale of the cosines; gamma of the focal term, ``focal`` "clip"
    or "batch"; optimiser "adamw", or "sgd" with momentum .9 as in the released code; weight ``decay`` on the "network",
    or, as released, on "all" parameters; rates that fall by ``schedule`` "step", or, as released, "epoch"; classes that
    a step compares its clips with, those of the clips and others at random (``train.SampledClasses``), 0 for all.
    """

    epochs: int = 8
    batch: int = 256
    frames: int = 16
    sample: str = "random"
    lr: float = 2e-3
    aggregator_lr: float = 3e-3
    weight_decay: float = 1e-4
    margin: float = 0.5
    scale: float = 30.0
    gamma: float = 0.0
    focal: str = "clip"
    optimiser: str = "adamw"
    decay: str = "network"
    schedule: str = "step"
    classes: int = 0

    def __post_init__(self):
        refuse_other(self, focal=("clip", "batch"), optimiser=("adamw", "sgd"), sample=SAMPLES[1:])
        refuse_other(self, decay=("network", "all"), schedule=("step", "epoch"))
        refuse_outside(self, FROM_ONE, "epochs", "batch", "frames", whole=True)
        if self.classes:  # a step has half as many clips more where few are left over
            refuse_outside(self, Interval(2 * self.batch, np.inf, "left"), "classes", whole=True)
        refuse_outside(self, POSITIVE, "lr", "scale")
        refuse_outside(self, FROM_ZERO, "aggregator_lr", "weight_decay", "gamma")
        refuse_outside(self, Interval(0, np.pi / 2, "both"), "margin")

    def loss(self, cosine: Tensor, label: Tensor, margin: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Return the loss of cosines (B, C) at labels (B,), a scalar; without a margin also of inner products.

        margin: of each clip (B,), instead of the one of all; weight: of each (B,).
        """
        return losses.margin_focal_loss(
            cosine,
            label,
            margin=self.margin if margin is None else margin,
            scale=self.scale,
            gamma=self.gamma,
            batch=self.focal == "batch",
            weight=weight,
        )


@dataclass(frozen=True)
class Experiment:
    """One run of one system on one data set; those that differ in ``RANKING`` only share their trained members.

    data: ``"simulated"``, or the path of a clip store (then ``profile`` and ``settings`` have no meaning).  settings:
    (name, value) pairs that override the simulator's.  seed: of the world and the training.

    The model.  modality: what is aggregated over frames, None for contexts alone.  classifier: ``nearest`` (cosine to
    the nearest training clip of an identity), ``class means``, ``whitened means`` (class means after WCCN, of that
    ``shrinkage``), ``linear`` (a trained cosine classifier), ``mlp`` (behind a residual MLP).  context: modalities that
    join inside the network, reduced to ``context_dim`` dimensions each, 0 for as they are, by ``fusion``;
    ``context_scale``: of unit length times sqrt(D), or raw.  concat, head, layers: as in ``IdentityModel``.  start: of
    the identities' vectors.  distractors: ``all`` in the gallery, as in the challenge; ``held out``, half of them taken
    out of it; that half trained on, by ``loss``: one further ``class`` with the margin, without it (``class, no
    margin``), or of a lower weight (``class, down-weighted``), or ``negatives``, pushed away from every identity.

    The ensemble.  ensemble: a kind of ``mmlib.ensemble``, ``regions``: blocks of ``views``.  members: which are used.

    The ranking.  split: whose clips, ``val`` or ``test``.  combine, scale: as in ``combine_scores``.  fallback: when a
    second model on contexts counts; its ensemble is of the same kind, with twice as many regions, as released.
    """

    data: str = "simulated"
    profile: str = "quick"
    settings: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    modality: str | None = "face"
    aggregator: str = "quality"
    classifier: str = "mlp"
    concat: str = "none"
    head: str = "cosine"
    context: tuple[str, ...] = ()
    context_dim: int = 128
    fusion: str = "concat"
    hidden: int = 512
    dropout: float = 0.5
    context_scale: str = "unit"
    layers: str = "study"
    start: str = "class means"
    shrinkage: float = 0.1
    distractors: str = "all"
    split: str = "val"
    training: Training = field(default_factory=Training)
    ensemble: str = "seeds"
    regions: int = 16
    members: tuple[int, ...] = (0,)
    combine: str = "log softmax"
    scale: float = 30.0
    fallback: Fallback | None = None

    def __post_init__(self):
        refuse_other(self, **CHOICES)
        refuse_outside(self, FROM_ONE, "regions", whole=True)
        refuse_outside(self, FROM_ZERO, "seed", "hidden", "context_dim", whole=True)
        refuse_outside(self, Interval(0, 1, "left"), "dropout")
        refuse_outside(self, Interval(0, 1, "both"), "shrinkage")
        refuse_outside(self, POSITIVE, "scale")
        for so, why, *names in self._combinations():
            if so:
                raise ValueError(", ".join([why, *(f"{name} is {getattr(self, name)!r}" for name in names)]))
        if self.simulated:
            self.world()
        if self.fallback:
            self.second()

    def _combinations(self) -> Iterator[tuple]:
        """Yield what cannot be: whether it is so here, what it is, and the fields that it lies in."""
        tuples = all(isinstance(part, tuple) for part in (self.context, self.members, self.settings))
        yield not tuples, "context, members and settings must be tuples", "context", "members", "settings"
        trained, faces, views = self.classifier in TRAINED, self.modality is not None, self.ensemble == "views"
        attention, dot, gated = faces and self.aggregator in LEARNED, self.head == "dot", self.fusion == "gated"
        learned = attention or self.context or dot or self.distractors in TRAINED_ON
        whitened, appended = self.classifier == "whitened means", self.concat in ("normalised", "raw")
        parts, both = (self.modality, *self.context), trained and faces and self.combine in ("softmax", "cosine")
        known = {member for member in self.members if type(member) is int and member >= 0}
        parameters = ("aggregator", "context", "head", "distractors")
        yield not trained and learned, "what has parameters needs a trained classifier", "classifier", *parameters
        yield whitened and appended, "no scores can be appended to what is whitened", "classifier", "concat"
        yield not faces and not self.context, "modality None needs a context", "context"
        yield not faces and (self.concat != "none" or gated), "scores and gates need a modality", "concat", "fusion"
        yield len(set(parts)) < len(parts), "context has something twice", "modality", "context"
        yield self.split == "test" and self.distractors != "all", "distractors are known in val only", "distractors"
        moved = self.layers == "released" and self.start == "class means"
        yield trained and moved, "layers as released move their input, so class means are no start", "layers", "start"
        yield dot and self.distractors == "negatives", "negatives need cosines", "distractors", "head"
        yield dot and self.training.margin > 0, "a margin needs a cosine", "head", "training"
        yield self.training.batch == 1 and self.classifier == "mlp", "batch norm needs two clips", "training"
        yield not known or len(known) < len(self.members), "members must be different numbers >= 0", "members"
        yield views and self.regions == 1, "one region leaves a view nothing", "regions"
        most = max(known)
        yield views and most >= self.regions, f"member {most} of views does not exist with {self.regions} regions"
        mixes = "a fallback mixes the scores of two trained models"
        yield self.fallback and not both, mixes, "classifier", "modality", "combine"

    def branch(self) -> Experiment:
        """Return what decides the trained members: the experiment with its ranking set aside."""
        return replace(self, **RANKING)

    def second(self) -> Experiment:
        """Return the experiment of the fallback's model."""
        asked = self.fallback
        own = {name: getattr(asked, name) for name in ("context_dim", "hidden") if getattr(asked, name) is not None}
        training = replace(self.training, lr=asked.lr or self.training.lr)
        alone = replace(
            self, modality=None, context=asked.context, concat="none", fusion="concat", fallback=None, **own
        )
        return replace(alone, aggregator="norm", members=asked.members, regions=2 * self.regions, training=training)

    @property
    def has_class_of_nobody(self) -> bool:
        """Whether the model has a vector for distractors, the last."""
        return self.distractors in TRAINED_ON and self.distractors != "negatives"

    def loss(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Return the loss of cosines (B, C) at labels (B,), a scalar; clips of nobody have the highest label.

        ``negatives``: their loss is softplus(logsumexp_j(s cos_j) - s t), that of a softmax in which nobody has the
        constant cosine t (``NEGATIVE``), and the classifier has no vector for them.
        """
        training, nobody = self.training, label >= cosine.shape[1] - self.has_class_of_nobody
        if self.distractors == "class, no margin" and training.margin:
            return training.loss(cosine, label, margin=torch.where(nobody, 0.0, training.margin))
        if self.distractors == "class, down-weighted":
            return training.loss(cosine, label, weight=torch.where(nobody, DOWN_WEIGHT, 1.0))
        if self.distractors != "negatives":
            return training.loss(cosine, label)
        known = (~nobody).float()
        # A batch of strangers alone still has a mean, times 0 below.
        of_known = training.loss(cosine, torch.where(nobody, 0, label), weight=known.clamp(min=1e-12))
        excess = torch.logsumexp(training.scale * cosine.float(), dim=1) - training.scale * NEGATIVE
        return (of_known * known.sum() + (F.softplus(excess) * nobody).sum()) / len(label)

    @property
    def simulated(self) -> bool:
        return self.data == "simulated"

    def world(self) -> tuple[Settings, int]:
        """Return the settings and seed of the simulated world."""
        return settings_for(self.profile, **dict(self.settings)), self.seed

    def key(self) -> str:
        """Hash what decides the number; a store counts by its content, not by where it lies."""
        said = asdict(self)
        # What has no meaning must not make two records of one number.
        if self.classifier not in TRAINED:
            for name in ("training", "hidden", "dropout", "start", "layers"):
                said.pop(name)
        if self.ensemble != "views":
            said.pop("regions")
        if not self.context:
            said.pop("fusion")
            if not self.fallback:
                said.pop("context_dim"), said.pop("context_scale")
        if self.modality is None:
            said.pop("aggregator")
        if self.simulated:
            said["settings"] = asdict(self.world()[0])
        else:
            said |= {"data": fingerprint(self.data), "profile": None, "settings": None}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:20]


# The fields of an experiment that decide nothing of its training, at their defaults.
RANKING = {name: getattr(Experiment, name) for name in ("members", "combine", "scale", "fallback")}


def arm_key(experiment: Experiment | Mapping, *free: str) -> str:
    """Name what an experiment is, whatever world it ran in, as text: all that it says but its data, size and seed.

    experiment: one, or what a record says of one; what a record does not say was added to experiments after it was
    made, and has its default.  free: more names that may differ, dotted within ``training`` and ``fallback``.

    >>> one, two = Experiment(seed=1), Experiment(seed=2, training=Training(lr=1.0))
    >>> arm_key(one) == arm_key(two), arm_key(one, "training.lr") == arm_key(two, "training.lr")
    (False, True)
    """
    said = dict(experiment) if isinstance(experiment, Mapping) else asdict(experiment)
    whole = asdict(Experiment())
    whole |= {name: said[name] for name in whole.keys() & said.keys()}
    whole["training"] = asdict(Training()) | dict(whole["training"])
    whole["fallback"] = whole["fallback"] and asdict(Fallback()) | dict(whole["fallback"])
    for name in ("data", "profile", "settings", "seed", *free):
        group, _, last = name.rpartition(".")
        part = whole.get(group) if group else whole
        if part:
            part.pop(last, None)
    return json.dumps(whole, sort_keys=True)


def smaller(experiment: Experiment, identities: int) -> Experiment:
    """Return the experiment in worlds of so few identities where its own, simulated, have more; 0 for its own."""
    if identities and identities < FEWEST:
        raise ValueError(f"identities must be {FEWEST} at least, got {identities}")
    if not experiment.simulated or not identities or identities >= experiment.world()[0].identities:
        return experiment
    settings = dict(experiment.settings) | {"identities": identities}
    return replace(experiment, settings=tuple(settings.items()))


def fingerprint(path: str | Path) -> str:
    """Name what the store at a path holds; see ``ClipStore.fingerprint``."""
    return ClipStore.open(path).fingerprint


def torch_device(name: str) -> torch.device:
    """Return the device of that name: ``auto`` is a GPU where there is one; ``cuda`` without one raises."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: there is no GPU here")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
