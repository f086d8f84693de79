"""Where the faces of a picture are, with their eyes, noses and mouths (RetinaFace, UltraFace), and crops by them."""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

PACKAGES = {"av": "PyAV (av)", "cv2": "opencv-python-headless"}  # of the extra `faces`
# Where the eyes, the nose and the mouth's corners of an aligned face are, of 112 pixels a side (ArcFace).
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
# Where they are in a box of UltraFace, as shares of its sides: medians over frames of YouTube Faces, made symmetric.
BOXED = ((0.26, 0.415), (0.74, 0.415), (0.5, 0.61), (0.31, 0.767), (0.69, 0.767))
OVERLAP = 0.3  # of two boxes, intersection over union, from which on they are of one face
ANCHORS = {8: (16, 32), 16: (64, 128), 32: (256, 512)}  # sides in pixels, by stride
VARIANCE = (0.1, 0.2)  # of the offsets of places, of the logarithms of sides
MEAN = (123, 117, 104)  # of red, green and blue
STAGES = {  # width and stride of the layers of the backbone
    "stage1": ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)),
    "stage2": ((128, 2), *[(128, 1)] * 5),
    "stage3": ((256, 2), (256, 1)),
}


def _conv(wide: int, out: int, size: int = 3, stride: int = 1, slope: float = 0.1, groups: int = 1) -> list[nn.Module]:
    layers = [nn.Conv2d(wide, out, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(out)]
    return [*layers, nn.LeakyReLU(slope, inplace=True)] if slope < 1 else layers


class _Context(nn.Module):
    """Convolutions of 3, 5 and 7 pixels side by side (SSH: Najibi et al., ICCV 2017)."""

    def __init__(self, wide: int):
        super().__init__()
        half, part = wide // 2, wide // 4
        self.conv3X3 = nn.Sequential(*_conv(wide, half, slope=1))
        self.conv5X5_1, self.conv5X5_2 = nn.Sequential(*_conv(wide, part)), nn.Sequential(*_conv(part, part, slope=1))
        self.conv7X7_2, self.conv7x7_3 = nn.Sequential(*_conv(part, part)), nn.Sequential(*_conv(part, part, slope=1))

    def forward(self, x: Tensor) -> Tensor:
        five = self.conv5X5_1(x)
        return F.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(five), self.conv7x7_3(self.conv7X7_2(five))], 1))


class RetinaFace(nn.Module):
    """Score anchors of pictures, with MobileNetV1 of a quarter of its width as backbone (Deng et al., CVPR 2020).

    Layers have the names of github.com/biubug6/Pytorch_Retinaface, whose `mobilenet0.25_Final.pth` it loads.
    """

    def __init__(self):
        super().__init__()
        self.body, self.fpn, wide = nn.ModuleDict(), nn.ModuleDict(), 8
        for number, (stage, layers) in enumerate(STAGES.items(), 1):
            self.body[stage] = nn.Sequential(*[nn.Sequential(*_conv(3, wide, stride=2))] * (number == 1))
            for out, stride in layers:
                depthwise = _conv(wide, wide, 3, stride, groups=wide)
                self.body[stage].append(nn.Sequential(*depthwise, *_conv(wide, out, 1)))
                wide = out
            self.fpn[f"output{number}"] = nn.Sequential(*_conv(wide, 64, 1))
        self.fpn["merge1"], self.fpn["merge2"] = nn.Sequential(*_conv(64, 64)), nn.Sequential(*_conv(64, 64))
        self.ssh1, self.ssh2, self.ssh3 = _Context(64), _Context(64), _Context(64)
        for head, numbers in (("ClassHead", 2), ("BboxHead", 4), ("LandmarkHead", 10)):  # of each of two anchors
            convs = [nn.ModuleDict({"conv1x1": nn.Conv2d(64, 2 * numbers, 1)}) for _ in ANCHORS]
            self.add_module(head, nn.ModuleList(convs))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return of pictures (B, 3, H, W), blue first, scores (B, A), boxes (B, A, 4) and points (B, A, 10)."""
        one = self.body["stage1"](pixels)
        two = self.body["stage2"](one)
        three = self.fpn["output3"](self.body["stage3"](two))
        two = self.fpn["output2"](two)
        two = self.fpn["merge2"](two + F.interpolate(three, size=two.shape[2:]))
        one = self.fpn["output1"](one)
        one = self.fpn["merge1"](one + F.interpolate(two, size=one.shape[2:]))
        levels = [self.ssh1(one), self.ssh2(two), self.ssh3(three)]

        def read(head: Any, numbers: int) -> Tensor:
            maps = (part["conv1x1"](x).permute(0, 2, 3, 1) for part, x in zip(head, levels))
            return torch.cat([each.reshape(len(pixels), -1, numbers) for each in maps], 1)

        return read(self.ClassHead, 2).softmax(-1)[..., 1], read(self.BboxHead, 4), read(self.LandmarkHead, 10)


SUFFIXES = {"readNetFromONNX": ".onnx", "readNetFromTensorflow": ".pb"}


class Graph:
    """A network that OpenCV runs, which keeps its input: one thread at a time."""

    def __init__(self, path: Path, read: str):
        if not path.is_file():
            raise ValueError(f"{path}: no such file of weights")
        if path.suffix.lower() != (kind := SUFFIXES[read]):  # OpenCV does not always survive another kind of file
            raise ValueError(f"{path}: not a {kind} file, which is what OpenCV reads here")
        cv2 = need("cv2")
        try:
            self.net: Any = getattr(cv2.dnn, read)(str(path))
        except cv2.error as error:
            raise ValueError(f"{path}: not a network that OpenCV reads ({error.err})") from None
        self.lock = threading.Lock()

    def __call__(self, blob: np.ndarray, *outputs: str) -> Any:
        with self.lock:
            self.net.setInput(blob)
            return self.net.forward(outputs) if outputs else self.net.forward()


class UltraFace:
    """Find boxes of faces, of pictures at 320 x 240 pixels: `version-RFB-320.onnx` of its repository.

    github.com/Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB, which gives no points: `BOXED` stands for them.
    """

    def __init__(self, path: Path):
        self.graph = Graph(path, "readNetFromONNX")
        if {*self.graph.net.getUnconnectedOutLayersNames()} != {"scores", "boxes"}:
            raise ValueError(f"{path}: of another architecture: it makes no scores and boxes, as UltraFace does")

    def __call__(self, pictures: list[np.ndarray], least: float) -> list[np.ndarray]:
        """Find faces as `detect` does."""
        if not pictures:  # of which OpenCV makes no batch
            return []
        cv2, sides, canvases = need("cv2"), [], []
        for picture in pictures:  # grey at the right and below makes it 4 : 3
            height, width = picture.shape[:2]
            sides.append([max(width, height * 4 / 3), max(height, width * 3 / 4)])
            wide, high = (max(1, round(side * 320 / sides[-1][0])) for side in (width, height))
            canvases.append(np.full((240, 320, 3), 127, np.uint8))
            canvases[-1][:high, :wide] = cv2.resize(picture, (wide, high), interpolation=cv2.INTER_AREA)
        blob = cv2.dnn.blobFromImages(canvases, 1 / 128, (320, 240), (127, 127, 127))
        found = []
        for score, box, side in zip(*self.graph(blob, "scores", "boxes"), np.array(sides)):
            best = np.flatnonzero(score[:, 1] >= least)
            best = best[(-score[best, 1]).argsort(kind="stable")]
            corners = box[best].reshape(-1, 2, 2) * side
            kept = _suppress(corners.reshape(-1, 4))
            corners, score = corners[kept], score[best[kept], 1]
            points = corners[:, :1] + np.array(BOXED) * (corners[:, 1:] - corners[:, :1])
            row = np.concatenate([corners.reshape(-1, 4), score[:, None], points.reshape(-1, 10)], 1)
            found.append(row.astype(np.float32))
        return found


Detector = nn.Module | UltraFace


def load_detector(path: Path) -> Detector:
    """Load RetinaFace's weights, or UltraFace, an ONNX file."""
    return UltraFace(path) if path.suffix.lower() == ".onnx" else fuse(load_weights(RetinaFace(), path))


def fuse(network: nn.Module) -> nn.Module:
    """Make every batch norm part of the convolution before it: they take a quarter of the time."""
    network.eval()
    for block in network.modules():
        if isinstance(block, nn.Sequential):
            for (name, conv), (after, norm) in pairwise(list(block.named_children())):
                if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d:  # subclasses do more
                    setattr(block, name, fuse_conv_bn_eval(conv, norm))
                    setattr(block, after, nn.Identity())
    return network.to(memory_format=torch.channels_last)


@torch.inference_mode()
def detect(network: Detector, pictures: list[np.ndarray], long: int, *, least: float = 0.5) -> list[np.ndarray]:
    """Find the faces of pictures (h, w, 3) uint8, RGB, of any sizes: of each an array (n, 15), best first.

    A row has the box x1, y1, x2, y2, the score, at least `least`, and x, y of five points: the eyes, left of the
    picture first, nose, mouth corners; in pixels of the picture.  Of boxes that overlap by more than `OVERLAP`,
    intersection over union, the best is kept.  long: pixels of the longer side in which RetinaFace looks for faces.
    """
    if isinstance(network, UltraFace):
        return network(pictures, least)
    fitted = [_fit(picture, long) for picture in pictures]
    found = [np.empty((0, 15), np.float32) for _ in pictures]
    for shape in {canvas.shape for canvas, *_ in fitted}:
        alike = [at for at, (canvas, *_) in enumerate(fitted) if canvas.shape == shape]
        pixels = torch.from_numpy(np.stack([fitted[at][0] for at in alike]))
        centred = (pixels.float() - torch.tensor(MEAN)).flip(-1).permute(0, 3, 1, 2)  # channels last in memory
        anchors = _anchors(*shape[:2])
        for at, score, box, points in zip(alike, *network(centred)):
            best = torch.nonzero(score >= least)[:, 0]
            best = best[score[best].argsort(descending=True)]
            centre, side = anchors[best].split([2, 1], 1)
            middle = centre + VARIANCE[0] * side * box[best, :2]
            half = side * torch.exp(VARIANCE[1] * box[best, 2:]) / 2
            place = centre[:, None] + VARIANCE[0] * side[:, None] * points[best].view(-1, 5, 2)
            places = torch.cat([torch.stack([middle - half, middle + half], 1), place], 1).numpy()
            kept = _suppress(places[:, :2].reshape(-1, 4))
            _, scale, corner = fitted[at]
            places = ((places[kept] - corner) / scale).reshape(-1, 14)
            found[at] = np.insert(places, 4, score[best].numpy()[kept], axis=1).astype(np.float32)
    return found


def _fit(picture: np.ndarray, long: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale a picture to `long` pixels and centre it on grey whose sides 64 divides; return scale and corner too.

    Where a face lies on the network's strides moves its points, by some per cent of the distance of the eyes.
    """
    cv2, (height, width) = need("cv2"), picture.shape[:2]
    wide, high = (max(1, round(side * long / max(height, width))) for side in (width, height))
    canvas = np.full((-(-high // 64) * 64, -(-wide // 64) * 64, 3), MEAN[1], np.uint8)
    top, left = (canvas.shape[0] - high) // 2, (canvas.shape[1] - wide) // 2
    canvas[top : top + high, left : left + wide] = cv2.resize(picture, (wide, high), interpolation=cv2.INTER_AREA)
    return canvas, np.array([wide / width, high / height]), np.array([left, top])


def _anchors(height: int, width: int) -> Tensor:
    """Return the anchors (A, 3) of a picture, x and y of the centre and side in pixels, in the network's order."""
    levels = []
    for stride, sides in ANCHORS.items():
        y, x = ((torch.arange(-(-side // stride)) + 0.5) * stride for side in (height, width))
        y, x, side = torch.meshgrid(y, x, torch.tensor(sides, dtype=torch.float32), indexing="ij")
        levels.append(torch.stack([x, y, side], -1).view(-1, 3))
    return torch.cat(levels)


def _suppress(boxes: np.ndarray) -> list[int]:
    """Return the places of boxes (n, 4), best first, that overlap no better one by more than `OVERLAP`."""
    area, kept, rest = np.prod(boxes[:, 2:] - boxes[:, :2], 1), [], np.arange(len(boxes))
    while len(rest):
        at, rest = rest[0], rest[1:]
        shared = np.minimum(boxes[rest, 2:], boxes[at, 2:]) - np.maximum(boxes[rest, :2], boxes[at, :2])
        shared = np.prod(shared.clip(0), 1)
        rest = rest[shared <= OVERLAP * (area[rest] + area[at] - shared)]
        kept.append(int(at))
    return kept


def align(picture: np.ndarray, points: np.ndarray, size: int, which: Sequence[int] = (0, 1, 2, 3, 4)) -> np.ndarray:
    """Cut faces out of a picture (h, w, 3) by their points (n, 5, 2): (n, S, S, 3), bilinear, black outside.

    The similarity that brings the points nearest to `TEMPLATE`, or to `which` of it, (Umeyama, 1991) is a product and a
    sum of complex numbers, fitted by least squares.
    """
    cv2 = need("cv2")
    source, target = points.astype(float) @ [1, 1j], np.array(TEMPLATE)[[*which]] @ [1, 1j] * (size / 112)
    middle = source.mean(1, keepdims=True)
    spread = np.square(abs(source - middle)).sum(1).clip(1e-9)
    turn = np.conj(source - middle) @ (target - target.mean()) / spread
    crops = np.empty((len(points), size, size, 3), np.uint8)
    for crop, a, b in zip(crops, turn, target.mean() - turn * middle[:, 0]):
        matrix = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
        crop[:] = cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_LINEAR)
    return crops


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Load a state dict, safetensors or what torch's `weights_only` reads, into a network of the same architecture.

    Linear layers whose weights are int8 (torch's dynamic quantisation) are loaded as numbers.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file of weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that quantised tensors are an old kind
            state = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
        state = _as_numbers(state.get("net_state_dict", state))
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("no state dict, which maps names to tensors")
    except Exception as error:  # unpickling may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a readable file of weights ({reason})") from None
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: of another architecture: {' '.join(str(error).split())[:200]} ...") from None
    return network


def _as_numbers(state: dict) -> dict:
    """Return a state dict in which weights are numbers: of a quantised one each packed layer's weight and bias."""
    packed = "._packed_params._packed_params"
    if not any(name.endswith(packed) for name in state):
        return state
    plain = {}
    for name, value in state.items():
        name = name.removeprefix("model.")
        if name.endswith(packed):
            stem, (weight, bias) = name.removesuffix(packed), value
            plain[f"{stem}.weight"] = weight.dequantize()
            if bias is not None:
                plain[f"{stem}.bias"] = bias.data
        elif not name.endswith((".scale", ".zero_point", "._packed_params.dtype")):
            plain[name] = value
    return plain


def need(module: str) -> Any:
    """Import a package of the extra `faces`."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{PACKAGES[module]} is not installed: pip install -e .[faces]") from None
