# Licensed under the Apache License, Version 2.0.
"""Whether compensation and window suit a training, in figures of each layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .iteration import cbn_layers
from .linking import is_plain
from .moments import statistics_dtype
from .window import Past, Window

# Above these the first-order compensation is no longer to be relied on: an expansion whose mean
# moved by a third of the standard deviation misses some tenth of the variance, delta squared.
LARGE_CORRECTION = 0.3
LARGE_CLAMPED = 0.05
LARGE_APART = 0.3


class Diagnosis(NamedTuple):
    """What the window of one CBN layer tells of the training.

    Attributes:
        correction: By how much the compensation moves the past's mean, in standard deviations of
            the channel, in the mean over channels. Of a sliding window ``|m . (w_t - w_{t-tau})|``,
            in the mean over iterations; of a moving one how far the last step of the weights moved
            it, times the window size, which is the past's mean age. 0 without compensation.
        clamped: The fraction of past variances that came out negative and were cut to zero.
        noise: How far the last batch's mean was from the past's, in standard deviations of the
            channel; the root of the mean square over channels. NaN before the second iteration.
        window_size: The window size as it is, the current iteration included.
        lag: Whether batches are off from the past in the same direction time after time, from -1 to
            1: the correlation of consecutive ones over channels, averaged over some fifty
            iterations. As the layer's own weight is compensated, it shows what earlier layers do
            (or images in an order): well above 0 the past lags behind them, and a narrower window
            or a lower learning rate helps; below 0 a wider window would be less noisy.
        apart: Of a layer that is called several times in a forward, how far the calls' means are
            from each other, in standard deviations of the channel; the root of the mean square.
            They have a window each, but one set of running statistics for evaluation.
    """

    correction: float
    clamped: float
    noise: float
    window_size: float
    lag: float
    apart: float

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
        several windows (one for each call in a forward), the means over them are given. Layers
        whose weight only a forward tells (a normalised one, say, or FSDP's) are left out, too.
    """
    figures = {}
    for name, layer in cbn_layers(model).items():
        pasts = [(each, _past(each)) for each in layer._windows if _can_tell(each)]
        if pasts:
            of_windows = torch.stack([_figures(*each, layer.eps) for each in pasts])
            together = of_windows.nanmean(0)  # the noise, of those that can tell
            figures[name] = torch.cat((together, _apart([past for _, past in pasts], layer.eps)))
    if not figures:
        return {}
    together = torch.stack(
        [each.to(next(iter(figures.values())).device) for each in figures.values()]
    )
    found = {name: Diagnosis(*row) for name, row in zip(figures, together.tolist(), strict=True)}
    return dict(sorted(found.items(), key=lambda item: item[1].window_size))


def _can_tell(window: Window) -> bool:
    """Whether it holds something, and the weight that it belongs to can be read, and is whole."""
    if window.seen == 0:
        return False
    if window.h is None:
        return True
    conv = None if window.conv is None else window.conv()
    return is_plain(conv) and window.fits(conv.weight)


def _past(window: Window) -> Past:
    """The past at today's weight, without the bias."""
    weight = None if window.h is None else window.conv().weight
    dtype = torch.float32 if weight is None else statistics_dtype(weight.dtype)
    return window.past(weight, None, dtype)


def _figures(window: Window, past: Past, eps: float) -> Tensor:
    """The figures of a :class:`Diagnosis` that each window has, ``(5,)``."""
    scale = (past.var + eps).rsqrt()
    correction = clamped = torch.zeros_like(scale[0])
    noise = torch.full_like(correction, math.nan)
    if past.positive is not None:
        correction = (window.moved(past).abs() * scale[:, None]).mean()
        clamped = 1 - past.positive.to(scale.dtype).mean()
    if window.surprise is not None:
        noise = (2 * window.surprise.square().mean()).sqrt()  # V + v are two variances
    size, lag = (torch.full_like(correction, each) for each in (1 / past.share, window.lag))
    return torch.stack((correction, clamped, noise.to(scale.dtype), size, lag)).float()


def _apart(pasts: list[Past], eps: float) -> Tensor:
    """How far the means of one layer's calls are from each other, ``(1,)``."""
    means, variances = (torch.stack([past[i] for past in pasts]) for i in (0, 1))
    spread = means.var(0, correction=0) / (variances.mean(0) + eps)
    return spread.mean().sqrt().float().view(1)
