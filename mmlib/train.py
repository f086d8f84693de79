"""One training loop for every model, and the features of a trained one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmlib import losses
from mmlib.aggregate import norm_pool
from mmlib.clips.store import ClipStore
from mmlib.models import IdentityModel


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
    margin: float = .5
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
        logits = (losses.margin_logits(cosine, label, margin=self.margin, scale=self.scale) if self.margin
                  else self.scale * cosine)
        return (losses.focal_loss if self.focal == "clip" else losses.batch_focal_loss)(logits, label, gamma=self.gamma)


def train(model: IdentityModel, store: ClipStore, clips: np.ndarray, training: Training, *, seed: int | list[int],
          modality: str | None = "face", progress: bool = False) -> list[float]:
    """Train on clips (n,) of a store; return the mean loss of every epoch.

    Clips without an identity are of one further class, the last, if the model has it.  modality: what the aggregator
    reads, None for a model of contexts alone.  The model stays on its device; on a GPU the forward pass runs in bfloat16,
    the loss in float32.  The same seed gives the same clips, frames and order whatever the model, so that two arms see
    the same data.
    """
    device = model.prototype.device
    sample, frames = _sampling(model, training.sample, training.frames)
    rng = np.random.default_rng([*([seed] if isinstance(seed, int) else seed), 2])
    seed_torch(seed)  # dropout
    slow = [] if model.aggregator is None else list(model.aggregator.parameters())
    groups = [{"params": slow, "lr": training.aggregator_lr, "weight_decay": 0.0}] if slow else []
    chosen = {id(parameter) for parameter in slow}
    groups.append({"params": [p for p in model.parameters() if id(p) not in chosen]})
    kind, options = {"adamw": (torch.optim.AdamW, {}), "sgd": (torch.optim.SGD, {"momentum": .9})}[training.optimiser]
    optimiser = kind(groups, lr=training.lr, weight_decay=training.weight_decay, fused=True, **options)
    # A last batch of one clip would break batch norm, so the remainder is spread over the batches.
    steps = max(1, round(len(clips) / training.batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, training.epochs * steps)
    history = []
    model.train()
    bar = tqdm(range(training.epochs), desc="train", unit="epoch", disable=not progress, mininterval=1, leave=False)
    for _ in bar:
        total = torch.zeros((), device=device)
        order = np.array_split(rng.permutation(clips), steps)
        for members, inputs in batches(model, store, order, modality, sample, frames, rng):
            label = torch.from_numpy(classes_of(store, members)).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                cosine = model(*inputs)
            loss = training.loss(cosine, label)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach() * len(members)
        history.append(total.item() / len(clips))
        if not np.isfinite(history[-1]):
            raise ValueError(f"training diverged: loss {history[-1]} in epoch {len(history)} of {training}")
        bar.set_postfix(loss=f"{history[-1]:.3f}")
    model.eval()
    return history


def classes_of(store: ClipStore, clips: np.ndarray) -> np.ndarray:
    """Return what clips (n,) are trained as: their identities, and one further class for those that have none."""
    identity = store.identity_of(clips)
    return np.where(identity < 0, len(store.identities), identity)


def seed_torch(seed: int | list[int]) -> None:
    """Seed torch's own generators, which layers and dropout draw from."""
    torch.manual_seed(seed if isinstance(seed, int) else int(np.random.SeedSequence(seed).generate_state(1)[0]))


def _sampling(model: IdentityModel, sample: str, frames: int | None) -> tuple[str, int | None]:
    """An aggregator with a fixed number of frames draws as the 2019 code does, with replacement from short clips."""
    fixed = getattr(model.aggregator, "frames", None)
    return ("draw", fixed) if fixed else (sample, frames)


def batches(model: IdentityModel, store: ClipStore, groups: list[np.ndarray], modality: str | None, sample: str,
            frames: int | None, rng: np.random.Generator | None) -> Iterator[tuple[np.ndarray, tuple]]:
    """Yield (clips, inputs of ``IdentityModel``) for groups of clips; inputs hold until the next ones are asked for.

    A context of several frames is their mean.  A thread that reads ahead would take more from the matrix products,
    which use every core, than it saves.
    """
    device = model.prototype.device
    buffers = {name: torch.empty(0) for name in (modality, *model.branches)}
    for members in groups:
        inputs = [None] * 4
        if modality is not None:
            inputs = store.batch(members, modality, sample=sample, frames=frames, rng=rng, buffer=buffers[modality])[:4]
        contexts = {}
        for name in model.branches:
            batch = store.batch(members, name, buffer=buffers[name])
            kept = model.seen(batch.feature)  # a view must not know even the length of what it discards
            length = kept.norm(dim=-1, keepdim=True)
            feature = norm_pool(batch.feature / torch.where(length > 0, length, 1.0), batch.mask) * kept.shape[-1] ** .5
            contexts[name] = feature.to(device), batch.mask.any(1).to(device)
        yield members, (*(None if x is None else x.to(device) for x in inputs), contexts)


@torch.no_grad()
def pooled_features(model: IdentityModel, store: ClipStore, clips: np.ndarray, modality: str | None = "face", *,
                    seed: int = 0, block: int = 16_384) -> Tensor:
    """Return what enters the MLP, (n, dim), for clips that have the modality, from all of their frames.

    An aggregator with a fixed number of frames (``as coded``) gets that many drawn ones instead.  Clips are read in
    order of their length, about ``block`` frames at a time, so that little of a batch is padding.
    """
    device = model.prototype.device
    sample, frames = _sampling(model, "all", None)
    # A context of 2048 dimensions weighs as much as a few faces.
    count = np.full(len(clips), 8) if modality is None else store.modalities[modality].count[clips]
    order = np.argsort(count, kind="stable")
    out = torch.empty(len(clips), model.dim, device=device)
    length = np.full(len(clips), frames) if frames else count[order]
    # Cut where (clips so far) x (longest so far) would pass the block.
    cuts, first = [], 0
    while first < len(order):
        fits = np.arange(1, len(order) - first + 1) * length[first:] <= block
        step = max(1, int(fits.argmin()) if not fits.all() else len(fits))
        cuts.append(order[first:first + step])
        first += step
    model.eval()
    reading = batches(model, store, [clips[rows] for rows in cuts], modality, sample, frames,
                      np.random.default_rng([seed, 3]))
    for rows, (_, inputs) in zip(cuts, reading):
        out[torch.from_numpy(rows).to(device)] = model.pool(*inputs)
    return out
