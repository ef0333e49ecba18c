"""The figures of a diagnosis, against the formulas on a small training."""

import math

import pytest
import torch
from torch import nn

from cbn_mmdet import CBN, diagnose, link, set_window, step, window_state

KINDS = pytest.mark.parametrize("window", ["moving", "sliding"])


def train(norm, steps, rate=0.05):
    """A trained model, and the images, weight and window share of each iteration."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Conv2d(4, 1, 1)).double()
    link(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    seen = []
    for number in range(1, steps + 1):
        x = torch.randn(2, 2, 6, 6, dtype=torch.float64) + torch.randn(1, dtype=torch.float64)
        size = norm.mean_window_size if norm.window_size == "auto" else norm.window_size
        seen.append((x, model[0].weight.detach().clone(), 1 / min(size, number)))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step(model)
    return model, seen


def statistics(weight, images, shares=None):
    """Mean and variance at a weight over all images together, each with its share."""
    outputs = [nn.functional.conv2d(x, weight) for x in images]
    if shares is None:
        shares = [1 / len(images)] * len(images)
    mean = sum(s * y.mean((0, 2, 3)) for s, y in zip(shares, outputs, strict=True))
    squares = [(y - mean[:, None, None]).square().mean((0, 2, 3)) for y in outputs]
    return mean, sum(s * each for s, each in zip(shares, squares, strict=True))


def shares_of(own):
    """Each iteration's share of the past, from its own share when it was added."""
    shares = []
    for share in own:
        shares = [(1 - share) * each for each in shares] + [share]
    return shares


def root_mean_square(values):
    return values.square().mean().sqrt().item()


def test_a_sliding_window_against_the_inputs():
    """Recomputes from the last inputs, at today's weight or the last iteration's."""
    model, seen = train(CBN(4, window="sliding", window_size=4, eps=1e-12), 9)
    found = diagnose(model)
    assert list(found) == ["1"]
    weight = model[0].weight.detach()
    images, weights, _ = zip(*seen[-3:], strict=True)
    mean, var = statistics(weight, images)
    means = torch.stack([statistics(weight, [x])[0] for x in images])
    recorded = torch.stack(
        [statistics(each, [x])[0] for x, each in zip(images, weights, strict=True)]
    )
    # The compensated variance is of second order only: hence the tolerance.
    correction = ((means - recorded).abs() / var.sqrt()).mean().item()
    last_mean, last_var = statistics(weights[-1], images[-1:])
    past_mean, past_var = statistics(weights[-1], [x for x, *_ in seen[-4:-1]])
    noise = root_mean_square((last_mean - past_mean) / ((past_var + last_var) / 2).sqrt())
    assert found["1"].correction == pytest.approx(correction, rel=0.05) and correction > 0.01
    assert found["1"].noise == pytest.approx(noise, rel=0.05) and noise > 0.1
    assert found["1"].clamped == 0.0 and found["1"].window_size == 4
    assert not found["1"].is_doubtful


@pytest.mark.parametrize("window_size", [4, "auto"])
def test_a_moving_window_against_the_inputs(window_size):
    """Recomputes from all inputs, at today's weight and at the last iteration's."""
    norm = CBN(4, window_size=window_size, eps=1e-12)
    model, seen = train(norm, 9, rate=0.002)
    found = diagnose(model)["1"]
    images, weights, own = zip(*seen, strict=True)
    shares, last = shares_of(own), weights[-1]
    mean, var = statistics(model[0].weight.detach(), images, shares)
    moved = mean - statistics(last, images, shares)[0]
    correction = norm.mean_window_size * (moved.abs() / var.sqrt()).mean().item()
    past_mean, past_var = statistics(last, images[:-1], shares_of(own[:-1]))
    batch_mean, batch_var = statistics(last, images[-1:])
    noise = root_mean_square((batch_mean - past_mean) / ((past_var + batch_var) / 2).sqrt())
    # Of second order only is the compensated variance, as above.
    assert found.correction == pytest.approx(correction, rel=0.05) and correction > 1e-4
    assert found.noise == pytest.approx(noise, rel=0.05) and noise > 0.1
    assert found.clamped == 0.0
    assert found.window_size == pytest.approx(norm.mean_window_size)
    assert not found.is_doubtful


@KINDS
def test_weights_that_leap(window):
    model, _ = train(CBN(4, window=window, window_size=4), 9)
    with torch.no_grad():
        model[0].weight += 0.5
    found = diagnose(model)["1"]
    assert found.correction > 0.3 and found.is_doubtful
    with torch.no_grad():
        model[0].weight *= float("nan")
    assert diagnose(model)["1"].is_doubtful


@KINDS
def test_without_compensation_there_is_none(window):
    norm = CBN(4, window=window, window_size=4, compensate=False)
    found = diagnose(train(norm, 9)[0])["1"]
    assert found.correction == found.clamped == 0.0
    assert found.noise > 0.1 and found.window_size == 4


@KINDS
def test_a_frozen_weight_needs_none(window):
    """The bias trains, but the window does not record it."""
    norm = CBN(4, window=window, window_size=4)
    model, _ = train(norm, 0)
    model[0].weight.requires_grad_(False)
    for _ in range(9):
        model(torch.randn(2, 2, 6, 6, dtype=torch.float64)).square().mean().backward()
        step(model)
        model[0].bias = nn.Parameter(model[0].bias.detach() + 1)
    model(torch.randn(2, 2, 6, 6, dtype=torch.float64))  # computes the past with the bias
    found = diagnose(model)["1"]
    assert found.correction == found.clamped == 0.0 and 0 < found.noise < 1


@pytest.mark.parametrize(
    "window, window_size, steps",
    [("sliding", 2, 1), ("sliding", 4, 1), ("moving", 4, 1), ("moving", "auto", 1)],
)
def test_one_past_iteration_tells_all_but_the_noise(window, window_size, steps):
    norm = CBN(4, window=window, window_size=window_size, eps=1e-12)
    model, seen = train(norm, steps)
    with torch.no_grad():
        model[0].weight *= -3
    found = diagnose(model)["1"]
    x, weight, _ = seen[-1]
    mean, var = statistics(model[0].weight.detach(), [x])
    moved = (mean - statistics(weight, [x])[0]).abs()
    # The variance of the first order comes out negative, and is cut to the mean's square at most.
    assert found.clamped == 1 and found.correction > (moved / var.sqrt()).mean()
    assert math.isnan(found.noise) and found.is_doubtful
    assert found.window_size == 2


class Often(nn.Module):
    def __init__(self, window):
        super().__init__()
        norm = CBN(4, window=window, window_size=4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm)

    def forward(self, x, calls):
        for _ in range(calls):
            x = self.block(x)
        return x


@KINDS
def test_a_window_that_is_younger_than_the_layers_others(window):
    """The noise is that of the windows with enough past iterations to tell it."""
    torch.manual_seed(0)
    model = Often(window)
    link(model)
    for calls in (1, 1, 1, 2):
        model(torch.randn(2, 4, 6, 6), calls).square().mean().backward()
        step(model)
    assert [state["seen"] for state in window_state(model)["block.1"]] == [4, 1]
    found = diagnose(model)["block.1"]
    assert 0 < found.noise < 1
    assert found.window_size == 3  # of 4 and 2


@pytest.mark.parametrize("window, size", [("sliding", 4), ("moving", 4), ("moving", "auto")])
def test_lag_is_the_mean_agreement_of_surprises(window, size):
    model, lag, last = train(CBN(4, window=window, window_size=size), 1)[0], 0.0, None
    for _ in range(6):
        model(torch.randn(2, 2, 6, 6, dtype=torch.float64)).sum().backward()
        step(model)
        surprise = window_state(model)["1"][0]["surprise"]
        if last is not None:
            lag += 0.02 * (torch.cosine_similarity(surprise, last, 0).item() - lag)
        last = surprise
    assert diagnose(model)["1"].lag == pytest.approx(lag, abs=1e-6) and lag != 0


@KINDS
def test_lag_tells_what_earlier_layers_do_from_noise(window):
    """An earlier layer moves the means by little in one direction; or images differ by much."""
    lags = []
    for drift in (0.05, 0.0):
        torch.manual_seed(0)
        norm = CBN(4, window=window, window_size=8)
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1), norm)
        link(model)
        for _ in range(200):
            model(torch.randn(1, 3, 6, 6) + (drift == 0) * torch.randn(1, 3, 1, 1))
            step(model)
            model[0].bias.data += drift
        lags.append(diagnose(model)["2"].lag)
    assert lags[0] > 0.8 and abs(lags[1]) < 0.3


@KINDS
@pytest.mark.parametrize("compensate", [True, False])
def test_how_far_calls_are_apart(window, compensate):
    torch.manual_seed(0)
    norm = CBN(4, window=window, window_size=4, eps=0.5, compensate=compensate)
    conv = nn.Conv2d(4, 4, 1, bias=False)
    model = Often(window)
    model.block = nn.Sequential(conv, norm)
    link(model)
    levels = [torch.randn(2, 4, size, size) * (1 + size) + size for size in (8, 5, 3)]
    model.forward = lambda: [model.block(level) for level in levels]
    model()
    step(model)
    means, variances = (
        torch.stack(each) for each in zip(*map(moments_of(conv), levels), strict=True)
    )
    spread = means.var(0, correction=0) / (variances.mean(0) + 0.5)
    assert diagnose(model)["block.1"].apart == pytest.approx(spread.mean().sqrt().item(), rel=1e-4)
    assert spread.mean() > 0.1


def moments_of(conv):
    """A function of the input: mean and variance of the convolution's output."""
    return lambda x: (conv(x).mean((0, 2, 3)), conv(x).var((0, 2, 3), correction=0))


def test_one_call_is_not_apart():
    assert diagnose(train(CBN(4), 3)[0])["1"].apart == 0


def test_from_the_narrowest_window_to_the_widest():
    norms = [CBN(3, window_size=5), CBN(3, window="sliding", window_size=3), CBN(3), CBN(3)]
    norms[-1].set_window(4)
    layers = [layer for norm in norms for layer in (nn.Conv2d(3, 3, 3, padding=1), norm)]
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Conv2d(3, 3, 3, padding=1), CBN(3, window_size=1))
    link(model)
    for _ in range(8):
        model(torch.randn(2, 3, 6, 6)).square().mean().backward()
        step(model)
    found = diagnose(model)
    sizes = [each.window_size for each in found.values()]
    assert sizes == sorted(sizes) and found.keys() == {"1", "3", "5", "7"}
    assert (found["1"].window_size, found["3"].window_size) == (5, 3)
    for name in ("5", "7"):  # they set their own size
        size = model.get_submodule(name).mean_window_size
        assert found[name].window_size == pytest.approx(size)


@KINDS
def test_empty_windows(window):
    assert diagnose(train(CBN(4, window=window, window_size=4), 0)[0]) == {}
    assert diagnose(train(CBN(4, window=window, window_size=1), 4)[0]) == {}
    assert diagnose(nn.Conv2d(1, 1, 1)) == {}


@KINDS
def test_a_convolution_that_is_gone(window):
    model, _ = train(CBN(4, window=window, window_size=4), 4)
    model[0] = nn.Conv2d(2, 4, 3)
    assert diagnose(model) == {}


@KINDS
def test_it_changes_nothing(window):
    ends = []
    for looks in (False, True):
        torch.manual_seed(0)
        norm = CBN(4, window=window, window_size=3)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Conv2d(4, 1, 1))
        link(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(6):
            set_window(model, 1 if number < 2 else 3)
            model(torch.randn(1, 2, 6, 6)).square().mean().backward()
            optimizer.step()
            step(model)
            if looks:
                diagnose(model)
        ends.append({**model.state_dict(), **window_state(model)["1"][0]})
    assert ends[0].keys() == ends[1].keys()
    for one, other in zip(*(end.values() for end in ends), strict=True):
        assert one.equal(other) if isinstance(one, torch.Tensor) else one == other
