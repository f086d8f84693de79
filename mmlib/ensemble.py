"""Members of an ensemble: what each of them sees, how much they differ, and their training in one batched pass.

Four kinds.  ``views``: every member discards one contiguous block of the feature space, the proposal of One Name (Dong
et al., ACM MM 2019).  ``bagging``: a bootstrap of the training clips (Breiman 1996), which loses identities of few
clips.  ``stratified``: one within every identity, which loses none.  ``seeds``: the same clips and features, another
order, other frames and other dropout.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from mmlib.experiment import KINDS
from mmlib.models import Dropout, IdentityModel


def member_clips(kind: str, clips: np.ndarray, identity: np.ndarray, *, seed: int, member: int) -> np.ndarray:
    """Return the training clips of a member, with repeats under bagging; clips (n,) and their identities (n,)."""
    if kind not in KINDS:
        raise ValueError(f"ensemble must be one of {', '.join(KINDS)}, got {kind!r}")
    rng = np.random.default_rng([seed, member, 4])
    if kind == "bagging":
        return np.sort(clips[rng.integers(len(clips), size=len(clips))])
    if kind == "stratified":
        order = np.argsort(identity, kind="stable")
        _, first, count = np.unique(identity[order], return_index=True, return_counts=True)
        draw = np.repeat(first, count) + (rng.random(len(clips)) * np.repeat(count, count)).astype(int)
        return np.sort(clips[order[draw]])
    return clips


def member_seed(seed: int, member: int) -> int | list[int]:
    """Return the seed of a member's training; that of the first is the seed itself, so that it is the plain model."""
    return seed if member == 0 else [seed, member]


def disagreement(predicted: np.ndarray) -> float:
    """Average over pairs of members the share of clips that they name differently; predicted (M, n), M > 1."""
    return float(np.mean([np.mean(a != b) for a, b in combinations(predicted, 2)]))


class Together:
    """Hold M models that differ in their numbers only, as one trainable body; a single model stays as it is.

    parameters: leaves for an optimiser by name, those of M > 1 models stacked, (M, ...).  Until ``finish`` M > 1 models
    themselves do not change.
    """

    def __init__(self, models: list[IdentityModel]):
        self.models = [model.train() for model in models]
        named = [model.named_modules() for model in models]
        self._drops = [{f"{name}.keep": layer for name, layer in part if isinstance(layer, Dropout)} for part in named]
        self.parameters: dict[str, Tensor] = dict(models[0].named_parameters())
        self._buffers: dict[str, Tensor] = {}
        if len(models) > 1:
            self.parameters, self._buffers = stack_module_state(models)

    def loss(
        self,
        inputs: dict,
        label: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        generators: list[torch.Generator],
        prototype: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of every model, (M,): ``loss`` of its cosines (B, C) and its labels, (B,) of (M, B).

        inputs: of ``IdentityModel`` by name; of M > 1 models every tensor has M in front.  generators: of the dropout
        masks, one a model.  prototype (M, S, D): vectors of S classes instead of those of the models.
        On a GPU the models run in bfloat16, the loss in float32.
        """
        device, clips = label.device.type, label.shape[1]
        drawn = [{name: drop.draw(clips, g) for name, drop in d.items()} for d, g in zip(self._drops, generators)]

        def one(parameters: dict, buffers: dict, inputs: dict, label: Tensor) -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                cosine = functional_call(self.models[0], (parameters, buffers), (), inputs)
            return loss(cosine, label)

        given = {} if prototype is None else {"prototype": prototype}
        if len(self.models) == 1:
            return one({name: value[0] for name, value in given.items()}, drawn[0], inputs, label[0])[None]
        masks = {name: torch.stack([keep[name] for keep in drawn]) for name in drawn[0]}
        return vmap(one)(self.parameters | given, self._buffers | masks, inputs, label)

    @torch.no_grad()
    def finish(self) -> None:
        """Give the models what they have learned, and leave them in eval mode."""
        learned = (self.parameters | self._buffers) if len(self.models) > 1 else {}
        for place, model in enumerate(self.models):
            model.load_state_dict({name: value[place] for name, value in learned.items()}, strict=False)
            model.eval()
