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

are one batched product each for the whole window.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .moments import Derivative


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


class Estimate(NamedTuple):
    """Statistics over the window at today's weights, and what their gradient needs.

    ``T`` is the number of past iterations held, ``k = T + 1``.

    Attributes:
        mean: ``mu_bar``, ``(C,)``.
        var: ``mean(v_hat) + var(mu_hat)``, ``(C,)``.
        size: ``k``.
        gap: ``mu_hat - mu_bar`` of the past iterations, ``(C, T)``.
        delta: ``(C, T)``, or None where nothing is compensated.
        positive: Whether ``v_hat`` was not cut by the maximum, ``(C, T)``, or None.
        derivative: ``m`` as ``(groups, T, P)`` and ``h`` as ``(C, T, P)``, or None.
    """

    mean: Tensor
    var: Tensor
    size: int
    gap: Tensor
    delta: Tensor | None
    positive: Tensor | None
    derivative: Derivative | None


class Window:
    """A ring of the last iterations, held as float32 tensors that are allocated once.

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
        self._count = 0
        self._next = 0
        self._vectors: Tensor | None = None  # (capacity, 2 or 3, C), as in an entry
        self._m: Tensor | None = None  # (groups, capacity, P)
        self._h: Tensor | None = None  # (C, capacity, P)

    def to(self, device: torch.device) -> None:
        """Moves what is held to ``device``; the dtype stays float32."""
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
        count = self._count
        if count == 0:
            return Estimate(mean, var, 1, mean.new_empty(mean.numel(), 0), None, None, None)
        vectors = self._vectors[:count].to(mean.dtype).unbind(1)  # T, C each
        past_mean, *rest = (vector.t() for vector in vectors)  # C, T each
        delta = positive = derivative = None
        if self._h is None:
            (past_var,) = rest
        else:
            derivative = Derivative(
                self._m[:, :count].to(mean.dtype), self._h[:, :count].to(mean.dtype)
            )
            recorded = past_mean
            past_mean, past_var = add_dot(*rest, derivative, weight)
            delta = past_mean - recorded
            past_var = past_var.addcmul_(delta, delta, value=-1)
            positive = past_var > 0
            past_var = past_var.clamp_min_(0)
        if bias is not None:
            mean = mean - bias.to(mean.dtype)
        size = count + 1
        means = torch.cat((past_mean, mean[:, None]), 1)  # C, k, the current one last
        mean_bar = means.mean(1)
        gap = means.sub_(mean_bar[:, None])
        var_bar = torch.cat((past_var, var[:, None]), 1).addcmul_(gap, gap).mean(1)
        if bias is not None:
            mean_bar = mean_bar + bias.to(mean.dtype)
        return Estimate(mean_bar, var_bar, size, gap[:, :count], delta, positive, derivative)

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
            self._h = torch.zeros(h.shape[0], self.capacity, h.shape[1], **new)


def dot(derivative: Derivative, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``m . w`` and ``h . w`` of each channel.

    Args:
        derivative: Of one iteration, ``m`` of shape ``(groups, P)`` and ``h`` of ``(C, P)``.
        weight: The convolution's weight, ``(C, C_in / groups, kh, kw)``.

    Returns:
        Two tensors of shape ``(C,)``.
    """
    m, h = derivative
    w = weight.to(h.dtype).reshape(h.shape)
    by_group = w.view(m.shape[0], -1, m.shape[1])  # groups, C / groups, P
    if h.device.type == "cpu":
        mean = torch.bmm(by_group, m[:, :, None]).view(-1)
    else:  # without TF32, as in _add_product_without_tf32
        mean = torch.linalg.vecdot(by_group, m[:, None]).view(-1)
    return mean, torch.linalg.vecdot(w, h)


def add_dot(
    mean: Tensor, var: Tensor, derivative: Derivative, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``mean + m . w`` and ``var + h . w`` of each channel for ``T`` iterations at once.

    Args:
        mean: Shape ``(C, T)``.
        var: Shape ``(C, T)``.
        derivative: ``m`` of shape ``(groups, T, P)`` and ``h`` of shape ``(C, T, P)``.
        weight: The convolution's weight, ``(C, C_in / groups, kh, kw)``.

    Returns:
        Two new tensors of shape ``(C, T)``.
    """
    m, h = derivative
    groups, (channels, count, patch) = m.shape[0], h.shape
    w = weight.to(h.dtype).reshape(channels, patch)
    add_product = _add_product if h.device.type == "cpu" else _add_product_without_tf32
    by_group = add_product(
        mean.view(groups, -1, count), w.view(groups, -1, patch), m
    )  # groups, C / groups, T
    return by_group.view(channels, count), add_product(var[:, None], w[:, None], h).squeeze(1)


def _add_product(rest: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``rest + a b^T`` for a batch of matrices; on the CPU with ``a`` the smaller, for speed."""
    return torch.baddbmm(rest, a, b.transpose(1, 2))


def _add_product_without_tf32(rest: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same by elements.

    A GPU that may use TF32 for matrix products would round each weight by as much as it moves in
    an iteration, and ``m . w_t - m . w_{t-tau}`` would be lost.
    """
    return rest + (a[:, :, None] * b[:, None]).sum(3)
