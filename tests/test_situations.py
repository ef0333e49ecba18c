"""CBN under what people train with: the rows of docs/trust.md, against references."""

import copy
import functools
import gc
import math
import os
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import computes_in_float16, needs_float16
from mmdet.models import FCNMaskHead, FCOSHead, ResNet, RetinaHead, RetinaSepBNHead
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.optim import OptimWrapper
from mmengine.registry import METRICS, init_default_scope
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from mmengine.utils import digit_version
from test_hooks.test_cbn_hook import LENGTH, Net, Noise, runner
from test_norm.test_linking import assert_same, held
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from zoo import loss_of, total

import cbn_mmdet.norm.cbn
from cbn_mmdet import (
    CBN,
    diagnose,
    link,
    links,
    load_window_state,
    set_window,
    step,
    window_state,
)
from cbn_mmdet.norm.reference import Reference

NORM = dict(type="CBN", window_size=3, derivative_stride=1)
WINDOWS = ["moving", "sliding"]
HALF = [pytest.param(torch.float16, marks=needs_float16), torch.bfloat16]
needs_scaler = pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs torch 2.3")


def linked(*modules):
    model = nn.Sequential(*modules)
    link(model)
    return model


def small(size=4, bias=True, **kwargs):
    return linked(nn.Conv2d(3, 4, 3, padding=1, bias=bias), CBN(4, window_size=size, **kwargs))


def reference(model, size=4, **kwargs):
    """Of the model that :func:`small` returns."""
    return Reference(model[0], window_size=size, eps=model[1].eps, stride=None, **kwargs)


def resnet(**kwargs):
    model = ResNet(18, base_channels=8, **{"norm_cfg": NORM, "norm_eval": False, **kwargs})
    if cbn_layers(model):
        link(model)
    model.train()
    return model


def cbn_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, CBN)}


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
    """The parameters of the other model; loading a state dict would empty the windows."""
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs)


def assert_close_in_norm(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other).norm() <= tolerance * other.norm()


def assert_all_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def tensors(state):
    """Those of a window's state."""
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


class TestMixedPrecision:
    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize("dtype", HALF)
    def test_the_window_is_that_of_float32(self, dtype, window):
        """Convolution and activations in half precision, statistics and window in float32."""
        torch.manual_seed(0)
        full = small(bias=False, window=window)  # a bias has no gradient but rounding
        half = copy.deepcopy(full)
        link(half)
        for _ in range(5):
            x = torch.randn(2, 3, 12, 12) * 3 + 1
            expected = backward(full, x)
            got = backward(half, x, half=dtype)
            assert got[0].dtype == dtype
            assert_close_in_norm(got, expected, 0.02)
            step(full), step(half)
            descend(full)
            take_over(half, full)
        ((ours,), (theirs,)) = (window_state(model)["1"] for model in (half, full))
        assert {"m", "h", "sums"} < tensors(ours).keys() == tensors(theirs).keys()
        for name, value in tensors(ours).items():
            assert value.dtype == torch.float32
            difference = (value - theirs[name]).norm() / theirs[name].norm()
            # Gradients come in half precision, and surprises are small differences.
            limit = 5 if name in ("sums", "surprise") else 1
            assert difference < limit * (1e-3 if dtype == torch.float16 else 1e-2), name
        torch.testing.assert_close(half[1].running_var, full[1].running_var, rtol=1e-2, atol=0)

    @pytest.mark.parametrize("dtype", HALF)
    def test_many_positions_and_large_activations(self, dtype):
        """1e5 positions and activations of 1e3: sums leave fp16's range, statistics must not."""
        torch.manual_seed(0)
        full = small(3, bias=False)
        half = copy.deepcopy(full)
        link(half)
        for _ in range(3):
            x = torch.randn(2, 3, 224, 224) * 300 + 1000
            expected = backward(full, x)
            got = backward(half, x, half=dtype)
            assert_close_in_norm(got, expected, 0.02 if dtype == torch.float16 else 0.05)
            step(full), step(half)
            descend(full)
            take_over(half, full)
        torch.testing.assert_close(half[1].running_var, full[1].running_var, rtol=0.05, atol=0)


@needs_scaler
class TestLossScale:
    """The averages of ``backward='full'`` are of gradients, whose scale is the scaler's."""

    def run(self, scaler, half=None, count=6, skipped=(), model=None, told=True):
        """Trains; returns the gradients and the windows' averages of each iteration."""
        torch.manual_seed(0)
        model = small(bias=False) if model is None else model
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        seen = []
        for number in range(count):
            x, weights = torch.randn(2, 3, 12, 12), torch.randn(2, 4, 12, 12)
            optimizer.zero_grad()
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = (model(x).float() * weights).sum()
            if number in skipped:
                loss = loss * math.inf
            if isinstance(scaler, torch.amp.GradScaler):
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                gradients = [p.grad.clone() for p in model.parameters()]
                scaler.step(optimizer)
                scaler.update()
            else:
                (loss * (scaler or 1)).backward()
                for parameter in model.parameters():
                    parameter.grad /= scaler or 1
                gradients = [p.grad.clone() for p in model.parameters()]
                if number not in skipped:
                    optimizer.step()
            step(model, *([] if scaler is None or not told else [scaler]))
            seen.append([*gradients, window_state(model)["1"][0].get("sums")])
        return seen

    @pytest.mark.parametrize(
        "scaler",
        [lambda: 1000, lambda: 0.5, lambda: torch.amp.GradScaler("cpu", init_scale=3.0e4)],
        ids=["1000", "0.5", "GradScaler"],
    )
    def test_averages_are_those_of_an_unscaled_run(self, scaler):
        expected, found = self.run(None), self.run(scaler())
        for ours, theirs in zip(found, expected, strict=True):
            assert_close_in_norm(ours, theirs, 1e-4)
        wrong = self.run(1000, told=False)
        assert (wrong[-1][-1] - expected[-1][-1]).norm() > expected[-1][-1].norm()

    @pytest.mark.parametrize("dtype", HALF)
    def test_in_half_precision(self, dtype):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
        for ours, theirs in zip(self.run(scaler, dtype), self.run(None), strict=True):
            assert_close_in_norm(ours, theirs, 0.03)

    def test_a_scale_that_changes(self):
        """It doubles in each iteration. Before the first, a step tells the scaler."""
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
        torch.manual_seed(0)
        model = small(bias=False)
        assert step(model, scaler) is None
        for ours, theirs in zip(self.run(scaler, model=model), self.run(None), strict=True):
            assert_close_in_norm(ours, theirs, 1e-4)
        assert scaler.get_scale() == 2.0**14

    @pytest.mark.parametrize("skipped", [0, 3])
    def test_a_skipped_step(self, skipped):
        """Infinite gradients leave the averages, whatever the scale becomes."""
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        found, expected = self.run(scaler, skipped=[skipped]), self.run(None, skipped=[skipped])
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            if number == skipped:
                assert not ours[0].isfinite().all()
                before = found[number - 1][-1] if number else None
                assert ours[-1] is before is None or torch.equal(ours[-1], before)
            else:
                assert_close_in_norm(ours, theirs, 1e-4)
        assert scaler.get_scale() == 2.0**7

    @pytest.mark.parametrize("dtype, scale", [(torch.float16, 2.0**40), (torch.bfloat16, 2.0**127)])
    def test_a_skipped_step_leaves_a_valid_window(self, dtype, scale):
        """The weights stay, and what the forward learnt is as good as any."""
        if dtype == torch.float16 and not computes_in_float16():
            pytest.skip("this torch does not compute in float16 on the CPU")
        torch.manual_seed(0)
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=1e-12)
        weight, images = model[0].weight.clone(), torch.randn(3, 2, 3, 12, 12) * 5
        for index, x in enumerate(images[:2]):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = model(x).float().square().sum()
            scaler.scale(loss).backward()
            skipped = not model[0].weight.grad.isfinite().all()
            assert skipped == (index == 0)
            if skipped:
                scaler.step(optimizer)
                scaler.update()
                assert torch.equal(model[0].weight, weight)
            step(model, scaler)
            assert ("sums" in window_state(model)["1"][0]) == (not skipped)
        assert held(model) == {"1": [2]}
        # The weights never moved: the window is the union of the three batches.
        with torch.autocast("cpu", dtype):
            output, y = model(images[2]), model[0](images.flatten(0, 1)).float()
        expected = nn.BatchNorm2d(4)(y)[-2:]
        torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.02)

    def test_a_resumed_run(self):
        """Told its scaler before the first forward it goes on as if nothing had happened."""

        def go_on(model, scaler):
            torch.manual_seed(1)
            y = model(torch.randn(2, 3, 12, 12))
            model.zero_grad()
            scaler.scale((y * torch.randn(y.shape)).sum()).backward()
            step(model, scaler)

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        torch.manual_seed(0)
        model = small()
        self.run(scaler, model=model)
        resumed = copy.deepcopy(model)
        link(resumed)
        load_window_state(resumed, window_state(model))
        step(resumed, scaler)
        go_on(model, scaler), go_on(resumed, scaler)
        assert_all_equal(*([p.grad for p in each.parameters()] for each in (model, resumed)))
        assert_same(model, resumed)


class TestActivationCheckpointing:
    """tests/test_norm/test_cbn.py has one block; here are a backbone and mmengine's switch."""

    @pytest.mark.parametrize("amp", [False, True])
    @pytest.mark.parametrize("how", ["reentrant", "not reentrant", "mmengine"])
    @pytest.mark.filterwarnings("ignore:.*use_reentrant parameter should be passed")
    def test_resnet(self, how, amp, monkeypatch):
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
            # A reentrant backward adds up in another order: as much as with BN in its place.
            assert_close_in_norm(*results, 0.08 if amp else 1e-4)
            descend(plain)
            take_over(saving, plain)
            if how == "not reentrant":
                assert_same(plain, saving)  # the averages of gradients, too
        assert held(plain) == held(saving)
        assert set(map(tuple, held(saving).values())) == {(3,)}


class TestGradientAccumulation:
    @pytest.mark.parametrize("window", WINDOWS)
    def test_equal_weights_mean_no_compensation(self, window):
        """Within a group the window is the union of its batches; across groups it compensates.

        That is, a sliding one as long as a group; a moving one while it fills, in the first group.
        """
        torch.manual_seed(0)
        model = small(window=window, backward="current", momentum=1.0).double()
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01), accumulative_counts=4)
        slow, naive = (
            reference(model, window=window, backward="current", compensate=each)
            for each in (True, False)
        )
        gamma, beta = model[1].weight, model[1].bias
        batches = torch.randn(12, 2, 3, 9, 9, dtype=torch.float64) * torch.rand(12, 1, 1, 1, 1) * 3
        for index, x in enumerate(batches):
            with wrapper.optim_context(model):
                output = model(x)
                for each in (slow, naive):
                    each.expected = each.forward(x, gamma, beta).detach()
            group = batches[index - index % 4 : index + 1]
            torch.testing.assert_close(output, slow.expected, rtol=1e-5, atol=1e-5)
            is_of_this_group = index < 4 or (window == "sliding" and index % 4 == 3)
            if is_of_this_group:  # all that the window holds
                torch.testing.assert_close(output, naive.expected, rtol=1e-5, atol=1e-5)
                union = nn.functional.batch_norm(
                    model[0](group.flatten(0, 1)), None, None, gamma, beta, training=True
                )
                torch.testing.assert_close(output, union[-2:], rtol=1e-5, atol=1e-5)
            else:
                assert (output - slow.expected).norm() < 0.1 * (output - naive.expected).norm()
            slow.step(x), naive.step(x)
            wrapper.update_params(output.square().sum() * 0.1)
            step(model)


def cascade_rcnn():
    """mmdet's Cascade R-CNN, much narrowed."""
    init_default_scope("mmdet")
    name = "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py"
    cfg = Config.fromstring(f"_base_ = 'mmdet::{name}'", ".py").model
    cfg.backbone.update(depth=18, base_channels=4, init_cfg=None)
    cfg.neck.update(in_channels=[4, 8, 16, 32], out_channels=8)
    cfg.rpn_head.update(in_channels=8, feat_channels=8)
    cfg.roi_head.bbox_roi_extractor.out_channels = 8
    for head in cfg.roi_head.bbox_head:
        head.update(type="ConvFCBBoxHead", in_channels=8, conv_out_channels=4, norm_cfg=NORM)
        head.update(num_shared_convs=2, num_shared_fcs=1, fc_out_channels=16)
    return MODELS.build(cfg)


class TestSeveralForwards:
    """Each call of each norm in mmdet's heads, against a reference with that call's history."""

    def check(self, model, forward):
        torch.manual_seed(0)
        link(model)
        model.train()
        inputs, calls, references = {}, [], {}
        modules = dict(model.named_modules())
        names = {module: name for name, module in modules.items()}

        def note(norm, _, y):
            conv = modules[links(model)[names[norm]]]
            calls.append((norm, conv, inputs[conv].clone(), y.clone()))

        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]}))
            elif isinstance(module, CBN):
                module.register_forward_hook(note)
        for _ in range(3):
            calls.clear()
            loss = forward(model)
            number = {}
            for norm, fed_by, x, y in calls:
                key = norm, number.setdefault(norm, 0)
                number[norm] += 1
                if key not in references:
                    conv = copy.deepcopy(fed_by).double()
                    references[key] = Reference(conv, norm.window, 3, norm.eps)
                slow, x = references[key], x.double()
                slow.conv.load_state_dict(fed_by.state_dict())
                expected = slow.forward(x, norm.weight, norm.bias)
                torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
                slow.step(x)
            model.zero_grad()
            loss.backward()
            step(model)
            descend(model, 0.1)
        return len(references)

    @pytest.mark.parametrize("kind", [RetinaHead, FCOSHead, RetinaSepBNHead])
    def test_dense_heads_on_five_levels(self, kind):
        init_default_scope("mmdet")
        separate = kind is RetinaSepBNHead
        head = kind(
            num_classes=3,
            in_channels=4,
            feat_channels=4,
            stacked_convs=2,
            norm_cfg=NORM,
            **(dict(num_ins=5) if separate else {}),
        )

        def forward(head):
            sizes = (17, 9, 5, 3, 2)
            levels = [torch.randn(2, 4, s, s) * (1 + i) + i for i, s in enumerate(sizes)]
            return sum(y.square().mean() for outputs in head(levels) for y in outputs)

        assert self.check(head, forward) == 5 * 2 * 2  # levels, convolutions, branches
        if separate:
            assert links(head)["cls_convs.3.1.bn"] == "cls_convs.0.1.conv"
        assert set(map(len, held(head).values())) == ({1} if separate else {5})

    @pytest.mark.slow
    def test_cascade_rcnn(self):
        model = cascade_rcnn()
        assert self.check(model, lambda model: total(loss_of(model))) == 3 * 2  # stages


class TestFrozen:
    def test_frozen_backbone_is_batch_norm(self):
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
        assert not any(layer.window_bytes for layer in cbn_layers(cbn).values())

    def test_partly_frozen(self, monkeypatch):
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
        changed = {
            name for name, value in cbn.state_dict().items() if (value != before[name]).any()
        }
        assert not any(name.startswith(("conv1.", "bn1.", "layer1.")) for name in changed)
        assert {"layer2.0.bn1.running_mean", "layer2.0.bn1.weight"} <= changed
        trained = [
            module.weight for module in cbn.modules() if isinstance(module, nn.Conv2d)
            and module.weight.requires_grad
        ]  # fmt: skip
        assert set(formed) == set(trained) and len(formed) == 3 * len(trained)
        for name, layer in cbn_layers(cbn).items():
            is_frozen = name.startswith(("bn1", "layer1"))
            assert (layer.window_bytes == 0) == is_frozen
            assert layer.weight.requires_grad != is_frozen

    def test_a_frozen_scale_and_shift(self):
        """The convolution trains as with those that train, of the same values."""
        torch.manual_seed(0)
        model = small()
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

    @pytest.mark.parametrize("window", WINDOWS)
    def test_frozen_and_thawed_again(self, window):
        """What was learnt of a weight that stood still is not mixed with what is compensated."""
        torch.manual_seed(0)
        model = small(window=window).double()
        conv, norm = model
        slow = reference(model, window=window)
        for index in range(9):
            conv.weight.requires_grad = index not in (3, 4, 5)
            x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
            expected = slow.forward(x, norm.weight, norm.bias)
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
            slow.step(x)
            step(model)
            assert held(model) == {"1": [index % 3 + 1]}
            assert ("h" in window_state(model)["1"][0]) == conv.weight.requires_grad
            if conv.weight.requires_grad:
                with torch.no_grad():
                    conv.weight *= 1.02


class TestNoPositions:
    @pytest.mark.parametrize("size", [1, 3])
    @pytest.mark.parametrize("training", [True, False])
    def test_mask_head_without_regions(self, size, training):
        init_default_scope("mmdet")
        torch.manual_seed(0)
        head = FCNMaskHead(
            num_convs=2, in_channels=4, conv_out_channels=4, num_classes=3, norm_cfg=NORM
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
            if size == 1 and "num_batches_tracked" in name:
                continue  # batch normalisation counts an empty batch, too
            assert torch.equal(value, before[name])
        for name, windows in window_state(head).items():
            for now, then in zip(windows, past[name], strict=True):
                assert now["seen"] == then["seen"] == (0 if size == 1 else 3)
                assert_all_equal(tensors(now).values(), tensors(then).values())
        assert head.train()(torch.randn(2, 4, 14, 14)).isfinite().all()

    @pytest.mark.parametrize("norm", [CBN(4, window_size=1), nn.BatchNorm2d(4)])
    def test_one_value_per_channel_and_no_window(self, norm):
        with pytest.raises(ValueError, match="^Expected more than 1 value per channel when train"):
            norm(torch.randn(1, 4, 1, 1))

    def test_one_value_per_channel_in_an_open_window(self):
        torch.manual_seed(0)
        model = small(3).double()
        slow = reference(model, 3)
        for size in (5, 1, 1, 1, 4):
            x = torch.randn(1, 3, size, size, dtype=torch.float64)
            expected = slow.forward(x, model[1].weight, model[1].bias)
            got = backward(model, x)
            torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-4)
            assert all(grad.isfinite().all() for grad in got)
            slow.step(x)
            step(model)
            descend(model)
        assert all(buffer.isfinite().all() for buffer in model.buffers())


class TestOtherLayers:
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
        """As nn.BatchNorm2d refuses them; of maps that no Conv2d made, see test_linking.py."""
        model = linked(feeder, CBN(4))
        set_window(model, in_force)
        with pytest.raises(ValueError, match=rf"'1' \(CBN\).*\(N, C, H, W\), got {len(size)} dim"):
            model(torch.randn(size))

    def test_linear_with_maps_behind(self):
        model = linked(nn.Linear(3, 8), nn.Unflatten(1, (2, 2, 2)), CBN(2))
        with pytest.raises(RuntimeError, match=r"'2' \(CBN\).*no module with a weight.*compensate"):
            model(torch.randn(5, 3))


@METRICS.register_module()
class KeepOutputs(BaseMetric):
    """Keeps what each evaluation returned, in a list that a test can read."""

    seen = []

    def process(self, data_batch, data_samples):
        self.seen.append(torch.stack(list(data_samples)))

    def compute_metrics(self, results):
        return {}


class TestAveragedModels:
    def run(self, folder, *hooks):
        """Two epochs with an evaluation after each."""
        torch.manual_seed(0)
        data = dict(dataset=Noise(), batch_size=1, collate_fn=dict(type="pseudo_collate"))
        run, _ = runner(
            folder,
            dict(type="CBNHook", burn_in=0),
            epochs=2,
            val_dataloader=dict(**data, sampler=dict(type="DefaultSampler", shuffle=False)),
            val_cfg=dict(),
            val_evaluator=[dict(type="KeepOutputs")],
        )
        for hook in hooks:
            run.register_hook(hook)
        KeepOutputs.seen.clear()
        run.train()
        return run.model, torch.cat(KeepOutputs.seen[-LENGTH:])

    @pytest.mark.parametrize("update_buffers", [True, False])
    @pytest.mark.filterwarnings("ignore:The prefix is not set")
    def test_ema_hook(self, tmp_path, update_buffers):
        """It evaluates as BN with the averaged weights, and the training does not notice."""
        from mmengine.hooks import EMAHook

        plain, _ = self.run(tmp_path / "plain")
        hook = EMAHook(momentum=0.3, update_buffers=update_buffers)
        model, outputs = self.run(tmp_path / "ema", hook)
        assert_same(model, plain)
        assert held(model) == {"body.1": [2 * LENGTH]}
        saved = torch.load(tmp_path / "ema" / "epoch_2.pth", weights_only=False)["state_dict"]
        assert not torch.equal(saved["body.0.weight"], model.body[0].weight)
        norm = nn.BatchNorm2d(4)
        twin = Net(norm).eval()
        twin.load_state_dict(saved, strict=True)
        images = torch.stack([Noise()[index]["inputs"] for index in range(LENGTH)])
        torch.testing.assert_close(outputs, twin(images))

    def test_swa(self):
        """torch's AveragedModel; its update_bn gathers as BN does, and training goes on."""
        torch.manual_seed(0)
        model = small()
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
            averaged.train()(batches[0])  # to train the copy is another matter


class TestResume:
    @pytest.mark.parametrize("before, after", [("BN", "CBN"), ("CBN", "BN"), ("CBN", "naive")])
    def test_load_from_a_checkpoint_of_another_norm(self, before, after, tmp_path):
        norms = dict(
            BN=nn.BatchNorm2d(4), CBN=CBN(4, window_size=3), naive=CBN(4, compensate=False)
        )
        hook, first = dict(type="CBNHook", burn_in=0), tmp_path / "first"
        run, _ = runner(first, hook, norm=norms[before], epochs=1)
        run.train()
        load_from = str(first / "epoch_1.pth")
        run, seen = runner(tmp_path / "second", hook, norm=norms[after], load_from=load_from)
        run.load_or_resume()
        saved = torch.load(load_from, weights_only=False)["state_dict"]
        assert saved.keys() == run.model.state_dict().keys()
        assert_all_equal(run.model.state_dict().values(), saved.values())
        run.model.load_state_dict(saved, strict=True)
        run.train()
        assert seen[0][1] == 0 and (run.epoch, run.iter) == (4, 4 * LENGTH)


class TestNothingStale:
    @pytest.mark.parametrize("window, size", [("moving", 4), ("sliding", 4), ("moving", "auto")])
    def test_sizes_windows_and_evaluation_in_turn(self, window, size):
        """Another image size in each iteration; the window opens, closes and opens again."""
        torch.manual_seed(0)
        model = small(size, window=window, momentum=0.2, derivative_stride=1).double()
        conv, norm = model
        slow = Reference(conv, window, size, norm.eps, momentum=0.2)
        schedule = [1] * 2 + [None] * 6 + [1] * 2 + [None] * 3
        if size == 4:
            schedule += [2] * 3 + [None] * 5
        for index, in_force in enumerate(schedule):
            set_window(model, in_force)
            if in_force != schedule[index - 1]:
                slow.window_size = size if in_force is None else in_force
                slow.forget()
            maps = 6 + 5 * index % 7, 4 + 3 * index % 11
            x = torch.randn(1 + index % 3, 3, *maps, dtype=torch.float64) + index % 2
            expected = slow.forward(x, norm.weight, norm.bias)
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
            slow.step(x)
            if in_force == 1:
                slow.forget()
            step(model)
            for ours, theirs in zip(
                (norm.running_mean, norm.running_var), slow.running, strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            if index % 3 == 0:
                model.eval()(torch.randn(1, 3, 7, 30, dtype=torch.float64))
                model.train()
            with torch.no_grad():
                conv.weight += 0.03 * torch.randn_like(conv.weight)
        assert held(model) == {"1": [5 if size == 4 else 3]}


def predicted_bytes(conv, norm):
    """The formula of docs/trust.md."""
    channels, weights = conv.out_channels, conv.weight.numel()
    patches = weights // channels * conv.groups  # of one channel, for each group
    kept = 3 * channels
    if norm.compensate:
        kept += weights + patches
    iterations = norm.window_size - 1 if norm.window == "sliding" else 1
    averages = 2 * channels if norm.compensate and norm.backward in ("full", "mixed") else 0
    return 4 * (iterations * kept + channels + averages)


class TestLongRuns:
    @pytest.mark.parametrize(
        "kwargs",
        [
            dict(),
            dict(window="sliding"),
            dict(backward="current"),
            dict(window="sliding", backward="own"),
            dict(compensate=False),
            dict(window="sliding", compensate=False),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("groups, kernel", [(1, 3), (4, 3), (2, (1, 5))])
    def test_memory_of_a_window(self, groups, kernel, kwargs):
        model = linked(
            nn.Conv2d(4, 8, kernel, groups=groups), CBN(8, window_size=5, **kwargs)
        ).bfloat16()
        for _ in range(6):
            backward(model, torch.randn(1, 4, 9, 9).bfloat16())
            step(model)
        assert model[1].window_bytes == predicted_bytes(*model)
        if model[1].window == "moving":
            assert model[1].window_bytes < 4 * (1.1 * model[0].weight.numel() + 60 * 8)

    @pytest.mark.slow
    def test_2000_steps_hold_no_more_than_200(self):
        torch.manual_seed(0)
        sliding = CBN(8, window="sliding", window_size=4, backward="own")
        model = linked(nn.Conv2d(3, 8, 3), sliding, nn.ReLU(), nn.Conv2d(8, 8, 3), CBN(8))
        sizes = [(9, 9), (12, 9), (16, 16)]
        alive, memory = {}, {}
        for index in range(2001):
            backward(model, torch.randn(2, 3, *sizes[index % 3]))
            step(model)
            descend(model)
            if index % 50 == 0:
                model.eval()(torch.randn(1, 3, 10, 10))
                model.train()
            if index in (200, 2000):
                gc.collect()
                alive[index] = sum(
                    issubclass(type(each), torch.Tensor) for each in gc.get_objects()
                )
                memory[index] = resident_bytes()
        assert alive[2000] == alive[200]
        assert memory[2000] - memory[200] < 2 * 1024**2  # a window entry alone is 3 kB a step
        for conv, norm in ((model[0], model[1]), (model[3], model[4])):
            assert norm.window_bytes == predicted_bytes(conv, norm)


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


WORLD = 2


def shard(rank, folder, norm):
    """Trains with weights that are spread over the processes, on the data of :func:`steps_of`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    model = blocks(**norm)
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    outputs, diagnosis = steps_of(model)
    torch.save((outputs, diagnosis), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def blocks(**norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), CBN(8, window_size=4, **norm), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), CBN(8, window_size=4, **norm), nn.ReLU()),
    )


def steps_of(model):
    """The outputs of some steps, the same data for each process, and the number of diagnoses."""
    link(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for _ in range(6):
        y = model(torch.randn(2, 3, 9, 9, generator=generator))
        (y * torch.randn(y.shape, generator=generator)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step(model)
        outputs.append(y.detach())
    return outputs, len(diagnose(model))


def test_a_scale_that_is_away_in_the_backward():
    """As FSDP takes a parameter away once the forward of its block is over."""
    torch.manual_seed(0)
    model = small()
    other = copy.deepcopy(model)
    link(other)
    for _ in range(3):
        x, results = torch.randn(2, 3, 9, 9), []
        for each in (model, other):
            y = each(x)
            scale = each[1].weight.detach().clone()
            if each is other:
                each[1].weight.data.fill_(math.nan)
            each.zero_grad()
            (y * torch.linspace(-1, 1, 9)).sum().backward()
            each[1].weight.data.copy_(scale)
            results.append([parameter.grad for parameter in each.parameters()])
            step(each)
        assert_all_equal(*results)
    assert_same(model, other)


@pytest.mark.slow
@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version("2.11"),
    reason="before torch 2.11 fully_shard may add gradients up over gloo where it should average",
)
@pytest.mark.parametrize("norm", [dict(), dict(window="sliding", backward="window")], ids=str)
def test_weights_that_are_spread_over_processes(norm, tmp_path):
    """As if they were not; diagnose leaves their layers out, for it finds parts of them."""
    mp.spawn(shard, (str(tmp_path), norm), nprocs=WORLD)
    expected, diagnosed = steps_of(blocks(**norm))
    assert diagnosed == 2
    for rank in range(WORLD):
        outputs, diagnosed = torch.load(tmp_path / f"{rank}.pth")
        torch.testing.assert_close(outputs, expected)
        assert diagnosed == 0


class TestOtherLoops:
    """docs/pytorch.md has the plain loop (tests/test_docs.py); mmengine's are in test_hooks."""

    @pytest.mark.filterwarnings("ignore:CBN. the weights changed since the last forward")
    def test_a_closure_that_is_evaluated_again(self):
        """LBFGS: many forwards in a step of the optimiser, the last of which counts."""
        torch.manual_seed(0)
        model = linked(nn.Conv2d(3, 4, 3, bias=False), CBN(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
        slow = Reference(copy.deepcopy(model[0]))
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
        for iteration in range(1, 4):
            x, weights = torch.randn(2, 3, 8, 8), []

            def closure(x=x, weights=weights):
                optimizer.zero_grad()
                weights.append(model[0].weight.detach().clone())
                loss = (model(x) - 1).square().mean()
                loss.backward()
                return loss

            before = closure().item()
            assert closure().item() == before  # the same weights, the same loss
            optimizer.step(closure)
            assert len(weights) > 4
            step(model)
            assert held(model) == {"1": [iteration]}
            assert model[1].num_batches_tracked == iteration
            slow.conv.load_state_dict({"weight": weights[-1]})
            slow.step(x)
            (state,) = window_state(model)["1"]
            for name, value in (("recorded", slow.past[0].mean), ("h", slow.past[0].var_in_w)):
                value = value.flatten(1) if value.dim() > 1 else value
                torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)

    def test_two_optimisers_in_turn(self):
        """A generator and a critic: each has its own step, and the other's window stays."""
        torch.manual_seed(0)
        generator = linked(nn.Conv2d(3, 3, 3), CBN(3, window_size=3))
        critic = linked(nn.Conv2d(3, 4, 3), CBN(4, window_size=3))
        slow = {
            model: Reference(copy.deepcopy(model[0]).double(), "moving", 3, model[1].eps)
            for model in (generator, critic)
        }
        for index in range(6):
            z = torch.randn(2, 3, 10, 10)
            fake = generator(z)
            score = critic(fake)
            for model, x, y in ((generator, z, fake), (critic, fake.detach(), score)):
                reference = slow[model]
                reference.conv.load_state_dict(model[0].state_dict())
                expected = reference.forward(x.double(), model[1].weight, model[1].bias)
                torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
            trained, x = ((generator, z), (critic, fake.detach().double()))[index % 2]
            (score.square().mean()).backward()
            slow[trained].step(x.double())
            step(trained)
            descend(trained)
