"""Fine-tune a scene network on pictures and extract its features, by one process or by all of a launched run.

As described by the One Name team: an SE-ResNeXt-50 trained on ImageNet is fine-tuned on one image a clip for 20 epochs,
its learning rates falling to 0 along a cosine, that of the backbone lower than that of the head; its 2048 pooled features
are the scene feature of a clip.

On a GPU convolutions run in bfloat16 with the channels last, and nothing in a step waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from mmlib import losses
from mmlib.data.images import Images
from mmlib.data.pictures import Decoded, ImageBatch, image_batches
from mmlib.data.store import ClipStore
from mmlib.launch import launched
from mmlib.scene_network import SceneModel, SceneSettings, make_model


def training_clips(store: ClipStore, images: Images) -> np.ndarray:
    """Return the labelled train clips that have an image, of which there must be one."""
    clips = np.intersect1d(store.select("train", labelled=True), images.present)
    if not len(clips):
        raise ValueError(
            f"{images.folder}: no labelled train clip of {store.path} has an image, so nothing can be trained"
        )
    return clips


def fine_tune(
    store: ClipStore,
    images: Images,
    settings: SceneSettings,
    *,
    seed: int,
    device: str = "auto",
    watch: int = 64,
    decoded: Decoded | None = None,
    mixed: bool | None = None,
    compile_mode: str = "",
    progress: bool = False,
) -> tuple[SceneModel, list[dict[str, float]]]:
    """Train on the labelled train clips that have an image, one drawn image a clip and epoch.

    Returns the model in eval mode, and by epoch: loss (nats), train (share of the epoch's pictures recognised, as the
    network stood when it saw them), val (share of ``watch`` labelled val clips recognised after the epoch; NaN if there
    are none).  decoded: pictures that need not be decoded again.  mixed: the forward pass in bfloat16; unless given, on a
    GPU.  compile_mode: that of ``compile_features``, none if empty.

    In a launched run each process takes its share of every batch, and gradients are averaged over the batch, so that
    ``settings.batch`` is that of all processes and a clip weighs the same in each.  Batch norm is over the whole batch on
    GPUs.  On CPUs, for which torch has no such layer, it is over each process's share, and the running statistics are
    those of the first process.
    """
    clips = training_clips(store, images)
    run = launched(device)
    at = run.device
    # A last batch of one clip would break batch norm, so the remainder is spread over the batches.
    steps = max(1, round(len(clips) / settings.batch))
    if run.count > 1 and len(clips) // steps < 2 * run.count:
        raise ValueError(
            f"batch must have two clips for each of {run.count} processes, got batches of {len(clips) // steps}"
        )
    model = make_model(settings, len(store.identities), seed=seed).to(at, memory_format=torch.channels_last)
    if run.count > 1 and at.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if compile_mode:
        compile_features(model, compile_mode)
    network = run.average_gradients(model)
    optimiser = make_optimiser(model, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.epochs * steps)
    rng = np.random.default_rng([seed, 6])
    watched = np.intersect1d(store.select("val", labelled=True), images.present)
    watched = np.sort(rng.permutation(watched)[:watch])
    shape = {"size": settings.size, "resize": settings.resize, "seed": seed, "decoded": decoded, "device": at}
    kept = list(image_batches(images, _blocks(run.share(watched), 64), **shape))  # the same after every epoch
    history = []
    for epoch in tqdm(
        range(settings.epochs), desc="fine-tune", unit="epoch", mininterval=1, disable=not progress or run.index > 0
    ):
        model.train()
        total = torch.zeros(2, device=at)
        groups = np.array_split(rng.permutation(clips), steps)
        shares = [run.share(group) for group in groups]
        labels = torch.from_numpy(store.identity_of(np.concatenate(shares))).to(at).split([len(s) for s in shares])
        batches = image_batches(images, shares, epoch=epoch, **shape)
        for group, label, batch in zip(groups, labels, batches, strict=True):
            with _fastest(at), _autocast(at, mixed):
                cosine = network(batch.pixels)
            loss = losses.cross_entropy(
                losses.margin_logits(cosine, label, margin=settings.margin, scale=settings.scale), label
            )
            optimiser.zero_grad(set_to_none=True)
            with _fastest(at):
                # Shares may differ by a clip, and the mean over processes is to be that over clips.
                (loss * (len(label) * run.count / len(group))).backward()
            optimiser.step()
            schedule.step()
            right = (cosine.detach().argmax(1) == label).sum()
            total += torch.stack([loss.detach() * len(label), right])
        loss, right = (run.sum(total) / len(clips)).tolist()
        if not np.isfinite(loss):
            raise ValueError(f"training diverged: loss {loss} in epoch {epoch + 1} of {settings}")
        run.copy_buffers(model)
        known = run.sum(torch.tensor(float(recognised(model, store, kept)), device=at)).item()
        history.append(
            {
                "epoch": epoch + 1,
                "loss": loss,
                "train": right,
                "val": known / len(watched) if len(watched) else float("nan"),
            }
        )
    return model.eval(), history


def make_optimiser(model: SceneModel, settings: SceneSettings) -> torch.optim.SGD:
    """Return SGD with one rate for the backbone and one for the head."""
    groups = [{"params": list(model.backbone.parameters()), "lr": settings.backbone_lr}, {"params": [model.prototype]}]
    return torch.optim.SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True if model.prototype.is_cuda else None,
    )


@torch.inference_mode()
def recognised(model: SceneModel, store: ClipStore, batches: Iterable[ImageBatch]) -> int:
    """Return how many labelled clips have the right identity vector nearest."""
    model.eval()
    return sum(
        int((model(batch.pixels).argmax(1).cpu().numpy() == store.identity_of(batch.clips)).sum()) for batch in batches
    )


def extract(
    model: SceneModel,
    images: Images,
    settings: SceneSettings,
    *,
    seed: int,
    block: int | None = None,
    decoded: Decoded | None = None,
    mixed: bool | None = None,
    progress: bool = False,
) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    """Yield pictures and their features (n, D) float16, ``block`` clips at a time, for every clip that has an image.

    One drawn picture a clip, as in training, but its centre.  The network is in eval mode, so that a clip's feature does
    not depend on which others share its batch; the code of 2019 leaves it in training mode.  block: 64 unless given, on a
    GPU 256.  decoded, mixed: as in ``fine_tune``.

    In a launched run processes take turns at the blocks; the first one yields all of them in their order, without the
    pixels, and the others yield nothing.
    """
    model.eval()
    device, clips = model.prototype.device, images.present
    run = launched(device.type)
    groups = _blocks(clips, block or (256 if device.type == "cuda" else 64))
    batches = image_batches(
        images,
        groups[run.index :: run.count],
        size=settings.size,
        resize=settings.resize,
        seed=seed,
        decoded=decoded,
        device=device,
    )
    own = _features(model, batches, mixed)
    with tqdm(
        total=len(groups), desc="extract", unit="block", mininterval=1, disable=not progress or run.index > 0
    ) as bar:
        for _ in range(-(-len(groups) // run.count)):
            found = next(own, None)
            if run.count > 1 and found:
                found = found[0]._replace(pixels=torch.empty(0, dtype=torch.uint8)), found[1]
            for each in filter(None, run.gather(found)):
                bar.update()
                yield each


def _features(
    model: SceneModel, batches: Iterable[ImageBatch], mixed: bool | None
) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    """Yield each batch with its features when the next one is under way, so that a GPU does not wait for the writing."""
    device, before = model.prototype.device, None
    for batch in batches:
        with torch.inference_mode(), _fastest(device), _autocast(device, mixed):
            feature = model.features(batch.pixels).to(torch.float16).to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        if before:
            yield _arrived(*before)
        before = batch, feature, copied
    if before:
        yield _arrived(*before)


def _arrived(
    batch: ImageBatch, feature: torch.Tensor, copied: torch.cuda.Event | None
) -> tuple[ImageBatch, np.ndarray]:
    if copied:
        copied.synchronize()
    return batch, feature.numpy()


def compile_features(model: SceneModel, mode: str = "default") -> None:
    """Let ``torch.compile`` build a model's features in place, normalisation included; warn where it cannot.

    mode: of ``torch.compile``.  Rounding differs a little from that of the model as it was.
    """
    try:  # what a compiler lacks comes out at the first call
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=model.prototype.device))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"torch.compile does not work here ({reason}); the network is run as it is", stacklevel=2)
        return
    model.features = torch.compile(model.features, mode=mode, dynamic=False)


def _blocks(clips: np.ndarray, size: int) -> list[np.ndarray]:
    return np.array_split(clips, -(-len(clips) // size)) if len(clips) else []


def _autocast(device: torch.device, mixed: bool | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda" if mixed is None else mixed)


def _fastest(device: torch.device):
    """Let cuDNN try its convolutions and keep the fastest; here alone, as it is a setting of the whole process."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True) if device.type == "cuda" else nullcontext()
