"""Moving Average Batch Normalization: the paper's formulas, and what nn.Module does."""

import copy

import pytest
import torch
from conftest import needs_float16
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cbn_mmdet import MABN, CenConv2d

SOON = dict(buffer_size=3, warmup=0, r_warmup=0)  # every part in force from the third step
C = (slice(None), None, None)


class Reference:
    """The paper's equations in float64, forward and backward: nothing is left to autograd."""

    def __init__(self, channels, eps, momentum, buffer_size, warmup, r_warmup, r_max):
        self.chi2_ema = torch.ones(channels, dtype=torch.float64)
        self.eps, self.momentum = eps, momentum
        self.buffer_size, self.warmup, self.r_warmup, self.r_max = (
            buffer_size, warmup, r_warmup, r_max,
        )  # fmt: skip
        self.chi2s, self.psis = [], []

    def average(self, values):
        if len(values) <= self.warmup or len(values) < self.buffer_size:
            return values[-1]
        return sum(values[-self.buffer_size :]) / self.buffer_size

    def step(self, x, gamma, beta, grad):
        """Output, and the gradients of ``(output * grad).sum()`` in x, gamma and beta."""
        chi2_b = x.square().mean((0, 2, 3))
        self.chi2s.append(chi2_b)
        steps = len(self.chi2s)
        chi = (self.average(self.chi2s) + self.eps).sqrt()
        r = torch.ones_like(chi)
        if steps > self.r_warmup:
            chi_ema = (self.chi2_ema + self.eps).sqrt()
            r = (chi / chi_ema).clamp(1 / self.r_max, self.r_max)
        x_hat = x / chi[C]
        y = gamma[C] * r[C] * x_hat + beta[C]
        alpha = 1 / steps if self.momentum is None else self.momentum
        self.chi2_ema = (1 - alpha) * self.chi2_ema + alpha * chi2_b

        g = grad * gamma[C] * r[C]
        self.psis.append((g * x_hat).mean((0, 2, 3)))
        grad_x = (g - x_hat * self.average(self.psis)[C]) / chi[C]
        return y, grad_x, (grad * r[C] * x_hat).sum((0, 2, 3)), grad.sum((0, 2, 3))


def batch(channels=4, scale=3.0, shift=1.0):
    return torch.randn(2, channels, 5, 6) * torch.rand(1) * scale + torch.randn(1) * shift


def trained(channels=4, steps=5, **kwargs):
    """A layer with random parameters, after some steps on moving batches."""
    torch.manual_seed(0)
    norm = MABN(channels, **{**SOON, **kwargs})
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    for _ in range(steps):
        x = batch(channels).requires_grad_()
        norm(x).square().sum().backward()
    norm.zero_grad()
    return norm


def assert_same(state, expected):
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


class TestFormulas:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_steps_are_the_references(self, data):
        """Output, gradients and averages, over shapes, windows and schedules."""
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 99)))
        channels, warmup = draw(st.integers(1, 5)), draw(st.integers(0, 4))
        options = dict(
            eps=1e-3,
            momentum=draw(st.sampled_from([0.02, 0.7, None])),
            buffer_size=draw(st.integers(1, 4)),
            warmup=warmup,
            r_warmup=draw(st.integers(warmup, 5)),
            r_max=draw(st.sampled_from([1.0, 1.5, 5.0])),
        )
        affine = draw(st.booleans())
        norm = MABN(channels, affine=affine, **options).double()
        gamma, beta = torch.ones(channels).double(), torch.zeros(channels).double()
        if affine:
            gamma, beta = nn.init.uniform_(norm.weight), nn.init.normal_(norm.bias)
        slow = Reference(channels, **options)
        for step in range(1, draw(st.integers(2, 10))):
            shape = [draw(st.integers(*sides)) for sides in ((1, 3), (1, 4), (1, 5))]
            shape.insert(1, channels)
            x = (torch.randn(shape).double() * 4 * torch.rand(1) + torch.randn(1)).requires_grad_()
            grad = torch.randn(shape).double()
            expected = slow.step(x.detach(), gamma.detach(), beta.detach(), grad)
            norm.zero_grad()
            y = norm(x)
            (y * grad).sum().backward()
            found = [y.detach(), x.grad, *(p.grad for p in norm.parameters())]
            for ours, plain in zip(found, expected, strict=False):
                # Gradients are differences of large terms: relative to the largest.
                atol = 1e-6 * float(plain.abs().max()) + 1e-9
                torch.testing.assert_close(ours, plain, rtol=1e-6, atol=atol)
            torch.testing.assert_close(norm.running_var, slow.chi2_ema)
            assert not norm.running_mean.any()
            assert norm.num_batches_tracked == norm.num_gradients_tracked == step

    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("options", [dict(buffer_size=1), dict(warmup=99)])
    def test_a_window_of_one_is_autograds(self, options, affine):
        """The gradient is then the derivative of dividing by the batch's own second moment."""
        norm = trained(affine=affine, **{**SOON, "buffer_size": 1, "r_warmup": 99, **options})
        norm.double()
        x = batch().double().requires_grad_()
        gamma, beta = (norm.weight, norm.bias) if affine else (torch.ones(4), torch.zeros(4))
        plain = x / (x.square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
        plain = gamma[C] * plain + beta[C]
        y = norm(x)
        torch.testing.assert_close(y, plain)
        target = torch.randn_like(x)
        for ours, theirs in zip(
            *(torch.autograd.grad(out, (x, *norm.parameters()), target) for out in (y, plain)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)

    def test_steady_statistics_are_autograds(self):
        """A window of equal batches averages to the batch's own, in both passes."""
        norm = trained(buffer_size=4, r_warmup=99).double()
        x, target = batch().double().requires_grad_(), torch.randn(2, 4, 5, 6).double()
        for _ in range(8):  # four until chi is steady, and then four for Psi
            x.grad = None
            (norm(x) * target).sum().backward()
        plain = x / (x.square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt() * norm.weight[C]
        torch.testing.assert_close(x.grad, *torch.autograd.grad(plain, x, target))

    def test_training_computes_what_evaluation_would(self):
        """Where r is not cut, the window's second moment cancels."""
        norm = trained(r_max=1e6)
        x = batch()
        expected = copy.deepcopy(norm).eval()(x)
        torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)

    def test_a_window_steadies_the_gradient(self):
        """The paper's point: Psi of single batches scatters more than the average over 16."""

        def scatter(buffer_size):
            torch.manual_seed(0)
            norm, factors = MABN(4, buffer_size=buffer_size, warmup=0), []
            probe = torch.ones(1, 4, 3, 3)
            for _ in range(80):
                x = torch.randn(1, 4, 3, 3).requires_grad_()
                norm(x).backward(probe * torch.randn(1))
                factors.append(norm.gradient_moments.mean(0))
            return torch.stack(factors[16:]).var(0)

        assert (scatter(16) < 0.3 * scatter(1)).all()

    def test_several_calls_in_a_forward_each_count(self):
        norm = trained()
        before = norm.num_batches_tracked.item()
        x = batch().requires_grad_()
        (norm(x) + norm(2 * x)).sum().backward()
        assert norm.num_batches_tracked == norm.num_gradients_tracked == before + 2

    def test_forwards_without_gradient_leave_psi(self):
        norm = trained()
        before = norm.gradient_moments.clone()
        with torch.no_grad():
            norm(batch())
        norm.requires_grad_(False)(batch())
        assert torch.equal(norm.gradient_moments, before) and norm.num_gradients_tracked == 5
        assert norm.num_batches_tracked == 7

    def test_one_value_per_channel_is_enough(self):
        y = trained()(torch.randn(1, 4, 1, 1))
        assert y.isfinite().all()


class TestIsBatchNorm:
    def test_loads_a_batch_norms_checkpoint(self):
        """As a run's start: steps count from 0, and the loaded running mean fades gradually."""
        bn = nn.BatchNorm2d(4)
        for _ in range(200):
            bn(batch(shift=9))
        norm = trained()
        norm.load_state_dict(bn.state_dict(), strict=True)
        assert norm.num_batches_tracked == norm.num_gradients_tracked == 0
        assert not norm.second_moments.any() and not norm.gradient_moments.any()
        x = batch()
        assert torch.equal(copy.deepcopy(norm).eval()(x), bn.eval()(x))
        norm(x)
        torch.testing.assert_close(norm.running_mean, 0.98 * bn.running_mean)
        torch.testing.assert_close(
            norm.running_var, 0.98 * bn.running_var + 0.02 * x.square().mean((0, 2, 3))
        )

    def test_a_partial_checkpoint_leaves_the_rest(self):
        norm = trained()
        before = copy.deepcopy(norm.state_dict())
        bn = nn.BatchNorm2d(4)
        bn.load_state_dict({name: before[name] for name in bn.state_dict()})
        for each in (norm, bn):
            each.load_state_dict({"weight": torch.zeros(4)}, strict=False)
        # torch 2.1 sets BN's count of batches to 0.
        assert_same(norm.state_dict(), {**before, **bn.state_dict()})


class TestSpoilt:
    """NaN and infinity are passed on, for the gradient scaler to find, and leave no trace."""

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    @pytest.mark.parametrize("steps", [0, 1, 5])
    def test_batches(self, value, steps):
        norm = trained(steps=steps)
        norm.running_mean.fill_(2.0)  # as from a checkpoint of batch normalisation
        before = copy.deepcopy(norm.state_dict())
        x = batch()
        x[0, 1] = value
        x.requires_grad_()
        y = norm(x)
        assert not y[0, 1].isfinite().any() and y[:, [0, 2, 3]].isfinite().all()
        y.sum().backward()
        assert norm.weight.grad.isfinite().tolist() == [True, False, True, True]
        assert_same(norm.state_dict(), before)

    @pytest.mark.parametrize("momentum", [0.02, None])
    def test_gradients(self, momentum):
        norm = trained(momentum=momentum)
        twin = copy.deepcopy(norm)
        x = batch().requires_grad_()
        grad = torch.ones_like(x)
        grad[1, 2, 3, 3] = float("inf")
        norm(x).backward(grad)
        assert not x.grad.isfinite().all() and not norm.weight.grad.isfinite().all()
        with torch.no_grad():
            twin(x)  # its forward was sound, and counts
        assert_same(norm.state_dict(), twin.state_dict())

    def test_the_run_goes_on_as_if_it_had_not_been(self):
        norm = trained()
        twin = copy.deepcopy(norm)
        norm(torch.full((2, 4, 5, 6), float("nan"), requires_grad=True)).sum().backward()
        for _ in range(5):
            x = batch()
            found, expected = (x.clone().requires_grad_() for _ in range(2))
            norm(found).square().sum().backward()
            twin(expected).square().sum().backward()
            assert torch.equal(found.grad, expected.grad)
        assert_same(norm.state_dict(), twin.state_dict())


class TestHalfPrecision:
    @pytest.mark.parametrize(
        "dtype", [pytest.param(torch.float16, marks=needs_float16), torch.bfloat16]
    )
    def test_a_half_precision_layer(self, dtype):
        """Statistics are float32, where sums of squares stay in range."""
        norm = trained(steps=0, momentum=0.5)
        half = copy.deepcopy(norm).to(dtype)
        norm.load_state_dict(half.state_dict())
        for _ in range(4):
            x = (torch.randn(2, 4, 9, 9) * 100 + 30).to(dtype)
            inputs = [x.clone().requires_grad_(), x.float().requires_grad_()]
            y, expected = half(inputs[0]), norm(inputs[1])
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.1)
            target = torch.randn(x.shape)
            for out in (y, expected):
                (out * target).sum().backward()
            limit = 0.03 * inputs[1].grad.abs().max().item()
            torch.testing.assert_close(
                inputs[0].grad.float(), inputs[1].grad, rtol=0.05, atol=limit
            )


class TestCopies:
    def test_another_window_is_refused(self):
        with pytest.raises(RuntimeError, match="size mismatch for second_moments"):
            MABN(4).load_state_dict(trained().state_dict())


class TestCenConv2d:
    @pytest.mark.parametrize("groups", [1, 2])
    def test_is_a_convolution_of_centred_filters(self, groups):
        conv = CenConv2d(4, 6, 3, stride=2, padding=1, groups=groups).double()
        x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
        weight = conv.weight - conv.weight.flatten(1).mean(1)[:, None, None, None]
        expected = nn.functional.conv2d(x, weight, conv.bias, 2, 1, groups=groups)
        torch.testing.assert_close(conv(x), expected)
        # So a constant added to the image changes nothing, away from the padding.
        torch.testing.assert_close(conv(x + 5)[..., 1:-1, 1:-1], conv(x)[..., 1:-1, 1:-1])
        conv(x).square().sum().backward()
        assert conv.weight.grad.flatten(1).sum(1).abs().max() < 1e-10

    def test_has_a_convolutions_checkpoint(self):
        conv = nn.Conv2d(3, 4, 3)
        CenConv2d(3, 4, 3).load_state_dict(conv.state_dict(), strict=True)

    def test_a_filter_of_one_weight_is_refused(self):
        with pytest.raises(ValueError, match="^CenConv2d: a filter of one weight less its mean"):
            CenConv2d(4, 4, 1, groups=4)

    def test_with_mmcv(self):
        """Also where it evaluates a convolution and its norm as one."""
        from mmcv.cnn import ConvModule, fuse_conv_bn

        torch.manual_seed(0)
        cfg = dict(norm_cfg=dict(type="MABN", **SOON), conv_cfg=dict(type="CenConv2d"))
        module = ConvModule(3, 4, 3, efficient_conv_bn_eval=True, **cfg)
        assert type(module.conv) is CenConv2d and type(module.norm) is MABN
        for _ in range(4):
            module(torch.randn(2, 3, 8, 8) + 1)
        module.eval()
        x = torch.randn(2, 3, 8, 8) + 1
        expected = module.activate(module.norm(module.conv(x)))
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        module.turn_on_efficient_conv_bn_eval(False)
        torch.testing.assert_close(fuse_conv_bn(module)(x), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("norm_eval", [True, False])
    def test_a_detectors_backbone(self, norm_eval):
        from mmdet.models import FPN, ResNet

        cfg = dict(norm_cfg=dict(type="MABN", **SOON), conv_cfg=dict(type="CenConv2d"))
        kwargs = dict(depth=50, base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1))
        kwargs |= dict(out_indices=(0, 1), frozen_stages=-1, norm_eval=norm_eval, **cfg)
        model = nn.Sequential(ResNet(**kwargs), FPN([32, 64], 8, num_outs=2, **cfg)).train()
        convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        assert all(type(conv) is CenConv2d for conv in convs)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(4):
            optimizer.zero_grad()
            sum(y.square().mean() for y in model(torch.randn(1, 3, 32, 32))).backward()
            optimizer.step()
        norms = [module for module in model[0].modules() if isinstance(module, MABN)]
        assert len(norms) == len(convs) - 4
        assert {norm.num_gradients_tracked.item() for norm in norms} == {0 if norm_eval else 4}
        assert all(p.isfinite().all() for p in model.parameters())


class TestErrors:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            (dict(buffer_size=0), "buffer_size must be a whole number of at least 1, got 0"),
            (dict(warmup=2000), "r_warmup must be a whole number of at least 2000, got 1000"),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=f"^MABN: {message}"):
            MABN(**{"num_features": 4, **kwargs})
