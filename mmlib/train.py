"""One training loop for every model, and the features of a trained one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmlib import losses
from mmlib.clips.store import ClipStore
from mmlib.models import IdentityModel


@dataclass(frozen=True)
class Training:
    """What decides a training run.

    epochs; batch: clips; frames: frames drawn a clip and step, by ``sample`` of ``ClipStore.batch``; lr of the MLP
    and classifier, and of the aggregator (whose gradients are some orders smaller), both falling to 0 along a cosine;
    weight_decay; margin in radians; scale of the cosines; gamma of the focal term, ``focal`` "clip" or "batch".
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

    def loss(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Return the loss of cosines (B, C) at labels (B,), a scalar."""
        if self.focal not in ("clip", "batch"):
            raise ValueError(f"focal must be clip or batch, got {self.focal!r}")
        logits = losses.margin_logits(cosine, label, margin=self.margin, scale=self.scale)
        return (losses.focal_loss if self.focal == "clip" else losses.batch_focal_loss)(logits, label, gamma=self.gamma)


def train(model: IdentityModel, store: ClipStore, clips: np.ndarray, training: Training, *, seed: int,
          modality: str = "face", context: str | None = None, progress: bool = False) -> list[float]:
    """Train on labelled clips (n,) of a store; return the mean loss of every epoch.

    The model stays on its device; on a GPU the forward pass runs in bfloat16, the loss in float32.  The same seed gives
    the same clips, frames and order whatever the model, so that two arms see the same data.
    """
    device = model.prototype.device
    # An aggregator with a fixed number of frames draws as the 2019 code does, with replacement from short clips.
    fixed = getattr(model.aggregator, "frames", None)
    sample, frames = ("draw", fixed) if fixed else (training.sample, training.frames)
    rng = np.random.default_rng([seed, 2])
    torch.manual_seed(seed)  # dropout
    slow = list(model.aggregator.parameters())
    groups = [{"params": slow, "lr": training.aggregator_lr, "weight_decay": 0.0}] if slow else []
    chosen = {id(parameter) for parameter in slow}
    groups.append({"params": [p for p in model.parameters() if id(p) not in chosen]})
    optimiser = torch.optim.AdamW(groups, lr=training.lr, weight_decay=training.weight_decay, fused=True)
    # A last batch of one clip would break batch norm, so the remainder is spread over the batches.
    steps = max(1, round(len(clips) / training.batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, training.epochs * steps)
    history = []
    model.train()
    bar = tqdm(range(training.epochs), desc="train", unit="epoch", disable=not progress, mininterval=1, leave=False)
    for _ in bar:
        total = torch.zeros((), device=device)
        order = np.array_split(rng.permutation(clips), steps)
        for members, inputs in batches(store, order, modality, context, sample, frames, rng, device):
            label = torch.from_numpy(store.identity_of(members)).long().to(device)
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


def batches(store: ClipStore, groups: list[np.ndarray], modality: str, context: str | None, sample: str,
            frames: int | None, rng: np.random.Generator | None, device: torch.device,
            ) -> Iterator[tuple[np.ndarray, tuple[Tensor | None, ...]]]:
    """Yield (clips, inputs of ``IdentityModel``) for groups of clips; inputs hold until the next ones are asked for.

    A thread that reads ahead would take more from the matrix products, which use every core, than it saves.
    """
    buffer = torch.empty(0)
    for members in groups:
        batch = store.batch(members, modality, sample=sample, frames=frames, rng=rng, buffer=buffer)
        inputs = [batch.feature, batch.mask, batch.quality, batch.det]
        if context is not None:
            inputs.append(store.batch(members, context, sample="first", frames=1).feature[:, 0])
        yield members, tuple(None if x is None else x.to(device) for x in inputs)


@torch.no_grad()
def pooled_features(model: IdentityModel, store: ClipStore, clips: np.ndarray, modality: str = "face",
                    context: str | None = None, *, seed: int = 0, block: int = 16_384) -> Tensor:
    """Return what enters the MLP, (n, dim), for clips that have the modality, from all of their frames.

    An aggregator with a fixed number of frames (``as coded``) gets that many drawn ones instead.  Clips are read in
    order of their length, about ``block`` frames at a time, so that little of a batch is padding.
    """
    device = model.prototype.device
    count = store.modalities[modality].count[clips]
    fixed = getattr(model.aggregator, "frames", None)
    order = np.argsort(count, kind="stable")
    out = torch.empty(len(clips), model.dim, device=device)
    length = np.full(len(clips), fixed) if fixed else count[order]
    # Cut where (clips so far) x (longest so far) would pass the block.
    cuts, first = [], 0
    while first < len(order):
        fits = np.arange(1, len(order) - first + 1) * length[first:] <= block
        step = max(1, int(fits.argmin()) if not fits.all() else len(fits))
        cuts.append(order[first:first + step])
        first += step
    rng = np.random.default_rng([seed, 3])
    sample, frames = ("draw", fixed) if fixed else ("all", None)
    model.eval()
    groups = [clips[rows] for rows in cuts]
    for rows, (_, inputs) in zip(cuts, batches(store, groups, modality, context, sample, frames, rng, device)):
        out[torch.from_numpy(rows).to(device)] = model.pool(*inputs)
    return out
