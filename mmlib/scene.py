"""Scene networks: an SE-ResNeXt and a vector an identity, its settings, and where it looks.

As described by the One Name team: an SE-ResNeXt-50 trained on ImageNet is fine-tuned on one image a clip for 20 epochs,
its learning rates falling to 0 along a cosine, that of the backbone lower than that of the head; its 2048 pooled
features are the scene feature of a clip.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

DEEP = ("seresnext50_32x4d", "legacy_seresnext50_32x4d")  # 2048 features; the second takes the weights of 2019
# SE-ResNeXts by the same code, for pictures of 64 pixels and a processor without a GPU: 512 features.  The number of
# layers counts convolutions in a row and the classifier.
NARROW = {"narrow_seresnext26": (2, 2, 2, 2), "narrow_seresnext14": (1, 1, 1, 1)}
ARCHITECTURES = (*DEEP, *NARROW)


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
            backbone = timm.create_model(architecture, pretrained=pretrained, num_classes=0, drop_rate=0.0)
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


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line, or what it is called."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
