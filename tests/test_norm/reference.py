"""CBN as the paper writes it: slow, in float64, with autograd for every derivative."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cbn_mmdet.norm.cbn import stride_for


class Past(NamedTuple):
    """A past iteration: mean and raw second moment, their derivatives, and the weight they had."""

    mu: Tensor
    nu: Tensor
    d_mu: Tensor
    d_nu: Tensor
    weight: Tensor
    moves: bool  # whether it has derivatives


class Reference:
    """The paper's formulas (equations 3 to 10) over one convolution, for any window.

    Raw second moments, derivatives by ``torch.autograd.grad`` for each output channel, old weights
    kept. The paper's layer has no bias; it is compensated exactly, by taking it off the past
    moments and adding today's.

    Args:
        conv: The convolution, whose weights are today's.
        window: The paper's ``k``.
        eps: Added to the variance.
        compensate: Whether past moments are moved to today's weights.
        flow: Whether gradients flow through past statistics; running statistics are the window's.
        stride: Every n-th row and column tells the derivative of the variance; None for the
            layer's own choice.
        momentum: Of the running statistics.
        dtype: What the convolution's output is rounded to; the gradient passes by.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        window: int,
        eps: float,
        compensate: bool,
        flow: bool,
        stride: int | None = 1,
        momentum: float | None = 0.1,
        dtype: torch.dtype | None = None,
    ):
        self.conv, self.window, self.eps = conv, window, eps
        self.compensate, self.flow, self.stride = compensate, flow, stride
        self.dtype = dtype or conv.weight.dtype
        self.past = []
        self.momentum, self.tracked = momentum, 0
        self.running_mean = conv.weight.new_zeros(conv.out_channels)
        self.running_var = conv.weight.new_ones(conv.out_channels)

    def output(self, x):
        y = self.conv(x)
        return y + (y.to(self.dtype).to(y.dtype) - y).detach()

    def moments(self, x):
        """Mean and raw second moment of the convolution's output."""
        y = self.output(x)
        return y.mean((0, 2, 3)), y.square().mean((0, 2, 3))

    def compensated(self, past):
        mu, nu = past.mu, past.nu
        if not self.compensate:
            return mu, nu
        now, bias = self.conv.weight, self.bias()
        if not self.flow:
            now, bias = now.detach(), bias.detach()
        mu = mu + (past.d_mu * (now - past.weight)).flatten(1).sum(1)
        nu = nu + (past.d_nu * (now - past.weight)).flatten(1).sum(1)
        return mu + bias, nu + 2 * bias * mu + bias.square()  # of y + b

    def past_variances(self):
        """What the maximum cuts at zero, ``(T, C)``."""
        terms = [self.compensated(past) for past in self.past]
        return torch.stack([nu - mu.square() for mu, nu in terms]).detach()

    def statistics(self, x):
        terms = [self.moments(x)] + [self.compensated(past) for past in self.past]
        mean = torch.stack([mu for mu, _ in terms]).mean(0)
        second = torch.stack([torch.maximum(nu, mu.square()) for mu, nu in terms]).mean(0)
        return mean, second - mean.square()

    def bias(self):
        bias = self.conv.bias
        return self.conv.weight.new_zeros(self.conv.out_channels) if bias is None else bias

    def normalize(self, y, mean, var, gamma, beta):
        c = (slice(None), None, None)
        return (y - mean[c]) * (var + self.eps)[c].rsqrt() * gamma[c] + beta[c]

    def forward(self, x, gamma, beta):
        return self.normalize(self.output(x), *self.statistics(x), gamma, beta)

    def evaluate(self, x, gamma, beta):
        return self.normalize(self.output(x), self.running_mean, self.running_var, gamma, beta)

    def new_running_statistics(self, x):
        """What an iteration on ``x`` averages into the running statistics."""
        if self.flow and self.past:
            mean, var = self.statistics(x)
        else:
            y = self.output(x)
            count = y.numel() // y.shape[1]
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
            var = var * count / max(count - 1, 1)
        return mean.detach(), var.detach()

    def average(self, mean, var):
        """Averages into the running statistics."""
        self.tracked += 1
        momentum = 1 / self.tracked if self.momentum is None else self.momentum
        self.running_mean = self.running_mean + momentum * (mean - self.running_mean)
        self.running_var = self.running_var + momentum * (var - self.running_var)

    def entry(self, x):
        """What an iteration on ``x`` adds to the window, at today's weight."""
        mu, nu = self.moments(x)
        if self.compensate:  # of the convolution without its bias
            bias = self.bias()
            mu, nu = mu - bias, nu - 2 * bias * mu + bias.square()
        weight = self.conv.weight.detach().clone()
        d_mu = d_nu = torch.zeros_like(weight)
        moves = self.compensate and self.conv.weight.requires_grad
        if moves:
            d_mu, d_nu = self.derivative(mu), self.derivative(nu)
            y = self.output(x)
            stride = self.stride or stride_for(y)
            if stride > 1:  # nu = v + mu^2, with the derivative of v on the coarser grid
                y = y[:, :, ::stride, ::stride]
                d_var = self.derivative(y.var((0, 2, 3), correction=0))
                d_nu = d_var + 2 * mu.detach()[:, None, None, None] * d_mu
        return Past(mu.detach(), nu.detach(), d_mu, d_nu, weight, moves)

    def derivative(self, values):
        """Of each channel's value in that channel's weight, shaped as the weight."""
        weight = self.conv.weight
        return torch.stack(
            [
                torch.autograd.grad(value, weight, retain_graph=True)[0][channel]
                for channel, value in enumerate(values)
            ]
        )

    def push(self, entry):
        # What was learnt of a frozen weight and of one that trains is not mixed.
        past = [past for past in self.past if past.moves == entry.moves]
        self.past = [entry, *past][: self.window - 1]

    def step(self, x):
        """Ends the iteration on ``x``."""
        self.average(*self.new_running_statistics(x))
        self.push(self.entry(x))
