"""The figures of a diagnosis, against the formulas on a small training."""

import math

import pytest
import torch
from torch import nn

from cbn_mmdet import CBN, diagnose, link, set_window, step


def train(norm, steps, rate=0.05):
    """A training, and what its last 3 iterations saw: the images, and the mean at that time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Conv2d(4, 1, 1)).double()
    link(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    seen = []
    for _ in range(steps):
        x = torch.randn(2, 2, 6, 6, dtype=torch.float64) + torch.randn(1, dtype=torch.float64)
        with torch.no_grad():
            seen.append((x, (model[0](x) - model[0].bias[:, None, None]).mean((0, 2, 3))))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step(model)
    return model, seen[-3:]


def test_against_the_inputs():
    """With the last of them through today's weight."""
    model, seen = train(CBN(4, window_size=4, eps=1e-12), 9)
    found = diagnose(model)
    assert list(found) == ["1"]
    with torch.no_grad():
        outputs = [model[0](x) - model[0].bias[:, None, None] for x, _ in seen]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs])
    var = torch.cat(outputs).var((0, 2, 3), unbiased=False)
    recorded = torch.stack([mean for _, mean in seen])
    # The compensated variance is of second order only: hence the tolerance.
    correction = ((means - recorded).abs() / var.sqrt()).mean().item()
    noise = ((means[-1] - means.mean(0)) / var.sqrt()).square().mean().sqrt().item()
    assert found["1"].correction == pytest.approx(correction, rel=0.05) and correction > 0.01
    assert found["1"].noise == pytest.approx(noise, rel=0.05) and noise > 0.1
    assert found["1"].clamped == 0.0
    assert not found["1"].is_doubtful


def test_weights_that_leap():
    model, _ = train(CBN(4, window_size=4), 9)
    with torch.no_grad():
        model[0].weight += 0.5
    found = diagnose(model)["1"]
    assert found.correction > 0.3 and found.is_doubtful
    with torch.no_grad():
        model[0].weight *= float("nan")
    assert diagnose(model)["1"].is_doubtful


def test_without_compensation_there_is_none():
    found = diagnose(train(CBN(4, window_size=4, compensate=False), 9)[0])["1"]
    assert found.correction == found.clamped == 0.0
    assert found.noise > 0.1


@pytest.mark.parametrize("window_size, steps", [(2, 4), (4, 1)])
def test_one_past_iteration_tells_all_but_the_noise(window_size, steps):
    model, seen = train(CBN(4, window_size=window_size, eps=1e-12), steps)
    with torch.no_grad():
        model[0].weight *= -3
    found = diagnose(model)["1"]
    x, recorded = seen[-1]
    with torch.no_grad():
        y = model[0](x) - model[0].bias[:, None, None]
    moved = (y.mean((0, 2, 3)) - recorded).abs()
    # The variance of the first order comes out negative, and is cut to the mean's square at most.
    assert found.clamped == 1 and found.correction > (moved / y.std((0, 2, 3))).mean()
    assert math.isnan(found.noise) and found.is_doubtful


class Often(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), CBN(4, window_size=4))

    def forward(self, x, calls):
        for _ in range(calls):
            x = self.block(x)
        return x


def test_a_window_that_is_younger_than_the_layers_others():
    """The noise is that of the windows that can tell."""
    torch.manual_seed(0)
    model = Often()
    link(model)
    for calls in (1, 1, 1, 2):
        model(torch.randn(2, 4, 6, 6), calls).square().mean().backward()
        step(model)
    assert [len(window) for window in model.block[1]._windows] == [3, 1]
    assert 0 < diagnose(model)["block.1"].noise < 1


def test_empty_windows():
    assert diagnose(train(CBN(4, window_size=4), 0)[0]) == {}
    assert diagnose(train(CBN(4, window_size=1), 4)[0]) == {}
    assert diagnose(nn.Conv2d(1, 1, 1)) == {}


def test_a_convolution_that_is_gone():
    model, _ = train(CBN(4, window_size=4), 4)
    model[0] = nn.Conv2d(2, 4, 3)
    assert diagnose(model) == {}


def test_it_changes_nothing():
    ends = []
    for looks in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), CBN(4, window_size=3), nn.Conv2d(4, 1, 1))
        link(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(6):
            set_window(model, 1 if number < 2 else 3)
            model(torch.randn(1, 2, 6, 6)).square().mean().backward()
            optimizer.step()
            step(model)
            if looks:
                diagnose(model)
        ends.append(model.state_dict())
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
