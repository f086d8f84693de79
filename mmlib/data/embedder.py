"""Networks that take aligned faces: an embedding of each, and a quality score."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from mmlib.data.detector import load_weights, need


class Embedder:
    """Embed faces: crops (n, S, S, 3) uint8, RGB, to (n, D) float32 as the network gives them, not normalised.

    weights: safetensors, or a file of torch's that `weights_only` reads, of timm's `architecture` with `width` outputs,
    or an ONNX file.  The network takes pixels in [0, 1] less `mean`, over `std`.
    """

    def __init__(self, weights: Path, architecture: str, width: int, size: int, mean: float, std: float):
        self.mean, self.std = mean, std
        if weights.suffix.lower() == ".onnx":
            self.graph: _Graph | None = _Graph(weights, "readNetFromONNX")
        else:
            self.graph = None
            try:
                network = timm.create_model(architecture, num_classes=width)
            except Exception as error:  # an unknown name, or one that takes no number of classes
                raise ValueError(f"architecture {architecture!r}: not one of timm's ({error})") from None
            self.network = load_weights(network, weights).eval().to(memory_format=torch.channels_last)
        try:
            shape = self(np.zeros((1, size, size, 3), np.uint8)).shape
        except Exception as error:  # whatever a layer says of a size that it cannot take
            raise ValueError(f"{weights}: takes no pictures of {size} x {size} pixels ({error})") from None
        if shape != (1, width):
            raise ValueError(f"{weights}: makes {shape} of one face, not (1, {width})")

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
        self.graph = _Graph(graph, "readNetFromTensorflow")

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        blob = need("cv2").dnn.blobFromImages([*crops], 1 / 128, (96, 96), (128, 128, 128), swapRB=True)
        return self.graph(blob).reshape(len(crops)).astype(np.float64)


class _Graph:
    """A network that OpenCV runs, which keeps its input: one thread at a time."""

    def __init__(self, path: Path, read: str):
        if not path.is_file():
            raise ValueError(f"{path}: no such file of weights")
        cv2 = need("cv2")
        try:
            self.net: Any = getattr(cv2.dnn, read)(str(path))
        except cv2.error as error:
            raise ValueError(f"{path}: not a network that OpenCV reads ({error.err})") from None
        self.lock = threading.Lock()

    def __call__(self, blob: np.ndarray) -> np.ndarray:
        with self.lock:
            self.net.setInput(blob)
            return self.net.forward()
