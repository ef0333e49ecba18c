# Licensed under the Apache License, Version 2.0.
"""The past iterations of one layer, and what their statistics are at today's weights.

Cross-Iteration Batch Normalization, https://arxiv.org/abs/2002.05712, equations 5 to 9, in a
centred form. For the iteration ``tau`` steps back, with ``delta = m . (w_t - w_{t-tau})``,

    mean        mu_hat = mu + delta + b_t - b_{t-tau}
    variance    v_hat  = max(v + h . (w_t - w_{t-tau}) - delta^2, 0)

and over the window of ``k`` iterations, the current one included,

    mean        mu_bar = mean(mu_hat)           variance    mean(v_hat) + var(mu_hat, biased)

This equals the paper's average of ``max(nu_hat, mu_hat^2)`` minus ``mu_bar^2``, without its
cancellation between large numbers. Old weights are not kept: with what is left of a past statistic
after its product with the weight of that time, one number per channel,

    mu_hat = (mu - m . w_{t-tau}) + m . w_t         v_hat + delta^2 = (v - h . w_{t-tau}) + h . w_t

are one batched product each for the whole window. The rest is done for all layers at once, when a
forward comes to the first of them: the past depends on weights alone, and where maps are small the
number of operations costs more than their size.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import linking
from .moments import Derivative, statistics_dtype

_DENSE = torch.contiguous_format
_BLOCK = 1 << 17  # numbers


class Entry(NamedTuple):
    """What one iteration leaves behind.

    Attributes:
        vectors: Mean of the convolution's output (less its bias if that is compensated) and biased
            variance, ``(2, C)``. With a derivative ``(3, C)``: the mean, and what is left of mean
            and variance after the products with the weight of that iteration.
        derivative: Derivatives in the weight, or None where nothing is to be compensated.
    """

    vectors: Tensor
    derivative: Derivative | None

    @classmethod
    def of(
        cls,
        mean: Tensor,
        var: Tensor,
        derivative: Derivative | None = None,
        weight: Tensor | None = None,
    ) -> Entry:
        """The entry of an iteration.

        Args:
            mean: ``(C,)``, less the bias if that is compensated.
            var: Biased variance, ``(C,)``.
            derivative: Derivatives in the weight, or None where nothing is to be compensated.
            weight: The weight of that iteration; only needed with a derivative.
        """
        if derivative is None:
            return cls(torch.stack((mean, var)), None)
        mean_at, var_at = dot(derivative, weight)
        return cls(torch.stack((mean, mean - mean_at, var - var_at)), derivative)


class Past(NamedTuple):
    """The past iterations of a window at today's weight, and what their gradient needs.

    ``T`` is their number. Means are less the bias where that is compensated.

    Attributes:
        size: ``T``.
        mean: Mean of ``mu_hat``, ``(C,)``.
        var: ``mean(v_hat) + var(mu_hat)``, ``(C,)``.
        means: ``mu_hat`` of each iteration, ``(C, T)``.
        positive: ``c``: whether ``v_hat`` was not cut by the maximum, bool ``(C, T)``; None, as
            all that follows, where nothing is compensated.
        offset: ``mu_hat - c delta``, ``(C, T)``.
        half: ``c / 2``, ``(C, T)``.
        derivative: ``m`` as ``(groups, T, P)`` and ``h`` as ``(C, T, P)``.
    """

    size: int
    mean: Tensor
    var: Tensor
    means: Tensor
    positive: Tensor | None = None
    offset: Tensor | None = None
    half: Tensor | None = None
    derivative: Derivative | None = None


class Look(NamedTuple):
    """What a window holds, for diagnostics.

    Attributes:
        past: The past iterations at today's weight.
        recorded: Their means as they were recorded, ``(C, T)``.
        newest: Which of them is the last.
    """

    past: Past
    recorded: Tensor
    newest: int


class Estimate(NamedTuple):
    """Statistics over the window at today's weight and bias.

    Attributes:
        mean: ``mu_bar``, ``(C,)``.
        var: ``mean(v_hat) + var(mu_hat)``, ``(C,)``.
        size: ``k``, the current iteration included.
        past: The iterations before, or None if there is none.
    """

    mean: Tensor
    var: Tensor
    size: int
    past: Past | None


class _Known(NamedTuple):
    """A past that was computed, and for which forward and weight."""

    past: Past
    forward: int
    weight: weakref.ref[Tensor] | None
    version: int

    def holds_for(self, weight: Tensor | None, dtype: torch.dtype) -> bool:
        """Whether it is the past at this weight in this dtype."""
        if self.past.mean.dtype != dtype or (weight is None) != (self.weight is None):
            return False
        return weight is None or (
            self.weight() is weight and self.version == linking.version_of(weight)
        )


class Window:
    """A ring of the last iterations, held as tensors that are allocated once.

    They are float32, except for ``h`` if the entries' is bfloat16.

    Args:
        capacity: Number of past iterations to hold, ``k - 1``.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.clear()

    def __len__(self) -> int:
        return self._count

    def clear(self) -> None:
        """Forgets everything and frees the memory."""
        self.feeder: weakref.ref[nn.Module] | None = None  # whose output the entries describe
        self._company = _Company([self])
        self._known: _Known | None = None
        self._count = 0
        self._next = 0
        self._vectors: Tensor | None = None  # (capacity, 2 or 3, C), as in an entry
        self._m: Tensor | None = None  # (groups, capacity, P)
        self._h: Tensor | None = None  # (C, capacity, P)

    def to(self, device: torch.device) -> None:
        """Moves what is held to ``device``; the dtype stays."""
        self._known = None
        if self._vectors is None or self._vectors.device == device:
            return
        if device.type == "meta":  # no values survive there, so there is nothing to come back to
            return self.clear()
        self._vectors = self._vectors.to(device)
        if self._h is not None:
            self._m, self._h = self._m.to(device), self._h.to(device)

    @property
    def device(self) -> torch.device | None:
        """Where the window lives, None while it is empty."""
        return None if self._vectors is None else self._vectors.device

    @property
    def is_of_weight(self) -> bool:
        """Whether the entries have derivatives in a convolution's weight."""
        return self._h is not None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (self._vectors, self._m, self._h)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def state(self) -> dict:
        """Everything but the feeder, as plain values and the tensors themselves."""
        return dict(
            capacity=self.capacity,
            count=self._count,
            next=self._next,
            vectors=self._vectors,
            m=self._m,
            h=self._h,
        )

    @classmethod
    @torch.inference_mode(False)
    def from_state(
        cls, state: dict, feeder: nn.Module | None, device: torch.device | None
    ) -> Window:
        """A window on ``device`` with a copy of what :meth:`state` returned."""
        window = cls(state["capacity"])
        window.feeder = None if feeder is None else weakref.ref(feeder)
        window._count, window._next = state["count"], state["next"]
        window._vectors, window._m, window._h = (
            None if state[name] is None else state[name].to(device, copy=True)
            for name in ("vectors", "m", "h")
        )
        return window

    @torch.no_grad()
    def push(self, entry: Entry) -> None:
        """Adds an iteration, in the place of the oldest one if the window is full."""
        self._known = None
        if self._vectors is None or (entry.derivative is None) != (self._h is None):
            # A weight that was frozen or thawed changes what an entry is; the two do not mix.
            self._allocate(entry)
        slot = self._next
        self._vectors[slot] = entry.vectors
        if entry.derivative is not None:
            self._m[:, slot] = entry.derivative.mean
            self._h[:, slot] = entry.derivative.var
        self._next = (slot + 1) % self.capacity
        self._count = min(self._count + 1, self.capacity)

    @torch.no_grad()
    def estimate(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Estimate:
        """The statistics of the past and the current iteration, at today's weight and bias.

        Args:
            mean: Mean of the current batch, ``(C,)``; its dtype is the one to compute in.
            var: Biased variance of the current batch, ``(C,)``.
            weight: Today's weight of the convolution, any shape with ``C`` first. Only read if
                the entries carry derivatives.
            bias: Today's bias, ``(C,)``, or None if the entries' means include none to restore.

        Returns:
            The estimate, in the dtype of ``mean``.
        """
        if self._count == 0:
            return Estimate(mean, var, 1, None)
        past = self._past(None if self._h is None else weight, mean.dtype)
        # Of k means, T are the past's: mean and variance of the union, by Chan's formula.
        size = past.size + 1
        share = past.size / size
        distance = (mean if bias is None else mean - bias.to(mean.dtype)) - past.mean
        return Estimate(
            torch.add(mean, distance, alpha=-share),
            torch.lerp(past.var, var, 1 / size).addcmul_(distance, distance, value=share / size),
            size,
            past,
        )

    def _past(self, weight: Tensor | None, dtype: torch.dtype) -> Past:
        """The past at today's weight.

        The first window that a forward asks learns it for its companions as well, which serves
        that forward alone.
        """
        forward = linking.current_forward()
        # The repetition of a forward in a backward pass may follow others, at other weights.
        if forward is not None and not linking.is_recomputation():
            self._company.learn(forward)
            known = self._known
            if known is not None and known.forward == forward and known.holds_for(weight, dtype):
                return known.past
        return _pasts([self], [weight], dtype)[0]

    @torch.no_grad()
    def look(self, weight: Tensor | None) -> Look:
        """The past iterations, of which there is one at least, as of now.

        Args:
            weight: Today's weight of the convolution; only read if entries carry derivatives.
        """
        dtype = torch.float32 if weight is None else statistics_dtype(weight.dtype)
        past = _pasts([self], [None if self._h is None else weight], dtype)[0]
        newest = (self._next - 1) % self.capacity
        return Look(past, self._vectors[: self._count, 0].to(dtype).T, newest)

    def fits(self, weight: Tensor) -> bool:
        """Whether what is held is of a weight of this size, and where it is."""
        if self._h is None:
            return True
        return self._h[:, 0].numel() == weight.numel() and self._h.device == weight.device

    # Entries recorded in inference mode must serve a later forward with gradients.
    @torch.inference_mode(False)
    def _allocate(self, entry: Entry) -> None:
        feeder = self.feeder
        self.clear()
        self.feeder = feeder
        new = dict(dtype=torch.float32, device=entry.vectors.device)
        self._vectors = torch.zeros(self.capacity, *entry.vectors.shape, **new)
        if entry.derivative is not None:
            m, h = entry.derivative
            self._m = torch.zeros(m.shape[0], self.capacity, m.shape[1], **new)
            if h.dtype == torch.bfloat16:
                new["dtype"] = h.dtype
            self._h = torch.zeros(h.shape[0], self.capacity, h.shape[1], **new)


class _Company:
    """Windows that grew in the same iteration and learn their pasts together."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self._members = [weakref.ref(window) for window in windows]
        self._forward: int | None = None  # the last that they learnt for

    def learn(self, forward: int) -> None:
        """Learns for a forward, once."""
        if self._forward != forward:
            self._forward = forward
            members = [member() for member in self._members]
            _learn([window for window in members if window is not None], forward)


def accompany(windows: Sequence[Window]) -> None:
    """Makes windows that grew in the same iteration learn their pasts together."""
    company = _Company(windows)
    for window in windows:
        window._company = company


def _learn(windows: list[Window], forward: int) -> None:
    """Computes the pasts of windows for a forward, those of one length together."""
    alike = defaultdict(list)
    for window in windows:
        window._known = weight = None
        if window._h is not None:
            feeder = None if window.feeder is None else window.feeder()
            if not _keeps_weight(feeder) or not window.fits(feeder.weight):
                continue  # left to its own layer
            weight = feeder.weight
        if len(window) > 0:
            dtype = torch.float32 if weight is None else statistics_dtype(weight.dtype)
            alike[len(window), window.device, weight is None, dtype].append((window, weight))
    for (_, _, _, dtype), members in alike.items():
        pasts = _pasts(*zip(*members, strict=True), dtype)
        for (window, weight), past in zip(members, pasts, strict=True):
            if weight is None:
                window._known = _Known(past, forward, None, 0)
            else:
                version = linking.version_of(weight)
                window._known = _Known(past, forward, weakref.ref(weight), version)


def is_whole(weight: Tensor) -> bool:
    """Whether a weight is not spread over processes: FSDP gathers it for the forward alone."""
    return type(weight) is nn.Parameter


def _keeps_weight(conv: nn.Module | None) -> bool:
    """Whether the weight is there before the convolution's forward as it will be in it.

    A subclass or a hook may set ``weight.data`` first, which nothing would tell of.
    """
    return (
        isinstance(conv, nn.Conv2d)
        and is_whole(conv.weight)
        and type(conv).forward is nn.Conv2d.forward
        and not conv._forward_pre_hooks
    )


def _pasts(
    windows: Sequence[Window], weights: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Past]:
    """The pasts of windows of one length at today's weights, all with derivatives or all without.

    The channels of all windows, ``C`` of them, are one dimension here.
    """
    count, channels = len(windows[0]), [window._vectors.shape[2] for window in windows]
    vectors = torch.cat([window._vectors[:count] for window in windows], 2)
    vectors = vectors.to(dtype).permute(1, 2, 0)  # 2 or 3, C, T
    derivatives: Sequence[Derivative | None] = [None] * len(windows)
    positive = offset = half = None
    if weights[0] is None:
        means, variances = vectors
    else:
        derivatives = [Derivative(window._m[:, :count], window._h[:, :count]) for window in windows]
        recorded, mean_rest, var_rest = vectors
        means, variances = (torch.empty_like(recorded, memory_format=_DENSE) for _ in range(2))
        places = zip(means.split(channels), variances.split(channels), strict=True)
        for derivative, weight, place in zip(derivatives, weights, places, strict=True):
            multiply(derivative, weight, *place)
        means += mean_rest
        delta = means - recorded
        variances.add_(var_rest).addcmul_(delta, delta, value=-1)
        positive = variances > 0
        variances.clamp_min_(0)
        half = positive.to(dtype)
        offset = torch.addcmul(means, half, delta, value=-1)
        half *= 0.5
    mean = means.mean(1)
    spread = means - mean[:, None]
    var = torch.addcmul(variances, spread, spread).mean(1)
    parts = zip(
        *(
            [None] * len(windows) if each is None else each.split(channels)
            for each in (mean, var, means, positive, offset, half)
        ),
        derivatives,
        strict=True,
    )
    return [Past(count, *part) for part in parts]


@torch.no_grad()
def dot(derivative: Derivative, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``m . w`` and ``h . w`` of each channel for one iteration.

    Args:
        derivative: ``m`` of shape ``(groups, P)`` and ``h`` of ``(C, P)``.
        weight: The convolution's weight, ``(C, C_in / groups, kh, kw)``.

    Returns:
        Two tensors of shape ``(C,)``.
    """
    m, h = derivative
    mean, var = m.new_empty(2, len(h), 1)
    multiply(Derivative(m[:, None], h[:, None]), weight, mean, var)
    return mean.squeeze(1), var.squeeze(1)


def multiply(derivative: Derivative, weight: Tensor, mean: Tensor, var: Tensor) -> None:
    """Puts ``m . w`` and ``h . w`` of each channel, for ``T`` iterations, into two tensors.

    Args:
        derivative: ``m`` of shape ``(groups, T, P)`` and ``h`` of shape ``(C, T, P)``.
        weight: The convolution's weight, ``(C, C_in / groups, kh, kw)``.
        mean: For ``m . w``, contiguous, ``(C, T)``.
        var: For ``h . w``, likewise.
    """
    m, h = derivative
    groups, (channels, count, patch) = m.shape[0], h.shape
    w = weight.to(mean.dtype).reshape(channels, patch)
    product = _product if h.device.type == "cpu" else _product_without_tf32
    product(w.view(groups, -1, patch), m.to(mean.dtype), mean.view(groups, -1, count))
    for rows, part in in_dtype(h, mean.dtype):
        product(w[rows, None], part, var[rows, None])


def in_dtype(h: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Goes through ``h``, ``(C, T, P)``, in another dtype by as many channels as a cache holds."""
    step = len(h)
    if h.dtype != dtype and h.device.type == "cpu":
        step = max(1, _BLOCK // h[0].numel())
    for start in range(0, len(h), step):
        rows = slice(start, start + step)
        yield rows, h[rows].to(dtype)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a b^T`` for a batch of matrices; on the CPU with ``a`` the smaller, for speed."""
    torch.bmm(a, b.transpose(1, 2), out=out)


def _product_without_tf32(a: Tensor, b: Tensor, out: Tensor) -> None:
    """The same by elements.

    A GPU that may use TF32 for matrix products would round each weight by as much as it moves in
    an iteration, and ``m . w_t - m . w_{t-tau}`` would be lost.
    """
    torch.sum(a[:, :, None] * b[:, None], 3, out=out)
