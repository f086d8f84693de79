"""Fine-tune a scene network, by one process or by all those of a launched run, which share every batch.

``accelerate launch`` and ``torchrun`` start one process a GPU.  What they do together, all have to do in one order.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from mmlib import losses
from mmlib.data.images import Images, image_batches
from mmlib.data.store import ClipStore
from mmlib.experiment import torch_device

if TYPE_CHECKING:
    from mmlib.scene import SceneSettings

PATIENCE = timedelta(minutes=10)  # how long a process waits for another one to start, or to take its step
FASTEST = {"enabled": True, "benchmark": True}  # of cuDNN: convolutions are tried, and the fastest kept


@dataclass(frozen=True)
class Launch:
    """How networks are computed: by process ``index`` of ``count``, on its own device.

    compile_mode: of ``torch.compile``, not used if empty.  decoded: a folder that keeps decoded pictures.
    """

    index: int
    count: int
    device: torch.device
    progress: bool = False
    compile_mode: str = ""
    decoded: Path | None = None

    def share(self, items: np.ndarray) -> np.ndarray:
        """Return this process's part of ``items`` (n,): parts are consecutive and differ by one in size at most."""
        return np.array_split(items, self.count)[self.index]


def launched(device: str = "auto", *, progress: bool = False, **how) -> Launch:
    """Return this process among those of its run; device as in ``torch_device``, of which each process gets one."""
    at, count = torch_device(device), int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return Launch(0, 1, at, progress, **how)
    from accelerate import PartialState  # half a second that one process need not wait

    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if at.type == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"device cuda: {here} processes on a machine with {torch.cuda.device_count()} GPUs")
    with _waiting(count):
        state = PartialState(cpu=at.type == "cpu", timeout=PATIENCE)
    if state.num_processes != count or state.device.type != at.type:
        found = f"WORLD_SIZE is {count}, but there are {state.num_processes} processes on {state.device.type}"
        raise ValueError(f"{found}: start them with accelerate launch or torchrun")
    return Launch(state.process_index, count, state.device, progress and state.is_main_process, **how)


@contextmanager
def _waiting(count: int) -> Iterator[None]:
    """Say after some seconds that a process waits, and let signals end it: torch, in which it waits, hears none."""
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    what = f"waiting for {count} processes to come to {place}, at most {PATIENCE.seconds // 60} minutes"
    timer = threading.Timer(3, print, [f"mmlib: {what}"], {"file": sys.stderr, "flush": True})
    kept = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    timer.start()
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"{what}: in vain ({first_line(error)})") from None
    finally:
        timer.cancel()
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def explained() -> Iterator[None]:
    """Say in a line what torch says in pages: no memory, no compiler, another process of the run that has failed."""
    try:
        yield
    except BaseException as error:
        text, module = str(error), type(error).__module__
        together = torch.distributed.is_initialized() and not isinstance(error, GeneratorExit)
        if together:  # a launcher stops all processes as soon as one has failed: let this one clear away first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        scarce = any(part in text for part in ("out of memory", "allocate memory", "ALLOC_FAILED"))
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and scarce):
            raise MemoryError(f"for a scene network: lower batch or size ({first_line(error)})") from None
        if module.startswith(("torch._dynamo", "torch._inductor")):
            raise ValueError(f"torch.compile does not work here ({first_line(error)}): do without") from None
        if together and isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text):
            raise ValueError(f"another process of this run has failed ({first_line(error)})") from None
        raise


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line, or what it is called."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def training_clips(store: ClipStore, images: Images) -> np.ndarray:
    """Return the labelled train clips that have an image, of which there must be one."""
    clips = np.intersect1d(store.select("train", labelled=True), images.present)
    if not len(clips):
        raise ValueError(f"{images.folder}: no labelled train clip of {store.path} has an image to train on")
    return clips


@explained()
@torch.backends.cudnn.flags(**FASTEST)
def fine_tune(
    model: nn.Module, store: ClipStore, images: Images, settings: SceneSettings, run: Launch, seed: int, watch: int = 64
) -> list[dict[str, float]]:
    """Train a model on the labelled train clips that have an image, one drawn image a clip and epoch.

    Leaves it in eval mode, and returns by epoch: loss (nats), train (share of the epoch's pictures recognised, as the
    network stood when it saw them), val (share of ``watch`` labelled val clips recognised after it; NaN without any).
    On a GPU convolutions run in bfloat16.

    In a launched run each process takes its share of every batch, and gradients are averaged over the batch, so that
    ``settings.batch`` is that of all processes and a clip weighs the same in each.  Batch norm is over the whole batch
    on GPUs.  On CPUs, for which torch has no such layer, it is over each process's share, and the running statistics
    are those of the first process.
    """
    clips, at, together = training_clips(store, images), run.device, run.count > 1
    # A last batch of one clip would break batch norm, so the remainder is spread over the batches.
    steps = max(1, round(len(clips) / settings.batch))
    if together and (least := len(clips) // steps) < 2 * run.count:
        raise ValueError(f"batch must have two clips for each of {run.count} processes, got batches of {least}")
    network = model.to(at, memory_format=torch.channels_last)
    if run.compile_mode:
        model.features = torch.compile(model.features, mode=run.compile_mode, dynamic=False)
    if together:
        own = [at.index] if at.type == "cuda" else None
        network = nn.SyncBatchNorm.convert_sync_batchnorm(model) if own else model
        network = nn.parallel.DistributedDataParallel(network, own)
    body: dict[str, Any] = {"params": list(model.backbone.parameters()), "lr": settings.backbone_lr}
    rates: dict[str, Any] = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
    optimiser = torch.optim.SGD([body, {"params": [model.prototype]}], **rates, fused=at.type == "cuda" or None)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.epochs * steps)
    rng = np.random.default_rng([seed, 6])
    watched = np.intersect1d(store.select("val", labelled=True), images.present)
    watched = np.sort(rng.permutation(watched)[:watch])
    shape: dict[str, Any] = {"size": settings.size, "resize": settings.resize, "seed": seed, "device": at}
    kept = list(image_batches(images, blocks_of(run.share(watched), 64), **shape))  # the same after every epoch
    history: list[dict[str, float]] = []
    for epoch in tqdm(range(settings.epochs), "fine-tune", unit="epoch", mininterval=1, disable=not run.progress):
        model.train()
        total = torch.zeros(3, device=at)  # the loss, clips recognised in train and in val
        groups = np.array_split(rng.permutation(clips), steps)
        batches = image_batches(images, [run.share(group) for group in groups], epoch=epoch, **shape)
        for group, batch in zip(groups, batches, strict=True):
            label = torch.from_numpy(store.identity_of(batch.clips)).to(at)
            with torch.autocast(at.type, dtype=torch.bfloat16, enabled=at.type == "cuda"):
                cosine = network(batch.pixels)
            logits = losses.margin_logits(cosine, label, margin=settings.margin, scale=settings.scale)
            loss = nn.functional.cross_entropy(logits, label)
            optimiser.zero_grad(set_to_none=True)
            # Shares may differ by a clip, and the mean over processes is to be that over clips.
            (loss * (len(label) * run.count / len(group))).backward()
            optimiser.step()
            schedule.step()
            total[0] += loss.detach() * len(label)
            total[1] += (cosine.detach().argmax(1) == label).sum()
        for buffer in model.buffers() if together else ():
            torch.distributed.broadcast(buffer, 0)
        model.eval()
        with torch.inference_mode():
            for batch in kept:
                identity = torch.from_numpy(store.identity_of(batch.clips)).to(at)
                total[2] += (model(batch.pixels).argmax(1) == identity).sum()
        if together:
            torch.distributed.all_reduce(total)
        (loss, train), known = (total[:2] / len(clips)).tolist(), total[2].item()
        val = known / len(watched) if len(watched) else float("nan")
        if not np.isfinite(loss):
            raise ValueError(f"training diverged: loss {loss} in epoch {epoch + 1} of {settings}")
        history.append({"epoch": epoch + 1, "loss": loss, "train": train, "val": val})
    return history


def blocks_of(clips: np.ndarray, size: int) -> list[np.ndarray]:
    """Split clips (n,) into blocks of ``size`` at most."""
    return np.array_split(clips, -(-len(clips) // size)) if len(clips) else []
