# Licensed under the Apache License, Version 2.0.
"""The statistics of a whole population of images, at fixed weights.

Running statistics lag behind the weights and weigh the last images most. When training pauses,
they can be replaced by what they estimate: "precise" batch normalisation, Wu and Johnson,
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
    """Replaces running statistics by those of ``batches``, at the present weights.

    Each layer's mean and variance become those over all positions of all images, so the variance
    includes that within images and that between them. Meanwhile, each layer normalises as inference
    does, with the statistics gathered so far, including the batch at hand. As the sample grows, its
    input thus approaches what it will be in inference. (Normalising with the old running statistics
    instead would leave every layer but the first with statistics of inputs that it will not see
    again. Normalising each batch with its own statistics would do the same if batches are small.)

    Layers in evaluation mode count as frozen and do not change; nor do modes, weights, windows,
    gradients or other buffers. In distributed training, all processes call this function, each
    with its own batches. Some may have none; but if the forward itself waits for other processes,
    all need equally many.

    Args:
        model: Any model with batch normalisation: ``CBN``, ``BRN``, ``nn.BatchNorm*d`` or
            ``nn.SyncBatchNorm``. In training mode: each layer's mode tells whether it is frozen.
        batches: Batches of any size to compute statistics from, some hundred images in all.
        forward: Called with each batch; ``model`` itself by default.

    Returns:
        The names of the layers whose statistics were replaced; layers that no batch reached keep
        theirs.

    Raises:
        ValueError: No layer with batch normalisation is in training mode.
    """
    layers = trained_batch_norms(model)
    if not layers:
        raise ValueError(
            "precise_statistics: no batch normalisation with running statistics is in training "
            "mode. Call model.train() first; layers in evaluation mode are taken as frozen."
        )
    populations = {name: _Population(layer) for name, layer in layers.items()}
    # Saved, because some losses count what they have seen.
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
            hooks.append(layer.register_forward_pre_hook(populations[name].see, with_kwargs=True))
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
    """The layers whose running statistics are updated in the model's present mode."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and module.track_running_stats
        and module.running_mean is not None  # as methods of test-time adaptation set it
    }


class _Population:
    """The statistics of all inputs that one layer has received so far."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.not_finite = False
        self._before = layer.running_mean.clone(), layer.running_var.clone()
        # Over many images, float32 would lose what the last ones add.
        zeros = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self._moments = Moments(zeros, zeros, 0, zeros, zeros, 0)

    def see(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Adds a batch, which the layer then normalises with all that it has seen."""
        (x,) = *args, *kwargs.values()
        count = x.numel() // x.shape[1]
        if count == 0:
            return
        mean, var, *_ = batch_moments(x.reshape(*x.shape[:2], -1, 1))
        if not torch.cat((mean, var)).isfinite().all():  # waits for a GPU once
            self.not_finite = True
            return
        self._moments = _union(self._moments, mean.double(), var.double(), count)
        self._use()

    def finish(self) -> bool:
        """Joins what all processes have seen; returns whether there was anything."""
        if is_distributed():
            joint = joint_moments(self._moments)
            self._moments = joint._replace(count=int(joint.count))
        if self._moments.count == 0:
            return False
        self._use()
        return True

    def restore(self) -> None:
        """Restores the running statistics from before."""
        self.layer.running_mean.copy_(self._before[0])
        self.layer.running_var.copy_(self._before[1])

    def _use(self) -> None:
        mean, var = self._moments[:2]
        if isinstance(self.layer, MABN):
            mean, var = self.layer.population(mean, var)
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(var)


def _union(seen: Moments, mean: Tensor, var: Tensor, count: int) -> Moments:
    """The joint moments of ``seen`` and of ``count`` further positions (Chan's formula)."""
    share = count / (seen.count + count)
    distance = mean - seen.mean
    mean = seen.mean + share * distance
    var = torch.lerp(seen.var, var, share) + share * (1 - share) * distance.square()
    count += seen.count
    return Moments(mean, var, count, mean, var, count)
