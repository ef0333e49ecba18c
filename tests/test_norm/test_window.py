"""What windows tell of the past, against recomputing the statistics from the stored inputs."""

import math

import pytest
import torch
from torch import nn

from cbn_mmdet import CBN, link, step, window_state
from cbn_mmdet.norm.window import LARGEST, MovingWindow, SlidingWindow, pasts

KINDS = pytest.mark.parametrize("kind", ["moving", "sliding"])
CPU = torch.device("cpu")


def model_of(conv, kind="moving", size=8, **kwargs):
    norm = CBN(conv.out_channels, window=kind, window_size=size, derivative_stride=1, **kwargs)
    model = nn.Sequential(conv, norm.to(conv.weight.dtype))
    link(model)
    return model


def iterate(model, *batches):
    for x in batches:
        model(x)
        step(model)
    return window_of(model)


def window_of(model):
    """A separate window with the contents of the layer's."""
    (state,), norm = window_state(model)["1"], model[1]
    kind = {"moving": MovingWindow, "sliding": SlidingWindow}[norm.window]
    dtype = getattr(torch, norm.window_dtype)
    window = kind(state["size"], norm.window_size == "auto", dtype)
    window.load(state, CPU)
    return window


def past_of(window, conv):
    """Mean and variance at today's weight and bias."""
    weight = conv.weight if window.h is not None else None
    bias = conv.bias if window.h is not None else None
    return window.past(weight, bias, conv.weight.dtype)


def moments(y):
    return y.mean((0, 2, 3)).detach(), y.var((0, 2, 3), correction=0).detach()


def moved(conv, distance):
    """Moves every weight and bias by a random step of the given relative length."""
    with torch.no_grad():
        for parameter in conv.parameters():
            noise = torch.randn_like(parameter)
            parameter += distance * parameter.norm() * noise / noise.norm()


@KINDS
def test_the_past_is_in_full_precision_under_autocast(kind):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3)
    model = model_of(conv, kind)
    window = iterate(model, *(torch.randn(2, 3, 9, 9) for _ in range(3)))
    moved(conv, 0.1)
    expected = past_of(window, conv)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 9, 9))
    found = model[1]._windows[0].cached[0]
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-6, atol=1e-6)


@KINDS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_compensation_against_recomputation(groups, bias, kind):
    """The mean is exact; the variance is low by exactly the Taylor remainder, E[(dw . phi)^2]."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=groups, bias=bias)
    x = torch.randn(2, 4, 15, 11) + 0.5
    window = iterate(model_of(conv, kind), x)
    before = conv.weight.detach().clone()
    errors = []
    for distance in (0.02, 0.02, 0.04):
        moved(conv, distance)
        mean, var, *_ = past_of(window, conv)
        true_mean, true_var = moments(conv(x))
        torch.testing.assert_close(mean, true_mean, rtol=0, atol=1e-6)
        change = nn.functional.conv2d(x, conv.weight - before, None, 2, 1, groups=groups)
        rest = change.square().mean((0, 2, 3))
        if kind == "moving":  # the paper's expansion is of E[y^2], not of the variance
            rest = rest - change.mean((0, 2, 3)).square()
        torch.testing.assert_close(true_var - var, rest, rtol=0.02, atol=2e-6)
        errors.append((true_var - var).mean().item())
    assert 0 < errors[0] < errors[1] < errors[2]


def gradient(past, of_mean, of_var):
    """The gradient in the weight, from given gradients in mean and variance alone."""
    found = of_mean.new_empty(len(of_mean), past.h.shape[-1])
    past.gradient(of_mean, of_var, found)
    return found


@KINDS
def test_a_negative_variance_is_cut(kind):
    conv = nn.Conv2d(1, 1, 1, bias=False)
    window = iterate(model_of(conv, kind), torch.randn(4, 1, 8, 8))
    with torch.no_grad():
        conv.weight.mul_(-3)  # v + h dw = v (1 + 2 * -4): far below zero
    past = past_of(window, conv)
    assert not past.positive.any() and not past.var.any()
    # Then it does not depend on the weight.
    of_var = past.positive.float() if kind == "moving" else torch.ones(1)
    assert not gradient(past, torch.zeros(1), of_var).any()


@KINDS
@pytest.mark.parametrize("compensate", [True, False])
def test_what_is_kept_of_a_weight_that_rests(compensate, kind):
    """Sliding: the last iterations as one batch. Moving: nested unions, each newer of share 1/k."""
    conv = nn.Conv2d(2, 4, 3)
    model, outputs, union = model_of(conv, kind, 4, compensate=compensate), [], None
    for number in range(9):
        x = torch.randn(2, 2, 6, 5) * (1 + number % 2) + number % 3
        outputs.append(conv(x).detach())
        past = past_of(iterate(model, x), conv)
        if kind == "sliding":
            expected = moments(torch.cat(outputs[-3:]))
            assert past.share == 1 / min(number + 2, 4)
        else:
            mean, var = moments(outputs[-1])
            s = 1 / min(number + 1, 4)
            d = mean - union[0] if union else 0 * mean
            old_mean, old_var = union or (mean, var)
            union = old_mean + s * d, s * var + (1 - s) * old_var + s * (1 - s) * d.square()
            expected = union
            assert past.share == 1 / min(number + 2, 4)
        torch.testing.assert_close(past.mean, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(past.var, expected[1], rtol=1e-4, atol=1e-5)


def predicted_bytes(conv, norm):
    """The formula of docs/trust.md."""
    channels, weights = conv.out_channels, conv.weight.numel()
    patches = weights // channels * conv.groups  # of one channel, for each group
    kept = 3 * channels
    if norm.compensate:
        kept += weights + patches
    iterations = norm.window_size - 1 if norm.window == "sliding" else 1
    averages = 2 * channels if norm.compensate and norm.backward == "mixed" else 0
    return 4 * (iterations * kept + channels + averages)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(window_size=2),
        dict(window_size=64),
        dict(window="sliding", window_size=5),
        dict(backward="current"),
        dict(window="sliding", window_size=5, backward="window"),
        dict(compensate=False),
        dict(window="sliding", window_size=5, compensate=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("groups, kernel", [(1, 3), (16, 3), (2, (1, 5))])
def test_memory(groups, kernel, kwargs):
    conv = nn.Conv2d(16, 64, kernel, groups=groups)
    model = nn.Sequential(conv, CBN(64, **kwargs)).bfloat16()
    link(model)
    for _ in range(6):
        model(torch.randn(1, 16, 9, 9).bfloat16()).sum().backward()
        step(model)
    window, norm = window_of(model), model[1]
    assert norm.window_bytes == window.nbytes == predicted_bytes(*model)
    if norm.window == "moving" and norm.compensate and groups == 1:  # one weight, of any size
        assert window.nbytes <= 1.2 * 4 * conv.weight.numel()
    window.clear()
    assert window.nbytes == 0 and window.seen == 0


@KINDS
@pytest.mark.parametrize("window_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradient(groups, window_dtype, kind):
    """By finite differences of what the window tells at a weight."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, groups=groups).double()
    model = model_of(conv, kind, 4, window_dtype=window_dtype)
    for _ in range(5):
        window = iterate(model, torch.randn(2, 2, 6, 5, dtype=torch.float64) + torch.randn(1))
        moved(conv, 0.05)
    with torch.no_grad():
        conv.weight[0] *= -3  # its variance is cut
    of_mean, of_var = torch.randn(2, 4, dtype=torch.float64)
    past = past_of(window, conv)
    assert not past.positive[0].any() and past.positive.any()
    masked = of_var * past.positive if kind == "moving" else of_var
    found = gradient(past, of_mean, masked)
    for place in range(found.shape[1]):
        ends = []
        for distance in (1e-4, -1e-4):  # each channel depends on its own weights alone
            weight = conv.weight.detach().clone()
            weight.flatten(1)[:, place] += distance
            at = window.past(weight, conv.bias, torch.float64)
            ends.append(of_mean * at.mean + of_var * at.var)
        expected = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close(found[:, place], expected, rtol=1e-6, atol=1e-6)


@KINDS
def test_several_windows_at_once_tell_what_each_does(kind):
    together = []
    for channels, groups, bias in ((4, 1, True), (6, 2, False), (4, 2, True)):
        conv = nn.Conv2d(2 * groups, channels, 3, groups=groups, bias=bias)
        batches = torch.randn(3, 2, 2 * groups, 6, 5)
        window = iterate(model_of(conv, kind, 4), *batches)
        moved(conv, 0.05)
        together.append((window, conv.weight, conv.bias))
    together.insert(1, (iterate(model_of(conv, kind, 4, compensate=False), *batches), None, None))
    for past, (window, weight, bias) in zip(pasts(together, torch.float32), together, strict=True):
        alone = window.past(weight, bias, torch.float32)
        torch.testing.assert_close(past.mean, alone.mean)
        torch.testing.assert_close(past.var, alone.var)
        assert (past.m is not None) == (weight is not None)
        if past.m is not None:
            assert torch.equal(past.positive, alone.positive)


@KINDS
def test_what_is_known_is_of_the_weight_as_it_is(kind):
    conv = nn.Conv2d(2, 4, 3)
    window = iterate(model_of(conv, kind), torch.randn(2, 2, 6, 5))
    past = past_of(window, conv)
    window.cache(past, conv.weight, conv.bias)
    assert past_of(window, conv) is past
    assert window.past(conv.weight.detach().clone(), conv.bias, torch.float32) is not past
    assert window.past(conv.weight, conv.bias, torch.float64) is not past
    for parameter in conv.parameters():
        window.cache(past, conv.weight, conv.bias)
        with torch.no_grad():
            parameter.add_(1)
        found = past_of(window, conv)
        assert found is not past and not torch.equal(found.mean, past.mean)


@KINDS
def test_a_past_of_another_weight_is_none(kind):
    window = iterate(model_of(nn.Conv2d(2, 4, 3), kind), torch.randn(2, 2, 6, 5))
    assert window.fits(torch.empty(4, 2, 3, 3)) and not window.fits(None)
    for other in (None, torch.empty(4, 2, 1, 1), torch.empty(4, 2, 3, 3, device="meta")):
        assert window.past(other, None, torch.float32) is None
    naive = iterate(model_of(nn.Conv2d(2, 4, 3), kind, compensate=False), torch.randn(2, 2, 6, 5))
    assert naive.fits(None) and not naive.fits(torch.empty(4, 2, 3, 3))


class TestShare:
    """The share of a moving window that sets its own size."""

    def test_starts_at_its_largest_and_keeps_within_its_bounds(self):
        window = MovingWindow(LARGEST, True, torch.float32)
        window.seen = 1000
        assert window.share == pytest.approx(1 / LARGEST)
        window.adapt(1)
        assert window.share == pytest.approx(math.exp(0.02) / LARGEST)
        for _ in range(300):
            window.adapt(1)
        assert window.share == 1
        for _ in range(300):
            window.adapt(-1)
        assert window.share == pytest.approx(1 / LARGEST)

    def test_the_past_fills_as_a_plain_mean(self):
        window = MovingWindow(LARGEST, True, torch.float32)
        for window.seen, share in ((0, 1), (1, 1 / 2), (6, 1 / 7), (9, 1 / 8)):
            assert window.share == pytest.approx(share)

    def test_is_held_by_the_size_in_force(self):
        window = MovingWindow(4, True, torch.float32)
        window.seen, window.log_share = 1000, -math.log(64)
        assert window.share == 1 / 4

    def test_is_forgotten_with_the_past(self):
        window = MovingWindow(LARGEST, True, torch.float32)
        for _ in range(20):
            window.adapt(1)
        assert window.lag > 0.3
        window.clear()
        window.seen = 1000
        assert window.share == pytest.approx(1 / LARGEST) and window.lag == 0

    def test_what_is_no_number_teaches_nothing(self):
        window = MovingWindow(LARGEST, True, torch.float32)
        window.adapt(1)
        before = window.log_share
        window.adapt(math.nan)
        assert window.log_share == before

    def test_a_size_that_is_given_is_not_learnt(self):
        window = MovingWindow(8, False, torch.float32)
        window.seen, window.log_share = 1000, -math.log(64)
        assert window.share == 1 / 8
