"""Lines on networks: what extracting features from pictures costs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.data import SCALES
from benchmarks.meter import measure, peak_memory, reset_peak
from mmlib.scene import make_model, settings_for


def forward(folder: str, scale: str, device: str, architecture: str, size: int, **_) -> dict:
    """Pass pictures through a network that was not trained, on a GPU in bfloat16.

    Bytes: pixels, features and every parameter once; what lies between the layers is left out.
    """
    images = SCALES[scale].images * (16 if device == "cuda" else 1)
    network = make_model(settings_for(architecture), 1, seed=0).backbone.eval()
    network = network.to(device, memory_format=torch.channels_last)
    pixels = torch.randn(images, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def call():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return network(pixels)

    counter = FlopCounterMode(display=False)
    with counter:
        feature = call()
    found = measure(call, warm=1, device=device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return found | {
        "work": f"{images} pictures of {size} pixels through {architecture}",
        "images": images,
        "flops": counter.get_total_flops(),
        "bytes": 4 * (pixels.numel() + feature.numel() + parameters),
    }


def scene(device: str, scale: str, **_) -> dict:
    """Return the rows of ``benchmarks.scene``: training and extraction; memory is the peak of all of them together."""
    from benchmarks.scene import measure as measure_scene

    before, cuda = reset_peak(), device == "cuda"
    found = measure_scene(**({"images": 32} if scale == "tiny" else {}))
    memory, on_gpu = peak_memory() - before, torch.cuda.max_memory_allocated() if cuda else None
    return {
        "rows": [
            {
                "name": f"scene, {row['what']}",
                "work": f"{row['images']} pictures: {row['what']}",
                "seconds": [row["seconds"]],
                "images": row["images"],
                "flops": row["flops"],
                "bytes": row["bytes"],
                "memory": memory,
                "device_memory": on_gpu,
                "precision": "bf16" if cuda else "fp32",
            }
            for row in found
        ]
    }
