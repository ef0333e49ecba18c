# Licensed under the Apache License, Version 2.0.
"""Whether compensation and window suit a training, in figures of each layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .iteration import cbn_layers
from .window import Window, is_whole

# Above these the first-order compensation is no longer to be relied on: an expansion whose mean
# moved by a third of the standard deviation misses some tenth of the variance, delta squared.
LARGE_CORRECTION = 0.3
LARGE_CLAMPED = 0.05


class Diagnosis(NamedTuple):
    """What the window of one CBN layer tells of the training.

    Attributes:
        correction: By how much the compensation moves the means of past iterations,
            ``|m . (w_t - w_{t-tau})|``, in standard deviations of the channel; the mean over
            channels and iterations. 0 without compensation.
        clamped: The fraction of past variances that came out negative and were cut to zero.
        noise: How far the last batch's mean is from the window's, in standard deviations of the
            channel; the root of the mean square over channels. The window's own mean is about
            ``noise / sqrt(window_size)`` from the population's. NaN of a window that holds one past
            iteration, which takes two.
    """

    correction: float
    clamped: float
    noise: float

    @property
    def is_doubtful(self) -> bool:
        """Whether the weights move too fast for the window, or are no numbers any more."""
        return not (self.correction <= LARGE_CORRECTION and self.clamped <= LARGE_CLAMPED)


@torch.no_grad()
def diagnose(model: nn.Module) -> dict[str, Diagnosis]:
    """Looks into the windows of a model, at its weights as they are.

    It reads each window once, which costs about a tenth of a training step, and changes nothing.

    Args:
        model: A linked model, between two iterations.

    Returns:
        By the name of the layer. Layers whose window is empty (in a burn-in, or with a
        ``window_size`` of 1) are left out; of a layer with several windows (one for each call in a
        forward), the means over them are given.
    """
    figures = {}
    for name, layer in cbn_layers(model).items():
        looks = [_figures(window, layer.eps) for window in layer._windows if _can_tell(window)]
        if looks:
            of_windows = torch.stack(looks)
            figures[name] = of_windows.mean(0)
            figures[name][-1] = of_windows[:, -1].nanmean()  # the noise, of those that can tell
    if not figures:
        return {}
    together = torch.stack(
        [each.to(next(iter(figures.values())).device) for each in figures.values()]
    )
    return {name: Diagnosis(*row) for name, row in zip(figures, together.tolist(), strict=True)}


def _can_tell(window: Window) -> bool:
    """Whether it holds enough, and the weight that it belongs to is still there, and whole."""
    if len(window) == 0:
        return False
    feeder = None if window.feeder is None else window.feeder()
    if feeder is None:
        return not window.is_of_weight
    return is_whole(feeder.weight) and window.fits(feeder.weight)


def _figures(window: Window, eps: float) -> Tensor:
    """The figures of a :class:`Diagnosis`, ``(3,)``."""
    feeder = None if window.feeder is None else window.feeder()
    past, recorded, newest = window.look(None if feeder is None else feeder.weight)
    scale = (past.var + eps).rsqrt()
    correction = ((past.means - recorded).abs() * scale[:, None]).mean()
    clamped = correction.new_zeros(())
    if past.positive is not None:
        clamped = 1 - past.positive.to(correction.dtype).mean()
    noise = ((past.means[:, newest] - past.mean) * scale).square().mean().sqrt()
    if len(window) < 2:
        noise = torch.full_like(noise, math.nan)
    return torch.stack((correction, clamped, noise)).float()
