# Licensed under the Apache License, Version 2.0.
"""The statistics of a whole population of images, with weights that rest.

Running statistics lag behind the weights and weigh the last images most. Once training pauses,
they can be replaced by what they stand for: "precise" batch normalisation, Wu and Johnson,
"Rethinking 'Batch' in BatchNorm", https://arxiv.org/abs/2105.07576, section 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .mabn import MABN
from .moments import Moments, batch_moments
from .sync import is_distributed, joint_moments


@torch.no_grad()
def precise_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], object] | None = None,
) -> list[str]:
    """Replaces running statistics by those of ``batches``, with the weights as they are.

    Each layer's mean and variance become those over all positions of all images: the variance
    within images and the variance between them. Meanwhile each layer normalises, as inference
    does, with what it has gathered so far, the batch at hand included; so a layer is handed what
    inference will hand it, ever more exactly as the sample grows. (Normalising with the old
    running statistics instead would leave every layer but the first with statistics of inputs that
    it will not see again. Normalising each batch with its own statistics would do so where
    batches are small.)

    Layers that do not train in the model's present mode are left alone, frozen ones that is; so
    are all modes, weights, windows, gradients and other buffers. In distributed training all
    processes call this, each with batches of its own, of which some may have none; as many each, if
    the forward itself waits for the other processes.

    Args:
        model: Any model with batch normalisation: ``CBN``, ``BRN``, ``nn.BatchNorm*d`` or
            ``nn.SyncBatchNorm``. In the mode of training, which tells what is frozen.
        batches: What the model is to see, some hundred images in all. Batches of any size.
        forward: Called with each batch; ``model`` itself by default.

    Returns:
        The names of the layers whose statistics were replaced; those that were not reached keep
        theirs.

    Raises:
        ValueError: No layer trains.
    """
    layers = trained_batch_norms(model)
    if not layers:
        raise ValueError(
            "precise_statistics: no batch normalisation with running statistics is in training "
            "mode. Call model.train() first; layers in evaluation mode are taken as frozen."
        )
    populations = {name: _Population(layer) for name, layer in layers.items()}
    # Some losses count what they have seen.
    others = [
        (module, name, buffer, buffer.clone())
        for module in set(model.modules()).difference(layers.values())
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    hooks = []
    done = []
    try:
        for name, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(populations[name].see))
            layer.training = False
        for batch in batches:
            (forward or model)(batch)
        done = [name for name, population in populations.items() if population.finish()]
    finally:
        for hook in hooks:
            hook.remove()
        for module, name, buffer, before in others:
            module._buffers[name] = buffer.copy_(before)
        for name, layer in layers.items():
            layer.training = True
            if name not in done:
                populations[name].restore()
    not_finite = [name for name, population in populations.items() if population.not_finite]
    if not_finite:
        warnings.warn(
            f"precise_statistics: '{not_finite[0]}' is the first of {len(not_finite)} layers that "
            "met NaN or infinite values, which are left out.",
            stacklevel=2,
        )
    return done


def trained_batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations whose running statistics the model's present mode updates."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    }


class _Population:
    """What one layer has been handed so far."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.not_finite = False
        self._before = layer.running_mean.clone(), layer.running_var.clone()
        # Sums over many images: float32 would lose what the last ones add.
        zeros = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self._moments = Moments(zeros, zeros, 0, zeros, zeros, 0)

    def see(self, layer: nn.Module, args: tuple[Tensor]) -> None:
        """Adds a batch, and has the layer normalise it with all that was seen."""
        (x,) = args
        count = x.numel() // x.shape[1]
        if count == 0:
            return
        mean, var, *_ = batch_moments(x.reshape(*x.shape[:2], -1, 1))
        if not torch.cat((mean, var)).isfinite().all():  # which a GPU waits for once
            self.not_finite = True
            return
        self._moments = _union(self._moments, mean.double(), var.double(), count)
        self._use()

    def finish(self) -> bool:
        """Joins what all processes saw; tells whether it was anything."""
        if is_distributed():
            joint = joint_moments(self._moments)
            self._moments = joint._replace(count=int(joint.count))
        if self._moments.count == 0:
            return False
        self._use()
        return True

    def restore(self) -> None:
        """Puts the running statistics back."""
        self.layer.running_mean.copy_(self._before[0])
        self.layer.running_var.copy_(self._before[1])

    def _use(self) -> None:
        mean, var = self._moments[:2]
        if isinstance(self.layer, MABN):
            mean, var = self.layer.population(mean, var)
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(var)


def _union(seen: Moments, mean: Tensor, var: Tensor, count: int) -> Moments:
    """The moments of what was seen and of ``count`` positions more (Chan's formula)."""
    share = count / (seen.count + count)
    distance = mean - seen.mean
    mean = seen.mean + share * distance
    var = torch.lerp(seen.var, var, share) + share * (1 - share) * distance.square()
    count += seen.count
    return Moments(mean, var, count, mean, var, count)
