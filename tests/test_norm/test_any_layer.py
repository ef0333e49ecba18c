"""CBN behind any layer with a weight: derivatives, statistics, gradients, and what is refused."""

import copy
import gc
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from layers import HALF, KINDS, as_on_a_gpu, assert_same, backward, chain, held, train_once
from mmcv.cnn import ConvAWS2d, ConvWS2d
from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    SAConv2d,
    deform_conv2d,
)
from mmcv.ops.modulated_deform_conv import modulated_deform_conv2d
from mmdet.models.backbones.trident_resnet import TridentConv
from mmengine.logging import MessageHub
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from zoo import loss_of, stock_model, total

import cbn_mmdet.norm.cbn
from cbn_mmdet import CBN, diagnose, link, links, load_window_state, set_window, step, window_state
from cbn_mmdet.norm.reference import Reference

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


class Gated(nn.Conv2d):
    """A convolution whose weight is multiplied by a gate that trains."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.gate, self.bias)


class Scaled(nn.Conv2d):
    """Scales and shifts the convolution's output."""

    def forward(self, x):
        return 2 * super().forward(x) + 1


class WithoutItsBias(nn.Conv2d):
    """Has a bias that it does not use, as the convolutions of DetectoRS do."""

    def forward(self, x):
        return 2 * F.conv2d(x, self.weight)


class Functional(nn.Module):
    """Calls ``F.conv2d`` itself, with parameters under names of its own."""

    def __init__(self):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return F.conv2d(x, self.kernel, self.shift, padding=1)


class OfComputedBias(Functional):
    """Its bias is computed, no parameter, so compensation does not follow it."""

    def forward(self, x):
        return F.conv2d(x, self.kernel, self.shift.exp(), padding=1)


class Offsets(nn.Module):
    """A deformable convolution that is handed its offsets, as in heads of detectors."""

    def __init__(self):
        super().__init__()
        self.offset, self.conv = nn.Conv2d(4, 18, 3, padding=1), DeformConv2d(4, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(x, self.offset(x))


class Modulated(nn.Module):
    """A modulated deformable convolution, which is handed its mask as well."""

    def __init__(self):
        super().__init__()
        self.offset, self.mask = nn.Conv2d(4, 18, 3, padding=1), nn.Conv2d(4, 9, 3, padding=1)
        self.conv = ModulatedDeformConv2d(4, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(x, self.offset(x), self.mask(x).sigmoid())


class Pixels(nn.Linear):
    """A linear layer over channels, as transformers have it."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Case(NamedTuple):
    """A layer with 4 channels in and 6 out, as a function of the weight that it uses.

    Attributes:
        build: Makes the layer.
        weight: The weight that the layer used, from its parameters, output channels first.
        output: The layer's output for an input, with another weight in place of that one.
        bias: The bias that is added to the output, unless it is part of the weight.
    """

    build: Callable[[], nn.Module]
    weight: Callable[[nn.Module], torch.Tensor]
    output: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    bias: Callable[[nn.Module], torch.Tensor | None] = lambda layer: layer.bias


def convolve(layer, x, weight):
    weight = weight.view(len(weight), -1, *layer.kernel_size)
    return F.conv2d(
        x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def without_bias(layer):
    return None


def at_rest(layer):
    """A parametrized weight, read in evaluation: in training a spectral norm's moves on."""
    layer.eval()
    weight = layer.weight
    layer.train()
    return weight


def of_old_spectral_norm(layer):
    (hook,) = layer._forward_pre_hooks.values()
    return hook.compute_weight(layer, do_power_iteration=False)


def standardised(layer):
    weight = layer.weight
    mean, std = (f(weight.flatten(1), 1)[:, None, None, None] for f in (torch.mean, torch.std))
    return (weight - mean) / (std + layer.eps)


def aws(groups=1):
    layer = ConvAWS2d(4, 6, 3, groups=groups)
    layer.weight_gamma.uniform_(0.5, 2)
    layer.weight_beta.normal_()
    return layer


def with_bias(weight, bias):
    """The bias as one more weight of each channel."""
    return torch.cat([weight.flatten(1), bias[:, None]], 1)


def channels_first(layer):
    """The weight of a transposed convolution, ``(C_in, C_out / groups, ...)``, by output channels.

    Written out for each channel.
    """
    weight, groups = at_rest(layer), layer.groups
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    rows = [
        weight[group * inputs : (group + 1) * inputs, channel].flatten()
        for group in range(groups)
        for channel in range(outputs)
    ]
    return with_bias(torch.stack(rows), layer.bias)


def convolve_transposed(layer, x, rows):
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    weight, bias = rows[:, :-1].view(-1, inputs, *layer.kernel_size), rows[:, -1]
    each = [
        F.conv_transpose2d(
            x[:, channel // outputs * inputs :][:, :inputs],
            weight[channel][:, None],
            bias[channel : channel + 1],
            layer.stride,
            layer.padding,
            layer.output_padding,
        )
        for channel in range(layer.out_channels)
    ]
    return torch.cat(each, 1)


def deformable(kind, **kwargs):
    layer = kind(4, 6, 3, padding=1, deform_groups=2, **kwargs)
    nn.init.normal_(layer.conv_offset.weight, std=0.1)
    return layer


def modulated(layer, x, rows):
    first, second, mask = layer.conv_offset(x).chunk(3, 1)
    weight, bias = rows[:, :-1].reshape(6, -1, 3, 3), rows[:, -1].contiguous()
    offset, mask = torch.cat((first, second), 1), mask.sigmoid()
    return modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1, 1, layer.groups, 2)


CASES = {
    "weight norm": Case(
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, 2, 1, groups=2)), at_rest, convolve
    ),
    "old weight norm": Case(
        lambda: nn.utils.weight_norm(nn.Conv2d(4, 6, 3)),
        lambda layer: torch._weight_norm(layer.weight_v, layer.weight_g),
        convolve,
    ),
    "spectral norm": Case(
        lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3, dilation=2)), at_rest, convolve
    ),
    "old spectral norm": Case(
        lambda: nn.utils.spectral_norm(nn.Conv2d(4, 6, (1, 3))), of_old_spectral_norm, convolve
    ),
    "ConvWS2d": Case(lambda: ConvWS2d(4, 6, 3, groups=2), standardised, convolve),
    "ConvAWS2d": Case(aws, lambda layer: layer._get_weight(layer.weight), convolve),
    "gated": Case(
        lambda: Gated(4, 6, 3, padding=1), lambda layer: layer.weight * layer.gate, convolve
    ),
    "a function": Case(
        Functional,
        lambda layer: layer.kernel,
        lambda layer, x, rows: F.conv2d(x, rows.view(6, 4, 3, 3), layer.shift, padding=1),
        lambda layer: layer.shift,
    ),
    "a bias that is computed": Case(
        OfComputedBias,
        lambda layer: layer.kernel,
        lambda layer, x, rows: F.conv2d(x, rows.reshape(6, 4, 3, 3), layer.shift.exp(), padding=1),
        without_bias,
    ),
    "something behind": Case(
        lambda: Scaled(4, 6, 3),
        lambda layer: with_bias(layer.weight, layer.bias),
        lambda layer, x, rows: (
            2 * F.conv2d(x, rows[:, :-1].reshape(6, 4, 3, 3), rows[:, -1].contiguous()) + 1
        ),
        without_bias,
    ),
    "an unused bias": Case(
        lambda: WithoutItsBias(4, 6, 3),
        lambda layer: with_bias(layer.weight, layer.bias),
        lambda layer, x, rows: 2 * F.conv2d(x, rows[:, :-1].reshape(6, 4, 3, 3)),
        without_bias,
    ),
    "transposed": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1),
        channels_first,
        convolve_transposed,
        without_bias,
    ),
    "transposed in groups": Case(
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2),
        channels_first,
        convolve_transposed,
        without_bias,
    ),
    "transposed, spectral norm": Case(
        lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3, groups=2)),
        channels_first,
        convolve_transposed,
        without_bias,
    ),
    "DCN": Case(
        lambda: deformable(DeformConv2dPack, groups=2),
        lambda layer: layer.weight,
        lambda layer, x, rows: deform_conv2d(
            x, layer.conv_offset(x), rows.reshape(6, 2, 3, 3), 1, 1, 1, 2, 2
        ),
        without_bias,
    ),
    "DCNv2": Case(
        lambda: deformable(ModulatedDeformConv2dPack),
        lambda layer: with_bias(layer.weight, layer.bias),
        modulated,
        without_bias,
    ),
    "DeformConv2d": Case(
        Offsets,
        lambda layer: layer.conv.weight,
        lambda layer, x, rows: deform_conv2d(
            x, layer.offset(x), rows.reshape(6, 4, 3, 3), 1, 1, 1, 1, 1
        ),
        without_bias,
    ),
    "ModulatedDeformConv2d": Case(
        Modulated,
        lambda layer: with_bias(layer.conv.weight, layer.conv.bias),
        lambda layer, x, rows: modulated_deform_conv2d(
            x,
            layer.offset(x),
            layer.mask(x).sigmoid(),
            rows[:, :-1].reshape(6, 4, 3, 3),
            rows[:, -1].contiguous(),
            *(1, 1, 1, 1, 1),
        ),
        without_bias,
    ),
    "Linear": Case(
        lambda: Pixels(4, 6),
        lambda layer: with_bias(layer.weight, layer.bias),
        lambda layer, x, rows: (
            torch.einsum("nchw,dc->ndhw", x, rows[:, :-1]) + rows[:, -1, None, None]
        ),
        without_bias,
    ),
    "GroupNorm": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)),
        lambda layer: with_bias(layer[1].weight[:, None], layer[1].bias),
        lambda layer, x, rows: F.group_norm(
            layer[0](x), 2, *(each.contiguous() for each in rows.T)
        ),
        without_bias,
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Seen(nn.Module):
    """A layer as a function of the weight that it uses: a convolution for :class:`Reference`."""

    def __init__(self, case, layer):
        super().__init__()
        self.__dict__.update(case=case, layer=layer)  # unregistered: their parameters stay out
        self.weight = nn.Parameter(self.rows().detach()[:, :, None, None].clone())
        self.out_channels = len(self.weight)
        bias = case.bias(layer)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def rows(self):
        return self.case.weight(self.layer).flatten(1)

    @torch.no_grad()
    def sync(self):
        """Takes the weight over that the layer used last."""
        self.weight.copy_(self.rows()[:, :, None, None])
        if self.bias is not None:
            self.bias.copy_(self.case.bias(self.layer))

    def forward(self, x):
        y = self.case.output(self.layer, x, self.weight.flatten(1))
        bias = self.case.bias(self.layer)
        # The layer's own bias, of equal value, is no parameter of this module.
        return y if bias is None else y + (self.bias - bias.detach())[:, None, None]


def model_of(layer, dtype=torch.float64, size=3, **kwargs):
    """A layer with CBN, linked."""
    norm = CBN(6, window_size=size, derivative_stride=1, **kwargs)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(layer, norm).to(dtype)
    link(model)
    return model


def images(dtype=torch.float64):
    """Random images; no two batches have the same scale and shift."""
    return torch.randn(2, 4, 9, 7, dtype=dtype) * (0.5 + torch.rand(1)) + torch.randn(1)


@torch.no_grad()
def move(model, by=0.03):
    """A step of an optimiser."""
    for parameter in model.parameters():
        parameter += (
            by * (parameter.norm() / parameter.numel() ** 0.5 + 0.1) * torch.randn_like(parameter)
        )


def gradients(y, target, parameters):
    return torch.autograd.grad((y * target).sum(), parameters, materialize_grads=True)


def grad_of(parameter):
    """Its gradient, or zeros."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class TestDerivative:
    @each_case
    def test_by_finite_differences(self, case, monkeypatch):
        """Derivatives of each channel's mean and variance in the weights of that channel."""
        found, derive = [], cbn_mmdet.norm.cbn.batch_derivative

        def spy(*args):
            found.append(derive(*args))
            return found[-1]

        monkeypatch.setattr(cbn_mmdet.norm.cbn, "batch_derivative", spy)
        torch.manual_seed(0)
        layer, x = case.build(), images()
        model = model_of(layer)
        model(x)
        (derivative,) = found
        rows = case.weight(layer).detach().flatten(1)

        def statistics(rows):
            y = case.output(layer, x, rows)
            return y.mean((0, 2, 3)).detach(), y.var((0, 2, 3), correction=0).detach()

        # Exact to rounding: the mean is linear in a weight, the variance quadratic.
        distance, columns = 1e-3, []
        for place in range(rows.shape[1]):
            ends = []
            for sign in (1, -1):
                moved = rows.clone()
                moved[:, place] += sign * distance
                ends.append(statistics(moved))
            columns.append([(a - b) / (2 * distance) for a, b in zip(*ends, strict=True)])
        expected_m, expected_h = (torch.stack(each, 1) for each in zip(*columns, strict=True))
        m = derivative.mean.repeat_interleave(6 // len(derivative.mean), 0)
        torch.testing.assert_close(m, expected_m, rtol=0, atol=1e-9)
        torch.testing.assert_close(derivative.var, expected_h, rtol=0, atol=1e-8)
        torch.testing.assert_close(derivative.mean_at, (expected_m * rows).sum(1))
        torch.testing.assert_close(2 * derivative.half_var_at, (expected_h * rows).sum(1))

    @pytest.mark.parametrize("dtype", HALF)
    def test_of_many_positions_in_half_precision(self, dtype, monkeypatch):
        """1e5 positions of values of 1e3: a plain sum would leave fp16's range."""
        found, derive = [], cbn_mmdet.norm.cbn.batch_derivative
        monkeypatch.setattr(
            cbn_mmdet.norm.cbn,
            "batch_derivative",
            lambda *args: found.append(derive(*args)) or found[-1],
        )
        torch.manual_seed(0)
        layer = nn.GroupNorm(1, 6)
        nn.init.constant_(layer.weight, 1e3)
        x = torch.randn(2, 6, 224, 224)
        for each in (torch.float64, dtype):
            model_of(layer.to(each), each)(x.to(each))
        exact, rounded = found
        torch.testing.assert_close(rounded.mean.double(), exact.mean, rtol=0, atol=0.02)
        torch.testing.assert_close(rounded.var.double(), exact.var, rtol=0.02, atol=5)


@KINDS
class TestStatistics:
    """Against the plain reference, whose convolution is the layer with the weight that it used."""

    def check(self, case, kind, backward, steps=6):
        torch.manual_seed(0)
        layer = case.build()
        model = model_of(layer, window=kind, backward=backward)
        norm, seen = model[1], Seen(case, layer)
        slow = Reference(seen, kind, 3, norm.eps, backward=backward)
        own = [p for p in layer.parameters() if p is not case.bias(layer)]
        for _ in range(steps):
            x = images()
            model.zero_grad(), seen.zero_grad()
            ours, theirs = (x.clone().requires_grad_() for _ in "ab")
            y = model(ours)
            seen.sync()
            affine = [p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias)]
            expected = slow.forward(theirs, *affine)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            target = torch.randn_like(y)
            (y * target).sum().backward()
            (expected * target).sum().backward(inputs=[theirs, *affine, *seen.parameters()])
            # The chain rule, from the weight that was used to the layer's parameters.
            of_own = torch.autograd.grad(
                seen.rows(), own, seen.weight.grad.flatten(1), allow_unused=True
            )
            assert any(grad is not None for grad in of_own)
            pairs = [
                (grad_of(p), grad) for p, grad in zip(own, of_own, strict=True) if grad is not None
            ]
            pairs += [(ours.grad, theirs.grad), (norm.weight.grad, affine[0].grad)]
            pairs += [(norm.bias.grad, affine[1].grad)]
            if seen.bias is not None:
                pairs.append((case.bias(layer).grad, seen.bias.grad))
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            slow.step(x)
            step(model)
            torch.testing.assert_close(norm.running_mean, slow.running.mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(norm.running_var, slow.running.var, rtol=1e-5, atol=1e-5)
            move(model)
        assert held(model) == {"1": [steps]}

    @each_case
    def test_of_every_layer(self, case, kind):
        self.check(case, kind, "mixed")

    @pytest.mark.parametrize("name", ["old weight norm", "transposed", "DCN"])
    def test_the_ways_of_a_gpu(self, name, kind):
        with as_on_a_gpu():
            self.check(CASES[name], kind, "mixed")

    @pytest.mark.parametrize("backward", ["window", "current"])
    @pytest.mark.parametrize("name", ["weight norm", "a function", "transposed in groups", "DCNv2"])
    def test_with_every_gradient(self, name, backward, kind):
        self.check(CASES[name], kind, backward)

    @pytest.mark.filterwarnings("ignore:CBN. the weights changed since the last forward")
    @each_case
    def test_the_gradient_is_the_losss_derivative(self, case, kind):
        """Finite differences of the whole loss: the past, too, is a function of the weight."""
        if case in (CASES[name] for name in CASES if "spectral" in name):
            pytest.skip("its weight moves on with each forward; the reference has it above")
        torch.manual_seed(0)
        layer = case.build()
        model = model_of(layer, window=kind, backward="window")
        for _ in range(4):
            model(images())
            step(model)
            move(layer)
        x, target = images(), torch.randn(2, 6, *case.build().double()(images()).shape[2:]).double()
        parameters = list(model.parameters())
        found = gradients(model(x), target, parameters)
        for parameter, grad in zip(parameters, found, strict=True):
            direction, ends = torch.randn_like(parameter), []
            for distance in (1e-7, -1e-7):  # so small that no offset crosses a pixel
                with torch.no_grad():
                    parameter += distance * direction
                ends.append((model(x) * target).sum().item())
                with torch.no_grad():
                    parameter -= distance * direction
            expected = (ends[0] - ends[1]) / 2e-7
            assert (grad * direction).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def test_of_lists(self, kind):
        """TridentNet's convolution returns a list: one weight, three dilations, three windows."""
        torch.manual_seed(0)
        conv = TridentConv(4, 6, 3)
        nn.init.kaiming_normal_(conv.weight)

        class Trident(nn.Sequential):
            def forward(self, xs):
                return [self[1](y) for y in self[0](xs)]

        norm = CBN(6, window=kind, window_size=3, derivative_stride=1)
        model = Trident(conv, norm).double()
        link(model)
        branches = [
            nn.Conv2d(4, 6, 3, padding=d, dilation=d, bias=False).double() for d in (1, 2, 3)
        ]
        slow = [Reference(branch, kind, 3, norm.eps) for branch in branches]
        for _ in range(5):
            xs = [images() for _ in range(3)]
            for reference, x, y in zip(slow, xs, model(xs), strict=True):
                reference.conv.load_state_dict({"weight": conv.weight})
                expected = reference.forward(x, norm.weight, norm.bias)
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
                reference.step(x)
            step(model)
            move(conv)
        assert held(model) == {"1": [5, 5, 5]} and links(model) == {"1": "0"}
        assert [each["conv"] for each in window_state(model)["1"]] == ["0"] * 3

    def test_a_resumed_training(self, kind):
        for case in (CASES["weight norm"], CASES["a function"], CASES["transposed"]):
            torch.manual_seed(0)
            model = model_of(case.build(), window=kind)
            for _ in range(4):
                train_once(model, images())
                move(model)
            other = copy.deepcopy(model)
            link(other)
            load_window_state(other, window_state(model))
            for each in (model, other):
                torch.manual_seed(1)
                train_once(each, images())
            assert_same(model, other)

    def test_a_weight_that_is_frozen(self, kind):
        """A frozen weight is a constant behind any layer: the window has no derivative."""
        for case in (CASES["weight norm"], CASES["transposed"], CASES["DCN"]):
            model = model_of(case.build().requires_grad_(False), window=kind)
            for _ in range(3):
                train_once(model, images())
            (state,) = window_state(model)["1"]
            assert state["seen"] == 3 and "h" not in state

    def test_in_half_precision(self, kind):
        """Convolution and activations in bfloat16, statistics and window in float32."""
        for name, case in CASES.items():
            # mmcv's operator has no bfloat16 here
            if name.startswith("DCN") or "Deform" in name:
                continue
            torch.manual_seed(0)
            full, half = (model_of(case.build(), torch.float32, window=kind) for _ in "ab")
            half.load_state_dict(full.state_dict())
            for _ in range(4):
                x = images(torch.float32)
                expected = full(x)
                with torch.autocast("cpu", torch.bfloat16):
                    y = half(x)
                target, results = torch.randn_like(expected), []
                for each, output in ((full, expected), (half, y)):
                    each.zero_grad()
                    (output.float() * target).sum().backward()
                    results.append([output.float(), *(p.grad for p in each[1].parameters())])
                    assert all(grad_of(p).isfinite().all() for p in each.parameters())
                for one, other in zip(*results, strict=True):
                    assert (one - other).norm() < 0.03 * one.norm(), name
                step(full), step(half)
                move(full)
                with torch.no_grad():
                    for ours, theirs in zip(half.parameters(), full.parameters(), strict=True):
                        ours.copy_(theirs)
            (state,) = window_state(half)["1"]
            assert state["h"].dtype == state["m"].dtype == torch.float32


class TestFound:
    """CBN looks up what feeds it in every forward."""

    @pytest.mark.parametrize("half", [None, torch.bfloat16])
    def test_a_bias_behind_a_mask(self, half):
        """Pruning computes it in each forward; windows follow it like a parameter."""
        found = []
        for is_pruned in (True, False):
            torch.manual_seed(0)
            conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
            model = chain(conv, CBN(4, window_size=4))
            if is_pruned:
                prune.identity(conv, "bias")
            bias = conv.bias_orig if is_pruned else conv.bias
            for _ in range(4):
                output, *_ = backward(model, torch.randn(2, 3, 8, 8), half=half)
                found.append((output, bias.grad))
                step(model)
                bias.data += torch.randn(4)
        for ours, theirs in zip(found[:4], found[4:], strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_a_bias_that_is_computed_is_told_of(self):
        conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        parametrize.register_parametrization(conv, "bias", nn.Tanh())
        model = chain(conv, CBN(4, window_size=4))
        with pytest.warns(UserWarning, match="bias of Param.* is computed in its.*bias=False"):
            backward(model, torch.randn(2, 3, 8, 8))

    def test_links(self):
        for name, case in CASES.items():
            model = model_of(case.build())
            train_once(model, images())
            inner = dict.fromkeys(["a function", "a bias that is computed"], "(a function)")
            inner.update({"GroupNorm": "0.1", "DeformConv2d": "0.conv"})
            inner["ModulatedDeformConv2d"] = "0.conv"
            assert links(model) == {"1": inner.get(name, "0")}

    def test_of_a_norm_that_is_linked_alone(self):
        """The convolution is outside the linked model; CBN finds it in the autograd graph."""
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Conv2d(4, 6, 3), CBN(6, window_size=3)).double()
        parts = copy.deepcopy(whole)
        link(whole), link(parts[1])
        for _ in range(4):
            x = images()
            torch.testing.assert_close(parts(x), whole(x))
            step(whole), step(parts[1])
            with torch.no_grad():
                for model in (whole, parts):
                    model[0].weight *= 1.02
        assert links(parts[1]) == {"": "(a function)"}

    @pytest.mark.parametrize("in_place", [True, False])
    @pytest.mark.parametrize("first", ["hook", "link"])
    def test_a_hook_that_changes_a_plain_convolutions_output(self, first, in_place):
        """The hook hands the norm a tensor that no module returned."""
        model = nn.Sequential(nn.Conv2d(4, 6, 3), CBN(6, window_size=3)).double()

        def change(module, args, y):
            return y.mul_(2).add_(1) if in_place else 2 * y + 1

        if first == "link":
            link(model)
        model[0].register_forward_hook(change)
        if first == "hook":
            link(model)
        with pytest.raises(RuntimeError, match="'1'.*that no module with a weight.*as it is"):
            model(images())

    def test_a_forward_that_is_replaced(self):
        """``forward`` is replaced on the instance, after the link and some iterations."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3), CBN(6, window_size=3)).double()
        twin = nn.Sequential(Scaled(4, 6, 3), CBN(6, window_size=3)).double()
        twin.load_state_dict(model.state_dict())
        link(model), link(twin)
        plain = model[0].forward
        for number in range(4):
            x = images()
            if number == 2:
                model[0].forward = lambda x: 2 * plain(x) + 1
                set_window(model, 1), set_window(model, None)  # drops the other function's past
                set_window(twin, 1), set_window(twin, None)
            if number >= 2:
                torch.testing.assert_close(model(x), twin(x))
            train_once(model, x), train_once(twin, x)

    def test_a_pruned_convolution(self):
        """torch's pruning masks the weight in a hook before the forward."""
        torch.manual_seed(0)
        conv = prune.random_unstructured(nn.Conv2d(4, 6, 3), "weight", 0.5)
        case = Case(None, lambda layer: layer.weight_orig * layer.weight_mask, convolve)
        model, seen = model_of(conv), Seen(case, conv)
        slow = Reference(seen, "moving", 3, model[1].eps)
        for _ in range(5):
            x = images()
            y = model(x)
            seen.sync()
            expected = slow.forward(x, model[1].weight, model[1].bias)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            slow.step(x)
            step(model)
            move(conv)

    def test_diagnose_leaves_out_what_only_a_forward_tells(self):
        model = model_of(CASES["weight norm"].build())
        train_once(model, images()), train_once(model, images())
        assert diagnose(model) == {}

    def test_nothing_is_kept_of_the_graph(self):
        """The window keeps the graph neither of the used weight nor of the layer's input."""
        model = model_of(CASES["weight norm"].build())
        y = model(images())
        y.sum().backward()
        step(model)
        state = window_state(model)["1"][0]
        assert not any(
            value.requires_grad for value in state.values() if isinstance(value, torch.Tensor)
        )
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()

    def test_a_batch_with_nan_is_dropped_behind_any_layer(self):
        """Also where CBN takes the derivative from autograd."""
        model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), CBN(4, window_size=4))
        link(model)
        for number in range(5):
            x = torch.randn(1, 3, 8, 8)
            if number in (1, 2):
                x[0, 0, 0, 0] = math.nan
            model(x).sum().backward()
            if number in (1, 2):
                with pytest.warns(UserWarning, match="NaN or infinite"):
                    step(model)
            else:
                step(model)
        assert held(model) == {"1": [3]}


class TestRefused:
    """By name, in the first forward, burn-in or not."""

    def refuse(self, layer, message, run=lambda model, x: model(x), channels=6):
        model = nn.Sequential(layer, CBN(channels, window_size=3))
        link(model)
        x = images(torch.float32)
        for in_force in (3, 1):
            set_window(model, in_force)
            with pytest.raises(RuntimeError, match=message) as refusal:
                run(model, x)
            assert "compensate='where_possible'" in str(refusal.value)
            del refusal
            gc.collect()  # torch's checkpoint holds on to what it saves with until then
        model[1].compensate = "where_possible"
        for in_force in (1, 3):
            set_window(model, in_force)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(model, x)
            step(model)

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("name", ["weight norm", "DCN", "transposed"])
    def test_under_activation_checkpointing(self, name, reentrant):
        self.refuse(
            CASES[name].build(),
            r"'1' \(CBN\).* is fed by '0' .*no plain nn.Conv2d.*checkpointing.*with_cp off",
            lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant),
        )

    @torch.no_grad()
    def test_without_gradients(self):
        self.refuse(CASES["weight norm"].build(), r"'1'.* runs without gradients")

    def test_a_weight_that_does_not_train(self):
        layer = nn.GroupNorm(2, 4)
        layer.weight.requires_grad_(False)
        self.refuse(layer, r"'0' \(GroupNorm\), which has no weight of its own that tr", channels=4)

    def test_a_weight_of_other_rows(self):
        layer = nn.Sequential(nn.Conv2d(4, 6, 3), nn.PReLU())
        self.refuse(layer, r"'0.1' \(PReLU\), whose weight has not one row for each of its 6")

    def test_rows_that_are_no_channels(self):
        """A linear layer over the maps' width, with as many rows as there are channels."""
        self.refuse(nn.Linear(7, 4), r"'0' \(Linear\), whose weight has not one row", channels=4)

    def test_channels_that_mix(self):
        """As behind squeeze-and-excitation: each channel depends on the rows of all channels."""

        class Mixed(nn.Conv2d):
            def forward(self, x):
                y = super().forward(x)
                return y + y.mean((1, 2, 3), keepdim=True)

        self.refuse(
            Mixed(4, 6, 3), r"'0' \(Mixed\), whose weight has not one row for each of its 6"
        )

    def test_a_bias_of_another_shape_is_a_constant(self):
        """A bias with one number per position, say, is no column of the weight's rows."""

        class Shifted(nn.Conv2d):
            def __init__(self):
                super().__init__(4, 6, 3, bias=False)
                self.bias = nn.Parameter(torch.randn(7, 5))

            def forward(self, x):
                return F.conv2d(x, self.weight).tanh() + self.bias

        model = chain(Shifted(), CBN(6, window_size=3))
        for _ in range(3):
            model(images(torch.float32)).square().sum().backward()
            step(model)
        assert window_state(model)["1"][0]["h"].shape == (6, 36)

    @pytest.mark.parametrize("backward", ["mixed", "window"])
    def test_what_becomes_another_kind_of_layer_is_followed(self, backward):
        """From then on autograd gives its derivative, and each channel has an ``m`` of its own."""

        class Layer(nn.Conv2d):
            is_plain = True

            def forward(self, x):
                y = super().forward(x)
                return y if self.is_plain else y * torch.ones_like(y)

        torch.manual_seed(0)
        model, twin = (
            chain(Layer(4, 6, 3, bias=False), CBN(6, backward=backward)).double() for _ in "ab"
        )
        twin.load_state_dict(model.state_dict())
        twin[0].is_plain = False
        for number in range(6):
            model[0].is_plain = number < 3
            x, outputs = images(), []
            for each in (model, twin):
                each.zero_grad()
                y = each(x)
                y.pow(3).sum().backward()
                outputs.append([y, *(p.grad for p in each.parameters())])
                step(each)
            for ours, theirs in zip(*outputs, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            move_alike(model, twin)

    def test_channels_that_mix_from_some_iteration_on(self):
        """What a module does is checked again, after 1, 2, 4, 8... iterations."""

        class Mixed(nn.Conv2d):
            mixes = False

            def forward(self, x):
                y = super().forward(x).tanh()
                return y + y.mean((1, 2, 3), keepdim=True) if self.mixes else y

        model = chain(Mixed(4, 6, 3), CBN(6, window_size=3))
        for number in range(8):
            model[0].mixes = number > 4
            train_once(model, images(torch.float32))
        with pytest.raises(RuntimeError, match="'0' .*Mixed.*, whose weight has not one row"):
            model(images(torch.float32))


class TestWherePossible:
    def build(self, compensate):
        torch.manual_seed(0)

        class Blocks(nn.Module):
            """The second norm is handed a product that no module returned."""

            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(4, 6, 3), CBN(6, window_size=3)
                self.mask, self.other = nn.Parameter(torch.ones(6, 1, 1)), CBN(6, window_size=3)
                self.norm.compensate, self.other.compensate = compensate

            def forward(self, x):
                return self.other(self.norm(self.conv(x)) * self.mask)

        model = Blocks().double()
        link(model)
        return model

    def test_is_naive_where_it_must_be_and_says_so_once(self):
        """The other layers are compensated; without 'where_possible' the model is refused."""
        model, twin = self.build(["where_possible"] * 2), self.build([True, False])
        for number in range(4):
            x, target = images(), None
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                y = model(x)
            messages = [str(each.message) for each in told]
            if number == 0:
                (message,) = messages
                assert message.startswith("CBN layer 'other' (CBN) is not compensated: it was hand")
            else:
                assert messages == []
            expected, target = twin(x), torch.randn_like(y)
            assert torch.equal(y, expected)
            (y * target).sum().backward(), (expected * target).sum().backward()
            for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.equal(ours.grad, theirs.grad)
            step(model), step(twin)
            move_alike(model, twin)
        assert links(model) == {"norm": "conv", "other": "(not compensated)"}
        windows = window_state(model)
        assert "h" in windows["norm"][0] and "h" not in windows["other"][0]
        with pytest.raises(RuntimeError, match="'other'.*or let such layers .*'where_possible'"):
            self.build([True, True])(images())

    def test_compensates_where_it_has_become_possible(self):
        model = self.build(["where_possible"] * 2)
        with pytest.warns(UserWarning, match="'other' .* is not compensated"):
            train_once(model, images())
        model.forward = lambda x: model.other(model.conv(x))
        train_once(model, images())
        assert links(model)["other"] == "conv"
        assert "h" in window_state(model)["other"][0]

    def test_is_told_in_a_burn_in(self):
        model = self.build(["where_possible"] * 2)
        set_window(model, 1)
        with pytest.warns(UserWarning, match="'other' .* is not compensated"):
            train_once(model, images())
        set_window(model, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train_once(model, images())
        assert held(model) == {"norm": [1], "other": [1]}

    def test_where_possible_repeats_what_a_checkpoint_ran(self):
        """The first forward has no autograd graph to ask, so its repetition must not ask one."""

        class Doubled(nn.Conv2d):
            def forward(self, x):
                return super().forward(x) * 2.0

        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                norm = CBN(4, compensate="where_possible", window_size=4)
                self.body = nn.Sequential(Doubled(3, 4, 3), norm)

            def forward(self, x):
                return checkpoint(self.body, x, use_reentrant=True)

        model, outputs = Checkpointed(), []
        link(model)
        model.body[1].register_forward_hook(lambda _, __, out: outputs.append(out.detach()))
        with pytest.warns(UserWarning, match="is not compensated") as warned:
            for _ in range(4):
                outputs.clear()
                model(torch.randn(1, 3, 8, 8, requires_grad=True)).square().sum().backward()
                step(model)
                assert torch.equal(*outputs)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 0.05
        assert len(warned) == 1


def move_alike(model, twin):
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours += 0.02 * torch.randn_like(ours)
            theirs.copy_(ours)


class ByOneGradient(Reference):
    """The reference, which asks autograd once for all channels: each has weights of its own."""

    def derivative(self, values):
        return torch.autograd.grad(values.sum(), self.conv.weight, retain_graph=True)[0]


def narrow(cfg):
    """Narrows a ResNet to an eighth of its channels, and gives its heads few."""
    cfg["backbone"]["base_channels"] = 8
    cfg["neck"].update(in_channels=[32, 64, 128, 256], out_channels=32)
    for name in ("rpn_head", "bbox_head"):
        if name in cfg:
            cfg[name].update(in_channels=32, feat_channels=32)
    if "roi_head" in cfg:
        cfg["roi_head"]["bbox_roi_extractor"]["out_channels"] = 32
        heads = cfg["roi_head"]["bbox_head"]
        for head in heads if isinstance(heads, list) else [heads]:
            head.update(in_channels=32, fc_out_channels=32)
            if "conv_out_channels" in head:
                head["conv_out_channels"] = 32


def narrow_recursive(cfg):
    """DetectoRS, whose neck has a backbone of its own."""
    narrow(cfg)
    cfg["neck"]["rfp_backbone"].update(base_channels=8, rfp_inplanes=32)
    cfg["neck"]["aspp_out_channels"] = 8


def with_few_regions(cfg):
    """For TridentNet, whose head runs the last stage of a fixed-width ResNet on each region."""
    cfg["train_cfg"]["rcnn"]["sampler"]["num"] = 8


def train_detector(model, steps):
    """Steps of SGD on an image; returns the losses."""
    link(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for _ in range(steps):
        losses.append(total(loss_of(model)))
        assert losses[-1].isfinite()
        optimizer.zero_grad()
        losses[-1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 35)
        optimizer.step()
        step(model)
    return [loss.item() for loss in losses]


@pytest.mark.slow
class TestDetectors:
    """Models of MMDetection as they are."""

    def test_deformable_convolutions(self):
        """20 steps; each layer agrees with a reference that has the same history."""
        torch.manual_seed(0)
        model = stock_model(
            "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
            norm=dict(type="CBN", window_size=4),
            change=narrow,
        ).train()
        case = Case(
            None,
            lambda layer: layer.weight,
            lambda layer, x, rows: deform_conv2d(
                x, layer.conv_offset(x), rows.view(layer.weight.shape), layer.stride, 1, 1
            ),
            without_bias,
        )
        inputs, references, compared = {}, {}, []

        def compare(norm, args, y):
            layer = modules[links(model)[names[norm]]]
            if not isinstance(layer, DeformConv2dPack):
                return
            if norm not in references:
                seen = Seen(case, copy.deepcopy(layer).double())
                references[norm] = ByOneGradient(seen, "moving", 4, norm.eps)
            slow, x = references[norm], inputs[layer].detach().double()
            slow.conv.layer.load_state_dict(layer.state_dict())
            slow.conv.sync()
            with torch.enable_grad():
                expected = slow.forward(x, norm.weight.double(), norm.bias.double())
                torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
                slow.step(x)
            compared.append(norm)

        modules = dict(model.named_modules())
        names = {module: name for name, module in modules.items()}
        for module in modules.values():
            if isinstance(module, DeformConv2dPack):
                module.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]}))
            elif isinstance(module, CBN):
                module.register_forward_hook(compare)
        losses = train_detector(model, 20)
        assert len(references) == 4 + 6 + 3 and len(compared) == 20 * len(references)
        assert losses[-1] < losses[0]
        assert set(map(tuple, held(model).values())) == {(20,)}

    @pytest.mark.parametrize(
        "name, change",
        [
            ("dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py", narrow),
            ("tridentnet/tridentnet_r50-caffe_1x_coco.py", with_few_regions),
            ("detectors/detectors_cascade-rcnn_r50_1x_coco.py", narrow_recursive),
            ("gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py", narrow),
            ("ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py", None),
        ],
    )
    @pytest.mark.filterwarnings("ignore:.* is not compensated. it is fed by .*SAConv2d")
    def test_trains(self, name, change):
        """All norms are compensated, but behind DetectoRS's switchable convolutions.

        These add a function of all channels' means to each channel.
        """
        torch.manual_seed(0)
        norm = dict(type="CBN", window_size=4)
        if name.startswith("detectors"):
            norm["compensate"] = "where_possible"
        model = stock_model(name, norm=norm, change=change).train()
        switchable = {name for name, each in model.named_modules() if isinstance(each, SAConv2d)}
        for module in model.modules():
            if isinstance(module, TridentConv):  # mmdet leaves its weight to a checkpoint
                nn.init.kaiming_normal_(module.weight)
        train_detector(model, 3)
        found, windows = links(model), window_state(model)
        left_out = [name for name, conv in found.items() if conv == "(not compensated)"]
        assert {name.replace("bn", "conv") for name in left_out} == switchable
        assert len(found) > 20 + len(left_out)
        for name in found:
            for window in windows[name]:
                assert (window["seen"], "h" in window) == (3, name not in left_out)
        with torch.no_grad():
            assert total(loss_of(model.eval())).isfinite()

    def test_what_is_no_function_of_a_weight(self):
        """TOOD hands a norm a product with an attention, which no module returned."""
        torch.manual_seed(0)
        norm = dict(type="CBN", window_size=4, compensate="where_possible")
        name = "tood/tood_r50_fpn_1x_coco.py"
        model = stock_model(name, norm=norm, change=narrow).train()
        MessageHub.get_current_instance().update_info("epoch", 0)  # as a runner tells it
        with pytest.warns(UserWarning, match="reduction_conv.* is not compensated") as told:
            train_detector(model, 3)
        left_out = {name for name, conv in links(model).items() if conv == "(not compensated)"}
        assert len([each for each in told if "not compensated" in str(each.message)]) == 2
        assert len(left_out) == 2 and all("reduction_conv" in name for name in left_out)
        model = stock_model(name, change=narrow).train()
        link(model)
        with pytest.raises(RuntimeError, match="reduction_conv.*compensate='where_possible'"):
            loss_of(model)
