"""The processes of a run that ``accelerate launch`` or ``torchrun`` started, one a GPU; any other run is one process.

Whoever computes takes its share, all of them get the same sums, and the first one writes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmlib.experiment import torch_device

_PATIENCE = timedelta(hours=12)  # others wait while the first process decodes or writes


@dataclass(frozen=True)
class Launch:
    """This process among those of its run: number ``index`` of ``count``, with a device of its own.

    What it does with others has to be done by all of them, in the same order.
    """

    index: int
    count: int
    device: torch.device

    def share(self, items: np.ndarray) -> np.ndarray:
        """Return this process's part of ``items`` (n,): parts are consecutive and differ by one in size at most."""
        return np.array_split(items, self.count)[self.index]

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of every process's ``value``."""
        return value if self.count == 1 else _accelerator(self.device.type).reduce(value, "sum")

    def gather(self, item: Any) -> list:
        """Return every process's ``item`` in their order, to the first process; to the others an empty list."""
        if self.count == 1:
            return [item]
        found = [None] * self.count if self.index == 0 else None
        torch.distributed.gather_object(item, found, group=_objects(self.device.type))
        return found or []

    def same(self, item: Any) -> Any:
        """Return the first process's ``item`` to all of them."""
        if self.count == 1:
            return item
        box = [item]
        torch.distributed.broadcast_object_list(box, group=_objects(self.device.type))
        return box[0]

    def average_gradients(self, model: nn.Module) -> nn.Module:
        """Return the model such that a backward pass leaves the mean of every process's gradients in each of them.

        Parameters and buffers become those of the first process.
        """
        return model if self.count == 1 else _accelerator(self.device.type).prepare_model(model)

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """Let an error in the block clear away undisturbed: a launcher stops all processes as soon as one has failed."""
        try:
            yield
        except BaseException:
            if self.count > 1 and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of the first one, such as running statistics of its share of the batches."""
        if self.count > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)


def launched(device: str = "auto") -> Launch:
    """Return this process among those of its run; device as in ``torch_device``, of which each process gets one."""
    at, asked = torch_device(device), int(os.environ.get("WORLD_SIZE", 1))
    if asked == 1:
        return Launch(0, 1, at)
    accelerator = _accelerator(at.type)
    if accelerator.num_processes != asked or accelerator.device.type != at.type:
        raise ValueError(
            f"WORLD_SIZE is {asked}, but there are {accelerator.num_processes} processes "
            f"on {accelerator.device.type}: start them with accelerate launch or torchrun"
        )
    return Launch(accelerator.process_index, asked, accelerator.device)


@cache
def _accelerator(kind: str):
    from accelerate import Accelerator, InitProcessGroupKwargs  # half a second that one process need not wait

    return Accelerator(cpu=kind == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])


@cache
def _objects(kind: str):
    """Return the group that passes Python objects: by way of the processors, and it fails as soon as a process has."""
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE) if kind == "cuda" else None
