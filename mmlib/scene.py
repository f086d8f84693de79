"""Scene features of a store's clips: a network fine-tuned on their pictures, a store of what it extracts, kept networks.

What a network is stands in ``scene_network``, how it learns in ``scene_training``; both can be had from here.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmlib.data.images import Images
from mmlib.data.pictures import Decoded, ImageBatch, decode
from mmlib.data.store import ClipStore
from mmlib.data.writer import partial_folder
from mmlib.experiment import fingerprint, torch_device
from mmlib.launch import Launch, launched
from mmlib.records import PACKAGE, cache_folder, claim, clear_partial, library_hash
from mmlib.scene_network import SceneModel, SceneSettings, make_backbone, make_model, settings_for
from mmlib.scene_training import extract, fine_tune, training_clips

__all__ = [
    "SceneModel",
    "SceneRun",
    "SceneSettings",
    "code_hash",
    "decoded_pictures",
    "extract",
    "fetch_or_train",
    "fine_tune",
    "fine_tune_to_store",
    "make_backbone",
    "make_model",
    "occlusion",
    "run_key",
    "settings_for",
    "write_scene_store",
]

DECIDING = (
    "scene.py",
    "scene_network.py",
    "scene_training.py",
    "data/crops.py",
    "data/images.py",
    "data/pictures.py",
    "data/render.py",
)  # beside those of ``runs``
_BLOCK = 2**13  # frames copied at once


def write_scene_store(
    store: ClipStore,
    out: str | Path,
    blocks: Iterable[tuple[ImageBatch, np.ndarray]],
    *,
    provenance: dict,
    keep: Iterable[str] | None = None,
    overwrite: bool = False,
) -> Counter:
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
            hidden[:, :, top : top + patch, left : left + patch] = colour
            drop = whole - model(hidden).gather(1, label[:, None])[:, 0]
            total[:, top : top + patch, left : left + patch] += drop[:, None, None]
            covered[:, top : top + patch, left : left + patch] += 1
    return total / covered


# -- from pictures to a store ---------------------------------------------------------------------------------------


@contextmanager
def decoded_pictures(
    store: ClipStore,
    images: Images,
    settings: SceneSettings,
    run: Launch,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Iterator[Decoded]:
    """Decode the pictures that are trained on, once for all processes of a run, and remove them at the end.

    folder: where to keep them instead for further runs, as in ``decode``; without, they lie in the cache.
    """
    clips = training_clips(store, images)
    path = folder
    if folder is None and run.index == 0:
        (cache_folder() / "decoded").mkdir(parents=True, exist_ok=True)
        path = tempfile.mkdtemp(dir=cache_folder() / "decoded")
    path = run.same(path)
    try:
        with run.orderly():
            if run.index == 0:
                decode(images, path, clips, resize=settings.resize, progress=progress)
            run.same(None)  # the others open what the first one has written
            yield decode(images, path, clips, resize=settings.resize)
            run.same(None)
    finally:
        if folder is None and run.index == 0:
            shutil.rmtree(path, ignore_errors=True)


def fine_tune_to_store(
    store: ClipStore,
    images: Images,
    settings: SceneSettings,
    out: str | Path,
    *,
    seed: int,
    device: str = "auto",
    keep: Iterable[str] | None = None,
    overwrite: bool = False,
    decoded: str | Path | None = None,
    compile_mode: str = "",
    progress: bool = False,
) -> Counter:
    """Fine-tune, extract, and write the store of ``write_scene_store``, whose path is checked first.

    decoded: a folder that keeps decoded pictures for further runs.  compile_mode: as in ``fine_tune``.  Of a launched run
    the first process writes; all return the count.
    """
    said = {"settings": asdict(settings), "seed": seed}
    run = launched(device)
    # The store is opened for writing before the first epoch: hours of training must not end in "exists already".

    def blocks() -> Iterator[tuple[ImageBatch, np.ndarray]]:
        with decoded_pictures(store, images, settings, run, folder=decoded, progress=progress) as pictures:
            model, history = fine_tune(
                store,
                images,
                settings,
                seed=seed,
                device=device,
                decoded=pictures,
                compile_mode=compile_mode,
                progress=progress,
            )
            said["history"] = history
            yield from extract(model, images, settings, seed=seed, decoded=pictures, progress=progress)

    return _first_writes(
        run,
        blocks(),
        lambda found: write_scene_store(store, out, found, provenance=said, keep=keep, overwrite=overwrite),
    )


def _first_writes(run: Launch, blocks: Iterator, write: Callable[[Iterator], Counter]) -> Counter:
    """Let all processes compute blocks and the first one write them; return to all what it returns."""

    def computed() -> Iterator:
        with run.orderly():
            yield from blocks

    if run.index > 0:
        deque(computed(), maxlen=0)
    return run.same(write(computed()) if run.index == 0 else None)


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


def fetch_or_train(
    store: ClipStore,
    images: Images,
    settings: SceneSettings,
    *,
    seed: int,
    device: str = "auto",
    progress: bool = False,
) -> SceneRun:
    """Return the network of these settings, images and seed from the cache, or train it and keep it there.

    Of several runs that ask for it at once, one trains it and the others wait.
    """
    run, folder = launched(device), cache_folder() / "scenes" / run_key(store, images, settings, seed)
    with claim(folder.with_suffix(".lock")) if run.index == 0 else nullcontext():
        if not run.same((folder / "run.json").exists()):  # as the first process has seen it, which holds the claim
            _train_and_keep(store, images, settings, folder, run, seed=seed, device=device, progress=progress)
    said = json.loads((folder / "run.json").read_text())
    model = SceneModel(make_backbone(settings.architecture), len(store.identities)).to(torch_device(device))
    model.load_state_dict(torch.load(folder / "model.pt", map_location="cpu", weights_only=True))
    return SceneRun(folder, settings, model.eval(), said["history"], said["modes"], said["seconds"])


def _train_and_keep(
    store: ClipStore,
    images: Images,
    settings: SceneSettings,
    folder: Path,
    run: Launch,
    *,
    seed: int,
    device: str,
    progress: bool,
) -> None:
    began = time.perf_counter()
    with decoded_pictures(store, images, settings, run, progress=progress) as pictures:
        model, history = fine_tune(
            store, images, settings, seed=seed, device=device, decoded=pictures, progress=progress
        )
        trained = time.perf_counter()

        def write(blocks: Iterator) -> Counter:
            clear_partial(folder)
            with partial_folder(folder, "run.json", overwrite=True) as partial:
                modes = write_scene_store(
                    store, partial / "trained", blocks, provenance={"settings": asdict(settings), "seed": seed}, keep=()
                )
                torch.save(model.state_dict(), partial / "model.pt")
                seconds = {"fine-tune": round(trained - began, 3), "extract": round(time.perf_counter() - trained, 3)}
                said = {"history": history, "modes": modes, "seconds": seconds}
                (partial / "run.json").write_text(json.dumps(said) + "\n")
            return modes

        _first_writes(run, extract(model, images, settings, seed=seed, decoded=pictures), write)


def run_key(store: ClipStore, images: Images, settings: SceneSettings, seed: int) -> str:
    """Hash what decides a network: the store, the images' names and sizes, settings, seed, weights and the code."""
    digest = hashlib.sha256(json.dumps([asdict(settings), seed, fingerprint(store.path), code_hash()]).encode())
    digest.update(images.digest(images.present).encode())
    if settings.weights not in ("", "pretrained") and Path(settings.weights).is_file():
        digest.update(Path(settings.weights).read_bytes())
    return digest.hexdigest()[:20]


@cache
def code_hash() -> str:
    """Hash the modules that decide pictures and networks, comments aside, and the library under them."""
    trees = [ast.dump(ast.parse((PACKAGE / name).read_text())) for name in DECIDING]
    return hashlib.sha256("\n".join([library_hash(), *trees]).encode()).hexdigest()[:12]
