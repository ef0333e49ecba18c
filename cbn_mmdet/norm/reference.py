# Licensed under the Apache License, Version 2.0.
"""The paper's CBN, and the moving window, in the plainest code: read this first.

Paper: Cross-Iteration Batch Normalization, https://arxiv.org/abs/2002.05712. The code follows the
formulas literally: it keeps old weights and calls ``torch.autograd.grad`` once per output channel.
It is slow, and runs in float64 if its convolution does. The tests compare the layer with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .moments import stride_for
from .window import ENDLESS, LARGEST, RATE


class Statistics(NamedTuple):
    """Mean and variance of each channel, ``(C,)``."""

    mean: Tensor
    var: Tensor


class Entry(NamedTuple):
    """Statistics and derivatives of one past iteration, or of the whole past together.

    Attributes:
        mean: ``mu`` of the convolution's output without its bias, ``(C,)``.
        var: ``v``, ``(C,)``.
        mean_in_w: ``d mu / d w``, shaped as the weight, ``(C, C_in / groups, kh, kw)``.
        var_in_w: ``d v / d w``, likewise.
        weight: The weight at which all of these were computed.
        moves: Whether the derivatives were computed; otherwise they are zero.
    """

    mean: Tensor
    var: Tensor
    mean_in_w: Tensor
    var_in_w: Tensor
    weight: Tensor
    moves: bool

    def at(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance at another weight, by first-order expansion."""
        step = weight - self.weight
        return self.mean + _dot(self.mean_in_w, step), self.var + _dot(self.var_in_w, step)


class Reference:
    """A convolution followed by CBN.

    Args:
        conv: The convolution; "today's weight" is the weight that it has now.
        window: ``'moving'``, ``'sliding'`` or ``'step'``; :meth:`forget` ends the step.
        window_size: ``k``, or ``'auto'``.
        eps: Added to the variance.
        compensate: Whether to move past statistics to today's weight.
        backward: Which gradient: ``'current'``, ``'window'`` or ``'mixed'``.
        stride: The derivative of the variance uses every n-th row and column; None for the
            layer's own choice.
        momentum: Momentum of the running statistics; None for their plain average.
        dtype: Dtype to which the convolution's output is rounded; the gradient skips the rounding.

    Attributes:
        past: Entries, newest first; a moving window has at most one.
        seen: Number of iterations that a moving window has seen.
        log_share: Logarithm of ``s`` in a moving window that sets its own size.
        averages: ``E_b`` and ``E_g``, past averages of the gradient's two sums, or None.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        window: str = "moving",
        window_size: int | str = "auto",
        eps: float = 1e-5,
        compensate: bool = True,
        backward: str = "mixed",
        stride: int | None = 1,
        momentum: float | None = 0.1,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.conv, self.window, self.window_size = conv, window, window_size
        self.eps, self.compensate, self.backward = eps, compensate, backward
        self.stride, self.momentum = stride, momentum
        self.dtype = dtype or conv.weight.dtype
        self.running = Statistics(
            conv.weight.new_zeros(conv.out_channels), conv.weight.new_ones(conv.out_channels)
        )
        self.tracked = 0
        self.forget()

    def forget(self) -> None:
        """Empties the window."""
        self.past: list[Entry] = []
        self.seen, self.log_share = 0, -math.log(LARGEST)
        self.surprise = self.averages = None
        self.sums: tuple[Tensor, Tensor] | None = None

    def moves(self) -> bool:
        """Whether past statistics are functions of a weight that trains, or did when they began."""
        began = bool(self.past) and self.past[0].moves
        return self.compensate and (began or self.conv.weight.requires_grad)

    def separate(self, moves: bool) -> None:
        """Empties the window if the weight has begun to train since the last entry."""
        if self.past and self.past[0].moves != moves:
            sums = self.sums
            self.forget()
            self.sums = sums

    # The statistics.

    def output(self, x: Tensor) -> Tensor:
        """The convolution's output, rounded to ``dtype``, ``(N, C, H, W)``."""
        y = self.conv(x)
        return y + (y.to(self.dtype).to(y.dtype) - y).detach()

    def bias(self) -> Tensor:
        """The convolution's bias, or zeros, ``(C,)``."""
        bias = self.conv.bias
        return self.conv.weight.new_zeros(self.conv.out_channels) if bias is None else bias

    def largest(self) -> int:
        """The largest window size that is allowed."""
        if self.window_size != "auto":
            return self.window_size
        return ENDLESS if self.window == "step" else LARGEST

    def share(self) -> float:
        """``s``: the share of the current batch in its union with the past."""
        if self.window == "sliding" or not self.past:
            return 1 / (len(self.past) + 1)
        sets_itself = self.window_size == "auto" and self.window == "moving"
        own = math.exp(self.log_share) if sets_itself else 0.0
        return max(own, 1 / self.largest(), 1 / (self.seen + 1))

    def compensated(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance of each entry at today's weight and bias (equations 5 to 9)."""
        weight, bias = self.conv.weight, self.bias()
        if self.backward == "current" or not self.compensate:
            weight, bias = weight.detach(), bias.detach()
        if not self.compensate:
            return [(entry.mean, entry.var) for entry in self.past]
        moved = []
        for entry in self.past:
            mean, var = entry.at(weight)
            if self.window == "sliding":
                # The paper expands nu = v + mu^2 instead of v, and takes its maximum with mu_hat^2.
                second = (
                    entry.var
                    + entry.mean.square()
                    + _dot(
                        entry.var_in_w + 2 * _columns(entry.mean) * entry.mean_in_w,
                        weight - entry.weight,
                    )
                )
                var = torch.maximum(second, mean.square()) - mean.square()
            moved.append((mean + bias, var.clamp_min(0)))
        return moved

    def past_statistics(self) -> Statistics | None:
        """``mu_p`` and ``V``: mean and variance of the whole past together."""
        if not self.past:
            return None
        means, variances = (torch.stack(each) for each in zip(*self.compensated(), strict=True))
        return Statistics(means.mean(0), variances.mean(0) + means.var(0, correction=0))

    def statistics(self, y: Tensor) -> Statistics:
        """Mean and variance of the union of the past and the current batch ``y``."""
        now, past, s = _moments(y), self.past_statistics(), self.share()
        if past is None:
            return now
        d = now.mean - past.mean
        return Statistics(
            past.mean + s * d, s * now.var + (1 - s) * past.var + s * (1 - s) * d.square()
        )

    # Forward and backward.

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Normalises the convolution's output for ``x``; the window does not change."""
        self.separate(self.moves())
        if self.backward != "mixed" or not self.compensate:
            y = self.output(x)
            return self.normalize(y, self.statistics(y), gamma, beta)
        # Two graphs with equal values, because parameters and input receive different gradients.
        y = self.output(x.detach())
        z = self.normalize(y, self.statistics(y), gamma, beta)
        y = self.output_of_constants(x)
        mean, var = (each.detach() for each in self.statistics(y))
        of_input = _Projected.apply(y, mean, (var + self.eps).rsqrt(), gamma.detach(), self)
        return z + (of_input - of_input.detach())

    def normalize(self, y: Tensor, of: Statistics, gamma: Tensor, beta: Tensor) -> Tensor:
        """Normalises ``y`` by the statistics ``of`` (equation 10)."""
        return (y - _maps(of.mean)) * _maps((of.var + self.eps).rsqrt() * gamma) + _maps(beta)

    def output_of_constants(self, x: Tensor) -> Tensor:
        """The convolution's output, with a gradient for the input alone."""
        parameters = {name: p.detach() for name, p in self.conv.named_parameters()}
        y = torch.func.functional_call(self.conv, parameters, (x,))
        return y + (y.to(self.dtype).to(y.dtype) - y).detach()

    # The end of an iteration.

    def step(self, x: Tensor) -> None:
        """Ends the iteration on ``x``: updates running statistics, window and ``averages``."""
        self.separate(self.moves())
        self.average(*self.new_running_statistics(x))
        self.push(self.new_entry(x), self.output(x).detach())

    def new_running_statistics(self, x: Tensor) -> Statistics:
        """The statistics that an iteration on ``x`` averages into the running statistics."""
        y = self.output(x).detach()
        if self.backward != "current" and self.past:
            return Statistics(*(each.detach() for each in self.statistics(y)))
        mean, var = _moments(y)
        count = y.numel() // y.shape[1]
        return Statistics(mean, var * count / max(count - 1, 1))

    def average(self, mean: Tensor, var: Tensor) -> None:
        """Averages ``mean`` and ``var`` into the running statistics."""
        self.tracked += 1
        momentum = 1 / self.tracked if self.momentum is None else self.momentum
        old = self.running
        self.running = Statistics(
            old.mean + momentum * (mean - old.mean), old.var + momentum * (var - old.var)
        )

    def new_entry(self, x: Tensor) -> Entry:
        """Statistics of the batch ``x`` alone, with their derivatives at today's weight."""
        weight, moves, trains = self.conv.weight, self.moves(), self.conv.weight.requires_grad
        weight.requires_grad_(moves or trains)  # a past that follows the weight does so if frozen
        y = self.output(x)
        mean, var = _moments(y)
        mean_in_w = var_in_w = torch.zeros_like(weight)
        if moves:
            stride = stride_for(y) if self.stride is None else self.stride
            mean_in_w = self.derivative(mean)
            var_in_w = self.derivative(_moments(y[:, :, ::stride, ::stride]).var)
        weight.requires_grad_(trains)
        if self.compensate:
            mean = mean - self.bias()
        return Entry(
            *(mean.detach(), var.detach(), mean_in_w, var_in_w, weight.detach().clone(), moves)
        )

    def derivative(self, values: Tensor) -> Tensor:
        """Derivative of each channel's value in that channel's weight, shaped as the weight."""
        weight = self.conv.weight
        return torch.stack(
            [
                torch.autograd.grad(value, weight, retain_graph=True)[0][channel]
                for channel, value in enumerate(values)
            ]
        )

    def push(self, entry: Entry, y: Tensor) -> None:
        """Adds an iteration to the window; ``y`` is the output of its convolution."""
        if self.largest() == 1:  # plain batch normalisation has no past
            return
        self.separate(entry.moves)
        s = self.share()
        if self.sums is not None:
            old = self.averages or self.sums
            self.averages = tuple(
                before + s * (now - before) for before, now in zip(old, self.sums, strict=True)
            )
            self.sums = None
        if self.window == "sliding":
            self.past = [entry, *self.past][: self.largest() - 1]
        else:
            self.unite(entry, y, s)

    @torch.no_grad()
    def unite(self, new: Entry, y: Tensor, s: float) -> None:
        """Replaces the past by the union: its values and derivatives at today's weight."""
        if not self.past:
            self.past, self.seen = [new], 1
            return
        (old,), past = self.past, self.past_statistics()
        d = _moments(y).mean - past.mean
        mean, var = self.statistics(y)
        if self.compensate:
            mean = mean - self.bias()
        var_in_w = s * new.var_in_w + (1 - s) * old.var_in_w
        var_in_w += 2 * s * (1 - s) * _columns(d) * (new.mean_in_w - old.mean_in_w)
        mean_in_w = s * new.mean_in_w + (1 - s) * old.mean_in_w
        self.past = [Entry(mean, var, mean_in_w, var_in_w, new.weight, new.moves)]
        self.seen += 1
        self.set_share(d / (past.var + new.var + self.eps).sqrt())

    def set_share(self, surprise: Tensor) -> None:
        """Adapts the share by the cosine between the last two surprises, taken over channels."""
        if self.surprise is not None:
            sizes = surprise.norm() * self.surprise.norm()
            if sizes > 0:
                self.log_share += RATE * (surprise @ self.surprise / sizes).item()
                self.log_share = min(max(self.log_share, -math.log(LARGEST)), 0.0)
        self.surprise = surprise


class _Projected(torch.autograd.Function):
    """Normalisation whose gradient for ``y`` also subtracts ``(1 - s) (e_b + x_hat e_g)``."""

    @staticmethod
    def forward(ctx, y: Tensor, mean: Tensor, r: Tensor, gamma: Tensor, reference: Reference):
        x_hat = (y - _maps(mean)) * _maps(r)
        ctx.save_for_backward(x_hat, r, gamma)
        ctx.reference = reference
        return x_hat * _maps(gamma)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x_hat, r, gamma = ctx.saved_tensors
        reference, g = ctx.reference, grad * _maps(gamma)
        s = reference.share()
        own = g.mean((0, 2, 3)), (g * x_hat).mean((0, 2, 3))
        averages = reference.averages or (torch.zeros_like(r),) * 2
        off = [
            s * now + (1 - s) * (s * now + (1 - s) * past)
            for now, past in zip(own, averages, strict=True)
        ]
        reference.sums = own
        grad_y = _maps(r) * (g - _maps(off[0]) - x_hat * _maps(off[1]))
        return grad_y, None, None, None, None


def _moments(y: Tensor) -> Statistics:
    return Statistics(y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0))


def _dot(derivative: Tensor, step: Tensor) -> Tensor:
    """Dot product of each channel's derivative with its weight step, ``(C,)``."""
    return (derivative * step).flatten(1).sum(1)


def _maps(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _columns(vector: Tensor) -> Tensor:
    return vector[:, None, None, None]
