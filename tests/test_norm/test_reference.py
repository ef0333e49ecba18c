"""The reference itself, against recomputations that share no line with it."""

import math

import pytest
import torch
from torch import nn

from cbn_mmdet.norm.reference import Reference
from cbn_mmdet.norm.window import LARGEST


def conv_of(**kwargs):
    torch.manual_seed(0)
    return nn.Conv2d(2, 4, 3, padding=1, **kwargs).double()


def batch(images=2):
    size = images, 2, 6, 5
    return torch.randn(size, dtype=torch.float64) * (0.5 + torch.rand(1)) + torch.randn(1)


def move(conv, distance=0.05):
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter += distance * torch.randn_like(parameter)


def raw_moments(x, weight):
    """``mu`` and ``nu``, the mean of squares, of the convolution without a bias."""
    y = nn.functional.conv2d(x, weight, padding=1, groups=2 // weight.shape[1])
    return y.mean((0, 2, 3)), y.square().mean((0, 2, 3))


def jacobians(x, weight):
    """The derivatives of both in the weight, ``(C, C, C_in, kh, kw)`` each."""
    return torch.autograd.functional.jacobian(lambda weight: raw_moments(x, weight), weight)


@pytest.mark.parametrize("distance", [0.05, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_sliding_window_is_the_papers(groups, distance):
    """Equations 5 to 9 with raw second moments; at the large distance the maximum acts."""
    conv = conv_of(bias=False, groups=groups)
    reference, past, is_cut = Reference(conv, "sliding", 4), [], False
    for _ in range(6):
        x, weight = batch(), conv.weight.detach()
        terms = [raw_moments(x, weight)]
        for x_then, weight_then in past:
            step = weight - weight_then
            of_mu, of_nu = (
                (jacobian * step).flatten(1).sum(1) for jacobian in jacobians(x_then, weight_then)
            )
            mu, nu = raw_moments(x_then, weight_then)
            terms.append((mu + of_mu, nu + of_nu))
        is_cut |= any(bool((nu < mu.square()).any()) for mu, nu in terms)
        mean = sum(mu for mu, _ in terms) / len(terms)
        nu = sum(torch.maximum(nu, mu.square()) for mu, nu in terms) / len(terms)
        found = reference.statistics(conv(x))
        torch.testing.assert_close(found.mean, mean)
        torch.testing.assert_close(found.var, nu - mean.square())
        past = [(x, weight.clone()), *past][:3]
        reference.step(x)
        move(conv, distance)
    assert is_cut == (distance == 1)


@pytest.mark.parametrize("window", ["moving", "sliding"])
def test_a_bias_only_shifts_the_means(window):
    conv, bare = conv_of(), conv_of(bias=False)
    bare.weight = conv.weight
    reference, without = (Reference(each, window, 3) for each in (conv, bare))
    for _ in range(4):
        x = batch()
        of, of_bare = reference.statistics(conv(x)), without.statistics(bare(x))
        torch.testing.assert_close(of.mean, of_bare.mean + conv.bias)
        torch.testing.assert_close(of.var, of_bare.var)
        reference.step(x), without.step(x)
        move(conv)


@pytest.mark.parametrize("size", [3, "auto"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_moving_window_is_the_unions_expansion(bias, size):
    """Value and derivatives, by finite differences of the union as a function of the weight."""
    conv = conv_of(bias=bias)
    reference = Reference(conv, "moving", size)

    @torch.no_grad()
    def union(x):
        found = reference.statistics(conv(x))
        return torch.stack((found.mean - reference.bias(), found.var))

    for _ in range(4):
        x, step, differences = batch(), 1e-5, []
        here = union(x)
        for place in range(conv.weight[0].numel()):
            ends = []
            for sign in (1, -1):  # each channel depends on its own weights alone
                conv.weight.data.flatten(1)[:, place] += sign * step
                ends.append(union(x))
                conv.weight.data.flatten(1)[:, place] -= sign * step
            differences.append((ends[0] - ends[1]) / (2 * step))
        reference.step(x)
        (past,) = reference.past
        of_mean, of_var = torch.stack(differences, 2)
        torch.testing.assert_close(torch.stack((past.mean, past.var)), here)
        torch.testing.assert_close(past.mean_in_w.flatten(1), of_mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(past.var_in_w.flatten(1), of_var, rtol=1e-6, atol=1e-8)
        move(conv)


@pytest.mark.parametrize("window", ["moving", "sliding"])
def test_a_window_that_fills_has_plain_averages(window):
    """Of a weight that rests: the statistics of all batches together."""
    conv, seen = conv_of(), []
    reference = Reference(conv, window, 8)
    for _ in range(5):
        x = batch()
        seen.append(conv(x).detach())
        found, together = reference.statistics(seen[-1]), torch.cat(seen)
        torch.testing.assert_close(found.mean, together.mean((0, 2, 3)))
        torch.testing.assert_close(found.var, together.var((0, 2, 3), correction=0))
        reference.step(x)


def gradients(reference, x, target):
    x = x.clone().requires_grad_()
    gamma, beta = torch.linspace(-1, 2, 4).double(), torch.ones(4).double()
    output = reference.forward(x, gamma, beta)
    return torch.autograd.grad((output * target).sum(), [x, *reference.conv.parameters()])


@pytest.mark.parametrize("backward", ["current", "window", "mixed"])
def test_without_a_past_every_gradient_is_batch_normalisations(backward):
    conv, x = conv_of(), batch()
    target = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    found = gradients(Reference(conv, backward=backward), x, target)
    x.requires_grad_()
    gamma, beta = torch.linspace(-1, 2, 4).double(), torch.ones(4).double()
    output = nn.functional.batch_norm(conv(x), None, None, gamma, beta, training=True)
    expected = torch.autograd.grad((output * target).sum(), [x, *conv.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_goes_on_to_the_input():
    """The gradient of the convolution's output, r [g - b - x_hat c], with each gradient."""
    conv = nn.Conv2d(4, 4, 1, bias=False).double()
    nn.init.dirac_(conv.weight)  # so that the input receives what its output does
    target = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    batches = [torch.randn(2, 4, 6, 5, dtype=torch.float64) + i for i in range(3)]
    g = target * torch.linspace(-1, 2, 4).double()[:, None, None]
    averages = torch.randn(2, 4, dtype=torch.float64)
    for backward in ("current", "window", "mixed"):
        reference = Reference(conv, "moving", 3, backward=backward)
        for x in batches[:2]:
            reference.step(x)
        reference.averages = tuple(averages)
        x = batches[2]
        mean, var = (each.detach() for each in reference.statistics(x))
        r = (var + reference.eps).rsqrt()[:, None, None]
        x_hat = (x - mean[:, None, None]) * r
        own = torch.stack((g.mean((0, 2, 3)), (g * x_hat).mean((0, 2, 3))))
        off = own * 5 / 9 + averages * 4 / 9 if backward == "mixed" else own / 3
        b, c = off[:, :, None, None]
        torch.testing.assert_close(gradients(reference, x, target)[0], r * (g - b - x_hat * c))


def test_the_share_follows_the_surprises():
    """The share falls where surprises turn and rises where they agree, within its bounds."""
    reference = Reference(conv_of())
    surprise = torch.randn(4, dtype=torch.float64)
    reference.set_share(surprise)
    widest = -math.log(LARGEST)
    assert reference.log_share == widest
    for number in range(3):
        reference.set_share(surprise * (1 + number))
    assert reference.log_share == pytest.approx(widest + 0.06)
    reference.set_share(-surprise)
    assert reference.log_share == pytest.approx(widest + 0.04)
    for number in range(300):
        reference.set_share(surprise * (-1) ** number)
    assert reference.log_share == pytest.approx(widest)
    for _ in range(300):
        reference.set_share(surprise)
    assert reference.log_share == 0


@pytest.mark.parametrize("window", ["moving", "sliding"])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_window_of_one_is_batch_normalisation(momentum, window):
    conv = conv_of()
    reference = Reference(conv, window, 1, momentum=momentum)
    norm = nn.BatchNorm2d(4, momentum=momentum).double()
    for _ in range(3):
        x = batch()
        y = reference.forward(x, norm.weight, norm.bias)
        torch.testing.assert_close(y, norm(conv(x)))
        reference.step(x)
        torch.testing.assert_close(reference.running.mean, norm.running_mean)
        torch.testing.assert_close(reference.running.var, norm.running_var)
        move(conv)
