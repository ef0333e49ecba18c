# Licensed under the Apache License, Version 2.0.
"""Batch Renormalization.

Paper: "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
2017, https://arxiv.org/abs/1702.03275
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linking
from .layer import NormLayer, check_count, is_number
from .moments import batch_moments

# How many forwards of a layer activation checkpointing may still repeat: a head that several
# levels or several batches share runs more than once in an iteration.
_REMEMBERED = 16
# How far, in standard deviations, a channel's mean may be from that of the forward it repeats.
_SAME_MEAN = 1e-2


class _Correction(NamedTuple):
    """What one forward corrected its batch by, and the batch's mean, to know the batch again."""

    mean: Tensor
    r: Tensor
    d: Tensor


class BRN(NormLayer):
    """Batch normalisation, corrected towards the running statistics that evaluation uses.

    Algorithm 1 of the paper. With the mean ``mu_B`` and standard deviation ``sigma_B`` of the
    batch, and ``mu`` and ``sigma`` of the running statistics before this batch is added to them,

        r = clip(sigma_B / sigma, 1 / r_max, r_max)
        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = gamma [(x - mu_B) / sigma_B r + d] + beta

    where ``r`` and ``d`` are constants for the gradient. Where neither is cut, a training step
    computes what evaluation would; with ``r_max = 1`` and ``d_max = 0`` it is batch normalisation.
    The paper starts as the latter and relaxes the two limits gradually, here linearly, each from
    the end of the warm-up until a step of its own. Steps are counted by ``num_batches_tracked``,
    so a resumed run goes on where it stopped. A layer that is called several times in one forward
    of the model counts each call.

    The paper keeps a moving average of ``sigma_B``. Here the running statistics are batch
    normalisation's own, the average of the unbiased variance, and ``sigma`` is the root of that
    average plus ``eps``. It is never below the average of the roots, and the closer the less the
    batches differ. In return parameters, buffers and names are those of ``nn.BatchNorm2d``, which
    the layer *is* in evaluation mode: checkpoints load either way.

    The layer needs neither a link nor a hook. Under activation checkpointing the repeated forward
    takes ``r`` and ``d`` from the first one, which it knows by the batch's mean, and updates
    nothing.

    Args:
        num_features: Number of channels ``C`` of the input, which is ``(N, C, H, W)``.
        eps: Added to the variance, both the batch's and the running one.
        momentum: Weight of the new value in the running statistics; None for their plain average.
        affine: Whether to learn a scale and a shift per channel.
        track_running_stats: Only True: without running statistics there is nothing to correct to.
        r_max: Final limit of ``r``, at least 1.
        d_max: Final limit of ``d``, at least 0.
        warmup: Number of training steps that are batch normalisation.
        r_end: The training step that reaches ``r_max``. The paper's defaults suit a run of about
            90,000 steps; shorter ones want all three to be shorter.
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
        check_count("BRN", "num_features", num_features, "the number of channels")
        if not is_number(eps) or eps <= 0:
            raise ValueError(f"BRN: eps must be a number above 0, got {eps!r}.")
        if momentum is not None and not (is_number(momentum) and 0 <= momentum <= 1):
            raise ValueError(f"BRN: momentum must be None or from 0 to 1, got {momentum!r}.")
        if not isinstance(affine, bool):
            raise ValueError(f"BRN: affine must be True or False, got {affine!r}.")
        if track_running_stats is not True:
            raise ValueError(
                f"BRN: track_running_stats must be True, got {track_running_stats!r}: the layer "
                "corrects its batch towards the running statistics. Use type='BN' to do without."
            )
        if not is_number(r_max) or r_max < 1:
            raise ValueError(f"BRN: r_max must be a finite number of at least 1, got {r_max!r}.")
        if not is_number(d_max) or d_max < 0:
            raise ValueError(f"BRN: d_max must be a finite number of at least 0, got {d_max!r}.")
        check_count("BRN", "warmup", warmup, "the steps that are batch normalisation", 0)
        for name, end, limit in (("r_end", r_end, "r_max"), ("d_end", d_end, "d_max")):
            meaning = f"the step that reaches {limit}, not before the end of warmup"
            check_count("BRN", name, end, meaning, warmup)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.r_max = r_max
        self.d_max = d_max
        self.warmup = warmup
        self.r_end = r_end
        self.d_end = d_end
        self._corrections = _no_corrections()

    def limits(self) -> tuple[Tensor, Tensor]:
        """The limits of ``r`` and ``d`` in force in the next training step.

        Returns:
            From ``(1, 0)`` in the warm-up to ``(r_max, d_max)``, two tensors without dimensions:
            the count of steps stays on its device, where reading it would wait for the GPU.
        """
        after_warmup = self.num_batches_tracked + (1 - self.warmup)
        r_share, d_share = (
            (after_warmup / max(end - self.warmup, 1)).clamp(0, 1)
            for end in (self.r_end, self.d_end)
        )
        return 1 + (self.r_max - 1) * r_share, self.d_max * d_share

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input``, ``(N, C, H, W)``, to a tensor of the same shape and dtype.

        Raises:
            ValueError: ``input`` is not 4-dimensional or has another number of channels, or it
                has one value per channel in training.
            RuntimeError: Activation checkpointing repeats a forward that the layer does not know,
                or a training step is traced or exported.
        """
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        return self._train(input)

    # Which forward a repetition repeats is for Python to look up: a compiled graph ends here.
    @torch.compiler.disable
    def _train(self, input: Tensor) -> Tensor:
        linking.refuse_graphs(self)
        if input.numel() == 0:  # no region in the batch: nothing to learn
            return self._batch_norm(input, self.weight, self.bias)
        if linking.is_recomputation():
            return self._batch_norm(input, *self._corrected_affine(self._recalled(input)))
        correction = self._correction(input)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / (float(self.num_batches_tracked) + 1)
        output = self._batch_norm(input, *self._corrected_affine(correction), momentum)
        self.num_batches_tracked.add_(1)
        self._corrections.appendleft(correction)
        return output

    def _correction(self, x: Tensor) -> _Correction:
        """``r`` and ``d``, each ``(C,)``, in float32 (float64 for a float64 layer)."""
        mean, var = batch_moments(x.detach())
        r_max, d_max = self.limits()
        inverse = (self.running_var.to(var.dtype) + self.eps).rsqrt()  # 1 / sigma
        r = (var + self.eps).sqrt() * inverse
        d = (mean - self.running_mean) * inverse
        return _Correction(mean, r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max))

    def _corrected_affine(self, correction: _Correction) -> tuple[Tensor, Tensor]:
        """``gamma r`` and ``gamma d + beta``: what makes batch normalisation the whole method."""
        _, r, d = correction
        if self.affine:
            weight, bias = self.weight * r, torch.addcmul(self.bias, self.weight, d)
        else:
            weight, bias = r, d
        dtype = self.running_var.dtype
        return weight.to(dtype), bias.to(dtype)

    def _batch_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, momentum: float = 0.0
    ) -> Tensor:
        """Batch normalisation; with a momentum of 0 the running statistics stay as they are."""
        # Handed over even then: checkpointing compares what a forward and its repetition save.
        running = self.running_mean, self.running_var
        return F.batch_norm(x, *running, weight, bias, True, momentum, self.eps)

    def _recalled(self, x: Tensor) -> _Correction:
        """The correction of the forward that is repeated: that of the batch with this mean."""
        mean, var = batch_moments(x.detach())
        distances = [math.inf]
        if self._corrections:
            means = torch.stack([correction.mean for correction in self._corrections])
            scale = (var + self.eps).rsqrt()
            # An overflow is for the gradient scaler to find: it must not look like another batch.
            apart = (means.nan_to_num() - mean.nan_to_num()).abs() * scale.nan_to_num()
            distances = apart.amax(1).tolist()
        nearest = min(range(len(distances)), key=distances.__getitem__)  # the newest of equals
        if not distances[nearest] <= _SAME_MEAN:
            raise RuntimeError(
                f"{self._title}: activation checkpointing repeats a forward on a batch that is "
                f"none of the layer's last {_REMEMBERED}, so what corrected it is not known any "
                "more. Turn checkpointing off (with_cp=False) around this layer."
            )
        return self._corrections[nearest]

    # What nn.Module does with a layer.

    def _apply(self, fn, *args, **kwargs):
        self._corrections.clear()
        return super()._apply(fn, *args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_corrections": _no_corrections()}

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, "
            f"warmup={self.warmup}, r_end={self.r_end}, d_end={self.d_end}"
        )


def _no_corrections() -> deque[_Correction]:
    return deque(maxlen=_REMEMBERED)
