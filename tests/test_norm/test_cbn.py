"""The layer: batch normalisation where it must be, the window's rules, and what nn.Module does."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from layers import (
    KINDS,
    assert_all_equal,
    assert_same,
    assert_same_window,
    backward,
    chain,
    descend,
    held,
    iterate,
    linked,
    reference,
    state_of,
    tensors,
)
from mmdet.models import FCNMaskHead
from mmengine.registry import init_default_scope
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import cbn_mmdet
from cbn_mmdet import CBN, SyncCBN, link, links, load_window_state, set_window, step, window_state
from cbn_mmdet.norm.reference import Reference
from cbn_mmdet.norm.window import LARGEST


def pair(channels=4, **kwargs):
    """A CBN and a BatchNorm2d with the same random state."""
    cbn, bn = CBN(channels, **kwargs), nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            tensor.uniform_(0.5, 2)
    cbn.load_state_dict(bn.state_dict(), strict=True)
    return cbn, bn


class TestIsBatchNorm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_evaluation_bit_for_bit(self, dtype):
        cbn, bn = (module.eval().to(dtype) for module in pair())
        x = torch.randn(2, 4, 5, 6).to(dtype)
        assert torch.equal(cbn(x), bn(x))
        assert list(cbn.state_dict()) == list(bn.state_dict())

    @KINDS
    @pytest.mark.parametrize("trains", [True, False])
    def test_evaluation_after_training_with_a_window(self, trains, kind):
        """Output and gradients are BN's, also for a frozen layer in a model that trains on."""
        model = linked(kind)
        iterate(model, 6)
        bn = nn.BatchNorm2d(4)
        bn.load_state_dict(model[1].state_dict(), strict=True)
        gradients = []
        for norm in (model[1], bn):
            norm.eval().requires_grad_(trains)
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        outputs = model(x), bn(model[0](x))
        assert torch.equal(*outputs)
        for norm, y in zip((model[1], bn), outputs, strict=True):
            inputs = [x, model[0].weight, *(p for p in norm.parameters() if trains)]
            gradients.append(torch.autograd.grad(y.square().sum(), inputs))
        assert_all_equal(*gradients)
        step(model)
        assert_all_equal(model[1].buffers(), bn.buffers())

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
        """BN bit for bit, but buffers change only in ``step``, and repeated forwards count once."""
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

    @pytest.mark.parametrize("backward", ["current", "window", "mixed"])
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
        data = [torch.randn(2, 3, 8, 8) for _ in range(12)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of forwards without a step
            for each in (model, bn):
                update_bn(data, each)
        assert_all_equal(model[1].buffers(), bn[1].buffers())
        assert model[1].momentum == 0.1
        iterate(model, 2)  # goes on with an empty window
        assert state_of(model)["seen"] == 2

    @KINDS
    def test_one_value_per_channel(self, kind):
        """At window size 1 BN's error, with an empty window the layer's own; later, no error."""
        x = torch.randn(1, 3, 1, 1).double()
        model = linked(kind, bias=True).double()
        for norm in (CBN(3, window_size=1), nn.BatchNorm2d(3)):
            with pytest.raises(ValueError, match="^Expected more than 1 value per channel when tr"):
                norm(x.float())
        with pytest.raises(
            ValueError,
            match=r"'1' \(CBN\): Expected more than 1 value per channel.* empty.* Once the window",
        ):
            model(x)
        slow = reference(model)
        for size in (5, 1, 1, 1, 4):
            x = torch.randn(1, 3, size, size).double()
            expected = slow.forward(x, model[1].weight, model[1].bias)
            got = backward(model, x)
            torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-4)
            assert all(grad.isfinite().all() for grad in got)
            slow.step(x)
            step(model)
            descend(model)
        assert all(buffer.isfinite().all() for buffer in model.buffers())

    @KINDS
    @pytest.mark.parametrize("size", [1, 3])
    @pytest.mark.parametrize("training", [True, False])
    def test_a_mask_head_without_regions(self, training, size, kind):
        """The head gives an empty output and zero gradients; it learns and forgets nothing."""
        init_default_scope("mmdet")
        torch.manual_seed(0)
        norm = dict(type="CBN", window=kind, window_size=3, derivative_stride=1)
        head = FCNMaskHead(
            num_convs=2, in_channels=4, conv_out_channels=4, num_classes=3, norm_cfg=norm
        )
        link(head)
        set_window(head, size)
        for _ in range(3):
            backward(head, torch.randn(5, 4, 14, 14))
            step(head)
        before, past = copy.deepcopy(head.state_dict()), window_state(head)
        head.train(training)
        masks, *grads = backward(head, torch.randn(0, 4, 14, 14))
        step(head)
        assert masks.shape == (0, 3, 28, 28) and not any(grad.any() for grad in grads)
        for name, value in head.state_dict().items():
            counts = size == 1 and training and "num_batches_tracked" in name  # as with BN
            assert torch.equal(value, before[name] + 1 if counts else before[name]), name
        for name, windows in window_state(head).items():
            for now, then in zip(windows, past[name], strict=True):
                assert now["seen"] == then["seen"] == (0 if size == 1 else 3)
                assert_all_equal(tensors(now).values(), tensors(then).values())
        assert head.train()(torch.randn(2, 4, 14, 14)).isfinite().all()


class TestWindow:
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

    @pytest.mark.parametrize(
        "before, option, value",
        [(8, "window_size", "auto"), ("auto", "window_size", 8), (8, "window", "sliding")]
        + [("auto", "window_dtype", "bfloat16")],
    )
    def test_options_that_are_set_later(self, before, option, value):
        """They are in force after ``set_window``, as if the layer had been built with them."""
        model = linked(size=before)
        iterate(model, 2)
        conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        built = chain(conv, CBN(4, **{"window_size": before, option: value}))
        built.load_state_dict(model.state_dict())
        setattr(model[1], option, value)
        for _ in range(2):
            set_window(model, None)  # drops the past, the first time
            x = torch.randn(2, 3, 8, 8)
            assert torch.equal(model(x), built(x))
            for each in (model, built):
                step(each)
        assert_same(model, built)

    def test_a_window_that_sets_itself_widens_in_noise_and_narrows_in_a_drift(self):
        """In noise a few batches say little of the next; in a drift the last one says most."""
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

    @KINDS
    @pytest.mark.parametrize("compensate", [True, False])
    @pytest.mark.parametrize("backward", ["mixed", "window", "current"])
    def test_running_statistics(self, backward, compensate, kind):
        """The window's; with the paper's gradient, and at first, the batch's with BN's variance."""
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
                call(*levels)  # a repeated forward of the linked model restarts its count
            for ours, model, level in zip(call(*levels), single, levels, strict=True):
                torch.testing.assert_close(ours, model(level))
                step(model)
            step(shared)
            assert len(window_state(shared)["norm"]) == 2
            change = 0.05 * torch.randn_like(shared.conv.weight)
            for conv in (shared.conv, single[0][0], single[1][0]):
                conv.weight.data += change

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
class TestLayersTogether:
    """The pasts of all layers are computed at once, with the same result as one by one."""

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
        """For each computation of pasts, the number of its windows."""
        calls, pasts = [], cbn_mmdet.norm.window.pasts

        def spy(together, dtype):
            calls.append(len(together))
            return pasts(together, dtype)

        for room in ("window", "iteration"):
            monkeypatch.setattr(f"cbn_mmdet.norm.{room}.pasts", spy)
        return calls

    def each_alone(self, model):
        """Adds pre-forward hooks: they may set a weight, so each layer computes its own past."""
        for conv in model[::2]:
            conv.register_forward_pre_hook(lambda conv, args: None)

    @pytest.mark.parametrize("moves", [False, True])
    def test_as_each_alone(self, moves, calls, kind):
        """Even if a weight moves after the forward began, but before its own layer runs."""

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
            # The naive layer's past depends on no weight.
            assert calls == ([1, 1, 1] if alone else [3, 1] if moves else [3]) * 5
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    def test_a_weight_set_within_the_forward(self, calls, kind):
        """As layers do that renormalise their weight: this does not bump the tensor's version."""

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
            # The constrained layer computes its own past.
            assert calls == ([1, 1, 1] if alone else [2, 1]) * 5
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    def test_a_weight_that_is_away(self, kind):
        """A weight offloaded until its block runs, say: its own layer computes its past."""
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
    """A window is emptied once its contents no longer fit the layer as it is now."""

    def test_compensation_is_turned_off(self, kind):
        model = linked(kind)
        iterate(model, 3)
        model[1].compensate = False
        iterate(model, 2)
        assert state_of(model)["seen"] == 2 and "h" not in state_of(model)

    def test_the_weight_has_another_size(self, kind):
        model = linked(kind)
        iterate(model, 3)
        model[0].weight = nn.Parameter(torch.randn(4, 3, 1, 1))
        model[0].kernel_size, model[0].padding = (1, 1), (0, 0)
        iterate(model, 2)
        assert state_of(model)["seen"] == 2

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
        """While its window is empty, a layer accepts any other convolution."""
        model = linked(kind)
        set_window(model, 1)
        iterate(model, 2)
        model[0] = nn.Conv2d(3, 4, 1)
        link(model)
        iterate(model, 2)
        assert links(model) == {"1": "0"}


class TestCopies:
    def test_swa(self):
        """torch's AveragedModel: ``update_bn`` gathers as with BN, and training goes on."""
        torch.manual_seed(0)
        model = linked(bias=True)
        twin = AveragedModel(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
        averaged = AveragedModel(model)
        for _ in range(5):
            backward(model, torch.randn(2, 3, 9, 9))
            step(model)
            descend(model, 0.5)
            averaged.update_parameters(model)
            twin.update_parameters(model)
        past = held(model)
        batches = list(torch.randn(4, 2, 3, 9, 9) * 2 + 1)
        update_bn(batches, averaged), update_bn(batches, twin)
        assert_all_equal(averaged.state_dict().values(), twin.state_dict().values())
        averaged.eval(), twin.eval()
        assert torch.equal(averaged(batches[0]), twin(batches[0]))
        assert held(model) == past == {"1": [5]}
        with pytest.raises(RuntimeError, match="CBN layer of 4 channels.* was never linked"):
            averaged.train()(batches[0])  # the copy must be linked to train

    @KINDS
    def test_moving_the_model_moves_the_window(self, kind):
        model = linked(kind)
        iterate(model, 3)
        before = state_of(model)["h"]
        model.to("cpu", torch.float64)
        assert torch.equal(state_of(model)["h"], before)
        model.to("meta")
        assert model[1].window_bytes == 0

    @KINDS
    def test_moving_the_model_within_an_iteration_drops_what_it_learnt(self, kind):
        model = linked(kind)
        iterate(model, 3)
        model(torch.randn(2, 3, 8, 8))
        window, mean = state_of(model), model[1].running_mean.double()
        step(model.double())
        assert_same_window(state_of(model), window)
        assert torch.equal(model[1].running_mean, mean)

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


class TestNotFinite:
    def run(self, model, spoil, value):
        """Five iterations; the third has a spoilt batch, or is left out."""
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
                assert_same_window(one, other)

    @KINDS
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_an_overflowing_derivative_is_dropped(self, dtype, kind):
        """The derivative can overflow although the activations and their variance do not."""
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
        """A strided convolution never reads the NaN, but the mean of the patches does."""
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
        assert_same_window(state_of(model), before)


@KINDS
class TestWindowState:
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
            assert_same_window(state["1"][0], before["1"][0])
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
            (dict(derivative_stride=-1), "derivative_stride must be a whole number"),
            (dict(num_features=0), "num_features must be a whole number"),
            (dict(window_size="AUTO"), "window_size must be a whole number .*or 'auto'.*"),
            (dict(window="sliding"), "window_size='auto' is for window='moving'"),
            (
                dict(window="paper"),
                "window must be 'moving' .* or 'sliding' .* or 'step' .*'paper'",
            ),
            (
                dict(backward="paper"),
                "backward must be 'mixed' .* or 'window' .* or 'current' .*'paper'",
            ),
            (dict(window_dtype="float16"), "window_dtype must be 'float32' or 'bfloat16', got"),
            (
                dict(compensate="no"),
                "compensate must be True or False or 'where_possible', got 'no'",
            ),
            (dict(affine=1), "affine must be True or False, got 1"),
            (dict(sync="where_possible"), "sync must be True or False, got 'where_possible'"),
            (dict(eps=0), "eps must be a number above 0, got 0"),
            (dict(momentum=2), "momentum must be None or from 0 to 1, got 2"),
        ],
    )
    def test_arguments(self, kwargs, message):
        """Tests the wording; test_fuzz.py tests which values are refused."""
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

    @pytest.mark.parametrize("kwargs", [{}, dict(track_running_stats=False)], ids=str)
    def test_never_linked(self, kwargs):
        norm = CBN(4, **kwargs)
        with pytest.raises(RuntimeError, match=r"4 channels.*link\(model\).*type='CBNHook'"):
            norm(torch.randn(2, 4, 5, 5))
        set_window(norm, 1)
        norm(torch.randn(2, 4, 5, 5))

    @pytest.mark.parametrize("in_force", [8, 1])
    @pytest.mark.parametrize(
        "feeder, size",
        [
            (nn.Linear(3, 4), (6, 3)),
            (nn.Conv1d(3, 4, 1), (2, 3, 5)),
            (nn.Conv3d(3, 4, 1), (2, 3, 5, 5, 5)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_outputs_that_are_no_maps(self, feeder, size, in_force):
        """Refused as by nn.BatchNorm2d; for maps that no weight made, see test_places.py."""
        model = chain(feeder, CBN(4))
        set_window(model, in_force)
        for norm, name in ((model[1], r"'1' \(CBN\)"), (CBN(4), "of 4 channels")):
            with pytest.raises(ValueError, match=rf"{name}.*\(N, C, H, W\), got {len(size)} dim"):
                norm(feeder(torch.randn(size)))

    def test_channels(self):
        model = nn.Sequential(nn.Conv2d(3, 5, 1), CBN(4))
        link(model)
        with pytest.raises(ValueError, match="'1' .*num_features=4.* 5 channels"):
            model(torch.randn(2, 3, 4, 4))
