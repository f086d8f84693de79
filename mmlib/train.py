"""One training loop for every model, and the features of a trained one."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmlib.aggregate import mean_pool, norm_pool
from mmlib.data.store import ClipStore, sample_rows
from mmlib.ensemble import Together
from mmlib.experiment import Training
from mmlib.models import Discard, IdentityModel, gap, kept_width


def train_together(
    models: list[IdentityModel],
    store: ClipStore,
    clips: list[np.ndarray],
    training: Training,
    *,
    seeds: list[int | list[int]],
    modality: str | None = "face",
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: bool = False,
) -> list[list[float]]:
    """Train models of one shape in one batched pass, each on clips (n,) of its own; return the mean losses by epoch.

    Every model sees the clips, frames, order and dropout masks that it would see alone, drawn from its own seed: the
    results are those of training one by one, up to the rounding of batched products.  The same seed gives the same
    clips, frames and order whatever the model, so that two arms see the same data.

    Clips without an identity have the label C, of one further class, the last, if the models have it.  modality: what
    the aggregator reads, None for models of contexts alone.  loss: of cosines and labels, that of the training unless
    given.  On the models' device; within an epoch nothing waits for the host.
    """
    device, number = models[0].prototype.device, len(clips[0])
    if number < 2:
        raise ValueError(f"{store.path}: training needs two clips at least, got {number}")
    # Batch norm needs two clips, so the remainder is spread over the batches.
    steps = max(1, min(round(number / training.batch), number // 2))
    bounds = np.linspace(0, number, steps + 1).round().astype(int).tolist()
    most = f"{number // steps} clips of {training.frames} frames for {len(models)} models"
    with enough_memory(f"{store.path}: training steps of {most} on {device}: lower batch, frames or members"):
        data, drops = ([_generator(seed, stream, device) for seed in seeds] for stream in (2, 5))
        together = Together(models)
        optimiser = _optimiser(together.parameters, training)
        sampled = None
        if 0 < training.classes < together.parameters["prototype"].shape[-2]:
            drawn = [_generator(seed, 7, device) for seed in seeds]
            sampled = SampledClasses(together, training.classes, len(store.identities), drawn)
            optimiser = _optimiser(together.parameters | {"prototype": sampled.rows}, training)
        by_epoch, measure = training.schedule == "epoch", loss or training.loss
        length = training.epochs if by_epoch else training.epochs * steps
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, length)
        reader = Reader(models, store, clips, modality, training)
        label = torch.from_numpy(np.stack([classes_of(store, chosen) for chosen in clips])).to(device)
        history = []
        bar = tqdm(range(training.epochs), "train", unit="epoch", disable=not progress, mininterval=1, leave=False)
        for epoch in bar:
            total = torch.zeros(len(models), device=device)
            order = torch.stack([torch.randperm(number, generator=generator, device=device) for generator in data])
            reader.draw(data)
            for low, high in zip(bounds, bounds[1:]):
                places = order[:, low:high]
                inputs, target = reader.read(places), label.gather(1, places)
                if sampled:
                    target = sampled.draw(target, optimiser)
                found = together.loss(inputs, target, measure, drops, sampled and sampled.rows)
                optimiser.zero_grad(set_to_none=True)
                found.sum().backward()
                optimiser.step()
                if sampled:
                    sampled.put_back(optimiser)
                if high == number or not by_epoch:
                    schedule.step()
                total += found.detach() * (high - low)
            history.append((total / number).tolist())
            if not np.isfinite(history[-1]).all():
                raise ValueError(f"training diverged: loss {max(history[-1])} in epoch {epoch + 1} of {training}")
            bar.set_postfix(loss=f"{np.mean(history[-1]):.3f}")
        together.finish()
    return [list(losses) for losses in zip(*history)]


class SampledClasses:
    """The identities that a step compares with: those of its clips, and others at random, drawn anew in every step.

    Their vectors, gradients and the optimiser's states are all that a step touches of a classifier that may be larger
    than all the rest (Partial FC, An et al., CVPR 2022).  What an optimiser keeps of an identity rests while it is not
    drawn.  rows (M, S, D): the leaf that is trained in place of the vectors (M, C, D) of M models.  A class of nobody,
    behind the ``identities``, is always drawn.
    """

    def __init__(self, together: Together, classes: int, identities: int, generators: list[torch.Generator]):
        whole = together.parameters["prototype"].detach()
        self._whole = whole if whole.dim() == 3 else whole[None]
        self.rows = self._whole[:, :classes].clone().requires_grad_()
        self._states: dict[str, Tensor] = {}
        self._identities, self._generators = identities, generators

    def draw(self, label: Tensor, optimiser: torch.optim.Optimizer) -> Tensor:
        """Draw the classes of clips with labels (M, B), and return their labels among those; nobody's stays the last.

        A class beyond the vectors, of clips that are pushed away from all identities, gets the label S.
        """
        count = self._whole.shape[1]
        order = torch.stack([torch.rand(count, generator=g, device=label.device) for g in self._generators])
        order[:, self._identities :] = 2
        order.scatter_(1, label.clamp(max=count - 1), 2)
        self._drawn = order.topk(self.rows.shape[1], dim=1).indices.sort(dim=1).values
        for whole, part in self._pairs(optimiser):
            part.copy_(torch.stack([one.index_select(0, drawn) for one, drawn in zip(whole, self._drawn)]))
        return torch.searchsorted(self._drawn, label)

    def put_back(self, optimiser: torch.optim.Optimizer) -> None:
        """Write what a step has learned where it belongs."""
        for whole, part in self._pairs(optimiser):
            for one, drawn, rows in zip(whole, self._drawn, part):
                one.index_copy_(0, drawn, rows)

    def _pairs(self, optimiser: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what is kept of all classes and the part of it that is at work, (M, C, D) and (M, S, D)."""
        yield self._whole, self.rows.data
        for name, value in optimiser.state.get(self.rows, {}).items():
            if value.shape == self.rows.shape:
                yield self._states.setdefault(name, torch.zeros_like(self._whole)), value


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Turn the errors of a full memory, of a CPU or a GPU, into one: what did not fit, and what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|out of memory|allocate memory|ALLOC_FAILED", repr(error)):
            raise
        raise ValueError(f"out of memory: {what}") from None


def _longest(store: ClipStore, name: str, clip: int) -> str:
    frames = store.modalities[name].count[clip]
    return f"{store.path}: clip {store.clips['clip'].iloc[clip]!r} has {frames} frames of {name}: keep fewer of them"


def _optimiser(parameters: dict[str, Tensor], training: Training) -> torch.optim.Optimizer:
    slow = [value for name, value in parameters.items() if name.startswith("aggregator.")]
    rest = [value for name, value in parameters.items() if not name.startswith("aggregator.")]
    groups = [{"params": rest}]
    if slow:
        decay = training.weight_decay if training.decay == "all" else 0.0
        groups.insert(0, {"params": slow, "lr": training.aggregator_lr, "weight_decay": decay})
    kind, options = {"adamw": (torch.optim.AdamW, {}), "sgd": (torch.optim.SGD, {"momentum": 0.9})}[training.optimiser]
    return kind(groups, lr=training.lr, weight_decay=training.weight_decay, fused=True, **options)


def _generator(seed: int | list[int], stream: int, device: torch.device) -> torch.Generator:
    words = np.random.SeedSequence([*([seed] if isinstance(seed, int) else seed), stream]).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 32 | int(words[1]))


def classes_of(store: ClipStore, clips: np.ndarray) -> np.ndarray:
    """Return what clips (n,) are trained as: their identities, and one further class for those that have none."""
    identity = store.identity_of(clips)
    return np.where(identity < 0, len(store.identities), identity)


class Reader:
    """Read batches of the clips (n,) of M models, on their device: contexts once, frames drawn anew for every epoch."""

    def __init__(self, models: list, store: ClipStore, clips: list, modality: str | None, training: Training):
        device, first = models[0].prototype.device, models[0]
        self._sampling = _sampling(first, training.sample, training.frames)
        self._frames = None if modality is None else store.on(modality, device)
        self._clips = torch.from_numpy(np.stack(clips)).to(device)
        self._buffer = torch.empty(0, device=device)
        self._discards = [model.discard for model in models]
        union = np.unique(np.concatenate(clips))
        self._place = torch.from_numpy(np.searchsorted(union, np.stack(clips))).to(device)
        self._contexts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name in first.branches:
            read = partial(contexts, store, name, union, device, raw=first.raw_contexts)
            known = {discard: read(discard) for discard in set(self._discards)}
            self._contexts[name] = [known[discard] for discard in self._discards]

    def draw(self, generators: list[torch.Generator]) -> None:
        """Draw the frames of an epoch for every clip of every model."""
        if self._frames is not None:
            start, count = self._frames.start[self._clips], self._frames.count[self._clips]
            sample, frames = self._sampling
            self._rows = [sample_rows(s, c, sample, frames, g) for s, c, g in zip(start, count, generators)]

    def read(self, places: Tensor) -> dict:
        """Return the inputs of ``Together`` for the clips at ``places`` (M, B); they hold until the next call."""
        inputs = {}
        if self._frames is not None:
            width, rows = self._frames.feature.shape[1], [rows[place] for rows, place in zip(self._rows, places)]
            gaps = [gap(width, discard) for discard in self._discards]
            out = self._buffer.resize_(len(rows), *rows[0].shape, kept_width(width, self._discards[0]))
            batches = [self._frames.gather(r, gap=left, out=one)[1:4] for r, left, one in zip(rows, gaps, out)]
            parts = dict(zip(("mask", "quality", "det"), zip(*batches)))
            inputs = {name: _stack(part) for name, part in parts.items() if part[0] is not None}
            inputs["x"] = out if len(rows) > 1 else out[0]
        at = self._place.gather(1, places)
        context = {
            name: tuple(_stack([value[place] for value, place in zip(values, at)]) for values in zip(*read))
            for name, read in self._contexts.items()
        }
        return inputs | {"contexts": context}


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(parts)) if len(parts) > 1 else parts[0]


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
    store: ClipStore,
    name: str,
    clips: np.ndarray,
    device: torch.device,
    discard: Discard = None,
    *,
    raw: bool = False,
    block: int = 2_048,
) -> tuple[Tensor, Tensor]:
    """Return the context feature of clips, (n, D) without the discarded block, and whether they have it, (n,).

    It is the mean of the unit embeddings, without that block, of all frames, scaled to entries of order 1; raw: that of
    the embeddings as they are.
    """
    source, count = store.on(name, device), store.modalities[name].count[clips]
    left = gap(source.feature.shape[1], discard)
    feature = torch.zeros(len(clips), kept_width(source.feature.shape[1], discard), device=device)
    for places in _blocks(np.maximum(count, 1), block):
        at, to = (torch.from_numpy(part).to(device) for part in (clips[places], places))
        with enough_memory(_longest(store, name, clips[places[-1]])):
            batch = source.gather(sample_rows(source.start[at], source.count[at]), gap=left)
            x, mask = batch[:2]
            feature[to] = norm_pool(x, mask) if raw else mean_pool(x, mask) * x.shape[2] ** 0.5
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

    An aggregator with a fixed number of frames (``as coded``) gets that many drawn ones instead.  Clips are read about
    ``block`` padded frames at a time.
    """
    device = model.prototype.device
    sample, frames = _sampling(model, "all", None)
    generator = _generator(seed, 3, device)
    count = np.full(len(clips), frames or 8)  # a context of 2048 dimensions weighs as much as a few faces
    if modality is not None:
        source = store.on(modality, device)
        count = count if frames else store.modalities[modality].count[clips]
    out = torch.empty(len(clips), model.dim, device=device)
    model.eval()
    for places in _blocks(count, block):
        at, to = (torch.from_numpy(part).to(device) for part in (clips[places], places))
        with enough_memory(_longest(store, modality or next(iter(model.branches)), clips[places[-1]])):
            inputs = ()
            if modality is not None:
                rows = sample_rows(source.start[at], source.count[at], sample, frames, generator)
                inputs = source.gather(rows, gap=gap(source.feature.shape[1], model.discard))[:4]
            read = partial(contexts, store, clips=clips[places], device=device, raw=model.raw_contexts)
            context = {name: read(name, discard=model.discard) for name in model.branches}
            out[to] = model.pool(*inputs, contexts=context)
    return out
