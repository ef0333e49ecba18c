"""Several forwards in one optimiser step: CBN, and CmBN, whose window is those forwards."""

import copy
from functools import partial

import pytest
import torch
from layers import KINDS, linked, reference, state_of
from mmengine.optim import OptimWrapper
from torch import nn

from cbn_mmdet import (
    BRN,
    CBN,
    MABN,
    CmBN,
    SyncCBN,
    link,
    load_window_state,
    set_window,
    step,
    window_state,
)


@KINDS
@pytest.mark.parametrize("images, backward", [(2, "current"), (1, "mixed")])
def test_equal_weights_mean_no_compensation(images, backward, kind):
    """Within a group the window is the union of its batches; across groups it compensates.

    For a sliding window as long as a group; for a moving one while it fills, in the first group.
    """
    torch.manual_seed(0)
    model = linked(kind, bias=True, backward=backward, momentum=1.0).double()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01), accumulative_counts=4)
    slow, naive = (reference(model, backward=backward, compensate=each) for each in (True, False))
    gamma, beta = model[1].weight, model[1].bias
    batches = torch.randn(12, images, 3, 9, 9, dtype=torch.float64) * torch.rand(12, 1, 1, 1, 1) * 3
    for index, x in enumerate(batches):
        with wrapper.optim_context(model):
            output = model(x)
            expected = slow.forward(x, gamma, beta)
            target = torch.randn_like(output)
            gradients = [
                torch.autograd.grad((y * target).sum(), model.parameters(), retain_graph=True)
                for y in (output, expected)
            ]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
            slow.expected = expected.detach()
            naive.expected = naive.forward(x, gamma, beta).detach()
        group = batches[index - index % 4 : index + 1]
        torch.testing.assert_close(output, slow.expected, rtol=1e-5, atol=1e-5)
        is_of_this_group = index < 4 or (kind == "sliding" and index % 4 == 3)
        if is_of_this_group:  # all that the window holds
            torch.testing.assert_close(output, naive.expected, rtol=1e-5, atol=1e-5)
            union = nn.functional.batch_norm(
                model[0](group.flatten(0, 1)), None, None, gamma, beta, training=True
            )
            torch.testing.assert_close(output, union[-images:], rtol=1e-5, atol=1e-5)
        else:
            assert (output - slow.expected).norm() < 0.1 * (output - naive.expected).norm()
        slow.step(x), naive.step(x)
        # Averages assume one backward pass per graph, so this reuses the gradients from above.
        loss = sum((p * g).sum() for p, g in zip(model.parameters(), gradients[0], strict=True))
        wrapper.update_params(0.1 * loss)
        step(model)


BRN_AT_ONCE = partial(BRN, warmup=1, r_end=4, d_end=4)
MABN_AT_ONCE = partial(MABN, warmup=1, r_warmup=2)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d, partial(nn.GroupNorm, 2), BRN_AT_ONCE, MABN_AT_ONCE, CBN, SyncCBN, CmBN],
)
def test_what_each_norm_does_of_accumulation(norm):
    """All but CmBN compute and count as if each forward had a step of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))
    alone = copy.deepcopy(model)
    has_window = isinstance(model[1], CBN)
    if has_window:
        link(model), link(alone)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1), accumulative_counts=4)
    for number in range(8):
        x = torch.randn(1, 3, 6, 6) * (1 + number % 3)
        with torch.no_grad():  # both forwards use the same weights
            torch._foreach_copy_(list(alone.parameters()), list(model.parameters()))
        with wrapper.optim_context(model):
            outputs = model(x), alone(x)
        losses = [z.square().sum() + z.sum() for z in outputs]
        (losses[1] / 4).backward()
        wrapper.update_params(losses[0])
        if has_window:
            step(model, updated=wrapper.should_update())
            step(alone)
        assert torch.equal(*outputs) is (norm is not CmBN or number % 4 == 0)
        buffers, others = (dict(each[1].named_buffers()) for each in (model, alone))
        assert buffers.get("num_batches_tracked", number + 1) == number + 1
        if norm is not CmBN:
            assert all(torch.equal(buffers[name], others[name]) for name in others)


class TestStepWindow:
    """CmBN: the mini-batches of one step of the optimiser, whose gradients accumulate."""

    def build(self, kind=CmBN, **kwargs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, momentum=0.3, **kwargs)).double()
        nn.init.uniform_(model[1].weight, 0.5, 2)
        nn.init.normal_(model[1].bias)
        link(model)
        return model

    @pytest.mark.parametrize("counts", [4, 1, 3])
    def test_is_the_formula(self, counts):
        """Of Bochkovskiy et al., section 3.3: mean and mean square of all of a step so far."""
        model = self.build()
        conv, norm = model
        mean, var = torch.zeros(4).double(), torch.ones(4).double()
        optimizer, group = torch.optim.SGD(model.parameters(), lr=0.1), []
        for number in range(3 * counts):
            x = torch.randn(1, 3, 6, 7, dtype=torch.float64) * (1 + number % 3) + number % 2
            target = torch.randn(1, 4, 4, 5, dtype=torch.float64)
            found = [model(x)]
            found += torch.autograd.grad((found[0] * target).sum(), list(model.parameters()))
            y = conv(x)
            now = y.mean((0, 2, 3)), y.square().mean((0, 2, 3))
            # Those before are constants, as in figure 4.
            means, squares = (torch.stack(each).mean(0) for each in zip(*group, now, strict=True))
            variances = squares - means.square()
            z = (y - means[:, None, None]) * (variances + norm.eps).rsqrt()[:, None, None]
            z = z * norm.weight[:, None, None] + norm.bias[:, None, None]
            expected = [z, *torch.autograd.grad((z * target).sum(), list(model.parameters()))]
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            if not group:  # alone, it is batch normalisation
                variances = variances * 20 / 19
            mean, var = mean.lerp(means.detach(), 0.3), var.lerp(variances.detach(), 0.3)
            group.append(tuple(each.detach() for each in now))
            model(x).square().mean().backward()  # a repetition
            is_last = len(group) == counts
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
            step(model, updated=is_last)
            assert state_of(model)["seen"] == (0 if is_last else len(group))
            if is_last:
                group.clear()
            torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(norm.running_var, var, rtol=1e-5, atol=1e-5)

    def test_a_step_is_the_default(self):
        """A loop that accumulates nothing has batch normalisation."""
        model, bn = self.build(), nn.BatchNorm2d(4, momentum=0.3).double()
        bn.load_state_dict(model[1].state_dict())
        for _ in range(3):
            x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
            torch.testing.assert_close(model(x), bn(model[0](x)))
            step(model)
            assert model[1].window_bytes == 0
        torch.testing.assert_close(model[1].running_var, bn.running_var)

    @pytest.mark.parametrize("backward", ["mixed", "window", "current"])
    def test_compensation_has_nothing_to_do(self, backward):
        """The weights stand still within a step, though the gradient may flow through the past."""
        models = self.build(), self.build(CBN, window="step", backward=backward)
        for number in range(8):
            x = torch.randn(1, 3, 6, 6, dtype=torch.float64) + number % 4
            torch.testing.assert_close(*(model(x) for model in models), rtol=1e-5, atol=1e-5)
            for model in models:
                step(model, updated=number % 4 == 3)
                with torch.no_grad():
                    model[0].weight *= 1.5 if number % 4 == 3 else 1

    def test_stands_behind_anything(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), CmBN(4))
        link(model)
        for _ in range(3):
            model(torch.randn(2, 3, 6, 6))
            step(model, updated=False)
        assert state_of(model, "2")["seen"] == 3

    def test_a_window_of_a_size(self):
        """From that size on the window averages exponentially; a burn-in closes it."""
        model = self.build(window_size=2)
        for number in range(4):
            assert model[1].mean_window_size == (2 if number else 1)
            model(torch.randn(1, 3, 6, 6, dtype=torch.float64))
            step(model, updated=False)
        set_window(model, 1)
        assert state_of(model)["seen"] == 0
        x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
        y = model[0](x)
        affine = model[1].weight, model[1].bias
        torch.testing.assert_close(model(x), nn.functional.batch_norm(y, None, None, *affine, True))

    def test_a_resume_within_a_step(self):
        model, other = self.build(), self.build()
        for _ in range(2):
            model(torch.randn(1, 3, 6, 6, dtype=torch.float64))
            step(model, updated=False)
        load_window_state(other, window_state(model))
        x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
        assert torch.equal(model(x), other(x))
        for each in (model, other):
            step(each)
            assert state_of(each)["seen"] == 0

    def test_other_windows_do_not_ask(self):
        """Other windows ignore whether the optimiser stepped."""
        for kind in ("moving", "sliding"):
            model = linked(kind)
            for updated in (True, False, True):
                model(torch.randn(2, 3, 8, 8))
                step(model, updated=updated)
            assert state_of(model)["seen"] == 3

    def test_its_repr(self):
        assert "window='step', window_size='auto', compensate=False" in str(CmBN(4))
        assert CmBN(4).window_in_force > 10**6 and isinstance(CmBN(4), CBN)
