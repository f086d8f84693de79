"""Time fine-tuning and extraction of the scene network on random pictures that are decoded already.

    python -m benchmarks.scene [--architecture NAME] [--batch 40 256] [--images 8192] [--compile-mode default]

Pictures take the way of any others: files without compression, cut by loading processes, bytes to the device.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from mmlib.data.images import Images
from mmlib.data.store import ClipStore
from mmlib.scene import ARCHITECTURES, DEEP, SceneModel, make_model, settings_for
from mmlib.scene_training import extract, fine_tune, launched

EPOCHS = 2  # timed, of training


def measure(
    *,
    architecture: str = "",
    size: int = 0,
    images: int = 0,
    batches: tuple[int, ...] = (),
    device: str = "auto",
    compile_mode: str = "",
) -> list[dict]:
    """Return rows of what, seconds, images, images_per_s, flops and bytes: training by size of batch, and extraction.

    Unless given: on a GPU an SE-ResNeXt-50 at 224 pixels, 8,192 pictures, batches of 40 as described and of 256;
    without one the narrow network of 26 layers at its 56 pixels, 192 pictures.  flops: counted, two a multiplication
    with its addition.  bytes: those of pixels, parameters (in training with gradients and momentum, at every step) and
    features, each as often as it must be read or written; what lies between the layers is left out.
    """
    run = launched(device, compile_mode=compile_mode)
    gpu = run.device.type == "cuda"
    settings = settings_for(architecture or (DEEP[0] if gpu else "narrow_seresnext26"))
    if size:
        settings = replace(settings, size=size, resize=round(size * settings.resize / settings.size))
    images = images or (8192 if gpu else 192)
    identities = 10_034 if settings.architecture in DEEP else 60
    with tempfile.TemporaryDirectory() as folder:
        store, listed = random_pictures(Path(folder), images, identities, settings.resize)

        def train(batch: int, epochs: int) -> SceneModel:
            model = make_model(settings, identities, seed=0)
            fine_tune(model, store, listed, replace(settings, batch=batch, epochs=epochs), run, seed=0, watch=0)
            return model

        rows = []
        model = make_model(settings, identities, seed=0).to(run.device, memory_format=torch.channels_last)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        pixels = 3 * settings.size**2
        forward, both = flops(model, settings.size)
        for batch in batches or ((settings.batch, 256) if gpu else (settings.batch,)):
            train(batch, 1)  # what is done once: kernels chosen, pages read
            once, more = (_seconds(partial(train, batch, epochs)) for epochs in (1, 1 + EPOCHS))
            seconds = more - once  # without the making of the network
            steps = EPOCHS * max(1, round(images / batch))
            # Weights twice, gradients twice, momentum twice, the new weights.
            rows.append(
                _row(
                    f"{settings.architecture} at {settings.size}, training, batch {batch}",
                    seconds,
                    EPOCHS * images,
                    both,
                    EPOCHS * images * pixels + steps * 7 * 4 * parameters,
                )
            )
        if compile_mode:
            model.features = torch.compile(model.features, mode=compile_mode, dynamic=False)

        def extract_all() -> int:
            return sum(len(feature) for _, feature in extract(model, listed, settings, seed=0, run=run))

        extract_all()
        rows.append(
            _row(
                f"{settings.architecture} at {settings.size}, extraction",
                _seconds(extract_all),
                images,
                forward,
                images * (pixels + 2 * model.prototype.shape[1]) + 4 * parameters,
            )
        )
    return rows


def random_pictures(folder: Path, images: int, identities: int, side: int) -> tuple[ClipStore, Images]:
    """Write a store of train clips, and one picture each as ``images.decode`` leaves it, square and of random bytes."""
    rng = np.random.default_rng(0)
    names = tuple(f"{number:06d}" for number in range(images))
    with ClipStore.create(folder / "store", simulated=True, provenance={"by": "benchmarks.scene"}) as writer:
        table = pd.DataFrame({"clip": names, "split": "train", "identity": rng.integers(0, identities, images)})
        writer.finish(table, [str(identity) for identity in range(identities)], {})
    for name in names:
        (folder / name).mkdir()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / name / "1.ppm")
    return ClipStore.open(folder / "store"), Images(folder, names, (("1.ppm",),) * images, 0, 0)


def flops(model: SceneModel, size: int) -> tuple[int, int]:
    """Return the operations that a picture takes: features alone, and a step of training, the updates left out."""
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=model.prototype.device)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.eval().features(pixels)
    with FlopCounterMode(display=False) as both:
        model.train()(pixels).sum().backward()
    model.zero_grad(set_to_none=True)
    return forward.get_total_flops() // 2, both.get_total_flops() // 2


def _seconds(call) -> float:
    began = time.perf_counter()
    call()  # ends with numbers on the processor, so nothing is under way
    return time.perf_counter() - began


def _row(what: str, seconds: float, images: int, each: int, size: int) -> dict:
    return {
        "what": what,
        "seconds": seconds,
        "images": images,
        "images_per_s": images / seconds,
        "flops": images * each,
        "bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="")
    parser.add_argument("--size", type=int, default=0, help="side of the crop in pixels")
    parser.add_argument("--images", type=int, default=0, help="pictures an epoch")
    parser.add_argument("--batch", type=int, nargs="+", default=[], dest="batches")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile-mode", default="", help="of torch.compile, such as default; none if empty")
    for row in measure(**vars(parser.parse_args())):
        print(
            f"{row['what']}: {row['images_per_s']:,.3g} images/s ({row['images']:,} in {row['seconds']:.2f} s), "
            f"{row['flops'] / row['seconds'] / 1e9:,.0f} GFLOP/s, {row['bytes'] / row['seconds'] / 1e6:,.0f} MB/s"
        )


if __name__ == "__main__":
    main()
