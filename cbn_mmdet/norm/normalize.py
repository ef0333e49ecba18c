# Licensed under the Apache License, Version 2.0.
"""Normalisation with the window's statistics, and its two gradients.

Cross-Iteration Batch Normalization, https://arxiv.org/abs/2002.05712, equation 10. With the
window's mean ``mu_bar`` and variance ``s``, ``r = (s + eps)^-1/2`` and ``x_hat = (y - mu_bar) r``,

    z = gamma x_hat + beta

Of the ``k`` iterations in the window only the current one, with ``M`` positions per channel,
carries a gradient to ``y``. For ``g``, the gradient of the loss in ``z`` times ``gamma``,

    dL/dy = r [g - (sum(g) + x_hat sum(g x_hat)) / (k M)]

which is batch normalisation's own formula with ``M`` replaced by ``k M``. If the current batch is
spread over processes, which may differ in their estimate of the past, each position receives the
sum of what reaches it from all of them. With their ``U`` and ``S`` (below) and the mean ``mu`` of
the current batch, of ``M`` positions in all,

    dL/dy = r g + (sum U + 2 sum(S (mu - mu_bar)) + 2 (y - mu) sum S) / (k M)

The compensated statistics of the past depend on today's weight and bias as well. The paper takes
them as constants; the gradient through the window adds their share. With ``U = dL/d mu_bar =
-r sum(g)`` and ``S = dL/d s = -1/2 r^2 sum(g x_hat)``, over the past iterations ``tau``,

    dL/dw += 1/k sum_tau [ (U + 2 S (mu_hat - c delta - mu_bar)) m + S c h ]
    dL/db += 1/k sum_tau [  U + 2 S (mu_hat - mu_bar) ]

where ``c`` is 1 where ``v_hat`` is positive and 0 where the maximum cut it. Without this share
the weight's gradient is not orthogonal to the weight, whose norm then drifts upwards: at one image
per batch training fails.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .moments import channel_sums, full_precision, standardize
from .sync import Moments, joint_sum
from .window import Estimate, in_dtype


def normalize(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    estimate: Estimate,
    eps: float,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    spread: Moments | None = None,
) -> Tensor:
    """Normalises ``y`` with the window's statistics.

    Args:
        y: Output of the convolution, ``(N, C, H, W)``.
        gamma: Scale, ``(C,)``, or None for 1.
        beta: Shift, ``(C,)``, or None for 0.
        estimate: The window's statistics, of which the current batch is one.
        eps: Added to the variance.
        conv_weight: The convolution's weight if the gradient is to flow through the past
            iterations' compensated statistics, else None (the paper's gradient).
        conv_bias: The convolution's bias, likewise.
        spread: The current batch's statistics if they are those of several processes, all of which
            then take part in the backward pass, else None.

    Returns:
        The normalised tensor, in the dtype and memory format of ``y``.
    """
    return _Normalize.apply(y, gamma, beta, conv_weight, conv_bias, estimate, eps, spread)


class _Normalize(Function):
    @staticmethod
    def forward(ctx, y, gamma, beta, conv_weight, conv_bias, estimate, eps, spread):
        ctx.size, ctx.eps, ctx.spread = estimate.size, eps, spread
        ctx.conv_shape = None if conv_weight is None else conv_weight.shape
        # Only where something flows through the window are its tensors kept.
        past, window = estimate.past, []
        if conv_weight is not None or conv_bias is not None:
            window = [past.mean, None if conv_bias is None else conv_bias.detach()]
        if conv_weight is not None:
            window += [past.offset, past.half, *past.derivative]
        ctx.save_for_backward(y, gamma, estimate.mean, estimate.var, *window)
        return standardize(y, gamma, beta, estimate.mean, estimate.var, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, gamma, mean, var, *past = ctx.saved_tensors
        with full_precision(y.device.type):
            r = (var + ctx.eps).rsqrt_()
            grad_gamma, grad_beta = channel_sums(grad, y, mean, var, ctx.eps, r)
            scale = r if gamma is None else r * gamma
            share = scale / -ctx.size
            through_mean = share * grad_beta  # U / k
            through_var = share * grad_gamma  # 2 S / (k r)
            grad_y = grad_weight = grad_bias = None
            if ctx.needs_input_grad[0]:
                grad_y = _backward_current(
                    ctx, grad, y, mean, var, r, scale, through_mean, through_var
                )
            if past:
                grad_weight, grad_bias = _backward_past(
                    ctx, through_mean, through_var * r, mean, *past
                )
        return (
            grad_y,
            grad_gamma if ctx.needs_input_grad[1] else None,
            grad_beta if ctx.needs_input_grad[2] else None,
            grad_weight,
            grad_bias,
            None,
            None,
            None,
        )


def _backward_current(ctx, grad, y, mean, var, r, scale, through_mean, through_var):
    """Gradient in y: its own, and what reaches it through the current batch's statistics."""
    count = y.numel() // y.shape[1]
    if ctx.spread is not None:
        slope = through_var * r
        through_mean, slope = joint_sum(
            torch.addcmul(through_mean, slope, ctx.spread.mean - mean), slope
        )
        mean, count, through_var = ctx.spread.mean, ctx.spread.count, slope / r
    through_mean, through_var = through_mean / count, through_var / count
    if y.dtype == mean.dtype:
        through_statistics = standardize(y, through_var, through_mean, mean, var, ctx.eps)
    else:
        # Terms that nearly cancel: rounding each to half precision would leave a residue.
        slope = through_var * r
        rest = torch.addcmul(through_mean, slope, mean, value=-1)
        through_statistics = torch.addcmul(rest[:, None, None], y, slope[:, None, None])
    return through_statistics.addcmul_(grad, scale[:, None, None]).to(y.dtype)


def _backward_past(
    ctx,
    through_mean,
    through_var,
    mean,
    past_mean,
    conv_bias,
    offset=None,
    half=None,
    m=None,
    h=None,
):
    """Gradients in the convolution's weight and bias through the compensated past.

    ``through_mean`` is ``U / k`` and ``through_var`` is ``2 S / k``.
    """
    need_weight, need_bias = ctx.needs_input_grad[3:5]
    grad_weight = grad_bias = None
    if conv_bias is not None:
        mean = mean - conv_bias.to(mean.dtype)
    if need_bias:
        grad_bias = torch.addcmul(through_mean, through_var, past_mean - mean) * (ctx.size - 1)
    if need_weight:
        (groups, count, patch), channels = m.shape, h.shape[0]
        rest = torch.addcmul(through_mean, through_var, mean, value=-1)
        of_mean = torch.addcmul(rest[:, None], through_var[:, None], offset)  # C, T
        of_var = through_var[:, None] * half  # C, T
        grad_weight = torch.bmm(of_mean.view(groups, -1, count), m.to(mean.dtype))
        grad_weight = grad_weight.view(channels, 1, patch)
        for rows, part in in_dtype(h, mean.dtype):
            grad_weight[rows].baddbmm_(of_var[rows, None], part)
        grad_weight = grad_weight.view(ctx.conv_shape)
    return grad_weight, grad_bias
