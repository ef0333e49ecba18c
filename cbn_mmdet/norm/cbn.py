# Licensed under the Apache License, Version 2.0.
"""Cross-Iteration Batch Normalization.

Paper: "Cross-Iteration Batch Normalization", CVPR 2021, https://arxiv.org/abs/2002.05712
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import sync
from .layer import NormLayer, check_choice, check_count, check_norm, check_values, outside_graphs
from .moments import Moments, batch_derivative, batch_moments, full_precision
from .normalize import Normalize
from .record import Record
from .window import ENDLESS, LARGEST, WINDOW_DTYPES, MovingWindow, Past, SlidingWindow, Window

if TYPE_CHECKING:
    from .iteration import Call

_WINDOWS = {
    "moving": "the past as one function of the weight",
    "sliding": "the paper's, of single iterations",
    "step": "the forwards of one step of the optimiser",
}
_BACKWARDS = {
    "mixed": "what all images want of the common statistics is subtracted as an average",
    "window": "the past's share of that is not subtracted",
    "current": "the paper's, in which the past is a constant",
}


class CBN(NormLayer):
    """Batch normalisation with the statistics of past iterations.

    A first-order Taylor expansion moves the mean and variance of past iterations to the current
    weights of the convolution that feeds the layer (section 3.2, equations 5 to 9). The layer
    then unites them with those of the current batch. In evaluation mode it *is* ``nn.BatchNorm2d``,
    with the same parameters, buffers and names: checkpoints load either way.

    After :func:`cbn_mmdet.link` was called on the model, the layer finds its convolution by itself.
    :func:`cbn_mmdet.step` ends an iteration, and :func:`cbn_mmdet.set_window` narrows the window
    for a burn-in. In mmengine, ``CBNHook`` calls all three. A linked layer changes nothing before
    ``step``: until then its forward can be repeated. With a window of 1 in force, its output is
    that of ``nn.BatchNorm2d``.

    Past statistics stay in float32 on the layer's device. They are not part of ``state_dict``, but
    :func:`cbn_mmdet.window_state` returns them. A copied or unpickled layer has an empty window and
    no link. A layer called several times in one forward of the model keeps a window for each call.

    Args:
        num_features: Number of channels ``C`` of the input, which is ``(N, C, H, W)``.
        eps: Added to the variance.
        momentum: Weight of the new value in the running statistics; None for their plain average.
            Batches of one or two images need less than the default, 0.02 say.
        affine: Whether to learn a scale and a shift per channel.
        track_running_stats: Whether to keep running statistics for evaluation.
        window: ``'moving'`` keeps the past as one first-order function of the weight, averaged
            exponentially; its cost does not depend on the window size. ``'sliding'`` is the paper's
            window and keeps the last iterations one by one. ``'step'`` averages the forwards of one
            optimiser step, over which gradients accumulate, and is emptied when the optimiser
            steps.
        window_size: The paper's ``k``. A sliding window averages ``k`` iterations, including the
            current one; in a moving window, the current iteration has the share ``1 / k``. 1 is
            batch normalisation. With ``'auto'``, a moving window sets its share itself, between 1/8
            (where it starts) and 1, so that the past predicts the next batch too high as often as
            too low; ``window='step'`` then averages all forwards of the step.
        compensate: Whether to move past statistics to the current weights. False is the paper's
            *naive CBN*, which needs no convolution; its gradient takes the past as a constant.
            Where no weight is found that the layer's input is a function of, True refuses, and
            ``'where_possible'`` warns and is naive.
        backward: Which gradient to compute. ``'current'`` is the paper's: past statistics are
            constants, and running statistics are those of the current batch. With the others, which
            batches of one or two images need, the gradient also flows through the past to the
            convolution's weight and bias, and running statistics are the window's. These differ in
            the gradient of the layer's input: ``'window'`` leaves in the part that many images have
            in common through the statistics; ``'mixed'`` subtracts this part, by averages over past
            iterations and the batch.
        derivative_stride: Estimates the derivative of the variance on every n-th row and column
            of the output, at ``1 / n**2`` of its cost. Mean and variance use all positions. None
            takes the largest of 1, 2 and 4 that leaves at least 256 positions of the batch.
        sync: Whether the current statistics, and hence those that enter the window, are computed
            over the batches of all processes, as in ``nn.SyncBatchNorm``; with a window of 1 the
            layer is the latter. Each process moves the past to today's weights with the derivative
            of its own batch, so running statistics differ slightly between processes unless they
            are averaged, as ``CBNHook`` does. All processes of the default group must call the
            layer and ``step`` equally often, forward and backward; a batch may be empty. Without
            distributed training, this has no effect.
        window_dtype: ``'float32'`` or ``'bfloat16'``: the dtype in which the window holds the
            derivatives of past variances, which are nearly all of it. Everything else stays in
            float32. ``'bfloat16'`` halves the memory. Its rounding affects the small correction,
            and, by 2^-9, these derivatives' share of the weight's gradient.
        device: Where to create parameters and buffers.
        dtype: Dtype of parameters and buffers.

    Attributes:
        window_size: As given. A value set later is in force after :func:`cbn_mmdet.set_window`.
        window_in_force: The largest window size in force: 1 in a burn-in; 8 where the window sets
            its own.

    Raises:
        ValueError: An argument is out of its range.
    """

    kind = "CBN"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        window: str = "moving",
        window_size: int | str = "auto",
        compensate: bool | str = True,
        backward: str = "mixed",
        derivative_stride: int | None = None,
        sync: bool = False,
        window_dtype: str = "float32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        own = num_features, eps, momentum, affine, track_running_stats
        check_norm("CBN", *own, must_track=False)
        check_choice("CBN", "window", window, _WINDOWS)
        if window_size != "auto":
            text = "the iterations averaged, the current included (or 'auto')"
            check_count("CBN", "window_size", window_size, text)
        elif window == "sliding":
            raise ValueError(
                "CBN: window_size='auto' is for window='moving'. Give window='sliding' a number: "
                "the paper's COCO runs have window_size=4."
            )
        check_choice("CBN", "backward", backward, _BACKWARDS)
        if derivative_stride is not None:
            check_count("CBN", "derivative_stride", derivative_stride, "every n-th row and column")
        is_dtype = isinstance(window_dtype, str) and window_dtype in WINDOW_DTYPES
        is_compensate = isinstance(compensate, bool) or compensate == "where_possible"
        check_values(
            "CBN",
            ("window_dtype", window_dtype, is_dtype, "'float32' or 'bfloat16'"),
            ("compensate", compensate, is_compensate, "True or False or 'where_possible'"),
            ("sync", sync, isinstance(sync, bool), "True or False"),
        )
        super().__init__(*own, device=device, dtype=dtype)
        self.window = window
        self.window_size = window_size
        self.compensate = compensate
        self.backward = backward
        self.derivative_stride = derivative_stride
        self.sync = sync
        self.window_dtype = window_dtype
        self.window_in_force = self.own_window_size
        self.__dict__.update(_FRESH, _windows=[])

    # The window in force.

    @property
    def own_window_size(self) -> int:
        """The largest window size that the layer can have in force."""
        if self.window_size != "auto":
            return self.window_size
        return ENDLESS if self.window == "step" else LARGEST

    @property
    def mean_window_size(self) -> float:
        """The actual window size: the mean over windows that set their own, 1 if all are empty."""
        is_fixed = self.window_size != "auto" and self.window != "step"
        if is_fixed or self.window_in_force == 1:
            return float(self.window_in_force)
        sizes = [1 / window.share for window in self._windows if window.seen]
        return sum(sizes) / len(sizes) if sizes else 1.0

    @property
    def window_bytes(self) -> int:
        """Memory held by past iterations, in bytes."""
        return sum(window.nbytes for window in self._windows)

    def set_window(self, size: int | None) -> None:
        """Sets the largest window size in force (None: layer's own); a change drops the past."""
        if size is not None:
            check_count("CBN", "size", size, "the window size to put in force, or None")
        own, before = self.own_window_size, self.window_in_force
        self.window_in_force = own if size is None else min(size, own)
        if self.window_in_force != before:
            self._forget()
            for window in self._windows:
                window.size = self.window_in_force
        new = self.new_window()  # window_size, window or window_dtype may have been set since
        if any((each.kind, each.dtype) != (new.kind, new.dtype) for each in self._windows):
            self._forget()
            self._windows.clear()

    def new_window(self) -> Window:
        """Creates an empty window of the size in force."""
        kind = SlidingWindow if self.window == "sliding" else MovingWindow
        sets_itself = self.window_size == "auto" and self.window == "moving"
        return kind(self.window_in_force, sets_itself, WINDOW_DTYPES[self.window_dtype])

    def is_reset_by_torch(self) -> bool:
        """Whether ``update_bn`` is gathering running statistics, as far as a layer can tell."""
        return self._was_reset and self.momentum is None

    @property
    def tracks(self) -> bool:
        """Whether there are running statistics to update, which TTA may have set to None."""
        return self.track_running_stats and self._buffers["running_mean"] is not None

    def is_spread(self) -> bool:
        """Whether other processes hold parts of the batch."""
        return self.sync and sync.is_distributed()

    def reset_running_stats(self) -> None:
        """Sets the running statistics back to their start, and forgets the past."""
        super().reset_running_stats()
        if hasattr(self, "_windows"):
            self._forget()
            self._was_reset = True

    def _forget(self) -> None:
        """Empties the windows, and drops what the layer learnt in the current iteration."""
        for window in self._windows:
            window.clear()
        if self._iteration is not None:
            self._iteration.forget(self)

    # The method, in the order of the paper.

    # Looking up past iterations is left to Python, so a compiled graph ends here.
    @outside_graphs
    def _train(self, y: Tensor) -> Tensor:
        self._refuse_graphs(y)
        if self._is_plain():
            return nn.BatchNorm2d.forward(self, y)
        with full_precision(y.device.type):
            call = self._iteration.call(self, y)
            is_burn_in = self.window_in_force == 1
            if is_burn_in and not self.is_spread():
                return self._batch_norm(y, *self._averaged(None, call.repeats))
            with torch.no_grad():
                moments = self._moments(y)
                if moments is not None:
                    record = self._unite(moments, call.past)
                    if is_burn_in:
                        self._averaged(moments, call.repeats)
                    else:
                        self._derive(record, y, call)
            if moments is None:  # an empty batch, of no regions say: nothing to learn or record
                return self._batch_norm(y, *self._copies(), 0.0)
            return self._normalize(y, record, call)

    def _moments(self, y: Tensor) -> Moments | None:
        """Statistics of the current batch, of all processes if ``sync``; None if it is empty."""
        moments = batch_moments(y)
        has_positions = moments.count > 0
        if self.is_spread():
            moments = sync.joint_moments(moments)
        # If this process has positions, the joint count is not read: that would wait for the GPU.
        return moments if has_positions or moments.count > 0 else None

    def _unite(self, moments: Moments, past: Past | None) -> Record:
        """Unites the statistics of the past and of the current batch in a record."""
        record = Record(self, moments, past)
        record.mean, record.var = moments.mean, moments.var
        if past is None:
            if not self.is_spread() and moments.count == 1:
                raise ValueError(
                    f"{self.title}: Expected more than 1 value per channel when training with an "
                    "empty window. Once the window has a past one value is enough."
                )
        else:
            share = past.share
            d = moments.mean - past.mean
            record.mean, record.var = torch._foreach_lerp(past[:2], moments[:2], share)
            record.var.addcmul_(d, d, value=share * (1 - share))
        if past is None or self.backward == "current":
            record.running = moments.mean, moments.unbiased_var
        else:
            record.running = record.mean, record.var
        return record

    def _derive(self, record: Record, y: Tensor, call: Call) -> None:
        """Adds to the record what the window needs of this iteration."""
        record.window, source = call.window, call.source
        if source is None:
            return
        if source.bias is not None:
            record.bias = source.bias.to(record.mean.dtype, copy=True)
        if source.weight is not None:
            if record.window.dtype != torch.float32:
                record.weight = source.weight.detach()
            record.derivative = batch_derivative(source, y, record.moments, self.derivative_stride)

    def _normalize(self, y: Tensor, record: Record, call: Call) -> Tensor:
        record.is_spread, record.finish = self.is_spread(), self._iteration.finish
        dtype, weight, bias = record.mean.dtype, None, None
        if call.source is not None:  # else the past is a constant
            record.backward, record.scale = self.backward, self._iteration.scale
            if self.backward == "mixed" and record.past is not None:
                record.averages = record.window.sums
            # If the convolution ran without gradients, its weight gets none from the past either.
            if record.past is not None and self.backward != "current" and y.requires_grad:
                weight, bias = call.source[:2]
        own = self._parameters
        if "weight" in own and "bias" in own:
            gamma, beta = own["weight"], own["bias"]
        else:  # pruned or parametrized
            gamma, beta = self.weight, self.bias
        if gamma is not None:
            if gamma.dtype != dtype:
                gamma = gamma.to(dtype)
            record.gamma = gamma.detach().clone() if call.gamma is None else call.gamma
        if beta is not None and beta.dtype != dtype:
            beta = beta.to(dtype)
        kind = type(record.window)
        record.kind = record.mean.device, dtype, kind, record.backward, record.is_spread
        self._iteration.add(record, call.repeats)
        return Normalize.apply(y, gamma, beta, weight, bias, record)

    # Batch normalisation.

    def _is_plain(self) -> bool:
        """Whether the layer is ``nn.BatchNorm2d`` at present, running statistics included.

        It is if it was not linked and has a window of 1. It also is while torch's ``update_bn``
        gathers running statistics: that function resets them, sets ``momentum`` to None, and then
        runs forwards that no ``step`` follows.
        """
        if self.is_reset_by_torch():
            return True
        if "_is_replica" in self.__dict__:
            raise self.refusal(
                "nn.DataParallel copies the model in every forward, so that what its layers learn "
                "is lost. Use DistributedDataParallel, one process for each GPU."
            )
        if self._iteration is not None:
            return False
        if self.window_in_force == 1 and not self.is_spread():
            return True
        raise self.refusal(
            "trains with a window above 1, but was never linked to its convolution. Call "
            "cbn_mmdet.link(model) before training and cbn_mmdet.step(model) after each iteration, "
            "or add dict(type='CBNHook') to custom_hooks in the config, which does both."
        )

    def _averaged(
        self, moments: Moments | None, repeats: bool
    ) -> tuple[Tensor | None, Tensor | None, float]:
        """Records copies of the running statistics for a burn-in; returns them and the momentum.

        If ``moments`` are given, averages them into the copies; else ``F.batch_norm`` is to do it.
        """
        if repeats or not self.tracks:
            return *self._copies(), 0.0
        records = [each for each in self._iteration.records if each.layer is self]
        copies = [each.clone() for each in records[-1].running] if records else self._copies()
        momentum = self.momentum
        if momentum is None:
            count = self.num_batches_tracked  # without it BN, too, keeps its running statistics
            momentum = 0.0 if count is None else 1.0 / (float(count) + len(records) + 1)
        if moments is not None:
            for copy, new in zip(copies, (moments.mean, moments.unbiased_var), strict=True):
                copy.lerp_(new.to(copy.dtype), momentum)
        record = Record(self, None, None)
        record.running, record.kind = tuple(copies), (copies[0].device, copies[0].dtype)
        self._iteration.records.append(record)
        return *copies, momentum

    def _copies(self) -> list[Tensor | None]:
        buffers = self.running_mean, self.running_var
        return [None if buffer is None else buffer.clone() for buffer in buffers]

    def _batch_norm(self, y: Tensor, mean, var, momentum: float) -> Tensor:
        """Batch normalisation in training mode, which averages the batch into ``mean``, ``var``."""
        return F.batch_norm(y, mean, var, self.weight, self.bias, True, momentum, self.eps)

    # Overrides of nn.Module's methods.

    @property
    def title(self) -> str:
        """The layer's name in its model, for messages."""
        name = "" if self._iteration is None else self._iteration.path_of(self)
        return f"CBN layer '{name}' ({type(self).__name__})" if name else super().title

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        for window in self._windows:
            if window.device is not None:
                window.move(fn(torch.empty(0, device=window.device)).device)
        if self._iteration is not None:
            self._iteration.forget(self)
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        # Past statistics belong to the weights that are being replaced.
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, **_FRESH, "_windows": []}

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return (
            f"{super().extra_repr()}, window={self.window!r}, window_size={self.window_size!r}, "
            f"compensate={self.compensate!r}, backward={self.backward!r}, "
            f"derivative_stride={self.derivative_stride}"
            + (", sync=True" if self.sync else "")
            + (f", window_dtype={self.window_dtype!r}" if self.window_dtype != "float32" else "")
        )


# The state of a layer that has not run, apart from its windows (one per call in a forward).
_FRESH = dict(_iteration=None, _was_reset=False)


class CmBN(CBN):
    """Cross mini-batch normalisation: ``norm_cfg=dict(type='CmBN')``.

    Bochkovskiy et al. 2020, "YOLOv4", https://arxiv.org/abs/2004.10934, section 3.3, figure 4. When
    an optimiser step accumulates the gradients of several mini-batches, each one is normalised with
    the statistics of all those up to and including it; the next step begins anew. Weights stay the
    same within a step, so there is nothing to compensate, and the layer works behind any layer. It
    is :class:`CBN` with other defaults.
    """

    def __init__(
        self, num_features: int, *args, window: str = "step", compensate: bool = False, **kwargs
    ) -> None:
        super().__init__(num_features, *args, window=window, compensate=compensate, **kwargs)


class SyncCBN(CBN):
    """:class:`CBN` with ``sync=True``: in a config, ``norm_cfg=dict(type='SyncCBN')``."""

    def __init__(self, num_features: int, *args, sync: bool = True, **kwargs) -> None:
        super().__init__(num_features, *args, sync=sync, **kwargs)
