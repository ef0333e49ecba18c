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

    dL/dw += 1/k sum_tau [ (U + 2 S (mu_hat - mu_bar) - 2 S c delta) m + S c h ]
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

from .moments import full_precision, standardize
from .sync import Moments, joint_sum
from .window import Estimate


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
        window = [None]
        if conv_weight is not None or conv_bias is not None:
            window = [estimate.gap]
        if conv_weight is not None:
            window += [estimate.delta, estimate.positive, *estimate.derivative]
        ctx.save_for_backward(y, gamma, estimate.mean, estimate.var, *window)
        return standardize(y, gamma, beta, estimate.mean, estimate.var, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, gamma, mean, var, gap, *compensation = ctx.saved_tensors
        with full_precision(y.device.type):
            dtype = y.dtype
            if dtype != mean.dtype:
                # Terms that nearly cancel: rounding each to half precision would leave a residue.
                grad, y = grad.to(mean.dtype), y.to(mean.dtype)
            grad_gamma, grad_beta = _sums(grad, y, mean, var, ctx.eps)
            r = (var + ctx.eps).rsqrt_()
            scale = r if gamma is None else r * gamma
            share = scale / -ctx.size
            through_mean = share * grad_beta  # U / k
            through_var = share * grad_gamma  # 2 S / (k r)
            grad_y = grad_weight = grad_bias = None
            if ctx.needs_input_grad[0]:
                grad_y = _backward_current(
                    ctx, grad, y, mean, var, r, scale, through_mean, through_var
                ).to(dtype)
            if gap is not None:
                grad_weight, grad_bias = _backward_past(
                    ctx, through_mean, through_var * r, gap, compensation
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


def _sums(grad: Tensor, y: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``sum(grad x_hat)`` and ``sum(grad)``, each ``(C,)``, in one pass: batch norm's own."""
    if y.numel() == 0:  # the kernel divides by the number of positions
        return torch.zeros_like(mean), torch.zeros_like(mean)
    return torch.ops.aten.native_batch_norm_backward(
        grad, y, None, mean, var, None, None, False, eps, [False, True, True]
    )[1:]


def _backward_current(ctx, grad, y, mean, var, r, scale, through_mean, through_var):
    """Gradient in y: its own, and what reaches it through the current batch's statistics."""
    count = y.numel() // y.shape[1]
    if ctx.spread is not None:
        slope = through_var * r
        through_mean, slope = joint_sum(
            torch.addcmul(through_mean, slope, ctx.spread.mean - mean), slope
        )
        mean, count, through_var = ctx.spread.mean, ctx.spread.count, slope / r
    through_statistics = standardize(
        y, through_var / count, through_mean / count, mean, var, ctx.eps
    )
    return through_statistics.addcmul_(grad, scale[:, None, None])


def _backward_past(ctx, through_mean, through_var, gap, compensation):
    """Gradients in the convolution's weight and bias through the compensated past.

    ``through_mean`` is ``U / k`` and ``through_var`` is ``2 S / k``.
    """
    through_mean, through_var = through_mean[:, None], through_var[:, None]
    need_weight, need_bias = ctx.needs_input_grad[3:5]
    grad_weight = grad_bias = None
    if need_bias:
        grad_bias = torch.addcmul(through_mean, through_var, gap).sum(1)
    if need_weight:
        delta, positive, m, h = compensation
        of_mean = torch.addcmul(through_mean, through_var, gap - positive * delta)  # C, T
        of_var = through_var * positive * 0.5  # C, T
        (groups, count, patch), channels = m.shape, h.shape[0]
        grad_weight = torch.bmm(of_mean.view(groups, -1, count), m).view(channels, 1, patch)
        grad_weight = grad_weight.baddbmm_(of_var[:, None], h).view(ctx.conv_shape)
    return grad_weight, grad_bias
