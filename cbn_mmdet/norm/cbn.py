# Licensed under the Apache License, Version 2.0.
"""Cross-Iteration Batch Normalization.

Paper: "Cross-Iteration Batch Normalization", CVPR 2021, https://arxiv.org/abs/2002.05712
"""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import linking, sync
from .layer import NormLayer, check_count, is_number
from .moments import (
    batch_derivative,
    batch_moments,
    full_precision,
    is_plain,
    statistics_dtype,
)
from .normalize import normalize
from .sync import Moments
from .window import Entry, Estimate, Window

_BACKWARDS = ("window", "current")
WINDOW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Positions from which the derivative of the variance is estimated if there are more.
_ENOUGH = 256


class _Record(NamedTuple):
    """What a forward leaves for the end of the iteration.

    Attributes:
        order: Greater than that of every earlier record of any layer.
        entry: For the window.
        running_mean: To be averaged into the running mean, ``(C,)``.
        running_var: Likewise.
        positive: Which past variances were not cut to zero, bool ``(C, T)``, or None.
    """

    order: int
    entry: Entry
    running_mean: Tensor
    running_var: Tensor
    positive: Tensor | None


class _Before(NamedTuple):
    """The running statistics before a forward of batch normalisation, which changes them."""

    order: int
    buffers: list[Tensor]


_order = itertools.count()


class CBN(NormLayer):
    """Batch normalisation with the statistics of the last ``window_size`` iterations.

    The mean and variance of past iterations are moved to the current weights of the convolution
    that feeds the layer by a first-order Taylor expansion (section 3.2, equations 5 to 9), and
    averaged with those of the current batch. In evaluation mode the layer *is*
    ``nn.BatchNorm2d``, whose parameters, buffers and names it has: checkpoints load either way.

    The layer finds its convolution by itself once the model was given to
    :func:`cbn_mmdet.link`; :func:`cbn_mmdet.step` ends an iteration and
    :func:`cbn_mmdet.set_window` narrows the window for a burn-in. In mmengine, ``CBNHook`` calls
    the three. Until an iteration ends its forward can be repeated: with a window above 1, what a
    forward learns about the statistics is kept apart, and ``step`` alone puts it into the window
    and the running statistics. With a window of 1 in force the layer is ``nn.BatchNorm2d`` in
    training, too, which updates the running statistics in each forward.

    Past statistics are kept in float32, on the layer's device, and are not part of
    ``state_dict``, but :func:`cbn_mmdet.window_state` has them. A copied or unpickled layer starts
    with an empty window and without a link.
    Called several times in one forward of the model, the layer keeps a window for each call.

    Args:
        num_features: Number of channels ``C`` of the input, which is ``(N, C, H, W)``.
        eps: Added to the variance.
        momentum: Weight of the new value in the running statistics; None for their plain average.
            Batches of one or two images want less than the default, 0.02 say.
        affine: Whether to learn a scale and a shift per channel.
        track_running_stats: Whether to keep running statistics for evaluation.
        window_size: The paper's ``k``, the number of iterations averaged, the current one
            included; 1 is batch normalisation.
        compensate: Whether to move past statistics to the current weights. False is the paper's
            *naive CBN*, which needs no convolution.
        backward: ``'window'`` lets the gradient flow to the convolution's weight through the
            compensated statistics of the past as well, and averages the window's statistics into
            the running ones; batches of one or two images need it. ``'current'`` is the paper's:
            past statistics are constants, running statistics those of the current batch.
        derivative_stride: Estimates the derivative of the variance on every n-th row and column
            of the output, at ``1 / n**2`` of its cost. Mean and variance use all positions. None
            for the largest of 1, 2 and 4 that leaves 256 positions of the batch or more.
        sync: Whether the current statistics, and hence those that enter the window, are those of
            the batches of all processes together, as in ``nn.SyncBatchNorm``, which this is with a
            window of 1. Each process moves the past to today's weights with the derivative of its
            own batch, so with ``backward='window'`` their running statistics differ slightly
            unless they are averaged, as ``CBNHook`` does. All processes of the default group must
            call the layer equally often, forward and backward; a batch may be empty. Without
            distributed training it changes nothing.
        window_dtype: ``'float32'`` or ``'bfloat16'``: how the window holds the derivatives of past
            variances, which are nearly all of it. Everything else stays in float32. Their rounding
            touches the small correction, and by 2^-9 their share of the weight's gradient.
            ``'bfloat16'`` halves the memory.
        device: Where to create parameters and buffers.
        dtype: Dtype of parameters and buffers.

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
        window_size: int = 8,
        compensate: bool = True,
        backward: str = "window",
        derivative_stride: int | None = None,
        sync: bool = False,
        window_dtype: str = "float32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("CBN", "num_features", num_features, "the number of channels")
        check_count(
            "CBN", "window_size", window_size, "the number of iterations, the current included"
        )
        if derivative_stride is not None:
            check_count("CBN", "derivative_stride", derivative_stride, "every n-th row and column")
        if not isinstance(backward, str) or backward not in _BACKWARDS:
            raise ValueError(
                f"CBN: backward must be 'window' (gradient through the window) or 'current' "
                f"(the paper's), got {backward!r}."
            )
        if not isinstance(window_dtype, str) or window_dtype not in WINDOW_DTYPES:
            raise ValueError(
                f"CBN: window_dtype must be 'float32' or 'bfloat16', got {window_dtype!r}."
            )
        switches = dict(
            affine=affine, track_running_stats=track_running_stats, compensate=compensate, sync=sync
        )
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"CBN: {name} must be True or False, got {value!r}.")
        if not is_number(eps) or eps < 0:
            raise ValueError(f"CBN: eps must be a number of at least 0, got {eps!r}.")
        if momentum is not None and not (is_number(momentum) and 0 <= momentum <= 1):
            raise ValueError(f"CBN: momentum must be None or from 0 to 1, got {momentum!r}.")
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.window_size = window_size
        self.compensate = compensate
        self.backward = backward
        self.derivative_stride = derivative_stride
        self.sync = sync
        self.window_dtype = window_dtype
        self._window = window_size  # in force
        self.__dict__.update(_fresh_state())

    @property
    def window(self) -> int:
        """The window size in force: 1 during a burn-in, else up to ``window_size``.

        It is 1 as well while torch's ``update_bn`` gathers running statistics, which resets them
        and sets ``momentum`` to None, and then runs forwards that no :func:`step` follows.
        """
        return 1 if self._was_reset and self.momentum is None else self._window

    @property
    def feeder(self) -> nn.Module | None:
        """The module whose output the layer was last handed, or None before it has run."""
        return None if self._feeder is None else self._feeder()

    @property
    def window_bytes(self) -> int:
        """Memory held by past iterations, in bytes."""
        return sum(window.nbytes for window in self._windows)

    def set_window(self, size: int) -> None:
        """Sets the window size in force, at most ``window_size``; a change forgets the past."""
        check_count("CBN", "size", size, "the window size to put in force")
        size = min(size, self.window_size)
        if size != self._window:
            self._window = size
            self._windows.clear()
            self._records.clear()

    def reset_running_stats(self) -> None:
        """Sets the running statistics back to their start, and forgets the past."""
        super().reset_running_stats()
        self.__dict__.update(_fresh_state(), _was_reset=True)

    # The end of an iteration, in the two parts between which all layers' checks are read at once.

    def checks(self) -> list[tuple[int, Tensor]]:
        """What the iteration taught, in the order of the forwards: its order and a check.

        The check is a vector that is finite if nothing that was learnt is NaN or infinite.
        """
        checks = [
            (
                record.order,
                torch.cat((*record.entry.vectors, record.running_mean, record.running_var)),
            )
            for _, record in sorted(self._records.items())
        ]
        if self._before is not None:
            checks.append((self._before.order, torch.cat((self.running_mean, self.running_var))))
        return checks

    def step(self, finite: Iterable[bool]) -> list[tuple[Window, _Record]]:
        """Ends an iteration: what its forward recorded becomes part of the window.

        Args:
            finite: For each of :meth:`checks`, whether it is. What is not is dropped.

        Returns:
            The records that were kept, each with the window of its call. The running statistics
            are still to be updated with them, by :func:`update_running_stats`.
        """
        kept, finite = [], iter(finite)
        for call, record in sorted(self._records.items()):
            if next(finite):
                window = self._window_of(call)
                window.push(record.entry)
                kept.append((window, record))
        if self._before is not None and not next(finite):
            for buffer, before in zip(self._buffers.values(), self._before.buffers, strict=True):
                buffer.copy_(before)
        self._records.clear()
        self._before = None
        self._was_reset = False
        self._forward_id, self._call = None, 0
        return kept

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input``, ``(N, C, H, W)``, to a tensor of the same shape and dtype.

        Raises:
            ValueError: ``input`` is not 4-dimensional or has another number of channels, or it
                has one value per channel and the window is empty.
            RuntimeError: The layer trains with a window above 1 and was not linked, what feeds
                it is no plain convolution, or a training step is traced or exported.
        """
        self._check_input_dim(input)
        if not self.training:
            if not linking.is_compiling():
                self._note_feeder(input)
            return super().forward(input)
        return self._train(input)

    # What is known of past iterations is for Python to look up: a compiled graph ends here.
    @torch.compiler.disable
    def _train(self, input: Tensor) -> Tensor:
        linking.refuse_graphs(self)
        with full_precision(input.device.type):
            if linking.is_recomputation():
                return self._recompute(input)
            conv, conv_input = self._resolve(input)
            call = self._next_call()
            if self.window == 1:
                self._keep_running_stats()
                if not self._is_spread():
                    return super().forward(input)
                conv = conv_input = None
            moments = self._moments(input)
            if moments is None:  # no region in the batch: nothing to learn or to record
                return self._batch_norm(input)
            estimate = self._estimate(call, moments, conv)
            if estimate.size == 1 and not self._is_spread() and moments.count == 1:
                raise ValueError(
                    f"{self._title}: Expected more than 1 value per channel when training with an "
                    f"empty window, got an input of shape {tuple(input.shape)}."
                )
            record = self._record(input, moments, estimate, conv, conv_input)
            if self.window == 1:
                update_running_stats([(self, record)])
            else:
                self._records[call] = record
            return self._normalize(input, estimate, moments, conv)

    # The method, in the order of the paper.

    @torch.no_grad()
    def _moments(self, y: Tensor) -> Moments | None:
        """Statistics of the current batch, of all processes if ``sync``; None if it is empty."""
        count = y.numel() // self.num_features
        if count > 0:
            mean, var = batch_moments(y.detach())
        else:
            mean = var = y.new_zeros(self.num_features, dtype=statistics_dtype(y.dtype))
        moments = Moments(mean, var, count, mean)
        if self._is_spread():
            moments = sync.joint_moments(moments)
        # Where this process has positions the sum need not be read, which a GPU would wait for.
        return moments if count > 0 or moments.count > 0 else None

    def _is_spread(self) -> bool:
        """Whether other processes hold parts of the batch."""
        return self.sync and sync.is_distributed()

    def _estimate(self, call: int, moments: Moments, conv: nn.Conv2d | None) -> Estimate:
        if self.window == 1:
            return Estimate(moments.mean, moments.var, 1, None)
        window = self._window_of(call)
        if conv is None:
            if window.feeder is not None:  # compensate was turned off
                window.clear()
            return window.estimate(moments.mean, moments.var, None, None)
        feeder = None if window.feeder is None else window.feeder()
        if feeder not in (None, conv):
            raise RuntimeError(
                f"{self._title}: was fed by {linking.name_of(feeder)} so far, and now by "
                f"{linking.name_of(conv)} in the same place of the model's forward. Past "
                "statistics of one convolution say nothing of another: give each its own CBN."
            )
        if feeder is None or not window.fits(conv.weight):
            window.clear()
            window.feeder = weakref.ref(conv)
        return window.estimate(moments.mean, moments.var, conv.weight, conv.bias)

    def _normalize(
        self, y: Tensor, estimate: Estimate, moments: Moments, conv: nn.Conv2d | None
    ) -> Tensor:
        dtype = estimate.mean.dtype
        past = estimate.past
        # Of a convolution that ran without gradients the weight gets none this way either.
        learns = y.requires_grad and conv is not None
        through_window = self.backward == "window" and past is not None and learns
        return normalize(
            y,
            None if self.weight is None else self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
            estimate,
            self.eps,
            conv.weight if through_window and past.derivative is not None else None,
            conv.bias if through_window else None,
            moments if self._is_spread() else None,
        )

    @torch.no_grad()
    def _record(
        self,
        y: Tensor,
        moments: Moments,
        estimate: Estimate,
        conv: nn.Conv2d | None,
        conv_input: Tensor | None,
    ) -> _Record:
        """What this forward adds to the window and to the running statistics."""
        if self.backward == "window" and estimate.size > 1:
            running = estimate.mean, estimate.var
        else:
            running = moments.mean, moments.unbiased_var
        entry = self._entry(y, moments, conv, conv_input)
        positive = None if estimate.past is None else estimate.past.positive
        return _Record(next(_order), entry, *running, positive)

    def _entry(
        self,
        y: Tensor,
        moments: Moments,
        conv: nn.Conv2d | None,
        conv_input: Tensor | None,
    ) -> Entry:
        mean, var = moments.mean, moments.var
        if conv is None:
            return Entry.of(mean, var)
        if conv.bias is not None:
            mean = mean - conv.bias.to(mean.dtype)
        if conv_input is None:
            return Entry.of(mean, var)
        stride = self.derivative_stride or stride_for(y)
        own_var = None if self._is_spread() else var
        derivative = batch_derivative(conv, conv_input, y, moments.own_mean, stride, own_var)
        if self.window_dtype != "float32":
            rounded = derivative.var.to(WINDOW_DTYPES[self.window_dtype])
            derivative = derivative._replace(var=rounded)
        return Entry.of(mean, var, derivative, conv.weight)

    def _keep_running_stats(self) -> None:
        """Lets the end of the iteration undo what a batch with NaN does to them."""
        if self._before is None and self.track_running_stats and linking.is_watched(self):
            self._before = _Before(next(_order), [each.clone() for each in self._buffers.values()])

    # Which call of the iteration this is, and which convolution feeds it.

    def _next_call(self) -> int:
        """Numbers the calls within one forward of the model; a new forward starts again at 0.

        Outside of a watched model's forward, a further call is a repetition of the first.
        """
        forward = linking.current_forward()
        if forward is None or forward != self._forward_id:
            self._forward_id, self._call = forward, 0
            self._warn_if_not_stepped()
            self._records.clear()
        else:
            self._call += 1
        return self._call

    def _warn_if_not_stepped(self) -> None:
        """Tells a loop that trains but never ends an iteration: its window would stay empty."""
        version = None if self.weight is None else self.weight._version
        if self._records and version != self._recorded_version:
            # Without the layer's name, so that Python shows it once and not for every layer.
            warnings.warn(
                "CBN: the weights changed since the last forward, but cbn_mmdet.step(model) was "
                "not called, so the window stays as it was and running statistics are not "
                "updated. Call it after each iteration, or use CBNHook in mmengine.",
                stacklevel=2,
            )
        self._recorded_version = version

    def _window_of(self, call: int) -> Window:
        while len(self._windows) <= call:
            self._windows.append(Window(self._window - 1))
        return self._windows[call]

    def _recompute(self, input: Tensor) -> Tensor:
        """The same output again, for activation checkpointing: nothing is recorded twice."""
        if self.window_size > 1 and self._call > 0:  # in a burn-in, too, before its time is lost
            raise RuntimeError(
                f"{self._title}: was called {self._call + 1} times in one forward, and activation "
                "checkpointing repeats the calls in another order, so they cannot be told apart. "
                "Turn checkpointing off (with_cp=False) around this layer."
            )
        moments = conv = None
        if self.window > 1 or self._is_spread():
            moments = self._moments(input)
        if moments is None:
            return self._batch_norm(input)
        if self.window > 1:
            # Not the layer's own feeder, which an evaluation in between may have changed.
            feeder = self._window_of(0).feeder
            conv = None if feeder is None else feeder()
        return self._normalize(input, self._estimate(0, moments, conv), moments, conv)

    def _batch_norm(self, input: Tensor) -> Tensor:
        """Batch normalisation in training that leaves the running statistics alone."""
        # Copies and not None: checkpointing counts what a forward saves for its backward.
        running = [
            None if buffer is None else buffer.clone()
            for buffer in (self.running_mean, self.running_var)
        ]
        return F.batch_norm(input, *running, self.weight, self.bias, True, 0.0, self.eps)

    def _resolve(self, input: Tensor) -> tuple[nn.Conv2d | None, Tensor | None]:
        """The convolution that feeds the layer, and its input if a derivative is to be formed."""
        signature = self._note_feeder(input)
        if self.window_size == 1:
            return None, None
        if not linking.is_watched(self):
            if self.window > 1:
                raise RuntimeError(
                    f"{self._title}: trains with a window of {self.window} but was never linked "
                    "to its convolution. Call cbn_mmdet.link(model) before training and "
                    "cbn_mmdet.step(model) after each iteration; in mmengine, add "
                    "custom_hooks=[dict(type='CBNHook')] to the config, which does both."
                )
            return None, None
        if not self.compensate:
            return None, None
        conv = None if signature is None else signature.module()
        if conv is None:
            raise self._refusal(
                f"was handed a tensor of shape {tuple(input.shape)} that no module of the linked "
                "model returned: the result of a function or of an operation in place, a sum or "
                "an activation say"
            )
        if not isinstance(conv, nn.Conv2d):
            raise self._refusal(f"is fed by {linking.name_of(conv)}, which is no nn.Conv2d")
        if nn.utils.parametrize.is_parametrized(conv, "weight"):
            raise self._refusal(
                f"is fed by {linking.name_of(conv)}, whose weight is parametrized, so that its "
                "value may change each time it is read"
            )
        if not conv.weight.requires_grad:  # never changes: there is nothing to compensate
            return conv, None
        if signature.input is None:
            raise self._refusal(
                f"is fed by {linking.name_of(conv)}, whose input is no longer known because the "
                "linked model's forward ended before this layer ran; link the model that "
                "contains both"
            )
        self._verify(conv, signature.input, input)
        return conv, signature.input

    @torch.no_grad()
    def _verify(self, conv: nn.Conv2d, x: Tensor, y: Tensor) -> None:
        """Refuses, once, a convolution that does not compute ``weight * x + bias``."""
        if any(verified() is conv for verified in self._verified):
            return
        if not y.any() or not y.isfinite().all():  # nothing to be seen in this batch
            return
        if not is_plain(conv, x, y):
            raise self._refusal(
                f"is fed by {linking.name_of(conv)}, whose output is not the plain convolution "
                "of its weight (a standardised or modulated one, say)"
            )
        self._verified.append(weakref.ref(conv))

    def _note_feeder(self, input: Tensor) -> linking.Signature | None:
        signature = linking.signature_of(input)
        self._feeder = None if signature is None else signature.module
        return signature

    def _refusal(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{self._title}: {what}. CBN can only compensate the statistics of a plain "
            "nn.Conv2d's output: place the layer directly after one, use another norm here, or "
            "set compensate=False (naive CBN)."
        )

    # What nn.Module does with a layer.

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        for window in self._windows:
            if window.device is not None:
                window.to(fn(torch.empty(0, device=window.device)).device)
        self._records.clear()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        # Past statistics belong to the weights that are being replaced.
        self._windows.clear()
        self._records.clear()
        self._before = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, **_fresh_state()}

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return (
            f"{super().extra_repr()}, window_size={self.window_size}, "
            f"compensate={self.compensate}, backward={self.backward!r}, "
            f"derivative_stride={self.derivative_stride}"
            + (", sync=True" if self.sync else "")
            + (f", window_dtype={self.window_dtype!r}" if self.window_dtype != "float32" else "")
        )


class SyncCBN(CBN):
    """:class:`CBN` with ``sync=True``: in a config, ``norm_cfg=dict(type='SyncCBN')``."""

    def __init__(self, num_features: int, *args, sync: bool = True, **kwargs) -> None:
        super().__init__(num_features, *args, sync=sync, **kwargs)


@torch.no_grad()
def update_running_stats(learnt: Iterable[tuple[CBN, _Record]]) -> None:
    """Averages records into the running statistics of their layers, no layer twice."""
    alike: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    learnt = [each for each in learnt if each[0].track_running_stats]
    if learnt:
        torch._foreach_add_([layer.num_batches_tracked for layer, _ in learnt], 1)
    for layer, record in learnt:
        weight = layer.momentum
        if weight is None:
            weight = 1.0 / float(layer.num_batches_tracked)
        running, new = alike.setdefault(weight, ([], []))
        running += layer.running_mean, layer.running_var
        new += record.running_mean, record.running_var
    for weight, (running, new) in alike.items():
        new = [each.to(into.dtype) for each, into in zip(new, running, strict=True)]
        torch._foreach_lerp_(running, new, weight)


def stride_for(y: Tensor) -> int:
    """The subsampling of the positions where none is asked for."""
    images, _, height, width = y.shape
    for stride in (4, 2):
        if images * math.ceil(height / stride) * math.ceil(width / stride) >= _ENOUGH:
            return stride
    return 1


def _fresh_state() -> dict:
    """The state of a layer that has not run."""
    return dict(
        _windows=[],  # one for each call within a forward
        _records={},  # by call
        _before=None,
        _was_reset=False,  # whether the running statistics were, in this iteration
        _forward_id=None,
        _call=0,
        _recorded_version=None,
        _feeder=None,
        _verified=[],  # convolutions
    )
