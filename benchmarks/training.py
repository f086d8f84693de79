"""Lines on training: an epoch of every aggregator, many members, and a member at the size of the challenge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.data import FACE, SCALES
from benchmarks.meter import measure
from mmlib.data.store import ClipStore
from mmlib.ensemble import member_seed
from mmlib.experiment import Experiment, Training
from mmlib.models import IdentityModel
from mmlib.retrieve import make_model
from mmlib.systems import ONE_NAME_AS_CODED
from mmlib.train import train_together


def system(aggregator: str, scale: str) -> Experiment:
    """Return the system as coded with another aggregator, for one epoch of the scale's batches.

    Its classes are those of the released code: the identities, and one for nobody.
    """
    s = SCALES[scale]
    return replace(
        ONE_NAME_AS_CODED,
        aggregator=aggregator,
        concat="frames" if aggregator == "as coded" else "none",
        distractors="class",
        training=replace(
            ONE_NAME_AS_CODED.training, epochs=1, batch=s.batch, frames=s.frames, aggregator_lr=0.01, lr=0.01
        ),
    )


def epoch(folder: str, scale: str, device: str, aggregator: str, **_) -> dict:
    """Train one epoch, reading included; of a pooling without parameters, the network behind it."""
    store, asked = ClipStore.open(Path(folder, "clips")), system(aggregator, scale)
    clips = store.select("train", labelled=True)
    model = make_model(asked, store).to(device)
    found = measure(lambda: train(model, store, clips, asked.training), warm=1, device=device)
    return found | {
        "work": _size(store, clips, asked.training),
        "flops": step_flops(model, store, clips, asked.training) * steps(clips, asked.training),
        "bytes": epoch_bytes(model, store, clips, asked.training),
    }


def train(model: IdentityModel, store: ClipStore, clips: np.ndarray, training: Training, member: int = 0) -> None:
    """Train one model with the seed of a member."""
    train_together([model], store, [clips], training, seeds=[member_seed(0, member)])


def members_together(folder: str, scale: str, device: str, **_) -> dict:
    """Train the members of an ensemble of views together, an epoch each."""

    def call(models, store, clips, training):
        seeds = [member_seed(0, member) for member in range(len(models))]
        train_together(models, store, [clips] * len(models), training, seeds=seeds)

    return _members(folder, scale, device, call, "together")


def members_apart(folder: str, scale: str, device: str, **_) -> dict:
    """Train the same members one after another."""

    def call(models, store, clips, training):
        for member, model in enumerate(models):
            train(model, store, clips, training, member)

    return _members(folder, scale, device, call, "one by one")


def _members(folder: str, scale: str, device: str, call: Callable, how: str) -> dict:
    store, asked, count = (
        ClipStore.open(Path(folder, "clips")),
        system("attention + scores", scale),
        SCALES[scale].members,
    )
    clips = store.select("train", labelled=True)
    models = [make_model(asked, store, member).to(device) for member in range(count)]
    found = measure(lambda: call(models, store, clips, asked.training), repeats=1, warm=1, device=device)
    flops = sum(step_flops(model, store, clips, asked.training) for model in models) * steps(clips, asked.training)
    return found | {
        "work": f"{count} members {how}, each {_size(store, clips, asked.training)}",
        "flops": flops,
        "bytes": sum(epoch_bytes(model, store, clips, asked.training) for model in models),
    }


def loss(scale: str, **_) -> dict:
    """Pass a margin and focal loss forward and backward, from cosines (B, C) to their gradient."""
    return _loss(scale, Training(gamma=2.0).loss, "the loss")


def loss_elsewhere(scale: str, **_) -> dict:
    """Pass the same loss of pytorch-metric-learning, whose cross-entropy is made focal, from the same cosines."""
    try:
        from pytorch_metric_learning.losses import ArcFaceLoss
    except ImportError:
        raise RuntimeError("not installed here: pip install pytorch-metric-learning") from None

    def focal(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        entropy = F.cross_entropy(logits, label, reduction="none")
        return (1 - torch.exp(-entropy)) ** 2 * entropy

    asked = Training()
    other = ArcFaceLoss(SCALES[scale].queries, 1, margin=np.degrees(asked.margin), scale=asked.scale)
    del other.cross_entropy
    other.cross_entropy, other.get_cosine = focal, lambda cosine: cosine
    return _loss(scale, other, "ArcFaceLoss of pytorch-metric-learning")


def _loss(scale: str, call: Callable, what: str) -> dict:
    """Bytes: the cosines are read twice and their gradient is written."""
    clips, identities = SCALES[scale].batch, SCALES[scale].queries
    draw = torch.Generator().manual_seed(0)
    label = torch.randint(identities, (clips,), generator=draw)
    unit = [F.normalize(torch.randn(n, FACE, generator=draw), dim=1) for n in (clips, identities)]
    cosine = (unit[0] @ unit[1].T).requires_grad_()
    # As in a step of training, where the gradient of the cosines is passed on and not kept.
    found = measure(lambda: torch.autograd.grad(call(cosine, label), cosine), repeats=20, warm=2)
    work = f"{what}, {clips:,} clips, {identities:,} identities, forward and backward"
    return found | {"work": work, "flops": 0, "bytes": 3 * 4 * clips * identities}


def challenge(folder: str, scale: str, device: str, **_) -> dict:
    """Train one face and scene member for 100 epochs of the challenge's train split: one is measured, times 100."""
    s = SCALES[scale]
    store = ClipStore.open(Path(folder, "challenge"))
    asked = system("as coded", scale)
    training = replace(asked.training, batch=s.challenge_batch)
    clips = store.select("train")
    model = make_model(asked, store).to(device)
    found = measure(lambda: train(model, store, clips, training), repeats=2, warm=1, device=device)
    epochs = ONE_NAME_AS_CODED.training.epochs
    flops = step_flops(model, store, clips, training) * steps(clips, training)
    return found | {
        "seconds": [epochs * second for second in found["seconds"]],
        "work": f"{epochs} epochs of {_size(store, clips, training)}: one epoch measured, times {epochs}",
        "flops": epochs * flops,
        "bytes": epochs * epoch_bytes(model, store, clips, training),
    }


def steps(clips: np.ndarray, training: Training) -> int:
    """Return the steps of an epoch, as ``train`` takes them."""
    return max(1, round(len(clips) / training.batch))


def step_flops(model: IdentityModel, store: ClipStore, clips: np.ndarray, training: Training) -> int:
    """Count the operations of the matrix products of one step, forward and backward."""
    group = clips[: round(len(clips) / steps(clips, training))]
    counter = FlopCounterMode(display=False)
    with counter:
        train(model, store, group, replace(training, batch=len(group)))
    return counter.get_total_flops()


def epoch_bytes(model: IdentityModel, store: ClipStore, clips: np.ndarray, training: Training) -> int:
    """Return the bytes that an epoch must move at least: frames, and parameters.

    Every drawn number of a clip is read as float16 and written as float32: 6 bytes.  In every step each parameter is
    read forward and backward, its gradient is written and read, each of its optimiser states (one for SGD with
    momentum, two for AdamW) is read and written, and it is read and written by the update: 4 (6 + 2 states) bytes.
    """
    widths = {name: store.modalities[name].feature.shape[1] for name in ("face", *model.branches)}
    numbers = len(clips) * (training.frames * widths.pop("face") + sum(widths.values()))
    states = {"sgd": 1, "adamw": 2}[training.optimiser]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 6 * numbers + steps(clips, training) * 4 * (6 + 2 * states) * parameters


def _size(store: ClipStore, clips: np.ndarray, training: Training) -> str:
    face, scene = (store.modalities[name].feature.shape[1] * 15 // 16 for name in ("face", "scene"))
    return (
        f"{len(clips):,} clips, {len(store.identities) + 1:,} classes, {training.frames} frames of {face}, "
        f"scenes of {scene}, batches of {training.batch:,}"
    )
