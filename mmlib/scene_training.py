"""Fine-tune a scene network, extract its features into a clip store, and keep both; by one process or by many.

``accelerate launch`` and ``torchrun`` start one process a GPU.  What they do together, all have to do in one order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from mmlib import losses, records
from mmlib.data.images import ImageBatch, Images, decode, image_batches
from mmlib.data.store import ClipStore
from mmlib.data.submission import check_names
from mmlib.data.writer import partial_folder
from mmlib.experiment import fingerprint, torch_device
from mmlib.scene import SceneModel, SceneSettings, first_line, make_model

DECIDING = ("scene.py", "scene_training.py", "data/images.py", "data/render.py")  # beside those of ``records``
_BLOCK = 2**13  # frames copied at once
PATIENCE = timedelta(minutes=10)  # how long a process waits for another one to start, or to take its step
COMPILED = ("", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # modes of torch.compile
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
    if (mode := how.get("compile_mode", "")) not in COMPILED:
        raise ValueError(f"compile mode must be one of {', '.join(COMPILED[1:])}, got {mode!r}")
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


Blocks = Iterable[tuple[ImageBatch, np.ndarray]]  # pictures with their features (n, D) float16


def extract(
    model: SceneModel, images: Images, settings: SceneSettings, *, seed: int, run: Launch | None = None, block: int = 0
) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    """Yield pictures and their features (n, D) float16, ``block`` clips at a time, for every clip that has an image.

    One drawn picture a clip, as in training, but its centre.  The network is in eval mode, so that a clip's feature
    does not depend on which others share its batch; the code of 2019 leaves it in training mode.  block: 64 unless
    given, on a GPU 256, and no more than eight batches.  In a launched run processes take turns at the blocks; each
    yields all of them in their order, without the pixels.
    """
    model.eval()
    run = run or launched(model.prototype.device.type)
    gpu = run.device.type == "cuda"
    groups = blocks_of(images.present, block or min(256 if gpu else 64, 8 * settings.batch))
    shape: dict[str, Any] = {"size": settings.size, "resize": settings.resize, "seed": seed, "device": run.device}
    own = image_batches(images, groups[run.index :: run.count], **shape)
    with explained():
        for _ in tqdm(range(0, len(groups), run.count), "extract", mininterval=1, disable=not run.progress):
            found = []
            for batch in itertools.islice(own, 1):
                fast = torch.autocast(run.device.type, torch.bfloat16, enabled=gpu)
                with torch.inference_mode(), torch.backends.cudnn.flags(**FASTEST), fast:
                    feature = model.features(batch.pixels).to(torch.float16).cpu().numpy()
                found.append((batch, feature))
            if run.count > 1:
                from accelerate.utils import gather_object

                none = torch.empty(0, dtype=torch.uint8)
                found = gather_object([(batch._replace(pixels=none), feature) for batch, feature in found])
            yield from found


def write_scene_store(
    store: ClipStore, out: Path, blocks: Blocks, *, provenance: dict, keep: Container | None = None, **options
) -> Counter:
    """Stream scene features into a new store, beside the other modalities of ``store``; count the pictures by mode.

    keep: the other modalities that are copied, all unless given.  options: of ``ClipStore.create``.  A clip without a
    picture has no scene.  What the store had as scene is left out.
    """
    modes: Counter = Counter()
    said = {"source": store.meta["provenance"], "scene": provenance | {"modes": modes}}
    start, count = np.zeros((2, len(store)), np.int64)
    with ClipStore.create(out, simulated=store.meta["simulated"], provenance=said, **options) as writer:
        spans = {"scene": (start, count)}
        for name, modality in store.modalities.items():
            if name == "scene" or (keep is not None and name not in keep):
                continue
            spans[name] = modality.start, modality.count
            for at in range(0, max(1, len(modality.feature)), _BLOCK):
                rows = slice(at, at + _BLOCK)
                writer.append(name, modality.feature[rows], **{key: c[rows] for key, c in modality.columns.items()})
        for batch, feature in blocks:
            start[batch.clips] = writer.append("scene", feature, frame=batch.number) + np.arange(len(feature))
            count[batch.clips] = 1
            modes.update(batch.modes)
        writer.finish(store.clips, list(store.identities), spans)
    return modes


def fine_tune_to_store(
    store: ClipStore, images: Images, settings: SceneSettings, out: Path, *, seed: int, run: Launch, **writing
) -> tuple[SceneModel, Counter]:
    """Fine-tune, extract, and write the store of ``write_scene_store``, whose path is checked first.

    Returns the network and the pictures by mode.  writing: keep, overwrite.  Of a launched run the first process
    writes.
    """
    check_names(store.clips["clip"], store.identities)
    model = make_model(settings, len(store.identities), seed=seed)
    history, cache = [], records.cache_folder() / "decoded"
    cache.mkdir(parents=True, exist_ok=True)

    # The store is opened for writing before the first epoch: hours of training must not end in "exists already".
    def blocks() -> Blocks:
        with tempfile.TemporaryDirectory(dir=cache) as own:
            place = [run.decoded or Path(own, "pictures")]
            if run.count > 1:
                torch.distributed.broadcast_object_list(place)
            with records.claim(Path(f"{place[0]}.lock")):  # whichever process comes first decodes for all
                clips = training_clips(store, images)
                ready = decode(images, place[0], clips, resize=settings.resize, progress=run.progress)
            history.extend(fine_tune(model, store, ready, settings, run, seed))
        yield from extract(model, images, settings, seed=seed, run=run)

    if run.index > 0:
        return model, Counter(mode for batch, _ in blocks() for mode in batch.modes)
    said = {"settings": asdict(settings), "seed": seed, "history": history}
    return model, write_scene_store(store, out, blocks(), provenance=said, **writing)


@dataclass(frozen=True)
class SceneRun:
    """A fine-tuned network that is kept: ``folder`` holds its store ``trained``, which has the scene modality alone.

    history: as ``fine_tune`` returns it.  modes: extracted pictures by the mode of their file.
    """

    folder: Path
    settings: SceneSettings
    model: SceneModel
    history: list[dict[str, float]]
    modes: dict[str, int]

    @property
    def store(self) -> ClipStore:
        return ClipStore.open(self.folder / "trained")


def fetch_or_train(
    store: ClipStore, images: Images, settings: SceneSettings, *, seed: int, device: str = "auto"
) -> SceneRun:
    """Return the network of these settings, images and seed from the cache, or train it and keep it there.

    Of several processes that ask for it at once, one trains it and the others wait.
    """
    run = Launch(0, 1, torch_device(device))
    folder = records.cache_folder() / "scenes" / run_key(store, images, settings, seed)
    with records.claim(folder.with_suffix(".lock")):
        if not (folder / "model.pt").exists():
            records.clear_partial(folder)
            with partial_folder(folder, "model.pt", overwrite=True) as partial:
                out = partial / "trained"
                model, _ = fine_tune_to_store(store, images, settings, out, seed=seed, run=run, keep=())
                torch.save(model.state_dict(), partial / "model.pt")
    model = make_model(replace(settings, weights=""), len(store.identities), seed=seed)
    model.load_state_dict(torch.load(folder / "model.pt", map_location="cpu", weights_only=True))
    said = ClipStore.open(folder / "trained").meta["provenance"]["scene"]
    return SceneRun(folder, settings, model.to(run.device).eval(), said["history"], said["modes"])


def run_key(store: ClipStore, images: Images, settings: SceneSettings, seed: int) -> str:
    """Hash what decides a network: the store, the images' names and content, settings, seed, weights and the code."""
    digest = hashlib.sha256(json.dumps([asdict(settings), seed, fingerprint(store.path), code_hash()]).encode())
    digest.update(images.digest(images.present).encode())
    if settings.weights not in ("", "pretrained") and Path(settings.weights).is_file():
        digest.update(Path(settings.weights).read_bytes())
    return digest.hexdigest()[:20]


@cache
def code_hash() -> str:
    """Hash the modules that decide pictures and networks, and the library under them."""
    return records.code_hash((*records.DECIDING, *DECIDING))
