"""Activation checkpointing, which repeats forwards: one block, and backbones of mmdet."""

import copy
import functools
import types

import pytest
import torch
from layers import (
    KINDS,
    assert_all_equal,
    assert_close_in_norm,
    assert_same,
    backward,
    chain,
    descend,
    held,
    iterate,
    linked,
    resnet,
    state_of,
    take_over,
    tensors,
)
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbn_mmdet import CBN, link, set_window, step


@KINDS
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("backward", ["mixed", "window", "current"])
def test_checkpointing_records_once(backward, size, reentrant, kind):
    torch.manual_seed(0)
    plain = linked(kind, backward=backward)
    other = copy.deepcopy(plain)
    link(other)
    for _ in range(5):
        x = torch.randn(2, 3, 8, 8)
        target = torch.randn(2, 4, 8, 8)
        grads = []
        for model in (plain, other):
            set_window(model, size)
            model.zero_grad()
            x_ = x.clone().requires_grad_()
            y = model(x_) if model is plain else checkpoint(model, x_, use_reentrant=reentrant)
            (y * target).sum().backward()
            step(model)
            grads.append([y, x_.grad, *(p.grad for p in model.parameters()), *model.buffers()])
            grads[-1] += tensors(state_of(model)).values()
            with torch.no_grad():
                model[0].weight *= 1.01
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert held(plain) == held(other)
    assert size == 1 or ("sums" in state_of(other)) == (backward == "mixed")


@KINDS
def test_an_evaluation_before_the_repetition(kind):
    """A layer called alone, in evaluation, loses neither its window nor its past."""
    torch.manual_seed(0)
    model = linked(kind)
    iterate(model, 4)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    gradients = []
    for looked_at in (False, True):
        y = checkpoint(model, x, use_reentrant=False)
        if looked_at:
            model.eval()[1](torch.randn(2, 4, 8, 8))
            model.train()
        gradients.append(torch.autograd.grad(y.square().sum(), [x, model[0].weight]))
    assert state_of(model)["seen"] == 4
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@KINDS
def test_a_repetition_after_another_forward(kind):
    """The other forward's weights are set without a version bump; one call computes all pasts."""
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = chain(
            *(nn.Conv2d(3, 4, 3), CBN(4, window=kind, window_size=4)),
            *(nn.Conv2d(4, 8, 3, groups=2, bias=False), CBN(8, window=kind, window_size=4)),
            *(nn.Conv2d(8, 6, 3), CBN(6, window=kind, window_size=4, compensate=False)),
        )
        for _ in range(6):
            backward(model, torch.randn(2, 3, 12, 12))
            step(model)
            descend(model)
        x, target = torch.randn(2, 3, 12, 12), torch.randn(2, 6, 6, 6)
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        kept = [parameter.data.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data.mul_(0.7)
        with torch.no_grad():
            model(x)
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.data.copy_(value)
        model.zero_grad()
        (y * target).sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@KINDS
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("gradients", ["mixed", "window", "current"])
def test_two_forwards_before_one_backward(gradients, reentrant, kind):
    """As in contrastive training, of two batches: the gradients are those without checkpointing."""
    models = [linked(kind, backward=gradients).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for _ in range(4):
        grads = []
        inputs = [torch.randn(2, 3, 8, 8).double() * s + 1 for s in (1, 2)]
        for model in models:
            model.zero_grad()
            loss = 0
            for x in inputs:
                x = x.clone().requires_grad_()
                is_plain = model is models[0]
                y = model(x) if is_plain else checkpoint(model, x, use_reentrant=reentrant)
                loss = loss + y.pow(3).sum()
            loss.backward()
            step(model)
            grads.append([parameter.grad for parameter in model.parameters()])
            descend(model, 1e-4)
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)
        for one, other in zip(
            *(tensors(state_of(model)).values() for model in models), strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_repetition_after_the_step_is_refused(reentrant):
    model = linked()
    iterate(model, 2)
    y = checkpoint(model, torch.randn(2, 3, 8, 8, requires_grad=True), use_reentrant=reentrant)
    step(model)
    with pytest.raises(RuntimeError, match=r"'1' \(CBN\).*repeats a forward.*has ended"):
        y.sum().backward()


@pytest.mark.parametrize("in_force", [1, 4])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_calls_that_cannot_be_told_apart(reentrant, in_force):
    """They are refused in a burn-in already, before its time is lost."""
    model = linked()
    set_window(model, in_force)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            parts = [checkpoint(self.body, part, use_reentrant=reentrant) for part in (x, x + 1)]
            return sum(parts)

    twice = Twice()
    link(twice)
    loss = twice(torch.randn(2, 3, 8, 8, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="called 2 times.*with_cp=False"):
        loss.backward()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "mmengine"])
@pytest.mark.filterwarnings("ignore:.*use_reentrant parameter should be passed")
def test_resnet(how, amp, monkeypatch):
    torch.manual_seed(0)
    plain, saving = resnet(), resnet(with_cp=how != "mmengine")
    saving.load_state_dict(plain.state_dict())
    if how == "mmengine":  # Runner's cfg=dict(activation_checkpointing=[...])
        turn_on_activation_checkpointing(saving, ["layer1", "layer3.1"])
    else:
        again = functools.partial(checkpoint, use_reentrant=how == "reentrant")
        monkeypatch.setattr(
            "mmdet.models.backbones.resnet.cp", types.SimpleNamespace(checkpoint=again)
        )
    for size in (1, 3, 3, 3):
        x, results = torch.randn(2, 3, 64, 64), []
        for model in (plain, saving):
            set_window(model, size)
            results.append(backward(model, x, half=torch.bfloat16 if amp else None))
            step(model)
        assert_all_equal(results[0][:4], results[1][:4])  # the outputs of the four stages
        assert_all_equal(plain.buffers(), saving.buffers())
        if how == "not reentrant":
            assert_all_equal(*results)
        # A reentrant backward sums in another order; with BN results differ as much.
        assert_close_in_norm(*results, 0.08 if amp else 1e-4)
        descend(plain)
        take_over(saving, plain)
        if how == "not reentrant":
            assert_same(plain, saving)  # the averages of gradients, too
    assert held(plain) == held(saving)
    assert set(map(tuple, held(saving).values())) == {(3,)}
