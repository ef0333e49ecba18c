# Licensed under the Apache License, Version 2.0.
"""Figures of each layer that show whether compensation and window suit the training."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .iteration import cbn_layers
from .linking import is_plain
from .moments import statistics_dtype
from .window import Past, SlidingPast, Window

# Above these values, the first-order compensation is unreliable: an expansion that moves the mean
# by a third of the standard deviation misses about a tenth of the variance, delta squared.
LARGE_CORRECTION = 0.3
LARGE_CLAMPED = 0.05
LARGE_APART = 0.3


class Diagnosis(NamedTuple):
    """What the window of one CBN layer says about the training.

    Attributes:
        correction: How far the compensation moves the past's mean, in standard deviations of the
            channel, averaged over channels. For a sliding window: ``|m . (w_t - w_{t-tau})|``,
            averaged over iterations. For a moving window: how far the last step of the weights
            moved the mean, times the window size (the past's mean age). 0 without compensation.
        clamped: The fraction of past variances that came out negative and were cut to zero.
        noise: How far the last batch's mean was from the past's, in standard deviations of the
            channel; root mean square over channels. NaN before the second iteration.
        window_size: The actual window size, including the current iteration.
        lag: Whether batches deviate from the past in the same direction time after time, from -1 to
            1: the correlation over channels of consecutive deviations, averaged over some fifty
            iterations. The layer's own weight is compensated, so the lag shows what earlier layers
            do (or images in an order). Well above 0, the past lags behind them, and a narrower
            window or a lower learning rate helps; below 0, a wider window would be less noisy.
        apart: If a layer is called several times in a forward, how far the calls' means are from
            each other, in standard deviations of the channel; root mean square. Each call has its
            own window, but all share one set of running statistics for evaluation.
    """

    correction: float
    clamped: float
    noise: float
    window_size: float
    lag: float
    apart: float

    @property
    def is_doubtful(self) -> bool:
        """Whether the weights move too fast for the window, or have become NaN."""
        return not (self.correction <= LARGE_CORRECTION and self.clamped <= LARGE_CLAMPED)


@torch.no_grad()
def diagnose(model: nn.Module) -> dict[str, Diagnosis]:
    """Diagnoses each layer of a model from its windows, at the current weights.

    This reads each window once, which costs a small part of a training step, and changes nothing.

    Args:
        model: A linked model, between two iterations.

    Returns:
        The diagnoses by layer name, ordered from the narrowest window to the widest. If a layer has
        several windows (one for each call in a forward), its figures are means over them. Layers
        whose window is empty (in a burn-in, or with a ``window_size`` of 1) are left out, as are
        layers whose weight is known only in a forward (a normalised weight, say, or FSDP's).
    """
    figures = {}
    for name, layer in cbn_layers(model).items():
        told = [(each, past) for each in layer._windows if (past := _past(each)) is not None]
        if told:
            of_windows = torch.stack([_figures(*each, layer.eps) for each in told])
            together = of_windows.nanmean(0)  # the noise of some windows may be NaN
            figures[name] = torch.cat((together, _apart(told, layer.eps)))
    if not figures:
        return {}
    together = torch.stack(
        [each.to(next(iter(figures.values())).device) for each in figures.values()]
    )
    found = {name: Diagnosis(*row) for name, row in zip(figures, together.tolist(), strict=True)}
    return dict(sorted(found.items(), key=lambda item: item[1].window_size))


def _past(window: Window) -> Past | None:
    """The past at today's weight, without the bias; None if empty, or no weight can be read."""
    if window.h is None:
        return window.past(None, None, torch.float32)
    conv = window.conv and window.conv()
    if not is_plain(conv):
        return None
    return window.past(conv.weight, None, statistics_dtype(conv.weight.dtype))


def _figures(window: Window, past: Past, eps: float) -> Tensor:
    """The figures of a :class:`Diagnosis` for one window, all but ``apart``, ``(5,)``."""
    scale = (past.var + eps).rsqrt()
    correction = clamped = torch.zeros_like(scale[0])
    noise = torch.full_like(correction, math.nan)
    if past.positive is not None:
        if isinstance(past, SlidingPast):
            moved = past.moved
        else:  # in the last step; the past's mean age is the window size
            moved = ((past.mean - window.recorded) / past.share)[:, None]
        correction = (moved.abs() * scale[:, None]).mean()
        clamped = 1 - past.positive.to(scale.dtype).mean()
    if window.surprise is not None:
        noise = (2 * window.surprise.square().mean()).sqrt()  # V + v are two variances
    size, lag = (torch.full_like(correction, each) for each in (1 / past.share, window.lag))
    return torch.stack((correction, clamped, noise.to(scale.dtype), size, lag)).float()


def _apart(told: list[tuple[Window, Past]], eps: float) -> Tensor:
    """The figure ``apart``: how far the means of a layer's calls are from each other, ``(1,)``."""
    means = torch.stack([_mean_with_bias(*each) for each in told])
    variances = torch.stack([past.var for _, past in told])
    spread = means.var(0, correction=0) / (variances.mean(0) + eps)
    return spread.mean().sqrt().float().view(1)


def _mean_with_bias(window: Window, past: Past) -> Tensor:
    """The past's mean; convolutions that feed one layer in turn may have different biases."""
    conv = window.conv and window.conv()
    if not window.is_without_bias or not is_plain(conv) or conv.bias is None:
        return past.mean
    return past.mean + conv.bias.to(past.mean.dtype)
