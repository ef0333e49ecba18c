"""The estimate over the window, against recomputing the statistics from the stored inputs."""

import pytest
import torch
from torch import nn

from cbn_mmdet.norm.moments import Derivative, batch_derivative, batch_moments
from cbn_mmdet.norm.window import (
    Entry,
    Window,
    _product,
    _product_without_tf32,
    dot,
    multiply,
)


def entry_of(conv, x, stride=1):
    y = conv(x).detach()
    mean, var = batch_moments(y)
    derivative = batch_derivative(conv, x, y, mean, stride)
    bias = 0 if conv.bias is None else conv.bias.detach()
    return Entry.of(mean - bias, var, derivative, conv.weight)


def moved(conv, distance):
    """Moves every weight and bias by a random step of the given relative length."""
    with torch.no_grad():
        for parameter in conv.parameters():
            noise = torch.randn_like(parameter)
            parameter += distance * parameter.norm() * noise / noise.norm()


def past_statistics(window, conv, channels):
    """Mean and variance of each past iteration alone, from windows of one entry."""
    zero = torch.zeros(channels)
    estimate = window.estimate(zero, zero, conv.weight, conv.bias)
    assert estimate.size == 2
    # With a current batch of mean 0 and variance 0: mean = mu_hat / 2,
    # var = v_hat / 2 + (mu_hat / 2)^2.
    return 2 * estimate.mean, 2 * (estimate.var - estimate.mean.square())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_compensation_against_recomputation(groups, bias):
    """The mean is exact; the variance is low by E[(dw . phi)^2], the Taylor rest, exactly."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=groups, bias=bias)
    x = torch.randn(2, 4, 15, 11) + 0.5
    window = Window(1)
    window.push(entry_of(conv, x))
    before = conv.weight.detach().clone()
    errors = []
    for distance in (0.02, 0.02, 0.04):
        moved(conv, distance)
        mean, var = past_statistics(window, conv, 6)
        true_mean, true_var = batch_moments(conv(x).detach())
        torch.testing.assert_close(mean, true_mean, rtol=0, atol=1e-6)
        change = nn.functional.conv2d(x, conv.weight - before, None, 2, 1, groups=groups)
        rest = change.square().mean((0, 2, 3))
        torch.testing.assert_close(true_var - var, rest, rtol=0.02, atol=2e-6)
        errors.append((true_var - var).mean().item())
    assert 0 < errors[0] < errors[1] < errors[2]


def test_the_error_is_of_second_order():
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    x = torch.randn(2, 4, 15, 11, dtype=torch.float64)
    start = conv.weight.detach().clone()
    direction = torch.randn_like(start) * 0.05
    window = Window(1)
    window.push(entry_of(conv, x))
    errors = []
    for scale in (1.0, 0.5, 0.25):
        with torch.no_grad():
            conv.weight.copy_(start + scale * direction)
        zero = torch.zeros(6, dtype=torch.float64)
        estimate = window.estimate(zero, zero, conv.weight, conv.bias)
        var = 2 * (estimate.var - estimate.mean.square())
        errors.append((batch_moments(conv(x).detach())[1] - var).mean().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_uncompensated_error_is_larger():
    torch.manual_seed(2)
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 15, 11) + 1
    window, naive = Window(1), Window(1)
    entry = entry_of(conv, x)
    window.push(entry)
    naive.push(Entry.of(*batch_moments(conv(x).detach())))
    moved(conv, 0.05)
    true_mean, true_var = batch_moments(conv(x).detach())
    mean, var = past_statistics(window, conv, 6)
    conv.bias = None
    naive_mean, naive_var = past_statistics(naive, conv, 6)
    assert (mean - true_mean).norm() < 1e-4 * (naive_mean - true_mean).norm()
    assert (var - true_var).norm() < 0.3 * (naive_var - true_var).norm()


def test_a_negative_variance_is_cut():
    conv = nn.Conv2d(1, 1, 1, bias=False)
    window = Window(1)
    window.push(entry_of(conv, torch.randn(4, 1, 8, 8)))
    with torch.no_grad():
        conv.weight.mul_(-3)  # v + h dw = v (1 + 2 * -4): far below zero
    estimate = window.estimate(torch.zeros(1), torch.ones(1), conv.weight, None)
    assert not estimate.past.positive.any()
    # Means of mu_hat and 0; variances of 0, as it was cut, and 1.
    torch.testing.assert_close(estimate.var, 0.5 + estimate.mean.square())


def test_the_ring_keeps_the_newest():
    window = Window(3)
    for value in range(5):
        window.push(Entry.of(torch.tensor([float(value)]), torch.tensor([1.0])))
        assert len(window) == min(value + 1, 3)
    estimate = window.estimate(torch.tensor([9.0]), torch.tensor([1.0]), None, None)
    assert estimate.size == 4
    assert estimate.mean.item() == pytest.approx((2 + 3 + 4 + 9) / 4)
    assert estimate.var.item() == pytest.approx(1 + torch.tensor([2.0, 3, 4, 9]).var(correction=0))


def test_memory_is_one_weight_per_entry():
    conv = nn.Conv2d(64, 64, 3)
    window = Window(7)
    assert window.nbytes == 0
    window.push(entry_of(conv, torch.randn(1, 64, 5, 5)))
    weight = conv.weight.numel() * 4
    assert window.nbytes <= 7 * 1.05 * weight
    window.clear()
    assert window.nbytes == 0 and len(window) == 0


def test_state_is_float32_for_any_input():
    window = Window(2)
    window.push(entry_of(nn.Conv2d(2, 3, 3).double(), torch.randn(1, 2, 6, 6).double()))
    assert window.nbytes == 4 * (3 * 3 * 2 + 2 * 18 + 2 * 3 * 18)


def test_entries_with_and_without_derivative_do_not_mix():
    conv = nn.Conv2d(2, 3, 3, bias=False)
    window = Window(4)
    x = torch.randn(1, 2, 6, 6)
    moments = batch_moments(conv(x).detach())
    window.push(entry_of(conv, x))
    window.push(entry_of(conv, x))
    window.push(Entry.of(*moments))
    assert len(window) == 1
    assert window.estimate(*moments, conv.weight, None).past.derivative is None


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("product", [_product, _product_without_tf32])
def test_products_with_the_weight(groups, product, monkeypatch):
    monkeypatch.setattr("cbn_mmdet.norm.window._product", product)
    weight = torch.randn(6, 4, 3, 3)
    derivative = Derivative(torch.randn(groups, 5, 36), torch.randn(6, 5, 36))
    mean, var = torch.empty(2, 6, 5)
    multiply(derivative, weight, mean, var)
    for channel in range(6):
        w = weight[channel].flatten()
        of_group = derivative.mean[channel * groups // 6]
        torch.testing.assert_close(mean[channel], of_group @ w)
        torch.testing.assert_close(var[channel], derivative.var[channel] @ w)
    one = Derivative(derivative.mean[:, 0], derivative.var[:, 0])
    torch.testing.assert_close(dot(one, weight)[0], mean[:, 0])
    torch.testing.assert_close(dot(one, weight)[1], var[:, 0])
