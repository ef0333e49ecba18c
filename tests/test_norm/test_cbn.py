"""The layer: batch normalisation where it must be, the window's rules, and what nn.Module does."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from torch import nn
from torch.utils.checkpoint import checkpoint

import cbn_mmdet
from cbn_mmdet import CBN, link, load_window_state, set_window, step, window_state
from cbn_mmdet.norm.cbn import stride_for


def pair(channels=4, **kwargs):
    """A CBN and a BatchNorm2d with the same random state."""
    cbn, bn = CBN(channels, **kwargs), nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            tensor.uniform_(0.5, 2)
    cbn.load_state_dict(bn.state_dict(), strict=True)
    return cbn, bn


def linked(window=4, affine=True, bias=False, **kwargs):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=bias),
        CBN(4, window_size=window, affine=affine, **kwargs),
    )
    assert link(model) == 1
    return model


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

    def test_evaluation_after_training_with_a_window(self):
        model = linked()
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

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("how", ["window_size", "set_window"])
    def test_window_of_one_in_training(self, momentum, how):
        cbn, bn = pair(window_size=1 if how == "window_size" else 8)
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

    def test_first_iteration_of_an_open_window(self):
        """One iteration in the window: BN's output, gradients and running statistics."""
        model = linked()
        bn = nn.BatchNorm2d(4)
        x, x_ = (torch.ones(2, 3, 8, 8).normal_(generator=torch.Generator().manual_seed(0)),) * 2
        target = torch.randn(2, 4, 8, 8)
        y = model(x)
        (y * target).sum().backward()
        grad = model[0].weight.grad.clone()
        model.zero_grad()
        expected = bn(model[0](x_))
        (expected * target).sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grad, model[0].weight.grad, rtol=1e-3, atol=1e-3)
        step(model)
        for ours, theirs in zip(model[1].buffers(), bn.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_bn_error_for_one_value_per_channel(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
        link(model)
        with pytest.raises(
            ValueError, match=r"'1' \(CBN\): Expected more than 1 value per channel"
        ):
            model(torch.randn(1, 3, 1, 1))
        model(torch.randn(2, 3, 4, 4))
        step(model)
        assert model(torch.randn(1, 3, 1, 1)).isfinite().all()


class TestWindow:
    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_any_sequence_of_calls_is_the_references(self, data):
        """Training forwards, repeated forwards, steps, evaluation and set_window in any order."""
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 99)))
        size = draw(st.integers(1, 4))
        compensate = draw(st.booleans())
        backward = draw(st.sampled_from(["window", "current"]))
        groups = draw(st.sampled_from([1, 2]))
        conv = nn.Conv2d(
            2, 4, draw(st.integers(1, 3)), draw(st.integers(1, 2)), 1, groups=groups,
            bias=draw(st.booleans()),
        ).double()  # fmt: skip
        norm = CBN(4, window_size=size, compensate=compensate, backward=backward).double()
        model = nn.Sequential(conv, norm)
        link(model)
        slow = Reference(conv, size, norm.eps, compensate, flow=backward == "window")
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
                with torch.no_grad():
                    conv.weight += 0.02 * torch.randn_like(conv.weight)
            elif action == "eval":
                model.eval()(torch.randn(1, 2, 6, 5, dtype=torch.float64))
                model.train()
            else:
                slow.window = draw(st.integers(1, size))
                if norm.window != slow.window:
                    slow.past, x = [], None
                set_window(model, slow.window)

    @pytest.mark.parametrize("compensate", [True, False])
    def test_repeating_a_forward_changes_nothing(self, compensate):
        model = linked(compensate=compensate)
        iterate(model, 3)
        once, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 8, 8)
        outputs = [model(x) for _ in range(3)]
        assert all(torch.equal(outputs[0], output) for output in outputs)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, once[name]), name
        tracked = model[1].num_batches_tracked.item()
        step(model)
        assert model[1].num_batches_tracked.item() == tracked + 1

    def test_closing_forgets(self):
        model = linked()
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
        assert [layer.window for layer in model] == [3, 5]
        with pytest.raises(ValueError, match="size 7 is above the largest window_size .* 6"):
            set_window(model, 7)
        for size in (0, -1, 2.5, "3"):
            with pytest.raises(ValueError, match="size must be a whole number of at least 1"):
                set_window(model, size)

    @pytest.mark.parametrize("backward", ["window", "current"])
    def test_running_statistics(self, backward):
        model = linked(window=3, backward=backward, momentum=0.3)
        conv, norm = model
        slow = Reference(conv, 3, norm.eps, True, flow=True)
        mean, var = torch.zeros(4), torch.ones(4)
        for i in range(5):
            x = torch.randn(1, 3, 4, 4) * (1 + i) + i
            y = conv(x).detach()
            model(x)
            step(model)
            new_mean, new_var = (t.detach() for t in slow.statistics(x))
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

    def test_without_running_statistics(self):
        """The window works alike; evaluation normalises with the batch, as BN does."""
        torch.manual_seed(0)
        tracking = linked()
        bare = nn.Sequential(
            copy.deepcopy(tracking[0]), CBN(4, window_size=4, track_running_stats=False)
        )
        link(bare)
        for _ in range(4):
            x = torch.randn(2, 3, 8, 8)
            assert torch.equal(bare(x), tracking(x))
            step(bare), step(tracking)
        bn = nn.BatchNorm2d(4, track_running_stats=False).eval()
        assert torch.equal(bare.eval()(x), bn(bare[0](x)))

    @pytest.mark.parametrize("frozen", ["input", "weight", "all but the bias"])
    def test_gradients_of_what_is_frozen_are_not_formed(self, frozen):
        torch.manual_seed(0)
        model = linked(bias=True)
        iterate(model, 4)
        x = torch.randn(2, 3, 8, 8)
        target = torch.randn(2, 4, 8, 8)
        (model(x) * target).sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        conv, norm = model
        if frozen == "input":
            with torch.no_grad():
                y = conv(x)
            (norm(y) * target).sum().backward()
            assert conv.weight.grad is None and conv.bias.grad is None  # nor through the window
            torch.testing.assert_close(norm.weight.grad, expected["1.weight"])
            return
        conv.weight.requires_grad_(False)
        if frozen == "all but the bias":
            norm.requires_grad_(False)
        (model(x) * target).sum().backward()
        assert conv.weight.grad is None
        torch.testing.assert_close(conv.bias.grad, expected["0.bias"], rtol=1e-3, atol=1e-3)

    def test_a_dead_output_is_verified_later(self):
        """A convolution whose output is all zero tells nothing of what it computes."""
        model = nn.Sequential(nn.ConvTranspose2d(3, 3, 1), nn.Conv2d(3, 4, 1, bias=False), CBN(4))
        link(model)
        model[1].weight.data.zero_()
        model(torch.randn(2, 3, 5, 5))
        assert model[2]._verified == []
        nn.init.normal_(model[1].weight)
        model(torch.randn(2, 3, 5, 5))
        (verified,) = model[2]._verified
        assert verified() is model[1]

    def test_step_tells_what_was_clamped(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), CBN(2))
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

    @pytest.mark.parametrize("direct", [False, True])
    def test_each_call_in_a_forward_has_its_own_window(self, direct):
        """A head shared between levels: a level meets its own history only."""

        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), CBN(4, window_size=3)

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
        single = [nn.Sequential(copy.deepcopy(shared.conv), CBN(4, window_size=3)) for _ in "ab"]
        for model in single:
            link(model)
        for _ in range(4):
            levels = [torch.randn(1, 3, 9, 9), torch.randn(1, 3, 5, 5) * 3 + 2]
            call(*levels)  # a repeated forward starts to count again
            for ours, model, level in zip(call(*levels), single, levels, strict=True):
                torch.testing.assert_close(ours, model(level))
                step(model)
            step(shared)
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

    def test_the_first_iterations_may_run_in_inference_mode(self):
        model = linked()
        with torch.inference_mode():
            model(torch.randn(2, 3, 8, 8))
            step(model)
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        step(model)

    @pytest.mark.parametrize("stride", [2, 3])
    def test_a_strided_derivative_is_close(self, stride):
        """On smooth maps the subgrid's derivative compensates almost as well as the whole one."""
        torch.manual_seed(0)
        full = linked(derivative_stride=1)
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

    def test_an_empty_batch_changes_nothing(self):
        model = linked()
        iterate(model, 3)
        before = copy.deepcopy(model.state_dict())
        x = torch.randn(0, 3, 8, 8, requires_grad=True)
        y = model(x)
        assert y.shape == (0, 4, 8, 8)
        y.sum().backward()
        held = len(model[1]._windows[0])
        step(model)
        assert len(model[1]._windows[0]) == held
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_a_frozen_convolution_needs_no_derivative(self):
        model = linked()
        model[0].weight.requires_grad_(False)
        iterate(model, 4)
        assert model[1].window_bytes == 2 * 4 * 3 * 4  # mean and variance, C = 4, 3 iterations

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("window", [1, 4])
    def test_checkpointing_records_once(self, reentrant, window):
        torch.manual_seed(0)
        plain = linked()
        other = copy.deepcopy(plain)
        link(other)
        for _ in range(5):
            x = torch.randn(2, 3, 8, 8)
            target = torch.randn(2, 4, 8, 8)
            grads = []
            for model in (plain, other):
                set_window(model, window)
                model.zero_grad()
                x_ = x.clone().requires_grad_()
                y = model(x_) if model is plain else checkpoint(model, x_, use_reentrant=reentrant)
                (y * target).sum().backward()
                step(model)
                grads.append([y, x_.grad, *(p.grad for p in model.parameters()), *model.buffers()])
                with torch.no_grad():
                    model[0].weight *= 1.01
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)

    def test_an_evaluation_before_the_repetition(self):
        """The layer looked at by itself, in evaluation, loses neither window nor past."""
        torch.manual_seed(0)
        model = linked()
        iterate(model, 4)
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        gradients = []
        for looked_at in (False, True):
            y = checkpoint(model, x, use_reentrant=False)
            if looked_at:
                model.eval()[1](torch.randn(2, 4, 8, 8))
                model.train()
            gradients.append(torch.autograd.grad(y.square().sum(), [x, model[0].weight]))
        assert len(model[1]._windows[0]) == 3
        torch.testing.assert_close(*gradients, rtol=0, atol=0)

    def test_loading_weights_forgets(self):
        model = linked()
        iterate(model, 4)
        model.load_state_dict(model.state_dict())
        assert model[1].window_bytes == 0


class TestHalfPrecision:
    def test_bfloat16_autocast(self):
        torch.manual_seed(0)
        model = linked()
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
        assert half[1]._windows[0]._h.dtype == torch.float32

    @pytest.mark.parametrize("mean", [0, 100])
    def test_gradient_has_no_residue(self, mean):
        """dL/dy sums to 0 over a channel; rounding its terms would leave a common part."""
        y = (torch.randn(2, 4, 50, 50) + mean).bfloat16().requires_grad_()
        target = torch.randn(2, 4, 50, 50).bfloat16()
        residues = []
        model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False).bfloat16(), CBN(4))
        nn.init.dirac_(model[0].weight)
        link(model)
        for norm in (model, nn.BatchNorm2d(4)):
            y.grad = None
            norm(y).backward(target)
            residues.append(y.grad.double().sum((0, 2, 3)).abs() / y.grad.double().abs().sum())
        assert residues[0].max() < 3 * residues[1].max() + 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_the_window_is_float32_whatever_the_layers_dtype(self, dtype):
        model = linked(bias=True)
        iterate(model, 2)
        model.to(dtype)
        for _ in range(3):
            model(torch.randn(2, 3, 8, 8, dtype=dtype)).sum().backward()
            step(model)
        window = model[1]._windows[0]
        assert {window._h.dtype, window._m.dtype, window._vectors.dtype} == {torch.float32}

    def test_channels_last_stays(self):
        model = linked().to(memory_format=torch.channels_last)
        iterate(model, 2)
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        assert model(x).is_contiguous(memory_format=torch.channels_last)


class TestLayersTogether:
    """A forward learns the pasts of all layers at once; each alone comes to the same."""

    def build(self):
        torch.manual_seed(0)
        layers = []
        for index, (width, groups) in enumerate([(4, 1), (8, 2), (6, 1)]):
            width_before = layers[-1].num_features if layers else 3
            layers += [
                nn.Conv2d(width_before, width, 3, padding=1, groups=groups, bias=index == 1),
                CBN(width, window_size=4, compensate=index < 2 or width == 6),
            ]
        layers[-1].compensate = False
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
        calls, pasts = [], cbn_mmdet.norm.window._pasts

        def spy(windows, *args):
            calls.append(len(windows))
            return pasts(windows, *args)

        monkeypatch.setattr(cbn_mmdet.norm.window, "_pasts", spy)
        return calls

    @pytest.mark.parametrize("moves", [False, True])
    def test_as_each_alone(self, moves, calls, monkeypatch):
        """Even if a weight moves between the first layer's forward and its own layer's."""

        def move(norm, args, output):
            with torch.no_grad():
                model[2].weight *= 1.01

        ends = []
        for alone in (False, True):
            if alone:
                monkeypatch.setattr(cbn_mmdet.norm.iteration, "accompany", lambda windows: None)
            model = self.build()
            if moves:
                model[1].register_forward_hook(move)
            calls.clear()
            ends.append(self.train(model))
            # Of its own are the naive layer's, and that of the weight that moved.
            assert calls == ([1, 1, 1] if alone else [2, 1, 1] if moves else [2, 1]) * 5
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    def test_a_weight_set_within_the_forward(self, calls, monkeypatch):
        """As by layers that renormalise their weight, which raises no version."""

        class Constrained(nn.Conv2d):
            def forward(self, x):
                self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
                return super().forward(x)

        ends = []
        for alone in (False, True):
            if alone:
                monkeypatch.setattr(cbn_mmdet.norm.iteration, "accompany", lambda windows: None)
            model = self.build()
            model[2] = Constrained(4, 8, 3, padding=1, groups=2)
            nn.init.constant_(model[2].weight, 0.5)
            link(model)
            calls.clear()
            ends.append(self.train(model))
            # Its layer looks for itself, and nobody learns twice for that.
            assert calls == [1, 1, 1] * 5
        assert all(map(torch.equal, *ends))

    def test_a_checkpoint_repeated_after_another_forward(self):
        """Of other weights, set in a way that raises no version."""
        grads = []
        for checkpointed in (False, True):
            model = self.build()
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

    def test_a_companion_whose_weight_is_away(self, calls):
        """Offloaded until its own block runs, say: it is left to its own layer."""
        model = self.build()
        full = {}

        def release(conv, args, output):
            full[conv], conv.weight.data = conv.weight.data, torch.empty(0)

        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(2, 3, 8, 8))
                step(model)
            expected = copy.deepcopy(window_state(model))
            twin = copy.deepcopy(model)
            link(twin)
            load_window_state(twin, expected)
            x = torch.randn(2, 3, 8, 8)
            model[2].register_forward_pre_hook(
                lambda conv, args: setattr(conv.weight, "data", full.pop(conv))
            )
            release(model[2], None, None)
            torch.testing.assert_close(model(x), twin(x))

    def test_forwards_of_parts_learn_their_own(self, calls):
        """Where the linked model itself is not called, each part is a forward."""
        model = self.build()
        for _ in range(4):
            calls.clear()
            x = torch.randn(2, 3, 8, 8)
            for layer in model:
                x = layer(x)
            x.sum().backward()
            step(model)
        assert calls == [1, 1, 1]

    def test_nothing_keeps_a_weight_alive(self):
        model = self.build()
        self.train(model)
        names = [name for name, _ in model.named_parameters()]
        weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
        x = torch.randn(2, 3, 8, 8)
        torch.func.functional_call(model, dict(zip(names, weights, strict=True)), x)
        gone = weakref.ref(weights[0])
        del weights
        gc.collect()
        assert gone() is None

    def test_a_layer_that_is_gone(self, calls):
        model = self.build()
        self.train(model)
        del model[2:]
        calls.clear()
        self.assert_trains(model)
        assert calls[0] == 1

    def assert_trains(self, model):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        step(model)

    def test_checkpointing_repeats_each_alone(self, calls):
        model = self.build()
        self.train(model)
        calls.clear()
        checkpoint(model, torch.randn(2, 3, 8, 8), use_reentrant=False).sum().backward()
        assert calls == [2, 1, 1, 1, 1]


class TestWhatChangesALayer:
    """What a window holds is dropped where it is no longer of the layer as it is now."""

    def test_compensation_is_turned_off(self):
        model = linked()
        iterate(model, 3)
        model[1].compensate = False
        iterate(model, 2)
        assert len(model[1]._windows[0]) == 2 and model[1]._windows[0]._h is None

    def test_the_weight_has_another_size(self):
        model = linked()
        iterate(model, 3)
        model[0].weight = nn.Parameter(torch.randn(4, 3, 1, 1))
        model[0].kernel_size, model[0].padding = (1, 1), (0, 0)
        iterate(model, 2)
        assert len(model[1]._windows[0]) == 2

    def test_windows_loaded_in_inference_mode(self):
        model = linked()
        iterate(model, 3)
        other = linked()
        with torch.inference_mode():
            load_window_state(other, window_state(model))
        other(torch.randn(2, 3, 8, 8)).sum().backward()
        step(other)


@pytest.mark.parametrize(
    "shape, stride",
    [
        ((1, 4, 64, 64), 4),
        ((1, 4, 61, 64), 4),  # 16 rows of 16
        ((1, 4, 60, 64), 2),  # 15
        ((2, 4, 16, 16), 1),
        ((4, 4, 16, 16), 2),
        ((64, 4, 7, 7), 4),
        ((1, 4, 1, 1), 1),
        ((0, 4, 7, 7), 1),
    ],
)
def test_the_default_stride_leaves_256_positions(shape, stride):
    assert stride_for(torch.empty(shape)) == stride
    if shape[0] and stride > 1:
        assert torch.empty(shape)[:, 0, ::stride, ::stride].numel() >= 256


class TestWindowInBfloat16:
    def test_halves_the_memory_and_hardly_changes_the_output(self):
        models = [linked(window_dtype=dtype) for dtype in ("float32", "bfloat16")]
        naive = linked(compensate=False)
        models[1].load_state_dict(models[0].state_dict())
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
        window, halved = (model[1]._windows[0] for model in models)
        assert halved._h.dtype == torch.bfloat16 and halved._m.dtype == torch.float32
        assert window.nbytes - halved.nbytes == 2 * window._h.numel()

    def test_is_exact_for_a_weight_that_rests(self):
        """What h is rounded by meets only the distance that the weight has gone."""
        models = [linked(window_dtype=dtype) for dtype in ("float32", "bfloat16")]
        models[1].load_state_dict(models[0].state_dict())
        for _ in range(4):
            x = torch.randn(2, 3, 8, 8) * 3 + 1
            outputs = [model(x) for model in models]
            for model in models:
                step(model)
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("channels", [4, 600])
    def test_gradient(self, channels, monkeypatch):
        """Of layers that are converted in one part or in several."""
        monkeypatch.setattr(cbn_mmdet.norm.window, "_BLOCK", 1 << 12)
        grads = []
        for dtype in ("float32", "bfloat16"):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, channels, 3), CBN(channels, window_dtype=dtype))
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

    def test_a_saved_window_of_the_other_dtype_is_refused(self):
        model = linked(window_dtype="bfloat16")
        iterate(model, 3)
        with pytest.raises(ValueError, match="another setting of compensate or window_dtype"):
            load_window_state(linked(), window_state(model))
        other = linked(window_dtype="bfloat16")
        load_window_state(other, window_state(model))
        assert torch.equal(other[1]._windows[0]._h, model[1]._windows[0]._h)


class TestCopies:
    def copies(self, model):
        yield copy.deepcopy(model)
        yield pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        yield torch.load(buffer, weights_only=False)

    def test_a_copy_starts_afresh(self):
        model = linked()
        iterate(model, 4)
        x = torch.randn(2, 3, 8, 8)
        expected = model(x)
        for other in self.copies(model):
            assert other[1].window_bytes == 0 and other[1].feeder is None
            with pytest.raises(RuntimeError, match="never linked"):
                other(x)
            hooks = len(other[0]._forward_hooks)
            link(other)
            assert len(other[0]._forward_hooks) == hooks == 1
            torch.testing.assert_close(other(x), nn.BatchNorm2d(4)(model[0](x)))
            iterate(other, 2)
        assert torch.equal(model(x), expected)

    def test_state_dict_is_batch_norms(self):
        model = linked()
        iterate(model, 3)
        bn = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        bn.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(bn.state_dict(), strict=True)

    def test_moving_the_model_moves_the_window(self):
        model = linked()
        iterate(model, 3)
        window = model[1]._windows[0]
        before = window._h.clone()
        model.to("cpu", torch.float64)
        assert torch.equal(window._h, before)
        model.to("meta")
        assert window.nbytes == 0


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
    @pytest.mark.parametrize("window", [1, 3])
    def test_a_spoilt_batch_leaves_no_trace(self, window, kwargs, value):
        ends = []
        for spoil in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(
                *(nn.Conv2d(3, 4, 3), CBN(4, window_size=3, **kwargs)),
                *(nn.Conv2d(4, 4, 3), CBN(4, window_size=3, **kwargs)),
            )
            link(model)
            set_window(model, window)
            self.run(model, spoil, value)
            ends.append((model.state_dict(), window_state(model), model(torch.ones(1, 3, 8, 8))))
        (state, windows, output), (clean, clean_windows, expected) = ends
        assert all(torch.equal(state[name], clean[name]) for name in clean)
        assert torch.equal(output, expected) and output.isfinite().all()
        for name in ("1", "3"):
            for one, other in zip(windows[name], clean_windows[name], strict=True):
                assert one["count"] == other["count"] and torch.equal(
                    one["vectors"], other["vectors"]
                )

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_an_overflowing_derivative_is_dropped(self, dtype):
        """It can overflow although neither the activations do nor their variance."""
        model = linked(window=3, window_dtype=dtype)
        with torch.no_grad():
            model[0].weight *= 1e-6
        iterate(model, 2)
        model(torch.randn(2, 3, 8, 8) * 1e23)
        assert not model[1]._records[0].entry.derivative.var.isfinite().all()
        self.assert_dropped(model)

    def test_what_no_output_sees_is_dropped(self):
        """NaN where a strided convolution never looks, but the mean of the patches does."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), CBN(4, window_size=3))
        link(model)
        for _ in range(2):
            model(torch.randn(2, 3, 8, 8))
            step(model)
        x = torch.randn(2, 3, 8, 8)
        x[0, 0, 7, 7] = float("nan")
        assert model(x).isfinite().all()
        self.assert_dropped(model)

    def test_an_overflowing_estimate_is_dropped(self):
        """The past can overflow at today's weights although the batch does not."""
        model = linked(window=3)
        for _ in range(2):
            model(torch.randn(2, 3, 8, 8) * 1e6 + 1e6)
            step(model)
        with torch.no_grad():
            model[0].weight *= 1e14
        model(torch.randn(2, 3, 8, 8) * 1e-3)
        self.assert_dropped(model)

    def assert_dropped(self, model):
        window, buffers = window_state(model), copy.deepcopy(model.state_dict())
        window = copy.deepcopy(window)
        with pytest.warns(UserWarning, match="met NaN or infinite values"):
            step(model)
        assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
        (after,), (before,) = window_state(model)["1"], window["1"]
        assert after["count"] == before["count"]
        assert torch.equal(after["h"], before["h"]) and torch.equal(after["m"], before["m"])


class TestWindowState:
    @pytest.mark.parametrize("kwargs", [{}, dict(compensate=False), dict(bias=True)])
    def test_a_resumed_model_goes_on_as_the_saved_one(self, kwargs):
        model = linked(**kwargs)
        iterate(model, 5)
        buffer = io.BytesIO()
        torch.save((model.state_dict(), window_state(model)), buffer)
        buffer.seek(0)
        weights, windows = torch.load(buffer, weights_only=True)
        resumed = linked(**kwargs)
        resumed.load_state_dict(weights)
        load_window_state(resumed, windows)
        for seed in range(3):
            ends = []
            for each in (model, resumed):
                torch.manual_seed(seed)
                iterate(each, 1)
                ends.append(each.state_dict())
            assert all(torch.equal(ends[0][name], ends[1][name]) for name in weights)

    def test_the_state_is_copied_on_loading(self):
        model = linked()
        iterate(model, 4)
        other = copy.deepcopy(model)
        link(other)
        load_window_state(other, window_state(model))
        assert other[1].feeder is None and other[1].window_bytes == model[1].window_bytes
        iterate(other, 1)
        ours, theirs = (window_state(each)["1"][0]["vectors"] for each in (model, other))
        assert not torch.equal(ours, theirs)

    def test_refusals(self):
        model = linked()
        iterate(model, 2)
        state = window_state(model)
        with pytest.raises(ValueError, match="'1' has a window of 3 in force, the state one of 4"):
            load_window_state(linked(window=3), state)
        with pytest.raises(ValueError, match="only one .* has a CBN layer '1'"):
            load_window_state(nn.Sequential(nn.Conv2d(3, 4, 3)), state)


class TestErrors:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            (dict(window_size=0), "window_size must be a whole number of at least 1, got 0"),
            (dict(window_size=2.0), "window_size must be a whole number of at least 1, got 2.0"),
            (dict(window_size=True), "window_size must be a whole number of at least 1, got True"),
            (dict(derivative_stride=-1), "derivative_stride must be a whole number"),
            (dict(num_features=0), "num_features must be a whole number"),
            (dict(backward="paper"), "backward must be 'window' .* or 'current' .*'paper'"),
            (dict(compensate="no"), "compensate must be True or False, got 'no'"),
            (dict(eps=-1), "eps must be a number of at least 0, got -1"),
            (dict(eps="small"), "eps must be a number"),
            (dict(momentum=2), "momentum must be None or from 0 to 1, got 2"),
            (dict(momentum="slow"), "momentum must be None or from 0 to 1"),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            CBN(**{"num_features": 4, **kwargs})

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
