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

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# y - mu, as an fp16 output gradient, is divided by its standard deviation and by the number of
# positions so that the sum over 1e5 positions cannot overflow; this factor keeps the quotient out
# of fp16's subnormal range.
_HALF_SCALE = 16.0

# Up to this many positions, one product over whole maps beats two over rows and columns: 6 against
# 28 us for 128 channels of 8x8, as much for 32x32, 635 against 275 us for 100x100 (one thread).
_SMALL_MAP = 1024

# What two computations of one convolution may differ by; other mathematics is far outside.
_SAME_OUTPUT = {torch.float64: 1e-6, torch.float32: 1e-2}
_SAME_OUTPUT_HALF = 5e-2

# On the CPU, from how many numbers on two reductions beat one kernel for the moments, and how far
# the squared mean may exceed the variance before the first lose too many digits.
_LARGE = 1 << 16
_FAR = 64
_NOTHING = nullcontext()


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
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device_type: str) -> AbstractContextManager:
    """A context in which autocast does not run small matrix products in half precision."""
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(device_type, enabled=False)
    return _NOTHING  # entering autocast to turn off what is off takes as long as several kernels


def batch_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over images and positions.

    Args:
        y: Output of a convolution, shape ``(N, C, H, W)``, any floating dtype.

    Returns:
        ``(mean, var)``, each of shape ``(C,)``, in float32 (float64 for float64 input).
    """
    dtype = statistics_dtype(y.dtype)
    if y.dtype == dtype:
        if y.device.type == "cpu" and y.is_contiguous() and y.numel() >= _LARGE:
            return _moments_in_two_reductions(y)
        return torch.batch_norm_update_stats(y, None, None, 0.0)
    # Without float32 running statistics the kernel would return its results in half precision.
    unused = y.new_ones(2, y.shape[1], dtype=dtype)
    return torch.batch_norm_update_stats(y, unused[0], unused[1], 0.0)


def _moments_in_two_reductions(y: Tensor) -> tuple[Tensor, Tensor]:
    """The same as ``E[y]`` and ``E[(y - mu) y]``, for large maps on the CPU.

    There the kernel of the moments sums the squares one by one, while that of batch norm's
    backward pass uses the processor's vectors: for 2 images of 256 channels of 100x100, 4.2 ms
    against 0.8 (two threads). Where the mean is far from 0 it would lose digits, and is not used.
    """
    mean = y.mean((0, 2, 3))
    one = torch.ones_like(mean)
    var = channel_sums(y, y, mean, one, 0.0, one)[0] / (y.numel() // y.shape[1])
    if (mean.square() > _FAR * var).any():
        return torch.batch_norm_update_stats(y, None, None, 0.0)
    return mean, var


def channel_sums(
    grad: Tensor, y: Tensor, mean: Tensor, var: Tensor, eps: float, r: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum(grad x_hat)`` and ``sum(grad)``, each ``(C,)``, in one pass: batch norm's own.

    ``x_hat`` is ``(y - mean) r``, where ``r`` is ``1 / sqrt(var + eps)``. ``grad`` and ``y`` may be
    in half precision, statistics and sums are not.
    """
    if y.numel() == 0:  # the kernel divides by the number of positions
        return torch.zeros_like(mean), torch.zeros_like(mean)
    # The kernel of the CPU reads mean and var as the running statistics, that of a GPU mean and r
    # as those of a forward; the latter also wants a scale, for the dtype of its results alone.
    return torch.ops.aten.native_batch_norm_backward(
        grad, y, r, mean, var, mean, r, False, eps, [False, True, True]
    )[1:]


def standardize(
    y: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """``gamma (y - mean) / sqrt(var + eps) + beta`` of each channel, in the dtype of ``y``.

    One pass of batch norm's own kernel, which computes in float32 at least.
    """
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(y, gamma, beta, mean, var, False, 0.0, eps, cudnn)


@torch.no_grad()
def batch_derivative(
    conv: nn.Conv2d, x: Tensor, y: Tensor, mean: Tensor, stride: int, var: Tensor | None = None
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
        var: ``batch_moments(y)[1]``, which may spare a pass over ``y``, or None.

    Returns:
        The derivatives in float32 (float64 for float64 input), detached; zeros if there is no
        position.
    """
    if y.numel() == 0:
        per_channel = mean.new_zeros(conv.weight.flatten(1).shape)
        return Derivative(per_channel[: conv.groups], per_channel)
    # Under autocast the convolution saw a cast copy of its input.
    x, padding = _padded(conv, x.to(y.dtype), y)
    of_mean = _mean_patch(conv, x, padding, y)
    if stride == 1 and var is not None and _is_near(y, conv.weight, mean, var):
        return Derivative(of_mean, _var_derivative_near(conv, x, padding, y, mean, of_mean))
    return Derivative(of_mean, _var_derivative(conv, x, padding, y, mean, stride, var))


def is_plain(conv: nn.Conv2d, x: Tensor, y: Tensor) -> bool:
    """Whether ``y`` is the plain convolution of ``x`` with the weight of ``conv``.

    It is not if the weight is standardised or modulated on the way, say. Computes the convolution
    once more, and allows for the rounding of half precision or of TF32.
    """
    if x.dim() != 4 or x.shape[1] != conv.in_channels or y.shape[1] != conv.out_channels:
        return False
    padded, padding = _padded(conv, x.to(y.dtype), y)
    weight = conv.weight.to(y.dtype)
    bias = None if conv.bias is None else conv.bias.to(y.dtype)
    again = F.conv2d(padded, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
    if again.shape != y.shape:
        return False
    dtype = statistics_dtype(y.dtype)
    error, size = (torch.linalg.vector_norm(each, dtype=dtype) for each in (again.sub_(y), y))
    return bool(error <= _SAME_OUTPUT.get(y.dtype, _SAME_OUTPUT_HALF) * size)


def _var_derivative(
    conv: nn.Conv2d,
    x: Tensor,
    padding: list[int],
    y: Tensor,
    mean: Tensor,
    stride: int,
    var: Tensor | None,
) -> Tensor:
    """``h = 2 E[(y - mean) phi]`` as one weight gradient, shape ``(C_out, P)``."""
    if stride > 1:
        y = y[:, :, ::stride, ::stride].contiguous()
        # The subset's own mean: about another centre, E[(y - c) phi] is not a covariance.
        mean = y.mean((0, 2, 3), dtype=mean.dtype)
    half_count = y.numel() / (2 * y.shape[1])  # M / 2
    if y.dtype == torch.float16:
        spread = (batch_moments(y)[1] if var is None or stride > 1 else var).sqrt()
        spread = torch.where(spread > 0, spread, 1.0)  # a constant channel stays 0
        divisor, rest = spread * (2 * half_count / _HALF_SCALE), spread * (2 / _HALF_SCALE)
    else:
        divisor, rest = torch.full_like(mean, half_count), None
    centred = standardize(y, None, None, mean, divisor.square_(), 0.0)
    gradient = _weight_gradient(conv, x, padding, centred, stride).to(mean.dtype)
    return gradient if rest is None else gradient.mul_(rest[:, None])


def _is_near(y: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> bool:
    """Whether to take the mean off ``h`` and not off ``y``: it is cheaper, and loses no digits."""
    if y.device.type != "cpu" or y.dtype != mean.dtype or y.numel() < 4 * weight.numel():
        return False
    return bool((mean.square() <= 4 * var).all())


def _var_derivative_near(
    conv: nn.Conv2d, x: Tensor, padding: list[int], y: Tensor, mean: Tensor, of_mean: Tensor
) -> Tensor:
    """``h = 2 E[y phi] - 2 mean m`` from all positions, without a centred copy of ``y``."""
    product = _weight_gradient(conv, x, padding, y, 1).view(conv.groups, -1, of_mean.shape[1])
    mean = mean.view(conv.groups, -1, 1)
    scale = 2 * y.shape[1] / y.numel()  # 2 / M
    return torch.baddbmm(product, mean, of_mean[:, None], beta=scale, alpha=-2).flatten(0, 1)


def _weight_gradient(
    conv: nn.Conv2d, x: Tensor, padding: list[int], gradient: Tensor, stride: int
) -> Tensor:
    """The weight's gradient for one of every ``stride``-th row and column, ``(C_out, P)``."""
    steps = [step * stride for step in conv.stride]
    if stride > 1 and tuple(conv.kernel_size) == (1, 1) and padding == [0, 0]:
        # What the convolution would pick out slowly: 1.3 against 0.5 ms for 256 to 64 channels.
        x, steps = x[:, :, :: steps[0], :: steps[1]].contiguous(), [1, 1]
    return torch.ops.aten.convolution_backward(
        gradient,
        x,
        conv.weight.to(x.dtype),
        None,
        steps,
        padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups,
        [False, True, False],
    )[1].flatten(1)


def _mean_patch(conv: nn.Conv2d, x: Tensor, padding: list[int], y: Tensor) -> Tensor:
    """``m = E[phi]``, shape ``(groups, P)``.

    The sum over output positions is separable: along each axis, a 0/1 matrix says which input rows
    (columns) meet which tap of the kernel. One pass over ``x`` serves all taps.
    """
    dtype = statistics_dtype(x.dtype)
    (images, channels, *size), outputs = x.shape, y.shape[2:]
    if tuple(conv.kernel_size) == (1, 1) and padding == [0, 0]:
        seen = x[:, :, :: conv.stride[0], :: conv.stride[1]]
        return seen.mean((0, 2, 3), dtype=dtype).view(conv.groups, -1)
    axes = tuple(
        zip(size, outputs, conv.kernel_size, conv.stride, padding, conv.dilation, strict=True)
    )
    if size[0] * size[1] <= _SMALL_MAP:
        one = x[0].to(dtype) if images == 1 else x.mean(0, dtype=dtype)
        taps = torch.mm(one.reshape(channels, -1), _map_taps(axes, dtype, x.device))
        return taps.view(conv.groups, -1)
    count = images * outputs.numel()
    rows, columns = _taps(*axes[0], x.dtype, x.device).t(), _taps(*axes[1], dtype, x.device)
    if x.dtype != dtype:  # keep a sum over rows within the range of half precision
        shrink = 2.0 ** -outputs[0].bit_length()
        rows, count = rows * shrink, count * shrink
    if x.is_contiguous(memory_format=torch.channels_last):
        by_row = rows.expand(images, -1, -1) @ x.permute(0, 2, 3, 1).flatten(2)  # N, kh, W C
        by_row = by_row.view(images, len(rows), size[1], channels).permute(0, 3, 1, 2)
    else:
        by_row = rows.expand(images * channels, -1, -1) @ x.flatten(0, 1)  # N C, kh, W
        by_row = by_row.view(images, channels, len(rows), size[1])
    taps = by_row.sum(0, dtype=dtype) @ columns  # C_in, kh, kw
    return taps.div_(count).view(conv.groups, -1)


# The same few feature maps come back in every iteration.
@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _map_taps(axes: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which position of a map meets which tap, ``(H W, kh kw)``, over the number of outputs."""
    rows, columns = (_taps(*axis, dtype, device) / axis[1] for axis in axes)
    return torch.kron(rows, columns)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _taps(
    size: int,
    outputs: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Whether input index ``i`` meets kernel tap ``j`` at some output position, ``(size, kernel)``.

    It does so at most once, and not at all where the tap's output position does not exist.
    """
    index = torch.arange(size)[:, None] + padding
    start = index - torch.arange(kernel) * dilation
    meets = (start >= 0) & (start % stride == 0) & (start < outputs * stride)
    return meets.to(device, dtype)


def _padded(conv: nn.Conv2d, x: Tensor, y: Tensor) -> tuple[Tensor, list[int]]:
    """The input with any padding applied that a convolution call cannot express as two numbers.

    Args:
        conv: The convolution.
        x: Its input, ``(N, C_in, H_in, W_in)``.
        y: Its output, whose size tells the padding of a module that pads in its own ``forward``.

    Returns:
        The input and the zeros still to be added to each side of its height and width.
    """
    if isinstance(conv.padding, str):
        pads = conv._reversed_padding_repeated_twice  # left, right, top, bottom
    else:
        pads = [pad for pad in reversed(conv.padding) for _ in range(2)]
    if _output_size(conv, x, pads) != tuple(y.shape[2:]):
        pads = _pads_to_size(conv, x, y)
    if conv.padding_mode != "zeros":
        return F.pad(x, pads, mode=conv.padding_mode), [0, 0]
    if pads[0] == pads[1] and pads[2] == pads[3]:
        return x, [pads[2], pads[0]]
    return F.pad(x, pads), [0, 0]


def _output_size(conv: nn.Conv2d, x: Tensor, pads: list[int]) -> tuple[int, ...]:
    return tuple(
        (x.shape[i + 2] + pads[2 - 2 * i] + pads[3 - 2 * i] - _reach(conv, i)) // conv.stride[i] + 1
        for i in (0, 1)
    )


def _pads_to_size(conv: nn.Conv2d, x: Tensor, y: Tensor) -> list[int]:
    """TensorFlow's "same" padding, as EfficientNet's convolutions do it: the odd one at the end."""
    pads = []
    for i in (1, 0):
        total = (y.shape[i + 2] - 1) * conv.stride[i] + _reach(conv, i) - x.shape[i + 2]
        total = max(total, 0)
        pads += [total // 2, total - total // 2]
    return pads


def _reach(conv: nn.Conv2d, axis: int) -> int:
    """How many inputs the kernel spans along an axis."""
    return (conv.kernel_size[axis] - 1) * conv.dilation[axis] + 1
