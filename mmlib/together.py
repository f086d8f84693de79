"""Models of one shape trained as one: their parameters stacked, one batched pass for all of them.

A small network leaves a GPU idle between launches, and sixteen of them trained one after another leave it idle sixteen
times as long.  ``torch.func.vmap`` turns every product of the network into one product for all members.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from mmlib.models import Dropout, IdentityModel


class Together:
    """Hold M models that differ in their numbers only, as one trainable body; a single model stays as it is.

    parameters: leaves for an optimiser by name, those of M models stacked, (M, ...).  Until ``finish`` the models
    themselves do not change.
    """

    def __init__(self, models: list[IdentityModel]):
        shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError("models that are trained together must have the same parameters, of the same shapes")
        self.models = [model.train() for model in models]
        self._drops = [{name: layer for name, layer in model.named_modules() if isinstance(layer, Dropout)}
                       for model in models]
        self.parameters, self._buffers = dict(models[0].named_parameters()), {}
        if len(models) > 1:
            self.parameters, self._buffers = stack_module_state(models)

    def loss(self, inputs: tuple, label: Tensor, loss: Callable[[Tensor, Tensor], Tensor],
             generators: list[torch.Generator]) -> Tensor:
        """Return the loss of every model, (M,): ``loss`` of its cosines (B, C) and its labels, (B,) of (M, B).

        inputs: of ``IdentityModel``, with M in front.  generators: of the dropout masks, one a model.  On a GPU the
        models run in bfloat16.
        """
        masks = {f"{name}.keep": torch.stack([layers[name].draw(label.shape[1], generator)
                                              for layers, generator in zip(self._drops, generators)])
                 for name in self._drops[0]}

        def one(parameters: dict, buffers: dict, inputs: tuple, label: Tensor) -> Tensor:
            with torch.autocast(label.device.type, dtype=torch.bfloat16, enabled=label.device.type == "cuda"):
                cosine = functional_call(self.models[0], (parameters, buffers), inputs)
            return loss(cosine, label)

        if len(self.models) > 1:
            given = tuple(None if value is None else 0 for value in inputs)
            return vmap(one, (0, 0, given, 0))(self.parameters, self._buffers | masks, inputs, label)
        *frames, contexts = inputs
        frames = [None if value is None else value[0] for value in frames]
        contexts = {name: tuple(value[0] for value in pair) for name, pair in contexts.items()}
        return one({}, {name: mask[0] for name, mask in masks.items()}, (*frames, contexts), label[0])[None]

    @torch.no_grad()
    def finish(self) -> None:
        """Give the models what they have learned, and leave them in eval mode."""
        for place, model in enumerate(self.models):
            if len(self.models) > 1:
                for name, value in [*model.named_parameters(), *model.named_buffers()]:
                    if not name.endswith(".keep"):
                        value.copy_((self.parameters | self._buffers)[name][place])
            model.eval()
