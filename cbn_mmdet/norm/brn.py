# Licensed under the Apache License, Version 2.0.
"""Batch Renormalization.

Paper: "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
2017, https://arxiv.org/abs/1702.03275
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import (
    NormLayer,
    check_count,
    check_norm,
    check_values,
    is_number,
    outside_graphs,
)
from .moments import batch_moments


class BRN(NormLayer):
    """Batch normalisation, corrected towards the running statistics that evaluation uses.

    Algorithm 1 of the paper. With the mean ``mu_B`` and standard deviation ``sigma_B`` of the
    batch, and the running ``mu`` and ``sigma`` before this batch updates them,

        r = clip(sigma_B / sigma, 1 / r_max, r_max)
        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = gamma [(x - mu_B) / sigma_B r + d] + beta

    where ``r`` and ``d`` are constants for the gradient. If neither is clipped, a training step
    computes what evaluation would; with ``r_max = 1`` and ``d_max = 0``, it is batch normalisation.
    The paper starts as batch normalisation and relaxes both limits gradually. Here they grow
    linearly, from the end of the warm-up to the steps ``r_end`` and ``d_end``. The layer counts
    steps in ``num_batches_tracked``, so a resumed run goes on where it stopped. If one forward of
    the model calls the layer several times, each call counts.

    The paper keeps a moving average of ``sigma_B``. Here, running statistics are those of batch
    normalisation: ``sigma`` is the root of the averaged unbiased variance plus ``eps``. It is never
    below the average of the roots, and the less the batches differ, the closer it is. In return,
    parameters, buffers and names are those of ``nn.BatchNorm2d``, which the layer *is* in
    evaluation mode: checkpoints load either way.

    The layer needs neither a link nor a hook. It refuses activation checkpointing, which repeats a
    forward after the running statistics that corrected it have changed.

    Args:
        num_features: Number of channels ``C`` of the input, which is ``(N, C, H, W)``.
        eps: Added to the variance, both the batch's and the running one.
        momentum: Weight of the new value in the running statistics; None for their plain average.
        affine: Whether to learn a scale and a shift per channel.
        track_running_stats: Must be True: the layer corrects towards the running statistics.
        r_max: Final limit of ``r``, at least 1.
        d_max: Final limit of ``d``, at least 0.
        warmup: Number of initial training steps that are plain batch normalisation.
        r_end: The training step that reaches ``r_max``. The paper's defaults suit a run of about
            90,000 steps; for shorter runs, reduce ``warmup``, ``r_end`` and ``d_end``.
        d_end: The training step that reaches ``d_max``.
        device: Where to create parameters and buffers.
        dtype: Dtype of parameters and buffers.

    Raises:
        ValueError: An argument is out of its range.
    """

    kind = "BRN"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 5000,
        r_end: int = 40000,
        d_end: int = 25000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        own = num_features, eps, momentum, affine, track_running_stats
        check_norm("BRN", *own)
        check_values(
            "BRN",
            ("r_max", r_max, is_number(r_max) and r_max >= 1, "a finite number of at least 1"),
            ("d_max", d_max, is_number(d_max) and d_max >= 0, "a finite number of at least 0"),
        )
        check_count("BRN", "warmup", warmup, "the steps that are batch normalisation", 0)
        for name, end, limit in (("r_end", r_end, "r_max"), ("d_end", d_end, "d_max")):
            meaning = f"the step that reaches {limit}, not before the end of warmup"
            check_count("BRN", name, end, meaning, warmup)
        super().__init__(*own, device=device, dtype=dtype)
        self.r_max = r_max
        self.d_max = d_max
        self.warmup = warmup
        self.r_end = r_end
        self.d_end = d_end

    def limits(self) -> tuple[Tensor, Tensor]:
        """The limits of ``r`` and ``d`` for the next training step.

        Returns:
            Two tensors without dimensions, from ``(1, 0)`` in the warm-up to ``(r_max, d_max)``.
            The step count stays on its device, because reading it would wait for the GPU.
        """
        after_warmup = self.num_batches_tracked + (1 - self.warmup)
        r_share, d_share = (
            (after_warmup / max(end - self.warmup, 1)).clamp(0, 1)
            for end in (self.r_end, self.d_end)
        )
        return 1 + (self.r_max - 1) * r_share, self.d_max * d_share

    @outside_graphs
    def _train(self, input: Tensor) -> Tensor:
        self._refuse_graphs(input)
        self._refuse_to_track(input)
        if input.numel() == 0:  # no region in the batch: nothing to learn
            return self._batch_norm(input, self.weight, self.bias)
        r, d = self._correction(input)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / (float(self.num_batches_tracked) + 1)
        if self.weight is not None:
            r, d = self.weight * r, self.weight * d
        if self.bias is not None:
            d = self.bias + d
        # gamma r and gamma d + beta, with which batch normalisation computes y.
        weight, bias = (each.to(self.running_var.dtype) for each in (r, d))
        output = self._batch_norm(input, weight, bias, momentum)
        self.num_batches_tracked.add_(1)
        return output

    @torch.no_grad()
    def _correction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``r`` and ``d``, each ``(C,)``, in float32 (float64 for a float64 layer)."""
        mean, var, *_ = batch_moments(x.detach())
        r_max, d_max = self.limits()
        inverse = (self.running_var.to(var.dtype) + self.eps).rsqrt()  # 1 / sigma
        r = (var + self.eps).sqrt() * inverse
        d = (mean - self.running_mean) * inverse
        return r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)

    def _batch_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, momentum: float = 0.0
    ) -> Tensor:
        """Batch normalisation; with a momentum of 0, running statistics do not change."""
        running = self.running_mean, self.running_var
        return F.batch_norm(x, *running, weight, bias, True, momentum, self.eps)

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, "
            f"warmup={self.warmup}, r_end={self.r_end}, d_end={self.d_end}"
        )
