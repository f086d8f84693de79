"""An SE-ResNeXt that learns identities from scene images, and the features that it extracts.

As described by the One Name team: an SE-ResNeXt-50 trained on ImageNet is fine-tuned on one image a clip for 20 epochs,
its learning rates falling to 0 along a cosine, that of the backbone lower than that of the head; its 2048 pooled features
are the scene feature of a clip.  Only this module knows timm.
"""

from __future__ import annotations

import ast
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from mmlib import losses
from mmlib.clips.arrays import partial_folder
from mmlib.clips.images import ImageBatch, Images, image_batches
from mmlib.clips.store import ClipStore
from mmlib.experiment import fingerprint, torch_device
from mmlib.runs import PACKAGE, cache_folder, library_hash

DEEP = ("seresnext50_32x4d", "legacy_seresnext50_32x4d")  # 2048 features; the second takes the weights of 2019
# SE-ResNeXts by the same code, for pictures of 64 pixels and a processor without a GPU: 512 features.  The number of
# layers counts convolutions in a row and the classifier.
NARROW = {"narrow_seresnext26": (2, 2, 2, 2), "narrow_seresnext14": (1, 1, 1, 1)}
ARCHITECTURES = (*DEEP, *NARROW)
DECIDING = ("scene.py", "clips/images.py", "clips/render.py")  # beside those of ``runs``
_BLOCK = 2**13  # frames copied at once


@dataclass(frozen=True)
class SceneSettings:
    """What decides a scene network; the defaults are what is described.

    architecture: one of ``ARCHITECTURES``.  weights: ``""`` starts from scratch, ``"pretrained"`` from timm's download,
    anything else is the path of a file.  size: pixels of a side of the crop, resize: of the shorter side before it.
    batch: clips.  lr of the classifier and of the backbone, for SGD with momentum; both fall to 0 along a cosine.
    margin in radians; scale of the cosines.
    """

    architecture: str = "seresnext50_32x4d"
    weights: str = "pretrained"
    size: int = 224
    resize: int = 256
    epochs: int = 20
    batch: int = 40
    lr: float = .1
    backbone_lr: float = .001
    momentum: float = .9
    weight_decay: float = 1e-4
    margin: float = 0.0
    scale: float = 30.0

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        for name in ("size", "epochs", "batch"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.resize < self.size:
            raise ValueError(f"resize must be at least size, {self.size}, got {self.resize}")
        if not 0 < self.backbone_lr <= self.lr:
            raise ValueError(f"backbone_lr must lie in (0, lr = {self.lr}], got {self.backbone_lr}")


def settings_for(architecture: str, weights: str = "", **overrides) -> SceneSettings:
    """Return settings for an architecture: as described for a deep one, pictures of 64 pixels for a narrow one.

    A backbone that starts from scratch has everything to learn, so its rate is only a little lower than the head's.
    """
    chosen = {} if architecture in DEEP else {"size": 56, "resize": 64, "batch": 32}
    if not weights:
        chosen |= {"backbone_lr": .05}
    return SceneSettings(architecture, weights, **chosen | overrides)


# -- the network ----------------------------------------------------------------------------------------------------


def make_backbone(architecture: str, weights: str = "") -> nn.Module:
    """Make an SE-ResNeXt (Hu et al., CVPR 2018; Xie et al., CVPR 2017) that maps (B, 3, S, S) to (B, D) pooled features.

    weights: as in ``SceneSettings``.  A file holds a state dict of the same architecture: every tensor but the
    classifier's must fit.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    pretrained = weights == "pretrained"
    if architecture in NARROW:
        if pretrained:
            raise ValueError(f"weights: there are no pretrained ones of {architecture}, only of {', '.join(DEEP)}")
        # Every block counts from the start: with the last scale of a block at 0, as usual, short trainings lose epochs.
        backbone = ResNet(Bottleneck, NARROW[architecture], num_classes=0, cardinality=8, base_width=8,
                          channels=(16, 32, 64, 128), block_args={"attn_layer": "se"}, zero_init_last=False)
    else:
        try:
            backbone = timm.create_model(architecture, pretrained=pretrained, num_classes=0)
        except Exception as error:  # whatever a download may raise: connection, hub, checksum, disk
            if not pretrained:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"weights: cannot download those of {architecture} ({reason}); "
                             "give the path of a file instead, or none to start from scratch") from None
    if weights and not pretrained:
        _load(backbone, architecture, Path(weights))
    return backbone


def _load(backbone: nn.Module, architecture: str, path: Path) -> None:
    """Load a state dict, strictly but for the classifier and for counters that old files lack."""
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"weights {path}: no such file") from None
    except Exception as error:  # unpickling may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"weights {path}: not a readable file of weights ({reason})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {path}: no state dict, which maps names to tensors")
    for prefix in ("module.", "backbone."):  # of several GPUs in 2019; of a model that ``fine_tune`` made
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if key.split(".")[0] not in ("fc", "last_linear")}
    wanted = backbone.state_dict()
    for key, value in wanted.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
        if key not in state:
            raise ValueError(f"weights {path}: not of {architecture}: no {key}")
        if state[key].shape != value.shape:
            raise ValueError(f"weights {path}: not of {architecture}: {key} is {tuple(state[key].shape)}, "
                             f"expected {tuple(value.shape)}")
    if extra := [key for key in state if key not in wanted]:
        raise ValueError(f"weights {path}: not of {architecture}: it has no {extra[0]}")
    backbone.load_state_dict(state)


class SceneModel(nn.Module):
    """Score pictures against identities by the cosine between their features and one vector an identity."""

    def __init__(self, backbone: nn.Module, identities: int):
        super().__init__()
        self.backbone = backbone
        said = getattr(backbone, "pretrained_cfg", None) or {}
        for name, value in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(said.get(name, value)).view(3, 1, 1), persistent=False)
        self.prototype = nn.Parameter(F.normalize(torch.randn(identities, backbone.num_features), dim=1))

    def features(self, pixels: Tensor) -> Tensor:
        """Return the pooled features (B, D) of pictures (B, 3, S, S) uint8."""
        return self.backbone((pixels.float() / 255 - self.mean) / self.std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return cosines (B, C)."""
        return F.normalize(self.features(pixels).float(), dim=1) @ F.normalize(self.prototype, dim=1).T


def make_model(settings: SceneSettings, identities: int, *, seed: int) -> SceneModel:
    """Make the network as it is before it is fine-tuned; what is random in it comes from ``seed``."""
    torch.manual_seed(seed)
    return SceneModel(make_backbone(settings.architecture, settings.weights), identities)


# -- fine-tune ------------------------------------------------------------------------------------------------------


def fine_tune(store: ClipStore, images: Images, settings: SceneSettings, *, seed: int, device: str = "auto",
              watch: int = 64, progress: bool = False) -> tuple[SceneModel, list[dict[str, float]]]:
    """Train on the labelled train clips that have an image, one drawn image a clip and epoch.

    Returns the model in eval mode, and by epoch: loss (nats), train (share of the epoch's pictures recognised, as the
    network stood when it saw them), val (share of ``watch`` labelled val clips recognised after the epoch; NaN if there
    are none).  On a GPU the forward pass runs in bfloat16.
    """
    clips = np.intersect1d(store.select("train", labelled=True), images.present)
    if not len(clips):
        raise ValueError(f"{images.folder}: no labelled train clip of {store.path} has an image, so nothing can be trained")
    at = torch_device(device)
    model = make_model(settings, len(store.identities), seed=seed).to(at, memory_format=torch.channels_last)
    optimiser = make_optimiser(model, settings)
    # A last batch of one clip would break batch norm, so the remainder is spread over the batches.
    steps = max(1, round(len(clips) / settings.batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.epochs * steps)
    rng = np.random.default_rng([seed, 6])
    watched = np.intersect1d(store.select("val", labelled=True), images.present)
    watched = np.sort(rng.permutation(watched)[:watch])
    shape = {"size": settings.size, "resize": settings.resize, "seed": seed}
    history = []
    for epoch in tqdm(range(settings.epochs), desc="fine-tune", unit="epoch", disable=not progress, mininterval=1):
        model.train()
        total = torch.zeros(2, device=at)
        groups = np.array_split(rng.permutation(clips), steps)
        for batch in image_batches(images, groups, epoch=epoch, **shape):
            label = torch.from_numpy(store.identity_of(batch.clips)).to(at)
            with torch.autocast(at.type, dtype=torch.bfloat16, enabled=at.type == "cuda"):
                cosine = model(_on(batch, at))
            loss = losses.cross_entropy(losses.margin_logits(cosine, label, margin=settings.margin, scale=settings.scale),
                                        label)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            right = (cosine.detach().argmax(1) == label).sum()
            total += torch.stack([loss.detach() * len(label), right])
        loss, right = (total / len(clips)).tolist()
        if not np.isfinite(loss):
            raise ValueError(f"training diverged: loss {loss} in epoch {epoch + 1} of {settings}")
        history.append({"epoch": epoch + 1, "loss": loss, "train": right,
                        "val": recognised(model, store, images, watched, settings, seed=seed)})
    return model.eval(), history


def make_optimiser(model: SceneModel, settings: SceneSettings) -> torch.optim.SGD:
    """Return SGD with one rate for the backbone and one for the head."""
    groups = [{"params": list(model.backbone.parameters()), "lr": settings.backbone_lr}, {"params": [model.prototype]}]
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


@torch.inference_mode()
def recognised(model: SceneModel, store: ClipStore, images: Images, clips: np.ndarray, settings: SceneSettings, *,
               seed: int) -> float:
    """Return the share of labelled clips (n,) whose nearest identity vector is the right one; NaN for none."""
    model.eval()
    right = 0
    groups = np.array_split(clips, max(1, -(-len(clips) // 64))) if len(clips) else []
    for batch in image_batches(images, groups, size=settings.size, resize=settings.resize, seed=seed):
        predicted = model(_on(batch, model.prototype.device)).argmax(1).cpu().numpy()
        right += int((predicted == store.identity_of(batch.clips)).sum())
    return right / len(clips) if len(clips) else float("nan")


def _on(batch: ImageBatch, device: torch.device) -> Tensor:
    return batch.pixels.to(device, non_blocking=True, memory_format=torch.channels_last)


# -- extract --------------------------------------------------------------------------------------------------------


def extract(model: SceneModel, images: Images, settings: SceneSettings, *, seed: int, block: int = 64,
            progress: bool = False) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    """Yield pictures and their features (n, D) float16, ``block`` clips at a time, for every clip that has an image.

    One drawn picture a clip, as in training, but its centre.  The network is in eval mode, so that a clip's feature does
    not depend on which others share its batch; the code of 2019 leaves it in training mode.
    """
    model.eval()
    clips = images.present
    groups = np.array_split(clips, max(1, -(-len(clips) // block)))
    device = model.prototype.device
    batches = image_batches(images, groups, size=settings.size, resize=settings.resize, seed=seed)
    for batch in tqdm(batches, total=len(groups), desc="extract", unit="block", disable=not progress, mininterval=1):
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            feature = model.features(_on(batch, device))
        yield batch, feature.float().cpu().numpy().astype(np.float16)


def write_scene_store(store: ClipStore, out: str | Path, blocks: Iterable[tuple[ImageBatch, np.ndarray]], *,
                      provenance: dict, keep: Iterable[str] | None = None, overwrite: bool = False) -> Counter:
    """Stream scene features into a new store, beside the other modalities of ``store``; count the pictures by mode.

    keep: the other modalities that are copied, all unless given.  A clip without a picture has no scene.  What the store
    had as scene is left out.
    """
    said = {"source": store.meta["provenance"], "scene": provenance}
    modes: Counter = Counter()
    start, count = (np.zeros(len(store), np.int64) for _ in range(2))
    with ClipStore.create(out, simulated=store.meta["simulated"], provenance=said, overwrite=overwrite) as writer:
        spans = {"scene": (start, count)}
        for name, modality in store.modalities.items():
            if name == "scene" or (keep is not None and name not in keep):
                continue
            spans[name] = modality.start, modality.count
            for at in range(0, max(1, len(modality.feature)), _BLOCK):
                rows = slice(at, at + _BLOCK)
                writer.append(name, modality.feature[rows], **{key: c[rows] for key, c in modality.columns.items()})
        for batch, feature in blocks:
            first = writer.append("scene", feature, frame=batch.number)
            start[batch.clips] = first + np.arange(len(feature))
            count[batch.clips] = 1
            modes.update(batch.modes)
        writer.finish(store.clips, list(store.identities), spans)
    return modes


@torch.inference_mode()
def occlusion(model: SceneModel, pixels: Tensor, label: Tensor, *, patch: int, stride: int) -> Tensor:
    """Return how far the cosine with the label's vector falls where a patch covers a picture, (B, S, S).

    pixels (B, 3, S, S) uint8; label (B,); patch and stride: pixels.  Source: Zeiler & Fergus, ECCV 2014, section 4.2; the
    patch has the mean colour of its picture, and a pixel's value is the mean over all patches that cover it.  Positive
    is a place that speaks for the identity.
    """
    size = pixels.shape[-1]
    if not 1 <= stride <= patch <= size:
        raise ValueError(f"patch and stride must obey 1 <= stride <= patch <= {size}, got {patch} and {stride}")
    model.eval()
    whole = model(pixels).gather(1, label[:, None])[:, 0]
    colour = pixels.float().mean((2, 3)).to(pixels.dtype)[:, :, None, None]
    total, covered = (torch.zeros(len(pixels), size, size, device=pixels.device) for _ in range(2))
    # The last place along each axis touches the edge, so that every pixel is covered.
    places = sorted({*range(0, size - patch + 1, stride), size - patch})
    for top in places:
        for left in places:
            hidden = pixels.clone()
            hidden[:, :, top:top + patch, left:left + patch] = colour
            drop = whole - model(hidden).gather(1, label[:, None])[:, 0]
            total[:, top:top + patch, left:left + patch] += drop[:, None, None]
            covered[:, top:top + patch, left:left + patch] += 1
    return total / covered


def fine_tune_to_store(store: ClipStore, images: Images, settings: SceneSettings, out: str | Path, *, seed: int,
                       device: str = "auto", keep: Iterable[str] | None = None, overwrite: bool = False,
                       progress: bool = False) -> Counter:
    """Fine-tune, extract, and write the store of ``write_scene_store``, whose path is checked first."""
    said = {"settings": asdict(settings), "seed": seed}
    # The store is opened for writing before the first epoch: hours of training must not end in "exists already".

    def blocks() -> Iterator[tuple[ImageBatch, np.ndarray]]:
        model, history = fine_tune(store, images, settings, seed=seed, device=device, progress=progress)
        said["history"] = history
        yield from extract(model, images, settings, seed=seed, progress=progress)

    return write_scene_store(store, out, blocks(), provenance=said, keep=keep, overwrite=overwrite)


# -- kept -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneRun:
    """A fine-tuned network that is kept: ``folder`` holds its store ``trained``, which has the scene modality alone.

    history: as ``fine_tune`` returns it.  modes: extracted pictures by the mode of their file.  seconds: of training
    and extraction, when they were done.
    """

    folder: Path
    settings: SceneSettings
    model: SceneModel
    history: list[dict[str, float]]
    modes: dict[str, int]
    seconds: dict[str, float]

    @property
    def store(self) -> ClipStore:
        return ClipStore.open(self.folder / "trained")


def fetch_or_train(store: ClipStore, images: Images, settings: SceneSettings, *, seed: int, device: str = "auto",
                   progress: bool = False) -> SceneRun:
    """Return the network of these settings, images and seed from the cache, or train it and keep it there."""
    folder = cache_folder() / "scenes" / run_key(store, images, settings, seed)
    if not (folder / "run.json").exists():
        began = time.perf_counter()
        model, history = fine_tune(store, images, settings, seed=seed, device=device, progress=progress)
        trained = time.perf_counter()
        with partial_folder(folder, "run.json", overwrite=True) as partial:
            modes = write_scene_store(store, partial / "trained", extract(model, images, settings, seed=seed),
                                      provenance={"settings": asdict(settings), "seed": seed}, keep=())
            torch.save(model.state_dict(), partial / "model.pt")
            seconds = {"fine-tune": round(trained - began, 3), "extract": round(time.perf_counter() - trained, 3)}
            said = {"history": history, "modes": modes, "seconds": seconds}
            (partial / "run.json").write_text(json.dumps(said) + "\n")
    said = json.loads((folder / "run.json").read_text())
    model = SceneModel(make_backbone(settings.architecture), len(store.identities)).to(torch_device(device))
    model.load_state_dict(torch.load(folder / "model.pt", map_location="cpu", weights_only=True))
    return SceneRun(folder, settings, model.eval(), said["history"], said["modes"], said["seconds"])


def run_key(store: ClipStore, images: Images, settings: SceneSettings, seed: int) -> str:
    """Hash what decides a network: the store, the images' names and sizes, settings, seed, weights and the code."""
    digest = hashlib.sha256(json.dumps([asdict(settings), seed, fingerprint(store.path), code_hash()]).encode())
    for clip in images.present:
        for number, file in enumerate(images.files[clip]):
            digest.update(f"{images.clips[clip]}/{file} {images.path(clip, number).stat().st_size}\n".encode())
    if settings.weights not in ("", "pretrained") and Path(settings.weights).is_file():
        digest.update(Path(settings.weights).read_bytes())
    return digest.hexdigest()[:20]


def code_hash() -> str:
    """Hash the modules that decide pictures and networks, comments aside, and the library under them."""
    trees = [ast.dump(ast.parse((PACKAGE / name).read_text())) for name in DECIDING]
    return hashlib.sha256("\n".join([library_hash(), *trees]).encode()).hexdigest()[:12]
