"""The scene network: an SE-ResNeXt as described by the One Name team, what decides one, and where its weights come from.

Only this module knows timm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
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
    chosen = {} if architecture in DEEP else {"size": 56, "resize": 64, "batch": 32}
    if not weights:
        chosen |= {"backbone_lr": 0.05}
    return SceneSettings(architecture, weights, **chosen | overrides)


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
        backbone = ResNet(
            Bottleneck,
            NARROW[architecture],
            num_classes=0,
            cardinality=8,
            base_width=8,
            channels=(16, 32, 64, 128),
            block_args={"attn_layer": "se"},
            zero_init_last=False,
        )
    else:
        try:
            backbone = timm.create_model(architecture, pretrained=pretrained, num_classes=0)
        except Exception as error:  # whatever a download may raise: connection, hub, checksum, disk
            if not pretrained:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"weights: cannot download those of {architecture} ({reason}); "
                "give the path of a file instead, or none to start from scratch"
            ) from None
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
            raise ValueError(
                f"weights {path}: not of {architecture}: {key} is {tuple(state[key].shape)}, "
                f"expected {tuple(value.shape)}"
            )
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
        """Return cosines (B, C), float32 also under autocast: the scale would make a loss of their rounding."""
        feature = self.features(pixels).float()
        with torch.autocast(feature.device.type, enabled=False):
            return F.normalize(feature, dim=1) @ F.normalize(self.prototype, dim=1).T


def make_model(settings: SceneSettings, identities: int, *, seed: int) -> SceneModel:
    """Make the network as it is before it is fine-tuned; what is random in it comes from ``seed``."""
    torch.manual_seed(seed)
    return SceneModel(make_backbone(settings.architecture, settings.weights), identities)
