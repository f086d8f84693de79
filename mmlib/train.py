"""One training loop for every model, and the features of a trained one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmlib.aggregate import mean_pool
from mmlib.data.store import ClipStore, sample_rows
from mmlib.ensemble import Together
from mmlib.experiment import Training
from mmlib.models import IdentityModel


def train(
    model: IdentityModel,
    store: ClipStore,
    clips: np.ndarray,
    training: Training,
    *,
    seed: int | list[int],
    modality: str | None = "face",
    progress: bool = False,
) -> list[float]:
    """Train on clips (n,) of a store; return the mean loss of every epoch.  See ``train_together``."""
    return train_together([model], store, [clips], training, seeds=[seed], modality=modality, progress=progress)[0]


def train_together(
    models: list[IdentityModel],
    store: ClipStore,
    clips: list[np.ndarray],
    training: Training,
    *,
    seeds: list[int | list[int]],
    modality: str | None = "face",
    progress: bool = False,
) -> list[list[float]]:
    """Train models of one shape in one batched pass, each on clips (n,) of its own; return the mean losses by epoch.

    Every model sees the clips, frames, order and dropout masks that it would see alone, drawn from its own seed: the
    results are those of training one by one, up to the rounding of batched products.

    Clips without an identity are of one further class, the last, if the models have it.  modality: what the aggregator
    reads, None for models of contexts alone.  The models stay on their device; on a GPU the forward pass runs in
    bfloat16, the loss in float32, and within an epoch nothing waits for the host.  The same seed gives the same clips,
    frames and order whatever the model, so that two arms see the same data.
    """
    if len({len(chosen) for chosen in clips}) != 1 or not len(models) == len(clips) == len(seeds):
        raise ValueError(
            f"{len(models)} models trained together need as many seeds and lists of clips of one length, "
            f"got {len(seeds)} seeds and lists of {', '.join(str(len(chosen)) for chosen in clips)} clips"
        )
    device, number = models[0].prototype.device, len(clips[0])
    data, drops = ([_generator(seed, stream, device) for seed in seeds] for stream in (2, 5))
    together = Together(models)
    optimiser = _optimiser(together.parameters, training)
    # A last batch of one clip would break batch norm, so the remainder is spread over the batches.
    steps = max(1, round(number / training.batch))
    bounds = np.linspace(0, number, steps + 1).round().astype(int).tolist()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, training.epochs * steps)
    reader = Reader(models, store, clips, modality, training)
    label = torch.from_numpy(np.stack([classes_of(store, chosen) for chosen in clips])).to(device)
    history = []
    bar = tqdm(range(training.epochs), desc="train", unit="epoch", disable=not progress, mininterval=1, leave=False)
    for _ in bar:
        total = torch.zeros(len(models), device=device)
        order = torch.stack([torch.randperm(number, generator=generator, device=device) for generator in data])
        reader.draw(data)
        for low, high in zip(bounds, bounds[1:]):
            places = order[:, low:high]
            loss = together.loss(reader.read(places), label.gather(1, places), training.loss, drops)
            optimiser.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimiser.step()
            schedule.step()
            total += loss.detach() * (high - low)
        history.append((total / number).tolist())
        if not np.isfinite(history[-1]).all():
            raise ValueError(f"training diverged: loss {max(history[-1])} in epoch {len(history)} of {training}")
        bar.set_postfix(loss=f"{np.mean(history[-1]):.3f}")
    together.finish()
    return [list(losses) for losses in zip(*history)]


def _optimiser(parameters: dict[str, Tensor], training: Training) -> torch.optim.Optimizer:
    slow = [value for name, value in parameters.items() if name.startswith("aggregator.")]
    groups = [{"params": slow, "lr": training.aggregator_lr, "weight_decay": 0.0}] if slow else []
    groups.append({"params": [value for name, value in parameters.items() if not name.startswith("aggregator.")]})
    kind, options = {"adamw": (torch.optim.AdamW, {}), "sgd": (torch.optim.SGD, {"momentum": 0.9})}[training.optimiser]
    return kind(groups, lr=training.lr, weight_decay=training.weight_decay, fused=True, **options)


def _generator(seed: int | list[int], stream: int, device: torch.device) -> torch.Generator:
    words = np.random.SeedSequence([*([seed] if isinstance(seed, int) else seed), stream]).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 32 | int(words[1]))


def classes_of(store: ClipStore, clips: np.ndarray) -> np.ndarray:
    """Return what clips (n,) are trained as: their identities, and one further class for those that have none."""
    identity = store.identity_of(clips)
    return np.where(identity < 0, len(store.identities), identity)


def seed_torch(seed: int | list[int]) -> None:
    """Seed torch's own generators, which new layers draw their weights from."""
    torch.manual_seed(seed if isinstance(seed, int) else int(np.random.SeedSequence(seed).generate_state(1)[0]))


class Reader:
    """Read the training batches of M models from a store, on the models' device.

    clips: of each model, (n,).  The contexts of a clip never change, so they are read once; frames are drawn anew
    for every epoch.
    """

    def __init__(
        self,
        models: list[IdentityModel],
        store: ClipStore,
        clips: list[np.ndarray],
        modality: str | None,
        training: Training,
    ):
        device = models[0].prototype.device
        self._sampling = _sampling(models[0], training.sample, training.frames)
        self._frames = None if modality is None else store.on(modality, device)
        self._clips = torch.from_numpy(np.stack(clips)).to(device)
        self._buffer = torch.empty(0, device=device)
        self._contexts = {}
        if modality is not None:
            self._gaps = [model.gap(self._frames.feature.shape[1]) for model in models]
            if self._sampling[0] == "draw" and (self._frames.count[self._clips] == 0).any():
                raise ValueError(f"{store.path}: a training clip has no {modality} to draw frames from")
        union = np.unique(np.concatenate(clips))
        self._place = torch.from_numpy(np.searchsorted(union, np.stack(clips))).to(device)
        for name in models[0].branches:
            width = store.on(name, device).feature.shape[1]
            gaps = [(gap.start, gap.stop) for gap in (model.gap(width) for model in models)]
            read = {gap: contexts(store, name, union, slice(*gap), device) for gap in dict.fromkeys(gaps)}
            self._contexts[name] = [read[gap] for gap in gaps]

    def draw(self, generators: list[torch.Generator]) -> None:
        """Draw the frames of an epoch for every clip of every model."""
        if self._frames is not None:
            source = self._frames
            self._rows = torch.stack(
                [
                    sample_rows(source.start[clips], source.count[clips], *self._sampling, generator)
                    for clips, generator in zip(self._clips, generators)
                ]
            )

    def read(self, places: Tensor) -> tuple:
        """Return the inputs of ``IdentityModel`` with M in front, for the clips at ``places`` (M, B) of each model's.

        They hold until the next call.
        """
        inputs = [None] * 4
        if self._frames is not None:
            parts = [rows[place] for rows, place in zip(self._rows, places)]
            dim = self._frames.feature.shape[1] - (self._gaps[0].stop - self._gaps[0].start)
            out = self._buffer.resize_(len(parts), *parts[0].shape, dim)
            parts = [self._frames.gather(rows, gap=gap, out=one)[1:4] for rows, gap, one in zip(parts, self._gaps, out)]
            inputs = [out, *(None if part[0] is None else _stack(part) for part in zip(*parts))]
        places = self._place.gather(1, places)
        context = {
            name: tuple(_stack([value[place] for value, place in zip(values, places)]) for values in zip(*read))
            for name, read in self._contexts.items()
        }
        return *inputs, context


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one shape, a single one without a copy."""
    return torch.stack(tuple(parts)) if len(parts) > 1 else parts[0][None]


def _sampling(model: IdentityModel, sample: str, frames: int | None) -> tuple[str, int | None]:
    """An aggregator with a fixed number of frames draws as the 2019 code does, with replacement from short clips."""
    fixed = getattr(model.aggregator, "frames", None)
    return ("draw", fixed) if fixed else (sample, frames)


def _blocks(count: np.ndarray, block: int) -> Iterator[np.ndarray]:
    """Yield positions of clips in order of their number of frames (n,), about ``block`` padded frames at a time."""
    order = np.argsort(count, kind="stable")
    first = 0
    while first < len(order):
        # Cut where (clips so far) x (longest so far) would pass the block.
        fits = np.arange(1, len(order) - first + 1) * count[order[first:]] <= block
        step = max(1, int(fits.argmin()) if not fits.all() else len(fits))
        yield order[first : first + step]
        first += step


@torch.no_grad()
def contexts(
    store: ClipStore, name: str, clips: np.ndarray, gap: slice, device: torch.device, *, block: int = 2_048
) -> tuple[Tensor, Tensor]:
    """Return the context feature of clips, (n, D - gap), and whether they have it, (n,), on a device.

    It is the mean of the unit embeddings of all frames, scaled to entries of order 1; a model that discards a region does
    not know even the length of what it discards.
    """
    source = store.on(name, device)
    count = store.modalities[name].count[clips]
    feature = torch.zeros(len(clips), source.feature.shape[1] - (gap.stop - gap.start), device=device)
    for places in _blocks(np.maximum(count, 1), block):
        at = torch.from_numpy(clips[places]).to(device)
        batch = source.gather(sample_rows(source.start[at], source.count[at]), gap=gap)
        feature[torch.from_numpy(places).to(device)] = mean_pool(batch.feature, batch.mask) * feature.shape[1] ** 0.5
    return feature, torch.from_numpy(count > 0).to(device)


@torch.no_grad()
def pooled_features(
    model: IdentityModel,
    store: ClipStore,
    clips: np.ndarray,
    modality: str | None = "face",
    *,
    seed: int = 0,
    block: int = 16_384,
) -> Tensor:
    """Return what enters the MLP, (n, dim), for clips that have the modality, from all of their frames.

    An aggregator with a fixed number of frames (``as coded``) gets that many drawn ones instead.  Clips are read in
    order of their length, about ``block`` frames at a time, so that little of a batch is padding.
    """
    device = model.prototype.device
    sample, frames = _sampling(model, "all", None)
    generator = _generator(seed, 3, device)
    if modality is None:
        count = np.full(len(clips), 8)  # a context of 2048 dimensions weighs as much as a few faces
    else:
        source = store.on(modality, device)
        count = np.full(len(clips), frames) if frames else store.modalities[modality].count[clips]
    out = torch.empty(len(clips), model.dim, device=device)
    model.eval()
    for places in _blocks(count, block):
        inputs = [None] * 4
        if modality is not None:
            at = torch.from_numpy(clips[places]).to(device)
            rows = sample_rows(source.start[at], source.count[at], sample, frames, generator)
            inputs = source.gather(rows, gap=model.gap(source.feature.shape[1]))[:4]
        context = {
            name: contexts(store, name, clips[places], model.gap(store.on(name, device).feature.shape[1]), device)
            for name in model.branches
        }
        out[torch.from_numpy(places).to(device)] = model.pool(*inputs, context)
    return out
