"""What people do to layers and models that no other module tests, and batch norm takes."""

import pickle
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from cbn_mmdet import (
    CBN,
    diagnose,
    from_batchnorm,
    link,
    links,
    precise_statistics,
    step,
    to_batchnorm,
    window_state,
)


def pair(conv=None, **kwargs):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1) if conv is None else conv
    model = nn.Sequential(conv, CBN(4, window_size=4, **kwargs))
    link(model)
    return model


def iterate(model, count=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        y = model(torch.randn(2, 3, 6, 6, generator=generator))
        y.square().mean().backward()
        step(model)
    return y.detach()


def seen(model):
    return [window["seen"] for windows in window_state(model).values() for window in windows]


def test_a_bias_that_autograd_no_longer_shows():
    """The window's means are without it, so the past counts no more."""
    model = pair(weight_norm(nn.Conv2d(3, 4, 3, padding=1)))
    with torch.no_grad():
        model[0].bias.fill_(10.0)
    iterate(model, 5)
    model[0].bias.requires_grad_(False)
    for number in (1, 2):
        assert iterate(model, seed=number).mean().abs() < 0.1
        assert seen(model) == [number]


def test_a_convolution_whose_inner_call_was_replaced():
    """As people do for textures without seams; autograd then tells what it computes."""
    circular = pair(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    model = pair(nn.Conv2d(3, 4, 3, padding=1))

    def seamless(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight, bias)

    model[0]._conv_forward = types.MethodType(seamless, model[0])
    model.load_state_dict(circular.state_dict())
    torch.testing.assert_close(iterate(model, 4), iterate(circular, 4))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("wrap", [nn.Identity(), weight_norm], ids=["plain", "weight_norm"])
def test_backward_hooks(place, wrap):
    """torch hands on aliases of inputs and outputs, which carry no mark of their own."""
    hooked, other = (pair(wrap(nn.Conv2d(3, 4, 3, padding=1))) for _ in range(2))
    other.load_state_dict(hooked.state_dict())
    called = []
    hooked[place].register_full_backward_hook(lambda *args: called.append(1))
    assert torch.equal(iterate(hooked, 4), iterate(other, 4))
    assert len(called) == 4 and links(hooked) == links(other)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("place", [0, 1])
def test_pruned(name, place):
    """A pruned parameter is a product that the module computes before its forward."""
    model, other = pair(), pair()
    with torch.no_grad():
        for each in (model, other):
            for number, parameter in enumerate(each.parameters()):
                parameter.add_(0.1 * number)
    module = model[place]
    prune.l1_unstructured(module, name, 0.5)
    with torch.no_grad():
        getattr(other[place], name).mul_(getattr(module, f"{name}_mask"))
    torch.testing.assert_close(iterate(model, 4), iterate(other, 4))
    x = torch.randn(1, 3, 6, 6)
    expected = model.eval()(x)
    torch.testing.assert_close(to_batchnorm(model)(x), expected)


def test_sizes_that_are_plain_numbers():
    model, other = pair(nn.Conv2d(3, 4, 3)), pair(nn.Conv2d(3, 4, 3, stride=2, padding=1))
    model.load_state_dict(other.state_dict())
    model[0].stride, model[0].padding, model[0].dilation = 2, 1, 1
    assert torch.equal(iterate(model, 4), iterate(other, 4))


def test_a_default_device():
    """Numbers that go to the layers' device are made on the CPU, whatever the default is."""
    # Windows of different sizes have different shares; no other test has these channels.
    model = nn.Sequential(nn.Conv2d(3, 5, 3), CBN(5, window_size=2), nn.Conv2d(5, 7, 1), CBN(7))
    link(model)
    x = torch.randn(2, 3, 6, 6)
    with torch.device("meta"):
        for _ in range(4):
            model(x).square().mean().backward()
            step(model)
    assert seen(model) == [4, 4] and model[3].running_var.isfinite().all()


def test_parts_that_are_called_without_a_step_are_told_of():
    """Not once for each call, and not in a loop that ends its iterations."""
    model = pair()
    for steps in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(120):
                model.forward(torch.randn(1, 3, 4, 4))
                if steps:
                    step(model)
        told = [each for each in caught if "not by the linked model's own" in str(each.message)]
        assert len(told) == (0 if steps else 1)


def test_calls_that_biases_set_apart():
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)])
            self.norm = CBN(4)
            nn.init.constant_(self.convs[0].bias, 5.0)
            nn.init.constant_(self.convs[1].bias, -5.0)

        def forward(self, x):
            return self.norm(self.convs[0](x)) + self.norm(self.convs[1](x))

    model = Turns()
    link(model)
    iterate(model, 4)
    assert diagnose(model)["norm"].apart > 4


def test_statistics_of_a_layer_without_any():
    model = from_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.append(nn.BatchNorm2d(4))
    link(model)
    model[1].running_mean = model[1].running_var = None
    assert precise_statistics(model, [torch.randn(2, 3, 6, 6)]) == ["2"]


def test_a_marked_tensor_is_copied_without_its_mark():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4), nn.Conv2d(4, 400, 1))
    link(model)
    with torch.no_grad():
        y = model[2](torch.randn(1, 4, 2, 2))  # a part: no end of a forward removes the mark
    assert vars(y) and vars(pickle.loads(pickle.dumps(y))).values() != vars(y).values()
    assert len(pickle.dumps(y)) < 4 * y.numel() + 2000
