"""Lines on photographs and videos: embed crops; a video to a store, against the same steps a frame at a time.

Networks are of the sizes of those that are used, but not trained; every frame is given one face.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from benchmarks.data import SCALES
from benchmarks.meter import measure
from mmlib.data import detector, faces
from mmlib.data.embedder import MOBILEFACENET, Embedder, MobileFaceNet
from mmlib.threads import one_thread

ROW = np.array([[400, 100, 700, 500, 0.9, 500, 250, 600, 250, 550, 330, 510, 410, 590, 410]], np.float32)
HOW = ("edgenext_x_small", 512, 112, 0.5, 0.5)
MOBILE = (MOBILEFACENET, 128, 112, 0.5, 0.5)


def make_video(folder: str, scale: str, **_) -> dict:
    """Write a video of 1280 x 720 pixels at 30 frames a second, twice, and weights that were not trained."""
    import av

    where, (y, x) = Path(folder, "films", "ann"), np.mgrid[:720, :1280]
    where.mkdir(parents=True)
    picture = np.stack([x / 6, y / 4, (x + y) / 8], -1).astype(np.uint8)
    with av.open(str(where / "0.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for at in range(30 * SCALES[scale].video):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(picture, 4 * at, 1)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    save_file(timm.create_model(HOW[0], num_classes=HOW[1]).state_dict(), Path(folder, "embedder.safetensors"))
    save_file(MobileFaceNet().state_dict(), Path(folder, "mobilefacenet.safetensors"))
    torch.save(detector.RetinaFace().state_dict(), Path(folder, "detector.pth"))
    return {}


def _crops(scale: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SCALES[scale].crops, 112, 112, 3), np.uint8)


def _embedder(folder: str, architecture: str) -> Embedder:
    name, how = ("mobilefacenet", MOBILE) if architecture == MOBILEFACENET else ("embedder", HOW)
    return Embedder(Path(folder, f"{name}.safetensors"), *how)


def embed(folder: str, scale: str, architecture: str = HOW[0], **_) -> dict:
    """Embed crops as `import_faces` does: batches, a thread a core."""
    crops, network = _crops(scale), _embedder(folder, architecture)
    batches = [crops[at : at + faces.BATCH] for at in range(0, len(crops), faces.BATCH)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, one_thread(torch.device("cpu")):
        found = measure(lambda: [*pool.map(network, batches)], repeats=1, warm=0)
    return found | {"work": f"{len(crops):,} crops, {architecture}", "flops": None, "bytes": None}


def embed_singly(folder: str, scale: str, architecture: str = HOW[0], **_) -> dict:
    """Embed the same crops one by one on one thread."""
    crops, network = _crops(scale), _embedder(folder, architecture)
    with one_thread(torch.device("cpu")):
        return measure(lambda: [network(crop[None]) for crop in crops], repeats=1) | {"work": "one by one, one thread"}


def _detect(network, pictures, long):
    for_nothing = detector.detect(network, pictures, long, least=2.0)  # an untrained network finds anything
    return [ROW for _ in for_nothing]


def import_video(folder: str, scale: str, **_) -> dict:
    """Decode, detect, align and embed a video at 8 frames a second."""
    settings = faces.FaceSettings(Path(folder, "embedder.safetensors"), Path(folder, "detector.pth"))
    store = Path(folder, "film")
    with patch.object(faces, "detect", _detect):
        found = measure(lambda: faces.import_faces(Path(folder, "films"), store, settings), repeats=1)
    shutil.rmtree(store)
    seconds = SCALES[scale].video
    work = f"{seconds} s of 720p video, 8 frames a second, to a store"
    return found | {"work": work, "flops": None, "bytes": None}


def import_video_singly(folder: str, scale: str, **_) -> dict:
    """Take the same steps a frame at a time, the networks as they are built, every frame searched at full size."""
    find = detector.load_weights(detector.RetinaFace(), Path(folder, "detector.pth")).eval()
    network = Embedder(Path(folder, "embedder.safetensors"), *HOW)

    def call():
        for frame in faces.read_video(Path(folder, "films", "ann", "0.mp4"), 8):
            rows = _detect(find, [frame], 640)[0]
            network(detector.align(frame, rows[:, 5:].reshape(-1, 5, 2), 112))

    return measure(call, repeats=1) | {"work": "a frame at a time"}
