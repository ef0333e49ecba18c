"""CBN as the paper writes it: slow, in float64, with autograd for every derivative."""

import torch
from torch import nn


class Reference:
    """The paper's formulas (equations 3 to 10) over one convolution, for any window.

    Raw second moments, derivatives by ``torch.autograd.grad`` for each output channel, old weights
    kept. The paper's layer has no bias; it is compensated exactly, by taking it off the past
    moments and adding today's.
    """

    def __init__(self, conv: nn.Conv2d, window: int, eps: float, compensate: bool, flow: bool):
        self.conv, self.window, self.eps = conv, window, eps
        self.compensate = compensate
        self.flow = flow  # whether gradients flow through past statistics
        self.past = []

    def moments(self, x):
        """Mean and raw second moment of the convolution's output."""
        y = self.conv(x)
        return y.mean((0, 2, 3)), y.square().mean((0, 2, 3))

    def compensated(self, entry):
        mu, nu, d_mu, d_nu, weight = entry
        if not self.compensate:
            return mu, nu
        now, bias = self.conv.weight, self.bias()
        if not self.flow:
            now, bias = now.detach(), bias.detach()
        mu = mu + (d_mu * (now - weight)).flatten(1).sum(1)
        nu = nu + (d_nu * (now - weight)).flatten(1).sum(1)
        return mu + bias, nu + 2 * bias * mu + bias.square()  # of y + b

    def statistics(self, x):
        terms = [self.moments(x)] + [self.compensated(entry) for entry in self.past]
        mean = torch.stack([mu for mu, _ in terms]).mean(0)
        second = torch.stack([torch.maximum(nu, mu.square()) for mu, nu in terms]).mean(0)
        return mean, second - mean.square()

    def bias(self):
        bias = self.conv.bias
        return self.conv.weight.new_zeros(self.conv.out_channels) if bias is None else bias

    def forward(self, x, gamma, beta):
        mean, var = self.statistics(x)
        c = (slice(None), None, None)
        return (self.conv(x) - mean[c]) * (var + self.eps)[c].rsqrt() * gamma[c] + beta[c]

    def step(self, x):
        mu, nu = self.moments(x)
        if self.compensate:  # of the convolution without its bias
            bias = self.bias()
            mu, nu = mu - bias, nu - 2 * bias * mu + bias.square()

        def derivative(values):
            return torch.stack(
                [
                    torch.autograd.grad(value, self.conv.weight, retain_graph=True)[0][channel]
                    for channel, value in enumerate(values)
                ]
            )

        d_mu, d_nu = derivative(mu), derivative(nu)
        entry = (mu.detach(), nu.detach(), d_mu, d_nu, self.conv.weight.detach().clone())
        self.past = [entry, *self.past][: self.window - 1]
