"""Say everything that decides a number: an experiment, and the key it hashes to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmlib import ensemble, losses
from mmlib.aggregate import LEARNED
from mmlib.data.simulate import Settings, settings_for
from mmlib.data.store import ClipStore
from mmlib.rank import COMBINE, Fallback

CLASSIFIERS = ("nearest", "class means", "whitened means", "linear", "mlp")
TRAINED = ("linear", "mlp")
FUSIONS = ("concat", "gated")
DISTRACTORS = ("all", "held out", "class")
STARTS = ("class means", "random")


@dataclass(frozen=True)
class Training:
    """What decides a training run.

    epochs; batch: clips; frames: frames drawn a clip and step, by ``sample`` of ``ClipStore.batch``; lr of the MLP
    and classifier, and of the aggregator (whose gradients are some orders smaller), both falling to 0 along a cosine;
    weight_decay; margin in radians, 0 for a plain (cosine) softmax; scale of the cosines; gamma of the focal term,
    ``focal`` "clip" or "batch"; optimiser "adamw", or "sgd" with momentum .9 as in the released code.
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

    def __post_init__(self):
        if self.focal not in ("clip", "batch"):
            raise ValueError(f"focal must be clip or batch, got {self.focal!r}")
        if self.optimiser not in ("adamw", "sgd"):
            raise ValueError(f"optimiser must be adamw or sgd, got {self.optimiser!r}")

    def loss(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Return the loss of cosines (B, C) at labels (B,), a scalar; without a margin also of inner products."""
        logits = (
            losses.margin_logits(cosine, label, margin=self.margin, scale=self.scale)
            if self.margin
            else self.scale * cosine
        )
        return (losses.focal_loss if self.focal == "clip" else losses.batch_focal_loss)(logits, label, gamma=self.gamma)


@dataclass(frozen=True)
class Experiment:
    """One run of one system on one data set.

    data: ``"simulated"``, or the path of a clip store (then ``profile`` and ``settings`` have no meaning).  settings:
    (name, value) pairs that override the simulator's.  seed: the world and its training; on a given store the
    training alone.

    The model.  modality: what is aggregated over frames, None for contexts alone.  classifier: ``nearest`` (cosine to
    the nearest training clip of an identity), ``class means``, ``whitened means`` (class means after WCCN),
    ``linear`` (a trained cosine classifier), ``mlp`` (behind a residual MLP).  concat, head: as in ``IdentityModel``.
    context: modalities that join inside the network, reduced to ``context_dim`` dimensions each, by ``fusion``.
    start: of the identities' vectors.  shrinkage: of the within-class covariance.  distractors: ``all`` in the
    gallery, as in the challenge; ``held out``, half of them taken out of it; ``class``, that half trained on as one
    further class.

    The ensemble.  ensemble: a kind of ``mmlib.ensemble``, ``regions``: blocks of ``views``.  members: which are used.

    The ranking.  split: whose clips, ``val`` or ``test``.  combine, scale: as in ``combine_scores``.  fallback: when a
    second model on contexts counts; its ensemble is of the same kind, with twice as many regions, as in the released code.

    Experiments that differ in ``RANKING`` only share their trained members.
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
        for name, known in (
            ("classifier", CLASSIFIERS),
            ("fusion", FUSIONS),
            ("distractors", DISTRACTORS),
            ("start", STARTS),
            ("ensemble", ensemble.KINDS),
            ("combine", COMBINE),
            ("split", ("val", "test")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        trained = self.classifier in TRAINED
        if self.aggregator in LEARNED and self.modality is not None and not trained:
            raise ValueError(f"aggregator {self.aggregator!r} is learned, so classifier cannot be {self.classifier!r}")
        if (self.context or self.head == "dot" or self.distractors == "class") and not trained:
            raise ValueError(
                f"context, head and a class of distractors are trained, so classifier cannot be {self.classifier!r}"
            )
        if self.modality is None and not self.context:
            raise ValueError("modality None needs a context")
        if self.modality in self.context or len(set(self.context)) < len(self.context):
            raise ValueError(f"context has {self.modality!r} or something else twice: {self.context!r}")
        if self.split == "test" and self.distractors != "all":
            raise ValueError(
                f"distractors are known in val only, so they cannot be {self.distractors!r} with split 'test'"
            )
        if self.head == "dot" and self.training.margin:
            raise ValueError(f"a margin needs a cosine, so head cannot be 'dot' with margin {self.training.margin}")
        if not self.members or len(set(self.members)) < len(self.members) or min(self.members) < 0:
            raise ValueError(f"members must be different numbers >= 0, at least one, got {self.members!r}")
        if self.ensemble == "views" and max(self.members) >= self.regions:
            raise ValueError(f"member {max(self.members)} of views does not exist with {self.regions} regions")
        if self.fallback and (self.modality is None or not trained or self.combine not in ("softmax", "cosine")):
            raise ValueError(
                "a fallback mixes the scores of two trained models, so it needs a modality and combine "
                f"'softmax' or 'cosine', got {self.modality!r} and {self.combine!r}"
            )
        if self.fallback:
            self.second()  # it may be impossible too

    def branch(self) -> Experiment:
        """Return what decides the trained members: the experiment with its ranking set aside."""
        return replace(self, **RANKING)

    def second(self) -> Experiment:
        """Return the experiment of the fallback's model."""
        training = replace(self.training, lr=self.fallback.lr or self.training.lr)
        return replace(
            self,
            training=training,
            modality=None,
            context=self.fallback.context,
            fusion="concat",
            concat="none",
            aggregator="norm",
            regions=2 * self.regions,
            members=self.fallback.members,
            fallback=None,
        )

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
            for name in ("training", "hidden", "dropout", "start"):
                said.pop(name)
        if self.ensemble != "views":
            said.pop("regions")
        if not self.context:
            said.pop("context_dim"), said.pop("fusion")
        if self.modality is None:
            said.pop("aggregator")
        if self.simulated:
            said["settings"] = asdict(self.world()[0])
        else:
            said |= {"data": fingerprint(self.data), "profile": None, "settings": None}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:20]


# The fields of an experiment that decide nothing of its training, at their defaults.
RANKING = {
    item.name: item.default for item in fields(Experiment) if item.name in ("members", "combine", "scale", "fallback")
}


def arm_key(experiment: Experiment | Mapping, *free: str) -> str:
    """Name what an experiment is, whatever world it ran in, as text: all that it says but its data, size and seed.

    experiment: one, or what a record says of one, where tuples are lists; what a record does not say was added to
    experiments after it was made, and has its default.  free: more names that may differ, dotted within ``training`` and
    ``fallback``.

    >>> arm_key(Experiment(seed=1)) == arm_key(Experiment(seed=2, training=Training(lr=1.0)), "training.lr")
    True
    """
    said = dict(experiment) if isinstance(experiment, Mapping) else asdict(experiment)
    whole = asdict(Experiment())
    whole |= {name: value for name, value in said.items() if name in whole}
    parts = {"": whole, "training": asdict(Training()) | dict(whole["training"])}
    if whole["fallback"]:
        parts["fallback"] = asdict(Fallback()) | dict(whole["fallback"])
    whole |= {name: part for name, part in parts.items() if name}
    for name in ("data", "profile", "settings", "seed", *free):
        group, _, last = name.rpartition(".")
        if group in parts:
            parts[group].pop(last, None)
    return json.dumps(whole, sort_keys=True)


def smaller(experiment: Experiment, identities: int) -> Experiment:
    """Return the experiment in worlds of so few identities where its own, simulated, have more; 0 for its own."""
    if not experiment.simulated or not identities or identities >= experiment.world()[0].identities:
        return experiment
    settings = dict(experiment.settings) | {"identities": identities}
    return replace(experiment, settings=tuple(settings.items()))


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
