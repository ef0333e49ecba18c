# Licensed under the Apache License, Version 2.0.
"""The statistics of one batch, and their derivatives in the convolution's weight.

Cross-Iteration Batch Normalization, https://arxiv.org/abs/2002.05712, section 3.2.

Write ``phi_p`` for the input patch at output position ``p``, so that the convolution computes
``y_p = w . phi_p + b``. For one output channel, over all images and positions,

    mean        mu = E[y]              d mu / d w = E[phi]                              =: m
    variance    v  = E[(y - mu)^2]     d v  / d w = 2 E[(y - mu) phi]                   =: h

``m`` does not depend on the output channel, so it is held once per group of the convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# y - mu, as an fp16 output gradient, is divided by its standard deviation and by the number of
# positions so that the sum over 1e5 positions cannot overflow; this factor keeps the quotient out
# of fp16's subnormal range.
_HALF_SCALE = 16.0


class Derivative(NamedTuple):
    """Derivatives of a channel's statistics in the weight that produces it.

    Attributes:
        mean: ``m`` (``d mu / d w``), shape ``(groups, P)`` with ``P = C_in / groups * kh * kw``.
        var: ``h`` (``d v / d w``), shape ``(C_out, P)``.
    """

    mean: Tensor
    var: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of a ``dtype`` tensor are computed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def batch_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over images and positions.

    Args:
        y: Output of a convolution, shape ``(N, C, H, W)``, any floating dtype.

    Returns:
        ``(mean, var)``, each of shape ``(C,)``, in float32 (float64 for float64 input).
    """
    dtype = statistics_dtype(y.dtype)
    if y.dtype == dtype:
        return torch.batch_norm_update_stats(y, None, None, 0.0)
    # Without float32 running statistics the kernel would return its results in half precision.
    unused = y.new_ones(2, y.shape[1], dtype=dtype)
    return torch.batch_norm_update_stats(y, unused[0], unused[1], 0.0)


def batch_derivative(
    conv: nn.Conv2d, x: Tensor, y: Tensor, mean: Tensor, stride: int
) -> Derivative:
    """Derivatives of ``y``'s mean and variance in the weight of ``conv``, where ``y = conv(x)``.

    ``m`` is taken over all positions, which makes the compensated mean exact. ``h`` only steers a
    second-order-small correction, so it may be estimated on every ``stride``-th row and column:
    that is the weight gradient of the same convolution with its stride multiplied, at
    ``1 / stride**2`` of the cost.

    Args:
        conv: The convolution that computed ``y``.
        x: Its input, shape ``(N, C_in, H_in, W_in)``.
        y: Its output, shape ``(N, C_out, H, W)``.
        mean: ``batch_moments(y)[0]``, shape ``(C_out,)``.
        stride: Subsampling of the positions for ``h``; 1 takes all of them.

    Returns:
        The derivatives in float32 (float64 for float64 input), detached.
    """
    dtype = statistics_dtype(y.dtype)
    x, y = x.detach(), y.detach()
    if x.dtype != y.dtype:  # under autocast the convolution saw a cast copy of its input
        x = x.to(y.dtype)
    return Derivative(_mean_patch(conv, x, y).to(dtype), _var_derivative(conv, x, y, mean, stride))


def convolve_subgrid(conv: nn.Conv2d, x: Tensor, stride: int) -> Tensor:
    """``conv(x)[:, :, ::stride, ::stride]``, computed at these positions only."""
    x, padding = _padded(conv, x)
    weight = conv.weight.to(x.dtype)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    steps = [s * stride for s in conv.stride]
    return F.conv2d(x, weight, bias, steps, padding, conv.dilation, conv.groups)


def _var_derivative(conv: nn.Conv2d, x: Tensor, y: Tensor, mean: Tensor, stride: int) -> Tensor:
    """``h = 2 E[(y - mean) phi]`` as one weight gradient, shape ``(C_out, P)``."""
    if stride > 1:
        y = y[:, :, ::stride, ::stride]
        # The subset's own mean: about another centre, E[(y - c) phi] is not a covariance.
        mean = y.mean((0, 2, 3), dtype=mean.dtype)
    count = y.numel() // y.shape[1]
    centred = y.to(mean.dtype) - mean[:, None, None]
    scale = torch.full_like(mean, 2.0 / count)
    if y.dtype == torch.float16:
        spread = centred.square().mean((0, 2, 3)).sqrt().clamp_min(torch.finfo(mean.dtype).tiny)
        centred = centred * (_HALF_SCALE / count / spread)[:, None, None]
        scale = spread * (2.0 / _HALF_SCALE)
    x, padding = _padded(conv, x)
    gradient = torch.ops.aten.convolution_backward(
        centred.to(x.dtype),
        x,
        conv.weight.detach().to(x.dtype),
        None,
        [s * stride for s in conv.stride],
        padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups,
        [False, True, False],
    )[1]
    return gradient.flatten(1).to(mean.dtype) * scale[:, None]


def _mean_patch(conv: nn.Conv2d, x: Tensor, y: Tensor) -> Tensor:
    """``m = E[phi]``, shape ``(groups, P)``.

    The mean over output positions is separable: along each axis, a 0/1 matrix says which input
    rows (columns) meet which tap of the kernel. One pass over ``x`` serves all taps.
    """
    dtype = statistics_dtype(x.dtype)
    if tuple(conv.kernel_size) == (1, 1) and conv.padding in ((0, 0), "valid", "same"):
        seen = x[:, :, :: conv.stride[0], :: conv.stride[1]]
        return seen.mean((0, 2, 3), dtype=dtype).view(conv.groups, -1)
    x, padding = _padded(conv, x)
    rows, columns = (
        _taps(x.shape[i + 2], y.shape[i + 2], size, stride, pad, dilation, x)
        for i, (size, stride, pad, dilation) in enumerate(
            zip(conv.kernel_size, conv.stride, padding, conv.dilation, strict=True)
        )
    )
    # A power of two is exact in half precision, and keeps a row's sum within its range.
    shrink = 2.0 ** -(y.shape[3] - 1).bit_length()
    by_column = torch.matmul(x, columns * shrink).mean(0, dtype=dtype)  # C_in, H, kw
    taps = torch.matmul(rows.t().to(dtype), by_column)  # C_in, kh, kw
    return taps.div_(shrink * y.shape[2] * y.shape[3]).reshape(conv.groups, -1)


def _taps(
    size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int, like: Tensor
) -> Tensor:
    """Whether input index ``i`` meets kernel tap ``j`` at some output position, ``(size, kernel)``.

    It does so at most once, and not at all where the tap's output position does not exist.
    """
    index = torch.arange(size, device=like.device)[:, None] + padding
    start = index - torch.arange(kernel, device=like.device) * dilation
    meets = (start >= 0) & (start % stride == 0) & (start < outputs * stride)
    return meets.to(like.dtype)


def _padded(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, list[int]]:
    """The input with any padding applied that a convolution call cannot express as two numbers."""
    if conv.padding == "valid":
        return x, [0, 0]
    if conv.padding_mode == "zeros" and conv.padding != "same":
        return x, list(conv.padding)
    pads = conv._reversed_padding_repeated_twice
    if conv.padding_mode == "zeros":
        if pads[0] == pads[1] and pads[2] == pads[3]:
            return x, [pads[2], pads[0]]
        return F.pad(x, pads), [0, 0]
    return F.pad(x, pads, mode=conv.padding_mode), [0, 0]
