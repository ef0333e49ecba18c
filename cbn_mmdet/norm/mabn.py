# Licensed under the Apache License, Version 2.0.
"""Moving Average Batch Normalization.

Paper: "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization",
2020, https://arxiv.org/abs/2001.06838
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .layer import (
    NormLayer,
    check_count,
    check_norm,
    check_values,
    is_number,
    outside_graphs,
)
from .moments import batch_moments


class MABN(NormLayer):
    """Normalisation by moving averages of the second moment, forward and backward.

    Section 4 of the paper. With the average ``chi^2`` of ``chi_B^2 = E[x^2]`` over the last
    ``buffer_size`` batches, and its exponential average ``chi_E^2`` before this batch,

        r = clip(chi / chi_E, 1 / r_max, r_max)        x_hat = x / chi
        y = gamma r x_hat + beta                       dL/dx = (g - x_hat Psi) / chi

    where ``g`` is the gradient in ``y`` times ``gamma r``, with ``r`` as a constant, and ``Psi`` is
    the average of ``Psi_B = E[g x_hat]`` over as many backward passes. ``eps`` is added to the
    second moments. The layer subtracts no mean, so the convolution before it must be a
    :class:`CenConv2d`, in MMDetection ``conv_cfg=dict(type='CenConv2d')`` beside
    ``norm_cfg=dict(type='MABN')``. The layer cannot check this.

    Until ``warmup`` steps have passed and the window is full, the batch's own ``chi_B^2`` and
    ``Psi_B`` replace the averages. The defaults of ``warmup``, ``r_warmup`` and ``r_max`` are those
    of the authors' released code, which averages ``chi^2`` into ``chi_E^2``, not ``chi_B^2`` as
    here. If one forward calls the layer several times, each call counts. A batch with NaN or
    infinity does not change the averages, but passes these values on. ``Psi`` has the scale of the
    loss: after a loss scaler changes it, the window has both scales for ``buffer_size`` steps.

    In evaluation, the layer is batch normalisation, with a ``running_mean`` of 0 and ``chi_E^2`` as
    ``running_var``. Checkpoints contain its parameters, buffers and both windows, so a resumed run
    goes on where it stopped. Checkpoints of batch normalisation load as well: the windows start
    empty, and ``running_mean`` fades as the run's averages take over. The layer refuses activation
    checkpointing, which repeats a forward after the averages that normalised it have changed.

    Args:
        num_features: Number of channels ``C`` of the input, which is ``(N, C, H, W)``.
        eps: Added to the second moments.
        momentum: Weight of the new value in the exponential average: 1 minus the paper's, which
            is 0.98. None for the plain average of all batches.
        affine: Whether to learn a scale and a shift per channel.
        track_running_stats: Must be True: ``r`` and evaluation need the exponential average.
        buffer_size: Number of batches in a window; the paper's 16 is for batches of 2 images.
        warmup: Number of initial training steps that use the batch's own statistics.
        r_warmup: Number of initial training steps with ``r`` at 1, including those of ``warmup``.
        r_max: Limit of ``r``, at least 1.
        device: Where to create parameters and buffers.
        dtype: Dtype of parameters and buffers.

    Raises:
        ValueError: An argument is out of its range.
    """

    kind = "MABN"
    # Those that batch normalisation lacks.
    more_buffers = ("second_moments", "gradient_moments", "num_gradients_tracked")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
        track_running_stats: bool = True,
        buffer_size: int = 16,
        warmup: int = 100,
        r_warmup: int = 1000,
        r_max: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        own = num_features, eps, momentum, affine, track_running_stats
        check_norm("MABN", *own)
        check_count("MABN", "buffer_size", buffer_size, "the batches in a window")
        check_count("MABN", "warmup", warmup, "the steps with the batch's own statistics", 0)
        check_count("MABN", "r_warmup", r_warmup, "the steps without r, warmup's included", warmup)
        check_values(
            "MABN",
            ("r_max", r_max, is_number(r_max) and r_max >= 1, "a finite number of at least 1"),
        )
        factory = dict(device=device, dtype=dtype)
        super().__init__(*own, **factory)
        self.buffer_size, self.warmup = buffer_size, warmup
        self.r_warmup, self.r_max = r_warmup, r_max
        for name in ("second_moments", "gradient_moments"):
            self.register_buffer(name, torch.zeros(buffer_size, num_features, **factory))
        self.register_buffer("num_gradients_tracked", torch.tensor(0, device=device))

    def population(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The running mean and variance for a given mean and variance of the layer's input."""
        return torch.zeros_like(mean), torch.addcmul(var, mean, mean)

    @outside_graphs
    def _train(self, x: Tensor) -> Tensor:
        self._refuse_graphs(x)
        self._refuse_to_track(x)
        if x.numel() == 0:  # no region in the batch: nothing to learn
            running = self.running_mean, self.running_var
            return F.batch_norm(x, *running, self.weight, self.bias, False, 0.0, self.eps)
        chi2, weight = self._statistics(x)
        mean = bias = torch.zeros_like(chi2)
        if self.weight is not None:
            weight = self.weight * weight
        if self.bias is not None:
            bias = self.bias.to(chi2.dtype)
        x = _SecondMoment.apply(x, chi2, self)
        return F.batch_norm(x, mean, chi2, weight, bias, False, 0.0, self.eps)

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``chi^2`` and ``r``, each ``(C,)``, in float32 (float64 for a float64 input)."""
        mean, var, *_ = batch_moments(x.detach())
        own = torch.addcmul(var, mean, mean)
        steps, old = self.num_batches_tracked, self.running_var.to(own.dtype)
        chi2 = self.averaged(own, self.second_moments, steps)
        limit = 1 + (self.r_max - 1) * (steps > self.r_warmup).to(own.dtype)
        r = ((chi2 + self.eps) / (old + self.eps)).sqrt().clamp(1 / limit, limit)
        momentum = 1 / steps.clamp_min(1) if self.momentum is None else self.momentum
        is_finite = own.isfinite().all()
        self.running_mean.sub_(torch.where(is_finite, self.running_mean, 0) * momentum)
        self.running_var.add_(torch.where(is_finite, own - old, 0) * momentum)
        return chi2, r

    @torch.no_grad()
    def averaged(self, own: Tensor, window: Tensor, count: Tensor) -> Tensor:
        """Adds a batch's ``own`` statistic to its window; returns the average, at first ``own``."""
        is_finite, slot = own.isfinite().all(), (count % self.buffer_size).view(1)
        row = torch.where(is_finite, own, window.index_select(0, slot))
        window.index_copy_(0, slot, row.to(window.dtype))
        count.add_(is_finite)
        is_full = count >= max(self.buffer_size, self.warmup + 1)
        return torch.where(is_full, window.mean(0, dtype=own.dtype), own)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        own = self.more_buffers
        if f"{prefix}running_var" in state_dict and f"{prefix}{own[0]}" not in state_dict:
            for name in (*own, "num_batches_tracked"):  # a checkpoint of batch normalisation
                state_dict[prefix + name] = torch.zeros_like(getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        names = "buffer_size", "warmup", "r_warmup", "r_max"
        return ", ".join([super().extra_repr(), *(f"{k}={getattr(self, k)}" for k in names)])


class _SecondMoment(Function):
    """The identity; its backward pass subtracts the gradient through the second moment."""

    @staticmethod
    def forward(ctx, x, chi2, norm):
        ctx.save_for_backward(x, chi2)
        ctx.norm = norm
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        norm, (x, chi2) = ctx.norm, ctx.saved_tensors
        x, grad = x.to(chi2.dtype), grad.to(chi2.dtype)  # grad is g / chi
        psi = (grad * x).mean((0, 2, 3))
        psi = norm.averaged(psi, norm.gradient_moments, norm.num_gradients_tracked)
        slope = (psi / (chi2 + norm.eps))[:, None, None]
        return torch.addcmul(grad, x, slope, value=-1).to(ctx.saved_tensors[0].dtype), None, None


class CenConv2d(nn.Conv2d):
    """A convolution that subtracts each filter's mean from its weights, as MABN needs it.

    Weight centralisation, section 4 of the paper. Checkpoints contain the weight as it is learnt.

    Raises:
        ValueError: A filter has only one weight, which is 0 after subtracting its mean.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() == 1:
            raise ValueError("CenConv2d: a filter of one weight less its mean is 0. Use Conv2d.")

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Not in forward, because mmcv's joint evaluation of a convolution and its norm calls this.
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)
