"""Both gradients: gradcheck in float64, and autograd on the same graph."""

import pytest
import torch
from reference import Reference
from torch import nn
from torch.func import functional_call

from cbn_mmdet import CBN, link, step
from cbn_mmdet.norm.moments import batch_moments
from cbn_mmdet.norm.normalize import normalize


def build(backward="window", affine=True, window=4, **kwargs):
    """A convolution with its CBN, after iterations with moving weights that fill the window."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, **kwargs)
    model = nn.Sequential(conv, CBN(4, window_size=window, backward=backward, affine=affine))
    model.double()
    if affine:
        nn.init.uniform_(model[1].weight)
        nn.init.normal_(model[1].bias)
    link(model)
    for _ in range(window + 1):
        model(torch.randn(2, 2, 6, 5, dtype=torch.float64) + torch.rand(1))
        step(model)
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "conv", [dict(), dict(bias=False), dict(groups=2, stride=2, padding=1)], ids=str
)
def test_gradient_through_the_window(conv, affine):
    model = build(affine=affine, **conv)
    names = [name for name, _ in model.named_parameters()]
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *model.parameters()))


@pytest.mark.parametrize("affine", [True, False])
def test_gradient_of_the_current_iteration(affine):
    """With the convolution's weight fixed, the paper's gradient is the whole gradient."""
    model = build("current", affine=affine)
    conv, norm = model
    window = norm._windows[0]
    assert len(window) == 3

    def run(y, *affine):
        estimate = window.estimate(*batch_moments(y.detach()), conv.weight, conv.bias)
        return normalize(y, *(affine or (None, None)), estimate, norm.eps)

    y = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (y, *norm.parameters()))


@pytest.mark.parametrize("backward", ["window", "current"])
@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_the_references(backward, window, bias):
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=bias).double()
    norm = CBN(4, window_size=window, backward=backward).double()
    nn.init.uniform_(norm.weight)
    model = nn.Sequential(conv, norm)
    link(model)
    slow = Reference(conv, window, norm.eps, compensate=True, flow=backward == "window")
    for _ in range(window + 2):
        x = torch.randn(1, 3, 6, 7, dtype=torch.float64) * torch.rand(1) + torch.rand(1)
        target = torch.randn(1, 4, 6, 7, dtype=torch.float64)
        grads = []
        for output in (model(x), slow.forward(x, norm.weight, norm.bias)):
            model.zero_grad()
            (output * target).sum().backward()
            grads.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
        for fast, plain in zip(*grads, strict=True):
            # The window is held in float32.
            torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
        step(model)
        slow.step(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.02 * parameter.grad.sign()


def test_weight_gradient_is_orthogonal_to_the_weight():
    """Only the gradient through the window keeps the invariance to the weight's scale."""
    cosine = {}
    for backward in ("window", "current"):
        torch.manual_seed(0)
        model = build(backward, bias=False, window=8)
        weight = model[0].weight
        # v_hat is a first-order expansion, invariant where the weight is where it was.
        for _ in range(8):
            x = torch.randn(1, 2, 6, 5, dtype=torch.float64) * torch.rand(1) * 2
            model(x)
            step(model)
        output = model(torch.randn(1, 2, 6, 5, dtype=torch.float64))
        (output * torch.randn_like(output)).sum().backward()
        dots = (weight * weight.grad).flatten(1).sum(1)
        cosine[backward] = (dots / weight.flatten(1).norm(dim=1)).abs().max().item()
    assert cosine["window"] < 1e-3
    assert cosine["current"] > 100 * cosine["window"]


def test_overwritten_statistics_are_not_used():
    """A step between forward and backward is an error, not a wrong gradient."""
    model = build().float()
    for _ in range(2):
        loss = model(torch.randn(2, 2, 6, 5)).square().sum()
        step(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
