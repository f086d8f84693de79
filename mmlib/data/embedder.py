"""Networks that take aligned faces: an embedding of each, and a quality score."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from mmlib.data.detector import Graph, fuse, load_weights, need

MOBILEFACENET = "mobilefacenet"
# Bottlenecks of MobileFaceNet, table 1 of its paper: expansion, width, how many, stride of the first.
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


def _conv(wide: int, out: int, size: int | tuple, stride: int = 1, groups: int = 1, slopes: bool = True) -> list:
    padding = size // 2 if isinstance(size, int) else 0
    layers = [nn.Conv2d(wide, out, size, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(out)]
    return [*layers, nn.PReLU(out)] if slopes else layers


def _named(layers: list) -> nn.Sequential:
    return nn.Sequential(OrderedDict(zip(("conv", "bn", "prelu"), layers)))


class _Bottleneck(nn.Module):
    """Widen, filter each channel, narrow; added to what came in where the shape is the same."""

    def __init__(self, wide: int, out: int, stride: int, expansion: int):
        super().__init__()
        inner = wide * expansion
        narrow = _conv(inner, out, 1, slopes=False)
        self.conv = nn.Sequential(*_conv(wide, inner, 1), *_conv(inner, inner, 3, stride, inner), *narrow)
        self.residual = stride == 1 and wide == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileFaceNet(nn.Module):
    """Embed faces in 128 dimensions (Chen et al., CCBR 2018), of 112 pixels by the middle 96 of 112.

    Layers have the names of github.com/Xiaoccer/MobileFaceNet_Pytorch, whose `068.ckpt` it loads.
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.dw_conv1 = _named(_conv(3, 64, 3, 2)), _named(_conv(64, 64, 3, groups=64))
        self.blocks, wide = nn.Sequential(), 64
        for expansion, out, number, stride in BOTTLENECKS:
            for at in range(number):
                self.blocks.append(_Bottleneck(wide, out, 1 if at else stride, expansion))
                wide = out
        self.conv2 = _named(_conv(wide, 512, 1))
        self.linear7 = _named(_conv(512, 512, (7, 6), groups=512, slopes=False))
        self.linear1 = _named(_conv(512, 128, 1, slopes=False))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, 128) of pictures (B, 3, 112, 112), red first, in [-1, 1]; it learned (x - 127.5) / 128."""
        x = self.dw_conv1(self.conv1(pixels[..., 8:104] * (127.5 / 128)))
        return self.linear1(self.linear7(self.conv2(self.blocks(x)))).flatten(1)


class Embedder:
    """Embed faces: crops (n, S, S, 3) uint8, RGB, to (n, D) float32 as the network gives them, not normalised.

    weights: safetensors, or a file of torch's that `weights_only` reads, of timm's `architecture` with `width` outputs
    or of "mobilefacenet", or an ONNX file.  The network takes pixels in [0, 1] less `mean`, over `std`.
    """

    def __init__(self, weights: Path, architecture: str, width: int, size: int, mean: float, std: float):
        self.mean, self.std = mean, std
        if weights.suffix.lower() == ".onnx":
            self.graph: Graph | None = Graph(weights, "readNetFromONNX")
        else:
            self.graph = None
            own = architecture == MOBILEFACENET
            try:
                network = MobileFaceNet() if own else timm.create_model(architecture, num_classes=width)
            except Exception as error:  # an unknown name, or one that takes no number of classes
                raise ValueError(f"architecture {architecture!r}: not one of timm's ({error})") from None
            network = load_weights(network, weights).eval()
            self.network = (fuse(network) if own else network).to(memory_format=torch.channels_last)
        try:
            shape = self(np.zeros((1, size, size, 3), np.uint8)).shape
        except Exception as error:  # whatever a layer says of a size that it cannot take
            raise ValueError(f"{weights}: takes no pictures of {size} x {size} pixels ({error})") from None
        if shape != (1, width):
            raise ValueError(f"{weights}: makes {shape} of one face, not (1, {width}); --width says how many numbers")

    @torch.inference_mode()
    def __call__(self, crops: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std)
        if self.graph:
            return self.graph(pixels.contiguous().numpy())
        return self.network(pixels).float().numpy()


class Quality:
    """Score faces (n, S, S, 3) uint8, RGB, by LightQNet: (n,) in [0, 1], higher is better.

    Chen et al., Pattern Recognition Letters 2021; the frozen graph of github.com/KaenChan/lightqnet, which its demo
    gives 96 pixels a side, blue first, less 128, over 128.
    """

    def __init__(self, graph: Path):
        self.graph = Graph(graph, "readNetFromTensorflow")

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        blob = need("cv2").dnn.blobFromImages([*crops], 1 / 128, (96, 96), (128, 128, 128), swapRB=True)
        return self.graph(blob).reshape(len(crops)).astype(np.float64)
