# Licensed under the Apache License, Version 2.0.
"""The statistics of one batch, and their derivatives in the convolution's weight.

Paper: Cross-Iteration Batch Normalization, https://arxiv.org/abs/2002.05712, section 3.2.

Write ``phi_p`` for the input patch at output position ``p``, so that the convolution computes
``y_p = w . phi_p + b``. For one output channel, over all images and positions,

    mean        mu = E[y]              d mu / d w = E[phi]                              =: m
    variance    v  = E[(y - mu)^2]     d v  / d w = 2 E[(y - mu) phi]                   =: h

``m`` does not depend on the output channel: it is held once per group of the convolution. As mean
and variance are linear and quadratic in the weight, ``m . w`` and ``h . w`` need no computation:

    m . w = mu - b                     h . w = 2 v                          (Euler's theorem)

Any other layer with a weight has the same derivatives, with ``phi = dy / dw``, whose sums autograd
computes. Its ``m`` differs between channels, and its products with the weight must be computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from . import kernels
from .kernels import statistics_dtype

# Where there are more positions, at least this many estimate the derivative of the variance.
_ENOUGH = 256

# From this many numbers on, subtract the mean from the derivative, not from a copy of the maps.
_LARGE = 1 << 16
_NOTHING = nullcontext()


class Moments(NamedTuple):
    """Statistics of the current batch.

    Attributes:
        mean: Mean of each channel, ``(C,)``.
        var: Biased variance of each channel, ``(C,)``.
        count: Number of positions per channel, ``M``; a tensor if it is a sum over processes.
        own_mean: Mean over the positions of this process alone, ``(C,)``.
        own_var: Biased variance over these positions, ``(C,)``.
        own_count: Number of these positions.
    """

    mean: Tensor
    var: Tensor
    count: int | Tensor
    own_mean: Tensor
    own_var: Tensor
    own_count: int

    @property
    def unbiased_var(self) -> Tensor:
        """The unbiased variance, as in batch normalisation's running statistics, ``(C,)``."""
        others = self.count - 1
        others = others.clamp_min(1) if isinstance(others, Tensor) else max(others, 1)
        return self.var * (self.count / others)


class Source(NamedTuple):
    """The convolution, or other operation, that computed a tensor ``y`` from a weight.

    Attributes:
        weight: The weight that was used, ``(C_out, ...)``; in autograd's graph if it is not a
            parameter. None if statistics are not taken as functions of it.
        bias: The convolution's bias, a parameter, or None.
        input: The convolution's input, ``(N, C_in, H_in, W_in)``; None for other operations.
        padding: The convolution's zeros on each side; stride, dilation and groups are its own, too.
        is_exact: Whether ``y`` is ``weight . phi + bias``, with nothing else added.
        leaf: Tensors that autograd differentiates by: the module's own weight, and the bias.
        groups_of_transposed: The groups of a transposed convolution, else None.
    """

    weight: Tensor | None
    bias: Tensor | None
    input: Tensor | None = None
    padding: Sequence[int] = (0, 0)
    stride: Sequence[int] = (1, 1)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1
    is_exact: bool = True
    leaf: tuple[Tensor, ...] = ()
    groups_of_transposed: int | None = None

    @classmethod
    def of(cls, conv: nn.Conv2d, x: Tensor, follows: bool = False) -> Source:
        """Source for a plain convolution of ``x`` with its own weight.

        Args:
            conv: The convolution.
            x: Its input.
            follows: Whether the window follows the weight, even while this does not train.
        """
        own = conv._parameters
        weight, bias = own["weight"], own["bias"] if "bias" in own else conv.bias  # it is pruned
        if not (weight.requires_grad or follows):
            return cls(None, bias)
        padding = conv.padding
        if conv.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode), (0, 0)
        sizes = padding, conv.stride, conv.dilation
        if int in map(type, sizes):  # set by hand, which torch takes as well
            sizes = tuple(map(_pair, sizes))
        return cls(weight, bias, x, *sizes, conv.groups)

    @classmethod
    def by_autograd(cls, weight: Tensor, bias: Tensor | None, transposed: int | None) -> Source:
        """Source for a transposed convolution or no convolution; each row ends with its bias."""
        leaf = (weight,) if bias is None or not bias.requires_grad else (weight, bias)
        source = cls(None, None, is_exact=False, leaf=leaf, groups_of_transposed=transposed)
        return source._replace(weight=source.rows(leaf))

    def rows(self, leaf: Sequence[Tensor]) -> Tensor:
        """Arranges ``leaf``, or its gradients, by output channels, ``(C_out, P)``."""
        weight, *bias = leaf
        groups = self.groups_of_transposed
        if groups is not None:  # C_in, C_out / groups, kh, kw
            weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        rows = weight.reshape(weight.shape[0], -1)  # a norm's weight has only one dimension
        return torch.cat([rows, *(each[:, None] for each in bias)], 1)

    def gradient(self, y: Tensor, grad: Tensor) -> Tensor:
        """The rows of the gradient in ``leaf``, given that in ``y``, by autograd."""
        # The module may have a bias that it does not use.
        return self.rows(
            torch.autograd.grad(y, self.leaf, grad, retain_graph=True, materialize_grads=True)
        )


class Derivative(NamedTuple):
    """Derivatives of a channel's statistics in the weight that produces the channel.

    Attributes:
        mean: ``m`` (``d mu / d w``), shape ``(groups, P)`` with ``P = C_in / groups * kh * kw``;
            ``(C_out, P)`` if the source is not a convolution.
        var: ``h`` (``d v / d w``), shape ``(C_out, P)``; with a moving window, ``h'`` from the
            backward pass on.
        mean_at: ``m . w`` at the weight that the batch had, ``(C_out,)``.
        half_var_at: ``h . w / 2``, likewise.
    """

    mean: Tensor
    var: Tensor
    mean_at: Tensor
    half_var_at: Tensor


def full_precision(device_type: str) -> AbstractContextManager:
    """A context that keeps autocast from running small matrix products in half precision."""
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(device_type, enabled=False)
    return _NOTHING  # because entering autocast takes as long as several kernels


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
    source: Source, y: Tensor, moments: Moments, stride: int | None = None
) -> Derivative:
    """Derivatives of ``y``'s mean and variance in the weight of ``source``.

    ``m`` is taken over all positions, which makes the compensated mean exact. ``h`` only steers a
    second-order-small correction, so it may be estimated on every ``stride``-th row and column.
    The estimate is the weight gradient of the same convolution with its stride multiplied, at
    ``1 / stride**2`` of the cost.

    Args:
        source: The operation that computed ``y``.
        y: Its output, shape ``(N, C_out, H, W)``.
        moments: ``batch_moments(y)``; only the process's own statistics are used.
        stride: Subsampling of the positions for ``h``; 1 uses all of them, None the stride of
            :func:`stride_for`. A source that is not a convolution uses all.

    Returns:
        The derivatives in float32 (float64 for float64 input), detached; zeros if there is no
        position.
    """
    mean, weight = moments.own_mean, source.weight
    if y.numel() == 0:
        of_var = mean.new_zeros(weight.flatten(1).shape)
        groups = len(of_var) if source.input is None else source.groups
        return Derivative(mean.new_zeros(groups, of_var.shape[1]), of_var, mean, mean)
    if source.input is None:
        of_mean, of_var, var = *_by_autograd(source, y, moments), None
    else:
        if source.input.dtype != y.dtype:  # under autocast, the convolution saw a copy
            source = source._replace(input=source.input.to(y.dtype))
        of_mean = kernels.mean_patch(source, y)
        stride = stride_for(y) if stride is None else stride
        if stride == 1 and y.numel() >= _LARGE and _is_near(y, weight, moments):
            of_var, var = _var_derivative_near(source, y, mean, of_mean), moments.own_var
        else:
            of_var, var = _var_derivative(source, y, moments, stride)
    if source.is_exact:
        mean_at = mean if source.bias is None else mean - source.bias.to(mean.dtype)
        return Derivative(of_mean, of_var, mean_at, var)
    mean_at, var_at = kernels.weight_products([of_mean], [of_var], [weight], mean.dtype)[0]
    return Derivative(of_mean, of_var, mean_at, var_at / 2)


def _by_autograd(source: Source, y: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """``m`` and ``h``, ``(C_out, P)`` each, as two vector-Jacobian products."""
    mean, var = moments.own_mean, moments.own_var
    centred, r, _ = kernels.centred(y, mean, var)
    shrink = kernels.HALF_SCALE if y.dtype == torch.float16 else 1.0
    ones = torch.full_like(y, shrink * y.shape[1] / y.numel())
    of_mean, of_var = (source.gradient(y, each).to(mean.dtype) for each in (ones, centred))
    return of_mean / shrink, of_var if r is None else kernels.rescaled(of_var, r)


def stride_for(y: Tensor) -> int:
    """The default subsampling of the positions, which leaves at least 256, or all of fewer."""
    images, _, height, width = y.shape
    if images * height * width < _ENOUGH:
        return 1
    for stride in (4, 2):
        if images * math.ceil(height / stride) * math.ceil(width / stride) >= _ENOUGH:
            return stride
    return 1


def _var_derivative(
    source: Source, y: Tensor, moments: Moments, stride: int
) -> tuple[Tensor, Tensor]:
    """``h = 2 E[(y - mean) phi]`` as one weight gradient, ``(C_out, P)``; and ``v``."""
    mean, var = moments.own_mean, moments.own_var
    if stride > 1:
        y = y[:, :, ::stride, ::stride]
        y = y if kernels.is_gpu(y) else y.contiguous()  # a GPU's kernels take strides
        if y.dtype != torch.float16:
            # The subset needs its own mean: for another c, E[(y - c) phi] is not a covariance.
            mean, var = kernels.moments(y)
    centred, r, var = kernels.centred(y, mean, var)
    gradient = kernels.weight_gradient(source, centred, stride)
    if r is not None:
        return kernels.rescaled(gradient, r), var
    return (gradient if gradient.dtype == mean.dtype else gradient.to(mean.dtype)), var


def _is_near(y: Tensor, weight: Tensor, moments: Moments) -> bool:
    """Whether subtracting the mean from ``h``, not from ``y``, is cheaper and loses no digits."""
    mean, var = moments.own_mean, moments.own_var
    if kernels.is_gpu(y) or y.dtype != mean.dtype:
        return False
    if y.numel() < 4 * weight.numel():
        return False
    return bool((mean.square() <= 4 * var).all())


def _var_derivative_near(source: Source, y: Tensor, mean: Tensor, of_mean: Tensor) -> Tensor:
    """``h = 2 E[y phi] - 2 mean m`` from all positions, without a centred copy of ``y``."""
    product = kernels.weight_gradient(source, y, 1)
    by_group = product.view(source.groups, -1, of_mean.shape[1])
    scale = 2 * y.shape[1] / y.numel()  # 2 / M
    by_group.baddbmm_(mean.view(source.groups, -1, 1), of_mean[:, None], beta=scale, alpha=-2)
    return product
