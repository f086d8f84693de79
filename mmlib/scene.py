"""Scene features: an SE-ResNeXt that is fine-tuned on clips' pictures, what it extracts, and kept networks.

As described by the One Name team: an SE-ResNeXt-50 trained on ImageNet is fine-tuned on one image a clip for 20 epochs,
its learning rates falling to 0 along a cosine, that of the backbone lower than that of the head; its 2048 pooled
features are the scene feature of a clip.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from mmlib import records
from mmlib.data.images import ImageBatch, Images, decode, image_batches
from mmlib.data.store import ClipStore
from mmlib.data.submission import check_names
from mmlib.data.writer import partial_folder
from mmlib.experiment import fingerprint, torch_device
from mmlib.scene_training import FASTEST, Launch, blocks_of, explained, fine_tune, first_line, launched, training_clips

DECIDING = ("scene.py", "scene_training.py", "data/images.py", "data/render.py")  # beside those of ``records``
DEEP = ("seresnext50_32x4d", "legacy_seresnext50_32x4d")  # 2048 features; the second takes the weights of 2019
# SE-ResNeXts by the same code, for pictures of 64 pixels and a processor without a GPU: 512 features.  The number of
# layers counts convolutions in a row and the classifier.
NARROW = {"narrow_seresnext26": (2, 2, 2, 2), "narrow_seresnext14": (1, 1, 1, 1)}
ARCHITECTURES = (*DEEP, *NARROW)
_BLOCK = 2**13  # frames copied at once

# -- the network ----------------------------------------------------------------------------------------------------


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
    lr: float = 0.1
    backbone_lr: float = 0.001
    momentum: float = 0.9
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
    chosen: dict[str, Any] = {} if architecture in DEEP else {"size": 56, "resize": 64, "batch": 32}
    if not weights:
        chosen |= {"backbone_lr": 0.05}
    return SceneSettings(architecture, weights, **chosen | overrides)


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
        """Return cosines (B, C), float32 also under autocast: the scale would make a loss of their rounding."""
        feature = self.features(pixels).float()
        with torch.autocast(feature.device.type, enabled=False):
            return F.normalize(feature, dim=1) @ F.normalize(self.prototype, dim=1).T


def make_model(settings: SceneSettings, identities: int, *, seed: int) -> SceneModel:
    """Make the network as it is before it is fine-tuned; what is random in it comes from ``seed``."""
    with torch.random.fork_rng(devices=[]):  # layers draw from the global generator, and take no other
        torch.default_generator.manual_seed(seed)
        return SceneModel(_make_backbone(settings.architecture, settings.weights), identities)


def _make_backbone(architecture: str, weights: str) -> nn.Module:
    """Make an SE-ResNeXt (Hu et al., CVPR 2018; Xie et al., CVPR 2017) from (B, 3, S, S) to (B, D) pooled features."""
    pretrained = weights == "pretrained"
    if pretrained and architecture in NARROW:
        raise ValueError(f"weights: there are no pretrained ones of {architecture}, only of {', '.join(DEEP)}")
    if architecture in NARROW:
        shape: dict = dict(cardinality=8, base_width=8, channels=(16, 32, 64, 128), block_args={"attn_layer": "se"})
        # Every block counts from the start: with the last scale of a block at 0, as usual, short trainings lose epochs.
        backbone = ResNet(Bottleneck, NARROW[architecture], num_classes=0, zero_init_last=False, **shape)
    else:
        try:
            backbone = timm.create_model(architecture, pretrained=pretrained, num_classes=0)
        except Exception as error:  # whatever a download may raise: connection, hub, checksum, disk
            reason = f"weights: cannot download those of {architecture} ({first_line(error)})"
            raise ValueError(f"{reason}; give the path of a file instead, or none to start from scratch") from None
    if weights and not pretrained:
        _load(backbone, architecture, Path(weights))
    return backbone


def _load(backbone: nn.Module, architecture: str, path: Path) -> None:
    """Load a state dict of the same architecture, strictly but for its classifier."""
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file")
    try:
        state = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # unpickling may raise anything
        raise ValueError(f"weights {path}: not a readable file of weights ({first_line(error)})") from None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {path}: no state dict, which maps names to tensors")
    if "prototype" in state:  # of a model that ``fine_tune`` made
        state = {key.removeprefix("backbone."): value for key, value in state.items() if key != "prototype"}
    state = {key: value for key, value in state.items() if key.split(".")[0] not in ("fc", "last_linear")}
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]  # of many
        raise ValueError(f"weights {path}: not of {architecture}: {reason}") from None


# -- features -------------------------------------------------------------------------------------------------------

Blocks = Iterable[tuple[ImageBatch, np.ndarray]]  # pictures with their features (n, D) float16


@torch.inference_mode()
def occlusion(model: SceneModel, pixels: Tensor, label: Tensor, *, patch: int, stride: int) -> Tensor:
    """Return how far the cosine with the label's vector falls where a patch covers a picture, (B, S, S).

    pixels (B, 3, S, S) uint8; label (B,); patch and stride: pixels.  Source: Zeiler & Fergus, ECCV 2014, section 4.2;
    the patch has the mean colour of its picture, and a pixel's value is the mean over all patches that cover it.
    Positive is a place that speaks for the identity.
    """
    size = pixels.shape[-1]
    if not 1 <= stride <= patch <= size:
        raise ValueError(f"patch and stride must obey 1 <= stride <= patch <= {size}, got {patch} and {stride}")
    model.eval()
    whole = model(pixels).gather(1, label[:, None])[:, 0]
    colour = pixels.float().mean((2, 3)).to(pixels.dtype)[:, :, None, None]
    total, covered = torch.zeros(2, len(pixels), size, size, device=pixels.device)
    # The last place along each axis touches the edge, so that every pixel is covered.
    places = [slice(at, at + patch) for at in sorted({*range(0, size - patch + 1, stride), size - patch})]
    for rows, columns in itertools.product(places, places):
        hidden = pixels.clone()
        hidden[:, :, rows, columns] = colour
        drop = whole - model(hidden).gather(1, label[:, None])[:, 0]
        total[:, rows, columns] += drop[:, None, None]
        covered[:, rows, columns] += 1
    return total / covered


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


# -- stores ---------------------------------------------------------------------------------------------------------


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


# -- kept -----------------------------------------------------------------------------------------------------------


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
