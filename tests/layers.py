"""Small models with CBN, and how tests compare what two of them hold."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from conftest import needs_float16
from torch import nn

from cbn_mmdet import CBN, link, step, window_state
from cbn_mmdet.norm import kernels
from cbn_mmdet.norm.reference import Reference

KINDS = pytest.mark.parametrize("kind", ["moving", "sliding"])
HALF = [pytest.param(torch.float16, marks=needs_float16), torch.bfloat16]
needs_scaler = pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs torch 2.3")


def chain(*modules):
    """A linked model of these modules."""
    model = nn.Sequential(*modules)
    link(model)
    return model


def linked(kind="moving", size=4, bias=False, **kwargs):
    """A convolution of 3 to 4 channels with its CBN."""
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=bias)
    return chain(conv, CBN(4, window=kind, window_size=size, **kwargs))


@contextmanager
def as_on_a_gpu():
    """Takes a GPU's ways on the CPU, and asserts that there were any.

    The operation that a CPU lacks is replaced by its formula.
    """

    def elemt(y, scale, shift, mean, invstd, eps):
        scale, shift, mean, invstd = (e.view(-1, 1, 1) for e in (scale, shift, mean, invstd))
        return (scale * (y - mean) * invstd + shift).to(y.dtype)

    with (
        mock.patch.object(kernels, "is_gpu", return_value=True) as is_gpu,
        mock.patch.object(torch, "batch_norm_elemt", elemt),
    ):
        yield
    assert is_gpu.called


def reference(model, **kwargs):
    """The plain reference of a model that :func:`linked` returned."""
    conv, norm = model
    kwargs = dict(window=norm.window, window_size=norm.window_size, eps=norm.eps, **kwargs)
    return Reference(conv, stride=None, **kwargs)


def resnet(**kwargs):
    """mmdet's ResNet-18, narrowed and in training; its CBN takes the paper's derivative."""
    from mmdet.models import ResNet

    norm = dict(type="CBN", window_size=3, derivative_stride=1)
    model = ResNet(18, base_channels=8, **{"norm_cfg": norm, "norm_eval": False, **kwargs})
    if any(isinstance(module, CBN) for module in model.modules()):
        link(model)
    model.train()
    return model


def is_computed_by_torch(conv, dtype):
    """Whether torch gets it right: in bfloat16 on a CPU, dilated ones read unwritten memory."""
    return dtype != torch.bfloat16 or conv.dilation == (1, 1)


# Parts of a training loop.


def train_once(model, *inputs):
    model.train()
    output = model(*inputs)
    step(model)
    return output


def iterate(model, count, size=(2, 3, 8, 8)):
    """Runs iterations between which both the weights and the data's distribution change."""
    for _ in range(count):
        model(torch.randn(size) * torch.rand(1) + torch.randn(1)).sum()
        step(model)
        with torch.no_grad():
            model[0].weight += 0.03 * torch.randn_like(model[0].weight)


def backward(model, x, seed=0, half=None):
    """The outputs of a training forward on ``x``, and the gradient of every parameter."""
    model.zero_grad()
    with torch.autocast("cpu", half, enabled=half is not None):
        outputs = model(x)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    generator = torch.Generator().manual_seed(seed)
    loss = sum((y.float() * torch.randn(y.shape, generator=generator)).sum() for y in outputs)
    loss.backward()
    return [*outputs, *(p.grad for p in model.parameters() if p.grad is not None)]


def descend(model, rate=0.01):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad / (parameter.grad.norm() + 1e-6)


def take_over(model, other):
    """Copies the other model's parameters; loading a state dict would empty the windows."""
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs)


def step_alike(model, other):
    """Ends an iteration of both models, then gives both the weights that the first descends to."""
    step(model), step(other)
    descend(model)
    take_over(other, model)


# What a training leaves behind.


def held(model):
    """The number of iterations that each window of each layer has seen."""
    return {
        name: [each["seen"] for each in windows] for name, windows in window_state(model).items()
    }


def state_of(model, name="1"):
    """What the one window of a layer holds."""
    (state,) = window_state(model)[name]
    return state


def tensors(state):
    """Those of a window's state."""
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def assert_all_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def assert_close_in_norm(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other).norm() <= tolerance * other.norm()


def assert_same_window(one, other, where=""):
    """Whether two windows hold the same, bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        is_tensor = isinstance(value, torch.Tensor)
        same = torch.equal(value, other[name]) if is_tensor else value == other[name]
        assert same, f"{where}: {name}"


def assert_same(model, other):
    """The same windows, running statistics and weights, bit for bit."""
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    ours, theirs = window_state(model), window_state(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        for one, another in zip(ours[name], theirs[name], strict=True):
            assert_same_window(one, another, name)
