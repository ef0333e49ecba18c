# Licensed under the Apache License, Version 2.0.
"""The statistics of one batch, and their derivatives in the convolution's weight.

Cross-Iteration Batch Normalization, https://arxiv.org/abs/2002.05712, section 3.2.

Write ``phi_p`` for the input patch at output position ``p``, so that the convolution computes
``y_p = w . phi_p + b``. For one output channel, over all images and positions,

    mean        mu = E[y]              d mu / d w = E[phi]                              =: m
    variance    v  = E[(y - mu)^2]     d v  / d w = 2 E[(y - mu) phi]                   =: h

``m`` does not depend on the output channel, so it is held once per group of the convolution. As the
mean is linear in the weight and the variance quadratic, their products with it need no computation:

    m . w = mu - b                     h . w = 2 v                          (Euler's theorem)
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .kernels import statistics_dtype

# y - mu, as an fp16 output gradient, is divided by its standard deviation and by the number of
# positions so that the sum over 1e5 positions cannot overflow; this factor keeps the quotient out
# of fp16's subnormal range.
_HALF_SCALE = 16.0

# Positions from which the derivative of the variance is estimated if there are more.
_ENOUGH = 256

# From how many numbers on the mean is better taken off the derivative than off a copy of the maps.
_LARGE = 1 << 16
_NOTHING = nullcontext()


class Moments(NamedTuple):
    """Statistics of the current batch.

    Attributes:
        mean: Mean of each channel, ``(C,)``.
        var: Biased variance of each channel, ``(C,)``.
        count: Number of positions per channel, ``M``; a tensor if it is a sum over processes.
        own_mean: Mean over the positions of this process alone, ``(C,)``.
        own_var: Likewise, ``(C,)``.
        own_count: Their number.
    """

    mean: Tensor
    var: Tensor
    count: int | Tensor
    own_mean: Tensor
    own_var: Tensor
    own_count: int

    @property
    def unbiased_var(self) -> Tensor:
        """The variance as batch normalisation's running statistics take it, ``(C,)``."""
        others = self.count - 1
        others = others.clamp_min(1) if isinstance(others, Tensor) else max(others, 1)
        return self.var * (self.count / others)


class Derivative(NamedTuple):
    """Derivatives of a channel's statistics in the weight that produces it.

    Attributes:
        mean: ``m`` (``d mu / d w``), shape ``(groups, P)`` with ``P = C_in / groups * kh * kw``.
        var: ``h`` (``d v / d w``), shape ``(C_out, P)``.
        mean_at: ``m . w`` at the weight of the batch, ``(C_out,)``.
        half_var_at: ``h . w / 2``, likewise.
    """

    mean: Tensor
    var: Tensor
    mean_at: Tensor
    half_var_at: Tensor


def full_precision(device_type: str) -> AbstractContextManager:
    """A context in which autocast does not run small matrix products in half precision."""
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(device_type, enabled=False)
    return _NOTHING  # entering autocast to turn off what is off takes as long as several kernels


def batch_moments(y: Tensor) -> Moments:
    """Mean and biased variance of each channel over images and positions.

    Args:
        y: Output of a convolution, shape ``(N, C, H, W)``, any floating dtype.

    Returns:
        The statistics in float32 (float64 for float64 input); zeros if there is no position.
    """
    count = y.numel() // y.shape[1]
    if count > 0:
        mean, var = kernels.moments(y)
    else:
        mean = var = y.new_zeros(y.shape[1], dtype=statistics_dtype(y.dtype))
    return Moments(mean, var, count, mean, var, count)


@torch.no_grad()
def batch_derivative(
    conv: nn.Conv2d, x: Tensor, y: Tensor, moments: Moments, stride: int | None = None
) -> Derivative:
    """Derivatives of ``y``'s mean and variance in the weight of ``conv``, where ``y = conv(x)``.

    ``m`` is taken over all positions, which makes the compensated mean exact. ``h`` only steers a
    second-order-small correction, so it may be estimated on every ``stride``-th row and column:
    that is the weight gradient of the same convolution with its stride multiplied, at
    ``1 / stride**2`` of the cost.

    Args:
        conv: The convolution that computed ``y``.
        x: Its input, shape ``(N, C_in, H_in, W_in)``.
        y: Its output, shape ``(N, C_out, H, W)``, detached.
        moments: ``batch_moments(y)``, of which the process's own statistics are used.
        stride: Subsampling of the positions for ``h``; 1 takes all of them, None as
            :func:`stride_for` says.

    Returns:
        The derivatives in float32 (float64 for float64 input), detached; zeros if there is no
        position.
    """
    mean = mean_at = moments.own_mean
    if y.numel() == 0:
        of_var = mean.new_zeros(conv.weight.flatten(1).shape)
        return Derivative(mean.new_zeros(conv.groups, of_var.shape[1]), of_var, mean, mean)
    if conv.bias is not None:
        mean_at = mean - conv.bias.to(mean.dtype)
    if x.dtype != y.dtype:  # under autocast the convolution saw a cast copy of its input
        x = x.to(y.dtype)
    x, padding = kernels.padded(conv, x, y)
    of_mean = kernels.mean_patch(conv, x, padding, y)
    if stride is None:
        stride = stride_for(y)
    if stride == 1 and y.numel() >= _LARGE and _is_near(y, conv.weight, moments):
        of_var = _var_derivative_near(conv, x, padding, y, mean, of_mean)
        return Derivative(of_mean, of_var, mean_at, moments.own_var)
    of_var, var = _var_derivative(conv, x, padding, y, moments, stride)
    return Derivative(of_mean, of_var, mean_at, var)


def stride_for(y: Tensor) -> int:
    """The subsampling of the positions where none is asked for: 256 are left at least."""
    images, _, height, width = y.shape
    if images * height * width < _ENOUGH:
        return 1
    for stride in (4, 2):
        if images * math.ceil(height / stride) * math.ceil(width / stride) >= _ENOUGH:
            return stride
    return 1


def _var_derivative(
    conv: nn.Conv2d, x: Tensor, padding: list[int], y: Tensor, moments: Moments, stride: int
) -> tuple[Tensor, Tensor]:
    """``h = 2 E[(y - mean) phi]`` as one weight gradient, ``(C_out, P)``; and ``v``."""
    mean, var = moments.own_mean, moments.own_var
    if stride > 1:
        y = y[:, :, ::stride, ::stride].contiguous()
        # The subset's own mean: about another centre, E[(y - c) phi] is not a covariance.
        mean, var = kernels.moments(y)
    half_count = y.numel() / (2 * y.shape[1])  # M / 2
    if y.dtype == torch.float16:
        spread = var.sqrt()
        spread = torch.where(spread > 0, spread, 1.0)  # a constant channel stays 0
        divisor = (spread * (2 * half_count / _HALF_SCALE)).square_()
        rest = spread * (2 / _HALF_SCALE)
    else:
        divisor = kernels.constant(len(mean), half_count * half_count, mean.dtype, mean.device)
        rest = None
    centred = kernels.standardize(y, None, None, mean, divisor, 0.0)
    gradient = kernels.weight_gradient(conv, x, padding, centred, stride)
    if gradient.dtype != mean.dtype:
        gradient = gradient.to(mean.dtype)
    return (gradient if rest is None else gradient.mul_(rest[:, None])), var


def _is_near(y: Tensor, weight: Tensor, moments: Moments) -> bool:
    """Whether to take the mean off ``h`` and not off ``y``: it is cheaper, and loses no digits."""
    mean, var = moments.own_mean, moments.own_var
    if y.device.type != "cpu" or y.dtype != mean.dtype:
        return False
    if y.numel() < 4 * weight.numel():
        return False
    return bool((mean.square() <= 4 * var).all())


def _var_derivative_near(
    conv: nn.Conv2d, x: Tensor, padding: list[int], y: Tensor, mean: Tensor, of_mean: Tensor
) -> Tensor:
    """``h = 2 E[y phi] - 2 mean m`` from all positions, without a centred copy of ``y``."""
    product = kernels.weight_gradient(conv, x, padding, y, 1)
    by_group = product.view(conv.groups, -1, of_mean.shape[1])
    scale = 2 * y.shape[1] / y.numel()  # 2 / M
    by_group.baddbmm_(mean.view(conv.groups, -1, 1), of_mean[:, None], beta=scale, alpha=-2)
    return product
