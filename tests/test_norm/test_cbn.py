"""The layer: batch normalisation where it must be, the window's rules, and what nn.Module does."""

import copy
import gc
import io
import math
import pickle
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import cbn_mmdet
from cbn_mmdet import (
    CBN,
    CmBN,
    SyncCBN,
    link,
    links,
    load_window_state,
    set_window,
    step,
    window_state,
)
from cbn_mmdet.norm.reference import Reference
from cbn_mmdet.norm.window import LARGEST

KINDS = pytest.mark.parametrize("kind", ["moving", "sliding"])


def pair(channels=4, **kwargs):
    """A CBN and a BatchNorm2d with the same random state."""
    cbn, bn = CBN(channels, **kwargs), nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            tensor.uniform_(0.5, 2)
    cbn.load_state_dict(bn.state_dict(), strict=True)
    return cbn, bn


def linked(kind="moving", size=4, bias=False, **kwargs):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=bias),
        CBN(4, window=kind, window_size=size, **kwargs),
    )
    assert link(model) == 1
    return model


def state_of(model, name="1"):
    """What the one window of a layer holds."""
    (state,) = window_state(model)[name]
    return state


def held(model, name="1"):
    """How many iterations the one window of a layer has seen."""
    return state_of(model, name)["seen"]


def iterate(model, count, size=(2, 3, 8, 8)):
    """Iterations whose weights and data move."""
    for _ in range(count):
        model(torch.randn(size) * torch.rand(1) + torch.randn(1)).sum()
        step(model)
        with torch.no_grad():
            model[0].weight += 0.03 * torch.randn_like(model[0].weight)


class TestIsBatchNorm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_evaluation_bit_for_bit(self, dtype):
        cbn, bn = (module.eval().to(dtype) for module in pair())
        x = torch.randn(2, 4, 5, 6).to(dtype)
        assert torch.equal(cbn(x), bn(x))
        assert list(cbn.state_dict()) == list(bn.state_dict())

    @KINDS
    def test_evaluation_after_training_with_a_window(self, kind):
        model = linked(kind)
        iterate(model, 6)
        bn = nn.BatchNorm2d(4)
        bn.load_state_dict(model[1].state_dict(), strict=True)
        model.eval(), bn.eval()
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(model(x), bn(model[0](x)))

    def test_evaluation_without_running_statistics(self):
        cbn = CBN(4, track_running_stats=False).eval()
        bn = nn.BatchNorm2d(4, track_running_stats=False).eval()
        x = torch.randn(2, 4, 5, 6)
        assert torch.equal(cbn(x), bn(x))

    @KINDS
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("how", ["window_size", "set_window"])
    def test_an_unlinked_window_of_one_in_training(self, momentum, how, kind):
        cbn, bn = pair(window=kind, window_size=1 if how == "window_size" else 8)
        cbn.momentum = bn.momentum = momentum
        set_window(cbn, 1)
        for _ in range(3):
            x = torch.randn(2, 4, 5, 6)
            results = []
            for norm in (cbn, bn):
                x_ = x.clone().requires_grad_()
                norm.zero_grad()
                y = norm(x_)
                y.square().sum().backward()
                results.append([y, x_.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
            step(cbn)
            for ours, theirs in zip(*results, strict=True):
                assert torch.equal(ours, theirs)

    @KINDS
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("how", ["window_size", "set_window"])
    @pytest.mark.parametrize("forwards", [1, 2])
    def test_a_linked_window_of_one_in_training(self, forwards, momentum, how, kind):
        """Bit for bit, but that nothing changes before the step, and repeated forwards are one."""
        model = linked(kind, 1 if how == "window_size" else 8, momentum=momentum)
        set_window(model, 1)
        conv, cbn = model
        bn = nn.BatchNorm2d(4, momentum=momentum)
        for _ in range(3):
            x, results = torch.randn(2, 3, 5, 6), []
            before = copy.deepcopy(cbn.state_dict())
            for _ in range(forwards - 1):
                model(torch.randn(2, 3, 5, 6))
            for norm in (cbn, bn):
                x_ = x.clone().requires_grad_()
                model.zero_grad(), norm.zero_grad()
                y = model(x_) if norm is cbn else bn(conv(x_))
                y.square().sum().backward()
                results.append([y, x_.grad, norm.weight.grad, norm.bias.grad, conv.weight.grad])
            assert all(torch.equal(cbn.state_dict()[name], before[name]) for name in before)
            step(model)
            for norm, of in ((cbn, results[0]), (bn, results[1])):
                of += norm.buffers()
            for ours, theirs in zip(*results, strict=True):
                assert torch.equal(ours, theirs)
        assert cbn.window_bytes == 0

    def test_calls_in_a_burn_in_average_one_after_another(self):
        class Twice(nn.Sequential):
            def forward(self, *levels):
                return [super(Twice, self).forward(level) for level in levels]

        model = Twice(nn.Conv2d(3, 4, 3), CBN(4, momentum=0.3))
        link(model)
        set_window(model, 1)
        bn = nn.BatchNorm2d(4, momentum=0.3)
        for _ in range(2):
            levels = [torch.randn(1, 3, 9, 9), torch.randn(1, 3, 5, 5) * 3 + 2]
            for ours, level in zip(model(*levels), levels, strict=True):
                assert torch.equal(ours, bn(model[0](level)))
            step(model)
            for ours, theirs in zip(model[1].buffers(), bn.buffers(), strict=True):
                assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("backward", ["current", "window", "full", "own", "mixed"])
    @KINDS
    def test_first_iteration_of_an_open_window(self, kind, backward):
        """Nothing in the window yet: BN's output, gradients and running statistics."""
        model = linked(kind, backward=backward)
        bn = nn.BatchNorm2d(4)
        x, target, ends = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8), []
        for norm in (model[1], bn):
            x_ = x.clone().requires_grad_()
            model.zero_grad()
            y = model(x_) if norm is not bn else bn(model[0](x_))
            (y * target).sum().backward()
            grads = x_.grad, model[0].weight.grad, norm.weight.grad, norm.bias.grad
            ends.append([y.detach(), *(grad.clone() for grad in grads)])
        step(model)
        for end, norm in zip(ends, (model[1], bn), strict=True):
            end += norm.buffers()
        for ours, theirs in zip(*ends, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_torchs_update_bn(self):
        """It resets the running statistics and averages over forwards that no step follows."""
        model = linked()
        iterate(model, 3)
        bn = nn.Sequential(model[0], nn.BatchNorm2d(4))
        data = [torch.randn(2, 3, 8, 8) for _ in range(4)]
        for each in (model, bn):
            torch.optim.swa_utils.update_bn(data, each)
        for ours, theirs in zip(model[1].buffers(), bn[1].buffers(), strict=True):
            assert torch.equal(ours, theirs)
        assert model[1].momentum == 0.1
        iterate(model, 2)  # goes on with an empty window
        assert held(model) == 2

    @KINDS
    def test_bn_error_for_one_value_per_channel(self, kind):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4, window=kind, window_size=8))
        link(model)
        with pytest.raises(
            ValueError,
            match=r"'1' \(CBN\): Expected more than 1 value per channel.* empty.* Once the window",
        ):
            model(torch.randn(1, 3, 1, 1))
        model(torch.randn(2, 3, 4, 4))
        step(model)
        assert model(torch.randn(1, 3, 1, 1)).isfinite().all()


class Parts(nn.Sequential):
    """A convolution that may run without gradients, and a norm."""

    is_frozen = False

    def forward(self, x):
        with torch.set_grad_enabled(not self.is_frozen):
            y = self[0](x)
        return self[1](y)


class Capped(Reference):
    """With ``set_window``."""

    cap = None

    def largest(self):
        own = super().largest()
        return own if self.cap is None else min(self.cap, own)

    def push(self, entry, y):
        super().push(entry, y)
        self.past = self.past[: self.largest() - 1]


class TestWindow:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_sequence_of_calls_is_the_references(self, data):
        """Training forwards, repeated forwards, steps, evaluation and set_window in any order."""
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 99)))
        kind, size = draw(
            st.one_of(
                st.just(("moving", "auto")),
                st.tuples(st.sampled_from(["moving", "sliding"]), st.sampled_from([1, 2, 4])),
            )
        )
        compensate = draw(st.booleans())
        backward = draw(st.sampled_from(["mixed", "full", "own", "window", "current"]))
        groups = draw(st.sampled_from([1, 2]))
        conv = nn.Conv2d(
            2, 4, draw(st.integers(1, 3)), draw(st.integers(1, 2)), 1, groups=groups,
            bias=draw(st.booleans()),
        ).double()  # fmt: skip
        norm = CBN(
            4, window=kind, window_size=size, compensate=compensate, backward=backward
        ).double()
        model = nn.Sequential(conv, norm)
        link(model)
        slow = Capped(conv, kind, size, norm.eps, compensate, backward)
        x = None
        for action in draw(
            st.lists(st.sampled_from("forward step eval window".split()), max_size=12)
        ):
            if action == "forward":
                x = torch.randn(2, 2, 6, 5, dtype=torch.float64) + torch.randn(1)
                expected = slow.forward(x, norm.weight, norm.bias)
                for _ in range(draw(st.integers(1, 2))):
                    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
            elif action == "step":
                step(model)
                if x is not None:
                    slow.step(x)
                x = None
                torch.testing.assert_close(norm.running_mean, slow.running.mean)
                torch.testing.assert_close(norm.running_var, slow.running.var)
                with torch.no_grad():
                    conv.weight += 0.02 * torch.randn_like(conv.weight)
            elif action == "eval":
                model.eval()(torch.randn(1, 2, 6, 5, dtype=torch.float64))
                model.train()
            else:
                before = slow.largest()
                slow.cap = draw(st.sampled_from([None, *range(1, min(before, 5) + 1)]))
                if slow.largest() != before:
                    slow.forget()
                    x = None
                set_window(model, slow.cap)

    @KINDS
    @pytest.mark.parametrize("compensate", [True, False])
    def test_repeating_a_forward_changes_nothing(self, compensate, kind):
        model = linked(kind, compensate=compensate)
        iterate(model, 3)
        once, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 8, 8)
        outputs = [model(x) for _ in range(3)]
        assert all(torch.equal(outputs[0], output) for output in outputs)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, once[name]), name
        tracked = model[1].num_batches_tracked.item()
        step(model)
        assert model[1].num_batches_tracked.item() == tracked + 1

    @KINDS
    def test_closing_forgets(self, kind):
        model = linked(kind)
        iterate(model, 5)
        assert model[1].window_bytes > 0
        set_window(model, 1)
        assert model[1].window_bytes == 0
        set_window(model, 4)
        x = torch.randn(2, 3, 8, 8)
        y = model[0](x)
        torch.testing.assert_close(model(x), nn.BatchNorm2d(4)(y))

    def test_set_window_keeps_to_each_layers_own_size(self):
        model = nn.Sequential(CBN(2, window_size=3), CBN(2, window_size=6))
        set_window(model, 5)
        assert [layer.window_in_force for layer in model] == [3, 5]
        with pytest.raises(ValueError, match="size 7 is above the largest window_size .* 6"):
            set_window(model, 7)
        for size in (0, -1, 2.5, "3"):
            with pytest.raises(ValueError, match="size must be a whole number of at least 1"):
                set_window(model, size)
        set_window(model, None)
        assert [layer.window_in_force for layer in model] == [3, 6]

    def test_set_window_caps_a_size_that_sets_itself(self):
        model = nn.Sequential(CBN(2), CBN(2, window_size=6))
        assert [layer.window_in_force for layer in model] == [LARGEST, 6]
        set_window(model, 5)
        assert [layer.window_in_force for layer in model] == [5, 5]
        set_window(model, 20)  # which it never reaches
        assert [layer.window_in_force for layer in model] == [LARGEST, 6]

    def test_setting_the_size_in_force_forgets_nothing(self):
        model = linked()
        iterate(model, 3)
        for size in (4, None, 4, 4):
            set_window(model, size)
        assert held(model) == 3

    def test_the_window_size_as_it_is(self):
        model = linked(size="auto")
        assert model[1].mean_window_size == 1
        iterate(model, 30)
        log_share = state_of(model)["log_share"]
        assert -math.log(LARGEST) < log_share < 0
        size = 1 / max(math.exp(log_share), 1 / 31)
        assert model[1].mean_window_size == pytest.approx(size)
        set_window(model, 1)
        assert model[1].mean_window_size == 1
        assert linked(size=5)[1].mean_window_size == 5

    def test_a_window_that_sets_itself_widens_in_noise_and_narrows_in_a_drift(self):
        """Of means that differ by chance a few say little; of a drift the last one says most."""
        sizes = []
        for drift in (0, 1):
            torch.manual_seed(0)
            model = linked(size="auto")
            for number in range(300):
                of_image = drift * number + (1 - drift) * torch.randn(1, 3, 1, 1)
                model(torch.randn(1, 3, 4, 4) + of_image)
                step(model)
            sizes.append(model[1].mean_window_size)
        assert sizes[0] > 2.5 and sizes[1] < 1.1

    def test_memory_is_one_weight_whatever_the_size(self):
        held = set()
        for size in (2, 64, "auto"):
            model = nn.Sequential(nn.Conv2d(32, 64, 3), CBN(64, window_size=size))
            link(model)
            for _ in range(3):
                model(torch.randn(2, 32, 5, 5)).sum().backward()
                step(model)
            held.add(model[1].window_bytes)
        (size,) = held
        assert size <= 1.1 * 4 * model[0].weight.numel()

    @KINDS
    @pytest.mark.parametrize("compensate", [True, False])
    @pytest.mark.parametrize("backward", ["mixed", "full", "own", "window", "current"])
    def test_running_statistics(self, backward, compensate, kind):
        """The window's, but of the paper's gradient, and first, the batch's with BN's variance."""
        model = linked(kind, 3, backward=backward, compensate=compensate, momentum=0.3)
        conv, norm = model
        slow = Reference(conv, kind, 3, norm.eps, compensate)
        mean, var = torch.zeros(4), torch.ones(4)
        for i in range(5):
            x = torch.randn(1, 3, 4, 4) * (1 + i) + i
            y = conv(x).detach()
            model(x)
            step(model)
            new_mean, new_var = (t.detach() for t in slow.statistics(y))
            if backward == "current" or i == 0:
                new_mean, new_var = y.mean((0, 2, 3)), y.var((0, 2, 3))
            mean, var = mean.lerp(new_mean, 0.3), var.lerp(new_var, 0.3)
            slow.step(x)
            torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                conv.weight += 0.01

    def test_running_statistics_as_a_plain_average(self):
        model = linked(backward="current", momentum=None)
        bn = nn.BatchNorm2d(4, momentum=None)
        for _ in range(4):
            x = torch.randn(2, 3, 8, 8)
            bn(model[0](x))
            model(x)
            step(model)
        for ours, theirs in zip(model[1].buffers(), bn.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)

    @KINDS
    def test_without_running_statistics(self, kind):
        """The window works alike; evaluation normalises with the batch, as BN does."""
        torch.manual_seed(0)
        tracking, bare = linked(kind), linked(kind, track_running_stats=False)
        bare[0].load_state_dict(tracking[0].state_dict())
        for size in (1, 1, 4, 4, 4, 4):
            x = torch.randn(2, 3, 8, 8)
            for model in (bare, tracking):
                set_window(model, size)
            assert torch.equal(bare(x), tracking(x))
            step(bare), step(tracking)
        bn = nn.BatchNorm2d(4, track_running_stats=False).eval()
        assert torch.equal(bare.eval()(x), bn(bare[0](x)))

    @KINDS
    @pytest.mark.parametrize("backward", ["mixed", "full", "own", "window"])
    @pytest.mark.parametrize("frozen", ["input", "weight", "all but the bias"])
    def test_gradients_of_what_is_frozen_are_not_formed(self, frozen, backward, kind):
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

    @KINDS
    def test_step_tells_what_was_clamped(self, kind):
        model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), CBN(2, window=kind, window_size=8))
        link(model)
        x = torch.randn(4, 1, 5, 5)
        model(x)
        assert step(model) is None
        model(x)
        assert step(model).item() == 0
        with torch.no_grad():
            model[0].weight[0] *= -3
        model(x)
        assert step(model).item() == 0.5

    @KINDS
    @pytest.mark.parametrize("direct", [False, True])
    def test_each_call_in_a_forward_has_its_own_window(self, direct, kind):
        """A head shared between levels: a level meets its own history only."""

        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3, bias=False)
                self.norm = CBN(4, window=kind, window_size=3)

            def forward(self, *levels):
                return [self.norm(self.conv(level)) for level in levels]

        class Detector(nn.Module):
            """Its loss is called as a method: no forward of the linked model encloses the head."""

            def __init__(self, head):
                super().__init__()
                self.head = head

            def loss(self, *levels):
                return self.head(*levels)

        torch.manual_seed(0)
        shared = Shared()
        call = shared
        if direct:
            call = Detector(shared).loss
        link(getattr(call, "__self__", call))
        single = [
            nn.Sequential(copy.deepcopy(shared.conv), CBN(4, window=kind, window_size=3))
            for _ in "ab"
        ]
        for model in single:
            link(model)
        for _ in range(4):
            levels = [torch.randn(1, 3, 9, 9), torch.randn(1, 3, 5, 5) * 3 + 2]
            if not direct:
                call(*levels)  # a repeated forward of the linked model starts to count again
            for ours, model, level in zip(call(*levels), single, levels, strict=True):
                torch.testing.assert_close(ours, model(level))
                step(model)
            step(shared)
            assert len(window_state(shared)["norm"]) == 2
            change = 0.05 * torch.randn_like(shared.conv.weight)
            for conv in (shared.conv, single[0][0], single[1][0]):
                conv.weight.data += change

    def test_a_loop_that_never_steps_is_told(self):
        model = linked()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.randn(2, 3, 8, 8))  # a repetition is none
        optimizer.step()
        with pytest.warns(UserWarning, match=r"cbn_mmdet.step\(model\) was not called"):
            model(torch.randn(2, 3, 8, 8))

    @KINDS
    def test_the_first_iterations_may_run_in_inference_mode(self, kind):
        model = linked(kind)
        for _ in range(2):
            with torch.inference_mode():
                model(torch.randn(2, 3, 8, 8))
                step(model)
        for _ in range(2):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
            step(model)
        assert held(model) == 4

    @KINDS
    @pytest.mark.parametrize("stride", [2, 3])
    def test_a_strided_derivative_is_close(self, stride, kind):
        """On smooth maps the subgrid's derivative compensates almost as well as the whole one."""
        torch.manual_seed(0)
        full = linked(kind, derivative_stride=1)
        strided = copy.deepcopy(full)
        strided[1].derivative_stride = stride
        naive = copy.deepcopy(full)
        naive[1].compensate = False
        for model in (strided, naive):
            link(model)
        outputs = {}
        for _ in range(4):
            x = nn.functional.interpolate(torch.randn(2, 3, 8, 8), scale_factor=4, mode="bilinear")
            change = 0.1 * torch.randn_like(full[0].weight)
            for model in (full, strided, naive):
                outputs[model] = model(x).detach()
                step(model)
                model[0].weight.data += change
        error = (outputs[strided] - outputs[full]).norm()
        assert 0 < error < 0.5 * (outputs[naive] - outputs[full]).norm()

    @KINDS
    @pytest.mark.parametrize("size", [1, 4])
    def test_an_empty_batch_changes_nothing(self, size, kind):
        model = linked(kind, size)
        iterate(model, 3)
        before = copy.deepcopy(model.state_dict())
        x = torch.randn(0, 3, 8, 8, requires_grad=True)
        y = model(x)
        assert y.shape == (0, 4, 8, 8)
        y.sum().backward()
        seen = held(model)
        step(model)
        assert held(model) == seen
        if size == 1:  # as batch normalisation does
            assert model[1].num_batches_tracked == 4
            before.pop("1.num_batches_tracked")
        for name, tensor in before.items():
            assert torch.equal(model.state_dict()[name], tensor), name

    @KINDS
    def test_a_frozen_convolution_needs_no_derivative(self, kind):
        model = linked(kind)
        model[0].weight.requires_grad_(False)
        iterate(model, 4)
        state = state_of(model)
        assert "m" not in state and "h" not in state
        # Numbers of a channel: of each of 3 iterations 3, or A, R and their last mean; a surprise.
        assert model[1].window_bytes == (10 if kind == "sliding" else 4) * 4 * 4

    @KINDS
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("size", [1, 4])
    @pytest.mark.parametrize("backward", ["mixed", "full", "own", "window", "current"])
    def test_checkpointing_records_once(self, backward, size, reentrant, kind):
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
                grads[-1] += [
                    value for value in state_of(model).values() if isinstance(value, torch.Tensor)
                ]
                with torch.no_grad():
                    model[0].weight *= 1.01
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)
        assert size == 1 or ("sums" in state_of(other)) == (backward in ("full", "mixed"))

    @KINDS
    def test_an_evaluation_before_the_repetition(self, kind):
        """The layer looked at by itself, in evaluation, loses neither window nor past."""
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
        assert held(model) == 4
        torch.testing.assert_close(*gradients, rtol=0, atol=0)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_repetition_after_the_step_is_refused(self, reentrant):
        model = linked()
        iterate(model, 2)
        y = checkpoint(model, torch.randn(2, 3, 8, 8, requires_grad=True), use_reentrant=reentrant)
        step(model)
        with pytest.raises(RuntimeError, match=r"'1' \(CBN\).*repeats a forward.*has ended"):
            y.sum().backward()

    @KINDS
    def test_loading_weights_forgets(self, kind):
        model = linked(kind)
        iterate(model, 4)
        model.load_state_dict(model.state_dict())
        assert model[1].window_bytes == 0


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
            assert held(model) == (0 if is_last else len(group))
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

    @pytest.mark.parametrize("backward", ["mixed", "full", "own", "window", "current"])
    def test_compensation_has_nothing_to_do(self, backward):
        """The weights stand still within a step; its gradient may flow through the past."""
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
        assert held(model, "2") == 3

    def test_a_window_of_a_size(self):
        """It averages exponentially from there; a burn-in closes it."""
        model = self.build(window_size=2)
        for number in range(4):
            assert model[1].mean_window_size == (2 if number else 1)
            model(torch.randn(1, 3, 6, 6, dtype=torch.float64))
            step(model, updated=False)
        set_window(model, 1)
        assert held(model) == 0
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
            assert held(each) == 0

    def test_other_windows_do_not_ask(self):
        """Whether the optimiser stepped is no matter of theirs."""
        for kind in ("moving", "sliding"):
            model = linked(kind)
            for updated in (True, False, True):
                model(torch.randn(2, 3, 8, 8))
                step(model, updated=updated)
            assert held(model) == 3

    def test_its_repr(self):
        assert "window='step', window_size='auto', compensate=False" in str(CmBN(4))
        assert CmBN(4).window_in_force > 10**6 and isinstance(CmBN(4), CBN)


class TestHalfPrecision:
    @KINDS
    def test_bfloat16_autocast(self, kind):
        torch.manual_seed(0)
        model = linked(kind)
        half = copy.deepcopy(model)
        link(half)
        for _ in range(5):
            x = torch.randn(2, 3, 8, 8) + 1
            y = model(x)
            with torch.autocast("cpu", torch.bfloat16):
                y_half = half(x)
            assert y_half.dtype == torch.bfloat16
            torch.testing.assert_close(y_half.float(), y, rtol=0.05, atol=0.08)
            y_half.float().square().mean().backward()
            step(model), step(half)
            change = 0.02 * torch.randn_like(model[0].weight)
            model[0].weight.data += change
            half[0].weight.data += change
        assert half[0].weight.grad.isfinite().all()
        assert state_of(half)["h"].dtype == torch.float32

    @pytest.mark.parametrize("backward", ["mixed", "full", "own", "window"])
    @pytest.mark.parametrize("mean", [0, 100])
    def test_gradient_has_no_residue(self, mean, backward):
        """dL/dy sums to 0 over a channel; rounding its terms would leave a common part."""
        y = (torch.randn(2, 4, 50, 50) + mean).bfloat16().requires_grad_()
        target = torch.randn(2, 4, 50, 50).bfloat16()
        residues = []
        model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False).bfloat16(), CBN(4, backward=backward))
        nn.init.dirac_(model[0].weight)
        link(model)
        for norm in (model, nn.BatchNorm2d(4)):
            y.grad = None
            norm(y).backward(target)
            residues.append(y.grad.double().sum((0, 2, 3)).abs() / y.grad.double().abs().sum())
        assert residues[0].max() < 3 * residues[1].max() + 1e-5

    @KINDS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_the_window_is_float32_whatever_the_layers_dtype(self, dtype, kind):
        model = linked(kind, bias=True)
        iterate(model, 2)
        model.to(dtype)
        for _ in range(3):
            model(torch.randn(2, 3, 8, 8, dtype=dtype)).sum().backward()
            step(model)
        held = [each for each in state_of(model).values() if isinstance(each, torch.Tensor)]
        assert {each.dtype for each in held} == {torch.float32}

    def test_channels_last_stays(self):
        model = linked().to(memory_format=torch.channels_last)
        iterate(model, 2)
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        assert model(x).is_contiguous(memory_format=torch.channels_last)


@KINDS
class TestLayersTogether:
    """The pasts of all layers are computed at once; each alone comes to the same."""

    def build(self, kind):
        torch.manual_seed(0)
        layers = []
        for index, (width, groups) in enumerate([(4, 1), (8, 2), (6, 1)]):
            width_before = layers[-1].num_features if layers else 3
            layers += [
                nn.Conv2d(width_before, width, 3, padding=1, groups=groups, bias=index == 1),
                CBN(width, window=kind, window_size=4, compensate=index < 2),
            ]
        model = nn.Sequential(*layers)
        link(model)
        return model

    def train(self, model, before=None):
        """Outputs and gradients of six iterations."""
        torch.manual_seed(1)
        seen = []
        for _ in range(6):
            x = torch.randn(2, 3, 8, 8)
            target = torch.randn(2, 6, 8, 8)
            model.zero_grad()
            y = model(x)
            (y * target).sum().backward()
            seen += [y.detach(), *(p.grad.clone() for p in model.parameters())]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
            step(model)
        return seen

    @pytest.fixture
    def calls(self, monkeypatch):
        """How many windows each computation was for."""
        calls, pasts = [], cbn_mmdet.norm.window.pasts

        def spy(together, dtype):
            calls.append(len(together))
            return pasts(together, dtype)

        for room in ("window", "iteration"):
            monkeypatch.setattr(f"cbn_mmdet.norm.{room}.pasts", spy)
        return calls

    def each_alone(self, model):
        """A hook before a convolution's forward may set its weight: its layer looks for itself."""
        for conv in model[::2]:
            conv.register_forward_pre_hook(lambda conv, args: None)

    @pytest.mark.parametrize("moves", [False, True])
    def test_as_each_alone(self, moves, calls, kind):
        """Even if a weight moves between the beginning and its own layer's forward."""

        def move(norm, args, output):
            with torch.no_grad():
                model[2].weight *= 1.01

        ends = []
        for alone in (False, True):
            model = self.build(kind)
            if alone:
                self.each_alone(model)
            if moves:
                model[1].register_forward_hook(move)
            calls.clear()
            ends.append(self.train(model))
            # The naive layer's past is of no weight.
            assert calls == ([1, 1, 1] if alone else [3, 1] if moves else [3]) * 5
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    def test_a_weight_set_within_the_forward(self, calls, kind):
        """As by layers that renormalise their weight, which raises no version."""

        class Constrained(nn.Conv2d):
            def forward(self, x):
                self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
                return super().forward(x)

        ends = []
        for alone in (False, True):
            model = self.build(kind)
            model[2] = Constrained(4, 8, 3, padding=1, groups=2)
            nn.init.constant_(model[2].weight, 0.5)
            link(model)
            if alone:
                self.each_alone(model)
            calls.clear()
            ends.append(self.train(model))
            # Its layer looks for itself.
            assert calls == ([1, 1, 1] if alone else [2, 1]) * 5
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    def test_a_checkpoint_repeated_after_another_forward(self, kind):
        """Of other weights, set in a way that raises no version."""
        grads = []
        for checkpointed in (False, True):
            model = self.build(kind)
            self.train(model)
            x, target = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)
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

    def test_a_weight_that_is_away(self, kind):
        """Offloaded until its own block runs, say: its past is left to its own layer."""
        model = self.build(kind)
        full = {}

        def release(conv):
            full[conv], conv.weight.data = conv.weight.data, torch.empty(0)

        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(2, 3, 8, 8))
                step(model)
            expected = copy.deepcopy(window_state(model))
            twin = copy.deepcopy(model)
            link(twin)
            load_window_state(twin, expected)
            model[2].register_forward_pre_hook(
                lambda conv, args: setattr(conv.weight, "data", full.pop(conv))
            )
            release(model[2])
            x = torch.randn(2, 3, 8, 8)
            torch.testing.assert_close(model(x), twin(x))

    def test_parts_called_one_by_one(self, calls, kind):
        """Where the linked model itself is not called, the first layer begins the iteration."""
        ends = []
        for parts in (False, True):
            model = self.build(kind)
            torch.manual_seed(1)
            for _ in range(4):
                calls.clear()
                x = torch.randn(2, 3, 8, 8)
                for layer in model if parts else [model]:
                    x = layer(x)
                x.square().sum().backward()
                step(model)
                with torch.no_grad():
                    model[0].weight *= 1.01
            assert calls == [3]
            ends.append([x, *(parameter.grad for parameter in model.parameters())])
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other)

    def test_nothing_keeps_a_weight_alive(self, kind):
        model = self.build(kind)
        self.train(model)
        names = [name for name, _ in model.named_parameters()]
        weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
        x = torch.randn(2, 3, 8, 8)
        torch.func.functional_call(model, dict(zip(names, weights, strict=True)), x)
        gone = weakref.ref(weights[0])
        del weights
        gc.collect()
        assert gone() is None

    def test_a_layer_that_is_gone(self, calls, kind):
        model = self.build(kind)
        self.train(model)
        del model[2:]
        gc.collect()
        calls.clear()
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        step(model)
        assert calls == [1]


@KINDS
class TestWhatChangesALayer:
    """What a window holds is dropped where it is no longer of the layer as it is now."""

    def test_compensation_is_turned_off(self, kind):
        model = linked(kind)
        iterate(model, 3)
        model[1].compensate = False
        iterate(model, 2)
        assert held(model) == 2 and "h" not in state_of(model)

    def test_the_weight_has_another_size(self, kind):
        model = linked(kind)
        iterate(model, 3)
        model[0].weight = nn.Parameter(torch.randn(4, 3, 1, 1))
        model[0].kernel_size, model[0].padding = (1, 1), (0, 0)
        iterate(model, 2)
        assert held(model) == 2

    def test_windows_loaded_in_inference_mode(self, kind):
        model = linked(kind)
        iterate(model, 3)
        other = linked(kind)
        with torch.inference_mode():
            load_window_state(other, window_state(model))
        for _ in range(2):
            other(torch.randn(2, 3, 8, 8)).sum().backward()
            step(other)

    def test_a_convolution_in_the_same_place(self, kind):
        """While the window is empty any other may come."""
        model = linked(kind)
        set_window(model, 1)
        iterate(model, 2)
        model[0] = nn.Conv2d(3, 4, 1)
        link(model)
        iterate(model, 2)
        assert links(model) == {"1": "0"}


@KINDS
class TestWindowInBfloat16:
    def pair(self, kind):
        models = [linked(kind, window_dtype=dtype) for dtype in ("float32", "bfloat16")]
        models[1].load_state_dict(models[0].state_dict())
        return models

    def test_halves_the_memory_and_hardly_changes_the_output(self, kind):
        models, naive = self.pair(kind), linked(kind, compensate=False)
        naive.load_state_dict(models[0].state_dict())
        for _ in range(6):
            x = torch.randn(2, 3, 8, 8) + 1
            change = 0.05 * torch.randn_like(models[0][0].weight)
            outputs = [model(x) for model in (*models, naive)]
            for model, y in zip((*models, naive), outputs, strict=True):
                y.square().mean().backward()
                step(model)
                model[0].weight.data += change
        full, half, without = outputs
        assert 0 < (half - full).norm() < 0.01 * (without - full).norm()
        window, halved = map(state_of, models)
        assert halved["h"].dtype == torch.bfloat16 and halved["m"].dtype == torch.float32
        saved = models[0][1].window_bytes - models[1][1].window_bytes
        assert saved == 2 * window["h"].numel()

    def test_is_exact_for_a_weight_that_rests(self, kind):
        """What h is rounded by meets only the distance that the weight has gone."""
        models = self.pair(kind)
        for _ in range(4):
            x = torch.randn(2, 3, 8, 8) * 3 + 1
            outputs = [model(x) for model in models]
            for model in models:
                step(model)
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("channels", [4, 600])
    def test_gradient(self, channels, kind, monkeypatch):
        """Of layers that are converted in one part or in several."""
        monkeypatch.setattr(cbn_mmdet.norm.kernels, "_BLOCK", 1 << 12)
        grads = []
        for dtype in ("float32", "bfloat16"):
            torch.manual_seed(0)
            norm = CBN(channels, window=kind, window_size=8, window_dtype=dtype)
            model = nn.Sequential(nn.Conv2d(3, channels, 3), norm)
            link(model)
            for _ in range(4):
                model.zero_grad()
                y = model(torch.randn(2, 3, 8, 8) + 1)
                (y * torch.randn_like(y)).sum().backward()
                step(model)
                model[0].weight.data += 0.05 * torch.randn_like(model[0].weight)
            grads.append(model[0].weight.grad)
        error = (grads[1] - grads[0]).norm() / grads[0].norm()
        assert 0 < error < 0.01

    def test_a_saved_window_of_the_other_dtype_is_refused(self, kind):
        model = linked(kind, window_dtype="bfloat16")
        iterate(model, 3)
        with pytest.raises(ValueError, match="another setting of compensate or window_dtype"):
            load_window_state(linked(kind), window_state(model))
        other = linked(kind, window_dtype="bfloat16")
        load_window_state(other, window_state(model))
        assert torch.equal(state_of(other)["h"], state_of(model)["h"])


class TestCopies:
    def copies(self, model):
        yield copy.deepcopy(model)
        yield pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        yield torch.load(buffer, weights_only=False)

    @KINDS
    def test_a_copy_starts_afresh(self, kind):
        model = linked(kind)
        iterate(model, 4)
        x = torch.randn(2, 3, 8, 8)
        expected = model(x)
        for other in self.copies(model):
            assert other[1].window_bytes == 0 and links(other) == {}
            with pytest.raises(RuntimeError, match="never linked"):
                other(x)
            link(other)
            assert len(other[0]._forward_hooks) == 1
            torch.testing.assert_close(other(x), nn.BatchNorm2d(4)(model[0](x)))
            iterate(other, 2)
        assert torch.equal(model(x), expected)

    def test_state_dict_is_batch_norms(self):
        model = linked()
        iterate(model, 3)
        bn = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        bn.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(bn.state_dict(), strict=True)

    @KINDS
    def test_moving_the_model_moves_the_window(self, kind):
        model = linked(kind)
        iterate(model, 3)
        before = state_of(model)["h"]
        model.to("cpu", torch.float64)
        assert torch.equal(state_of(model)["h"], before)
        model.to("meta")
        assert model[1].window_bytes == 0

    @pytest.mark.parametrize("size", [1, 4])
    def test_a_replica_of_data_parallel_is_refused(self, size):
        """What it learns would be lost with it."""
        model = linked()
        set_window(model, size)
        replica = model[1]._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match="CBN layer of 4 .*DataParallel.*DistributedData"):
            replica(torch.randn(2, 4, 8, 8))
        replica.eval()
        replica._parameters = model[1]._parameters  # as torch.nn.parallel.replicate puts them there
        x = torch.randn(2, 4, 8, 8)
        assert torch.equal(replica(x), model[1].eval()(x))


def assert_same(one, other):
    """Whether two windows hold the same."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        is_tensor = isinstance(value, torch.Tensor)
        assert torch.equal(value, other[name]) if is_tensor else value == other[name], name


class TestNotFinite:
    def run(self, model, spoil, value):
        """Five iterations, of which the third may have a spoilt batch in its place."""
        generator = torch.Generator().manual_seed(0)
        for index in range(5):
            x = torch.randn(2, 3, 8, 8, generator=generator)
            if index != 2:
                model(x)
                step(model)
            elif spoil:
                x[0, 0, 3, 3] = value
                model(x)
                with pytest.warns(
                    UserWarning, match="CBN layer '1' is the first of 2 that met NaN"
                ):
                    step(model)
            with torch.no_grad():
                for conv in (model[0], model[2]):
                    conv.weight += 0.02 * torch.randn(conv.weight.shape, generator=generator)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("kwargs", [{}, dict(compensate=False), dict(backward="current")])
    @pytest.mark.parametrize(("kind", "size"), [("moving", 3), ("moving", "auto"), ("sliding", 3)])
    @pytest.mark.parametrize("in_force", [1, None])
    def test_a_spoilt_batch_leaves_no_trace(self, in_force, kind, size, kwargs, value):
        ends = []
        kwargs = dict(window=kind, window_size=size, **kwargs)
        for spoil in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(
                *(nn.Conv2d(3, 4, 3), CBN(4, **kwargs)), *(nn.Conv2d(4, 4, 3), CBN(4, **kwargs))
            )
            link(model)
            set_window(model, in_force)
            self.run(model, spoil, value)
            ends.append((model.state_dict(), window_state(model), model(torch.ones(1, 3, 8, 8))))
        (state, windows, output), (clean, clean_windows, expected) = ends
        assert all(torch.equal(state[name], clean[name]) for name in clean)
        assert torch.equal(output, expected) and output.isfinite().all()
        for name in ("1", "3"):
            for one, other in zip(windows[name], clean_windows[name], strict=True):
                assert_same(one, other)

    @KINDS
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_an_overflowing_derivative_is_dropped(self, dtype, kind):
        """It can overflow although neither the activations do nor their variance."""
        model = linked(kind, 3, window_dtype=dtype)
        iterate(model, 2)
        x = torch.randn(2, 3, 8, 8) * 1e23
        with torch.no_grad():
            model[0].weight *= 1e-6
            assert model[0](x).var().isfinite()
        assert model(x).isfinite().all()
        self.assert_dropped(model)

    @KINDS
    def test_what_no_output_sees_is_dropped(self, kind):
        """NaN where a strided convolution never looks, but the mean of the patches does."""
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, bias=False), CBN(4, window=kind, window_size=3)
        )
        link(model)
        for _ in range(2):
            model(torch.randn(2, 3, 8, 8))
            step(model)
        x = torch.randn(2, 3, 8, 8)
        x[0, 0, 7, 7] = float("nan")
        assert model(x).isfinite().all()
        self.assert_dropped(model)

    @KINDS
    def test_an_overflowing_past_is_dropped(self, kind):
        """The past can overflow at today's weights although the batch does not."""
        model = linked(kind, 3)
        for _ in range(2):
            model(torch.randn(2, 3, 8, 8) * 1e6 + 1e6)
            step(model)
        with torch.no_grad():
            model[0].weight *= 1e14
        model(torch.randn(2, 3, 8, 8) * 1e-3)
        self.assert_dropped(model)

    def assert_dropped(self, model):
        before, buffers = state_of(model), copy.deepcopy(model.state_dict())
        with pytest.warns(UserWarning, match="met NaN or infinite values"):
            step(model)
        assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
        assert_same(state_of(model), before)


@KINDS
class TestWindowState:
    @pytest.mark.parametrize(
        "kwargs", [{}, dict(compensate=False), dict(bias=True), dict(backward="window")], ids=str
    )
    def test_a_resumed_model_goes_on_as_the_saved_one(self, kwargs, kind):
        kwargs = dict(size="auto" if kind == "moving" else 4, **kwargs)
        model = linked(kind, **kwargs)
        iterate(model, 5)
        buffer = io.BytesIO()
        torch.save((model.state_dict(), window_state(model)), buffer)
        buffer.seek(0)
        weights, windows = torch.load(buffer, weights_only=True)
        resumed = linked(kind, **kwargs)
        resumed.load_state_dict(weights)
        load_window_state(resumed, windows)
        for seed in range(3):
            ends = []
            for each in (model, resumed):
                torch.manual_seed(seed)
                iterate(each, 1)
                ends.append(each.state_dict())
            assert all(torch.equal(ends[0][name], ends[1][name]) for name in weights)
            assert_same(state_of(model), state_of(resumed))

    def test_the_state_is_a_copy(self, kind):
        model = linked(kind)
        iterate(model, 4)
        state = window_state(model)
        before = copy.deepcopy(state)
        other = copy.deepcopy(model)
        link(other)
        load_window_state(other, state)
        assert other[1].window_bytes == model[1].window_bytes
        for each in (model, other):
            iterate(each, 1)
            assert_same(state["1"][0], before["1"][0])
        assert not torch.equal(state_of(model)["h"], state_of(other)["h"])

    def test_refusals(self, kind):
        model = linked(kind)
        iterate(model, 2)
        state, other = window_state(model), "sliding" if kind == "moving" else "moving"
        for fresh, message in (
            (linked(kind, 3), rf"'1' has a {kind.title()}Window of 3 in force, .*Window of 4"),
            (linked(other), rf"'1' has a {other.title()}Window of 4 in force, the state a {kind}"),
            (linked(kind, compensate=False), "another setting of compensate"),
            (nn.Sequential(nn.Conv2d(3, 4, 3)), "only one .* has a CBN layer '1'"),
        ):
            with pytest.raises(ValueError, match=f"(?i){message}"):
                load_window_state(fresh, state)


class TestErrors:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            (dict(window_size=0), "window_size must be a whole number of at least 1, got 0"),
            (dict(window_size=2.0), "window_size must be a whole number of at least 1, got 2.0"),
            (dict(window_size=True), "window_size must be a whole number of at least 1, got True"),
            (dict(derivative_stride=-1), "derivative_stride must be a whole number"),
            (dict(num_features=0), "num_features must be a whole number"),
            (dict(window_size="AUTO"), "window_size must be a whole number .*or 'auto'.*"),
            (dict(window="sliding"), "window_size='auto' is for window='moving'"),
            (
                dict(window="paper"),
                "window must be 'moving' .* or 'sliding' .* or 'step' .*'paper'",
            ),
            (dict(window=8), "window must be 'moving' .* or 'sliding' .* or 'step' .*got 8"),
            (
                dict(backward="paper"),
                "backward must be 'mixed' .* or 'full' .* or 'own' .* or 'current' .*'paper'",
            ),
            (dict(window_dtype="float16"), "window_dtype must be 'float32' or 'bfloat16', got"),
            (
                dict(compensate="no"),
                "compensate must be True or False or 'where_possible', got 'no'",
            ),
            (dict(affine=1), "affine must be True or False, got 1"),
            (dict(sync="where_possible"), "sync must be True or False, got 'where_possible'"),
            (dict(eps=-1), "eps must be a number above 0, got -1"),
            (dict(eps=0), "eps must be a number above 0, got 0"),
            (dict(eps="small"), "eps must be a number"),
            (dict(momentum=2), "momentum must be None or from 0 to 1, got 2"),
            (dict(momentum="slow"), "momentum must be None or from 0 to 1"),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            CBN(**{"num_features": 4, **kwargs})

    def test_the_defaults(self):
        norm = SyncCBN(4)
        assert (norm.window, norm.window_size, norm.backward) == ("moving", "auto", "mixed")
        assert "window='moving', window_size='auto', compensate=True, backward='mixed'" in str(norm)

    @pytest.mark.parametrize("loss_scale", [0, -1.0, float("inf"), True, "1024"])
    def test_a_loss_scale_that_is_none(self, loss_scale):
        with pytest.raises(ValueError, match="loss_scale must be a number above 0 or a torch.amp"):
            step(linked(), loss_scale=loss_scale)

    def test_never_linked(self):
        norm = CBN(4)
        with pytest.raises(RuntimeError, match=r"4 channels.*link\(model\).*type='CBNHook'"):
            norm(torch.randn(2, 4, 5, 5))
        set_window(norm, 1)
        norm(torch.randn(2, 4, 5, 5))

    @pytest.mark.parametrize("shape", [(4, 5), (4, 5, 5), (2, 4, 5, 5, 5)])
    def test_dimensions(self, shape):
        with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \d dimensions"):
            CBN(4)(torch.randn(shape))

    def test_channels(self):
        model = nn.Sequential(nn.Conv2d(3, 5, 1), CBN(4))
        link(model)
        with pytest.raises(ValueError, match="'1' .*num_features=4.* 5 channels"):
            model(torch.randn(2, 3, 4, 4))

    @pytest.mark.parametrize("in_force", [1, 4])
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointed_calls_that_cannot_be_told_apart(self, reentrant, in_force):
        """Also in a burn-in, before its time is lost."""
        model = linked()
        set_window(model, in_force)

        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = model

            def forward(self, x):
                parts = [
                    checkpoint(self.body, part, use_reentrant=reentrant) for part in (x, x + 1)
                ]
                return sum(parts)

        twice = Twice()
        link(twice)
        loss = twice(torch.randn(2, 3, 8, 8, requires_grad=True)).sum()
        with pytest.raises(RuntimeError, match="called 2 times.*with_cp=False"):
            loss.backward()
