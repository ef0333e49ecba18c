# Licensed under the Apache License, Version 2.0.
"""Whether compensation and window suit a training, in figures of each layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .iteration import cbn_layers
from .linking import is_whole
from .moments import statistics_dtype
from .window import Window

# Above these the first-order compensation is no longer to be relied on: an expansion whose mean
# moved by a third of the standard deviation misses some tenth of the variance, delta squared.
LARGE_CORRECTION = 0.3
LARGE_CLAMPED = 0.05


class Diagnosis(NamedTuple):
    """What the window of one CBN layer tells of the training.

    Attributes:
        correction: By how much the compensation moves the past's mean, in standard deviations of
            the channel, in the mean over channels. Of a sliding window ``|m . (w_t - w_{t-tau})|``,
            in the mean over iterations; of a moving one how far the last step of the weights moved
            it, times the window size, which is the past's mean age. 0 without compensation.
        clamped: The fraction of past variances that came out negative and were cut to zero.
        noise: How far the last batch's mean was from the past's, in standard deviations of the
            channel; the root of the mean square over channels. NaN where the window holds one past
            iteration alone, which takes two.
        window_size: The window size as it is, the current iteration included.
    """

    correction: float
    clamped: float
    noise: float
    window_size: float

    @property
    def is_doubtful(self) -> bool:
        """Whether the weights move too fast for the window, or are no numbers any more."""
        return not (self.correction <= LARGE_CORRECTION and self.clamped <= LARGE_CLAMPED)


@torch.no_grad()
def diagnose(model: nn.Module) -> dict[str, Diagnosis]:
    """Looks into the windows of a model, at its weights as they are.

    It reads each window once, which costs a small part of a training step, and changes nothing.

    Args:
        model: A linked model, between two iterations.

    Returns:
        By the name of the layer, in order of the narrowest window to the widest. Layers whose
        window is empty (in a burn-in, or with a ``window_size`` of 1) are left out; of a layer with
        several windows (one for each call in a forward), the means over them are given.
    """
    figures = {}
    for name, layer in cbn_layers(model).items():
        looks = [_figures(window, layer.eps) for window in layer._windows if _can_tell(window)]
        if looks:
            of_windows = torch.stack(looks)
            figures[name] = of_windows.mean(0)
            figures[name][2] = of_windows[:, 2].nanmean()  # the noise, of those that can tell
    if not figures:
        return {}
    together = torch.stack(
        [each.to(next(iter(figures.values())).device) for each in figures.values()]
    )
    found = {name: Diagnosis(*row) for name, row in zip(figures, together.tolist(), strict=True)}
    return dict(sorted(found.items(), key=lambda item: item[1].window_size))


def _can_tell(window: Window) -> bool:
    """Whether it holds something, and the weight that it belongs to is still there, and whole."""
    if window.seen == 0:
        return False
    if window.h is None:
        return True
    conv = None if window.conv is None else window.conv()
    return conv is not None and is_whole(conv.weight) and window.fits(conv.weight)


def _figures(window: Window, eps: float) -> Tensor:
    """The figures of a :class:`Diagnosis`, ``(4,)``."""
    weight = None if window.h is None else window.conv().weight
    dtype = torch.float32 if weight is None else statistics_dtype(weight.dtype)
    past = window.past(weight, None, dtype)
    scale = (past.var + eps).rsqrt()
    moved, noise = window.look(past, scale)
    correction = (moved.abs() * (scale if moved.dim() == 1 else scale[:, None])).mean()
    clamped = torch.zeros_like(correction)
    if past.positive is not None:
        clamped = 1 - past.positive.to(correction.dtype).mean()
    if noise is None:
        noise = torch.full_like(correction, math.nan)
    size = torch.full_like(correction, 1 / past.share)
    return torch.stack((correction, clamped, noise, size)).float()
