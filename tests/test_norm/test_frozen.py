"""What does not train: whole stages, scale and shift, a convolution's weight."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from layers import (
    KINDS,
    assert_all_equal,
    backward,
    descend,
    iterate,
    linked,
    reference,
    resnet,
    state_of,
)
from torch import nn

import cbn_mmdet.norm.cbn
from cbn_mmdet import CBN, link, step


def test_frozen_backbone_is_batch_norm():
    """MMDetection's default: norm_eval=True and frozen_stages=1."""
    cbn = resnet(norm_eval=True, frozen_stages=1)
    bn = resnet(norm_eval=True, frozen_stages=1, norm_cfg=dict(type="BN"))
    bn.load_state_dict(cbn.state_dict())
    cbn.train(), bn.train()
    for seed in range(3):
        x = torch.randn(2, 3, 64, 64)
        assert_all_equal(backward(cbn, x, seed), backward(bn, x, seed))
        step(cbn)
    assert_all_equal(cbn.buffers(), bn.buffers())
    assert not any(layer.window_bytes for layer in cbn.modules() if isinstance(layer, CBN))


def test_partly_frozen(monkeypatch):
    """Frozen stages behave as BN's do; no derivative is formed of a weight that is frozen."""
    derivative, formed = cbn_mmdet.norm.cbn.batch_derivative, []

    def spy(source, *args):
        formed.append(source.weight)
        return derivative(source, *args)

    monkeypatch.setattr(cbn_mmdet.norm.cbn, "batch_derivative", spy)
    torch.manual_seed(0)
    cbn, bn = resnet(frozen_stages=1), resnet(frozen_stages=1, norm_cfg=dict(type="BN"))
    bn.load_state_dict(cbn.state_dict())
    cbn.layer2[0].conv1.weight.requires_grad = False  # under a norm that trains
    before = copy.deepcopy(cbn.state_dict())
    for _ in range(3):
        x = torch.randn(2, 3, 64, 64)
        frozen = [model.layer1(model.norm1(model.conv1(x))) for model in (cbn, bn)]
        assert torch.equal(*frozen)
        grads = backward(cbn, x)
        assert all(grad.isfinite().all() for grad in grads)
        step(cbn)
        descend(cbn)
    changed = {name for name, value in cbn.state_dict().items() if (value != before[name]).any()}
    assert not any(name.startswith(("conv1.", "bn1.", "layer1.")) for name in changed)
    assert {"layer2.0.bn1.running_mean", "layer2.0.bn1.weight"} <= changed
    trained = [
        module.weight for module in cbn.modules() if isinstance(module, nn.Conv2d)
        and module.weight.requires_grad
    ]  # fmt: skip
    assert set(formed) == set(trained) and len(formed) == 3 * len(trained)
    for name, layer in cbn.named_modules():
        if not isinstance(layer, CBN):
            continue
        is_frozen = name.startswith(("bn1", "layer1"))
        assert (layer.window_bytes == 0) == is_frozen
        assert layer.weight.requires_grad != is_frozen


def test_a_frozen_scale_and_shift():
    """The convolution trains as with a scale and shift of the same values that train."""
    torch.manual_seed(0)
    model = linked(bias=True)
    frozen = copy.deepcopy(model)
    link(frozen)
    frozen[1].requires_grad_(False)
    for _ in range(3):
        x = torch.randn(2, 3, 9, 9)
        y, weight, bias, *_ = backward(model, x)
        assert_all_equal([y, weight, bias], backward(frozen, x))
        step(model), step(frozen)
        with torch.no_grad():
            for conv in (model[0], frozen[0]):
                conv.weight *= 1.02


@KINDS
def test_a_hook_sets_the_bias_of_a_frozen_convolution(kind):
    biases, outputs = torch.randn(4, 4), []

    def set_bias(conv, _):
        conv.bias.data.copy_(biases[len(outputs) % 4])

    for hooked in (True, False):
        torch.manual_seed(0)
        model = linked(kind, bias=True)
        model[0].requires_grad_(False)
        if hooked:
            model[0].register_forward_pre_hook(set_bias)
        for _ in range(4):
            if not hooked:
                set_bias(model[0], None)
            outputs.append(model(torch.randn(2, 3, 8, 8)))
            step(model)
    assert_all_equal(outputs[:4], outputs[4:])


@KINDS
def test_thawed_and_frozen_again(kind):
    """A weight that begins to train begins a window; one that is frozen later goes on with its."""
    torch.manual_seed(0)
    model = linked(kind, bias=True).double()
    conv, norm = model
    slow = reference(model)
    for index in range(9):
        conv.weight.requires_grad = index in (3, 4, 5)
        x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
        expected = slow.forward(x, norm.weight, norm.bias)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        slow.step(x)
        step(model)
        state = state_of(model)
        assert state["seen"] == (index + 1 if index < 3 else index - 2)
        assert ("m" in state, "h" in state) == (index >= 3,) * 2
        if index >= 3:
            with torch.no_grad():
                conv.weight *= 1.02


class Standardized(nn.Conv2d):
    """A convolution that is not plain, so that autograd's graph tells its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, padding=1)


class Gained(nn.Conv2d):
    """A convolution that is not plain, with one more parameter."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(self.gain * x)


@pytest.mark.filterwarnings("error")
@KINDS
@pytest.mark.parametrize("convolution", [nn.Conv2d, Standardized, Gained])
def test_a_critic_that_is_frozen_while_the_generator_trains(kind, convolution):
    """It normalises, and passes gradients on, as if it were not frozen."""
    torch.manual_seed(0)
    critic = nn.Sequential(
        convolution(3, 4, 3, padding=1), CBN(4, window=kind, window_size=4), nn.ReLU()
    )
    link(critic)
    iterate(critic, 5)
    images = torch.randn(2, 3, 8, 8)
    target = torch.randn(2, 4, 8, 8)
    found = []
    for trains in (True, False):
        for name, parameter in critic.named_parameters():
            parameter.requires_grad_(trains or name == "0.gain")
        x = images.clone().requires_grad_()
        y = critic(x)
        (y * target).sum().backward()
        found.append((y.detach(), x.grad))
    assert_all_equal(*found)


@KINDS
def test_a_frozen_critic_whose_weight_no_graph_shows(kind):
    """Its window does not fit; checkpointing, which hides the graph, is not refused for that."""
    torch.manual_seed(0)
    model = nn.Sequential(Standardized(3, 4, 3, padding=1), CBN(4, window=kind, window_size=4))
    link(model)
    iterate(model, 5)
    model.requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    expected = nn.functional.batch_norm(model[0](x), None, None, training=True)
    torch.testing.assert_close(model(x), expected)
    x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    assert x.grad.isfinite().all()


class Parts(nn.Sequential):
    """A convolution that may run without gradients, and a norm."""

    is_frozen = False

    def forward(self, x):
        with torch.set_grad_enabled(not self.is_frozen):
            y = self[0](x)
        return self[1](y)


@KINDS
@pytest.mark.parametrize("backward", ["mixed", "window"])
@pytest.mark.parametrize("frozen", ["input", "weight", "all but the bias"])
def test_gradients_of_what_is_frozen_are_not_formed(frozen, backward, kind):
    torch.manual_seed(0)
    model = Parts(
        nn.Conv2d(3, 4, 3, padding=1), CBN(4, window=kind, window_size=4, backward=backward)
    )
    link(model)
    iterate(model, 4)
    x = torch.randn(2, 3, 8, 8)
    target = torch.randn(2, 4, 8, 8)
    (model(x) * target).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    conv, norm = model
    if frozen == "input":
        model.is_frozen = True
        (model(x) * target).sum().backward()
        assert conv.weight.grad is None and conv.bias.grad is None  # nor through the window
        torch.testing.assert_close(norm.weight.grad, expected["1.weight"])
        return
    conv.weight.requires_grad_(False)
    if frozen == "all but the bias":
        norm.requires_grad_(False)
    (model(x) * target).sum().backward()
    assert conv.weight.grad is None
    torch.testing.assert_close(conv.bias.grad, expected["0.bias"], rtol=1e-3, atol=1e-3)
