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

Any other layer with a weight has the same derivatives, with ``phi = dy / dw``, of which autograd
tells the sums. Its ``m`` differs from channel to channel, and its products are computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .kernels import statistics_dtype

# y - mu, as an fp16 output gradient, is divided by its standard deviation and by the number of
# positions so that the sum over 1e5 positions cannot overflow; this factor keeps the quotient out
# of fp16's subnormal range.
_HALF_SCALE = 16.0
_TINY = 1e-20  # below any variance of fp16 numbers but zero

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


class Source(NamedTuple):
    """What computed a tensor ``y``, as a function of a weight.

    Attributes:
        weight: The weight that was used, ``(C_out, ...)``, in autograd's graph if it is no
            parameter; None if it does not train, so that there is nothing to compensate.
        bias: The convolution's parameter, or None.
        input: The convolution's, ``(N, C_in, H_in, W_in)``; None if it is no convolution.
        padding: The convolution's zeros on each side; likewise stride, dilation and groups.
        is_exact: Whether ``y`` is ``weight . phi + bias``, and nothing else is added.
        leaf: What autograd is asked for: the weight as the module has it, and the bias.
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
    def of(cls, conv: nn.Conv2d, x: Tensor) -> Source:
        """A plain convolution with its own weight, whose input is ``x``."""
        weight, bias = conv._parameters["weight"], conv._parameters["bias"]
        if not weight.requires_grad:
            return cls(None, bias)
        padding = conv.padding
        if conv.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode), (0, 0)
        return cls(weight, bias, x, padding, conv.stride, conv.dilation, conv.groups)

    @classmethod
    def by_autograd(cls, weight: Tensor, bias: Tensor | None, transposed: int | None) -> Source:
        """What is no convolution, or a transposed one; its bias is one more weight of each row."""
        leaf = (weight,) if bias is None or not bias.requires_grad else (weight, bias)
        source = cls(None, None, is_exact=False, leaf=leaf, groups_of_transposed=transposed)
        return source._replace(weight=source.rows(leaf))

    def rows(self, leaf: Sequence[Tensor]) -> Tensor:
        """What belongs to the leaf, its gradients say, by output channels: ``(C_out, P)``."""
        weight, *bias = leaf
        groups = self.groups_of_transposed
        if groups is not None:  # C_in, C_out / groups, kh, kw
            weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        rows = weight.reshape(weight.shape[0], -1)  # of a norm's it has but one dimension
        return torch.cat([rows, *(each[:, None] for each in bias)], 1)


class Derivative(NamedTuple):
    """Derivatives of a channel's statistics in the weight that produces it.

    Attributes:
        mean: ``m`` (``d mu / d w``), shape ``(groups, P)`` with ``P = C_in / groups * kh * kw``;
            if it is no convolution, ``(C_out, P)``.
        var: ``h`` (``d v / d w``), shape ``(C_out, P)``; of a moving window ``h'`` from the
            backward pass on.
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
    source: Source, y: Tensor, moments: Moments, stride: int | None = None
) -> Derivative:
    """Derivatives of ``y``'s mean and variance in the weight of what computed it.

    ``m`` is taken over all positions, which makes the compensated mean exact. ``h`` only steers a
    second-order-small correction, so it may be estimated on every ``stride``-th row and column:
    that is the weight gradient of the same convolution with its stride multiplied, at
    ``1 / stride**2`` of the cost.

    Args:
        source: What computed ``y``.
        y: Its output, shape ``(N, C_out, H, W)``.
        moments: ``batch_moments(y)``, of which the process's own statistics are used.
        stride: Subsampling of the positions for ``h``; 1 takes all of them, None as
            :func:`stride_for` says. What is no convolution takes all.

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
        if source.input.dtype != y.dtype:  # autocast's convolution saw a copy of its input
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
    centred, rest, _ = _centred(y, mean, var)
    shrink = _HALF_SCALE if y.dtype == torch.float16 else 1.0
    ones = torch.full_like(y, shrink * y.shape[1] / y.numel())
    of_mean, of_var = (
        source.rows(
            # A bias may be there and not be used.
            torch.autograd.grad(y, source.leaf, each, retain_graph=True, materialize_grads=True)
        ).to(mean.dtype)
        for each in (ones, centred)
    )
    return of_mean / shrink, of_var if rest is None else of_var * rest[:, None]


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
    source: Source, y: Tensor, moments: Moments, stride: int
) -> tuple[Tensor, Tensor]:
    """``h = 2 E[(y - mean) phi]`` as one weight gradient, ``(C_out, P)``; and ``v``."""
    mean, var = moments.own_mean, moments.own_var
    if stride > 1:
        y = y[:, :, ::stride, ::stride].contiguous()
        if y.dtype != torch.float16:
            # The subset's own mean: about another centre, E[(y - c) phi] is not a covariance.
            mean, var = kernels.moments(y)
    centred, rest, var = _centred(y, mean, var)
    gradient = kernels.weight_gradient(source, centred, stride)
    if rest is not None:
        return gradient * rest[:, None], var  # in the dtype of the latter
    return (gradient if gradient.dtype == mean.dtype else gradient.to(mean.dtype)), var


def _centred(y: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """``2 (y - mean) / M``, as an output gradient, what of it is left to be multiplied, and ``v``.

    In fp16 mean and variance are found anew.
    """
    scale = 2 * y.shape[1] / y.numel()  # 2 / M
    if y.dtype == torch.float16:
        like = mean.dtype, mean.device
        of, nothing = (len(mean), _HALF_SCALE * scale, *like), kernels.constant(len(mean), 0, *like)
        # A variance of zero leaves a constant channel at 0.
        centred, _, r = torch.native_batch_norm(
            y, kernels.constant(*of), nothing, None, None, True, 0.0, _TINY
        )
        if not kernels.is_gpu(y):  # it rounds y r and mean r apart, and r is 1e10 there
            centred.masked_fill_((r * r * _TINY > 0.5).view(-1, 1, 1), 0)
        rest = kernels.constant(len(mean), 1 / _HALF_SCALE, *like) / r
        return centred, rest, torch.addcmul(nothing, rest, rest, value=_HALF_SCALE**2)
    if kernels.is_gpu(y):  # one launch, and on a CPU three times the time of two
        divisor = kernels.constant(len(mean), scale**-2, mean.dtype, mean.device)
        return kernels.standardize(y, None, None, mean, divisor, 0.0), None, var
    offset = (mean * -scale).view(-1, 1, 1)
    centred = torch.add(offset, y, alpha=scale)
    return centred if centred.dtype == y.dtype else centred.to(y.dtype), None, var


def _is_near(y: Tensor, weight: Tensor, moments: Moments) -> bool:
    """Whether to take the mean off ``h`` and not off ``y``: it is cheaper, and loses no digits."""
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
