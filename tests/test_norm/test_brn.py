"""Batch Renormalization: the paper's formulas, its schedule, and what nn.Module does."""

import copy

import pytest
import torch
from conftest import needs_float16
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cbn_mmdet import BRN

OPEN = dict(warmup=0, r_end=0, d_end=0)  # both limits in force from the first step


class Reference:
    """Algorithm 1 of the paper in float64, with autograd for every derivative.

    The running statistics are batch normalisation's: of the unbiased variance.
    """

    def __init__(self, channels, eps, momentum):
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.var = torch.ones(channels, dtype=torch.float64)
        self.eps, self.momentum, self.steps = eps, momentum, 0

    def forward(self, x, gamma, beta, r_max, d_max):
        c = (slice(None), None, None)
        mu_b = x.mean((0, 2, 3))
        sigma_b = (x.var((0, 2, 3), correction=0) + self.eps).sqrt()
        sigma = (self.var + self.eps).sqrt()
        r = (sigma_b / sigma).clamp(1 / r_max, r_max).detach()
        d = ((mu_b - self.mean) / sigma).clamp(-d_max, d_max).detach()
        x_hat = (x - mu_b[c]) / sigma_b[c] * r[c] + d[c]
        self.steps += 1
        alpha = 1 / self.steps if self.momentum is None else self.momentum
        self.mean = self.mean + alpha * (mu_b.detach() - self.mean)
        self.var = self.var + alpha * (x.detach().var((0, 2, 3)) - self.var)
        return gamma[c] * x_hat + beta[c]


def ramp(step, start, warmup, end, final):
    """The limit in force at a step, counted from 1, as in the paper."""
    if step <= warmup:
        return start
    if step >= end:
        return final
    return start + (final - start) * (step - warmup) / (end - warmup)


def trained(channels=4, steps=3, **kwargs):
    """A layer with random parameters, after some steps on moving batches."""
    torch.manual_seed(0)
    norm = BRN(channels, **{**OPEN, **kwargs})
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    for _ in range(steps):
        norm(torch.randn(2, channels, 5, 6) * torch.rand(1) + torch.randn(1))
    return norm


class TestFormulas:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_steps_are_the_references(self, data):
        """Output, gradients and running statistics, over shapes, limits and schedules."""
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 99)))
        channels = draw(st.integers(1, 5))
        r_max, d_max = draw(st.floats(1, 5)), draw(st.floats(0, 6))
        warmup = draw(st.integers(0, 3))
        r_end, d_end = (draw(st.integers(warmup, 5)) for _ in range(2))
        affine, momentum = draw(st.booleans()), draw(st.sampled_from([0.1, 0.7, None]))
        norm = BRN(
            channels, 1e-3, momentum, affine,
            r_max=r_max, d_max=d_max, warmup=warmup, r_end=r_end, d_end=d_end,
        ).double()  # fmt: skip
        gamma, beta = torch.ones(channels).double(), torch.zeros(channels).double()
        if affine:
            gamma, beta = nn.init.uniform_(norm.weight), nn.init.normal_(norm.bias)
        slow = Reference(channels, 1e-3, momentum)
        for step in range(1, draw(st.integers(2, 6))):
            shape = [draw(st.integers(*sides)) for sides in ((1, 3), (1, 4), (2, 5))]
            shape.insert(1, channels)
            x = torch.randn(shape).double() * 4 * torch.rand(1) + 3 * torch.randn(1)
            target = torch.randn(shape).double()
            limits = ramp(step, 1, warmup, r_end, r_max), ramp(step, 0, warmup, d_end, d_max)
            assert [limit.item() for limit in norm.limits()] == pytest.approx(limits, rel=1e-5)
            grads = []
            for run in (norm, lambda x, at=limits: slow.forward(x, gamma, beta, *at)):
                x_ = x.clone().requires_grad_()
                norm.zero_grad()
                y = run(x_)
                (y * target).sum().backward()
                grads.append([y.detach(), x_.grad, *(p.grad.clone() for p in norm.parameters())])
            for fast, plain in zip(*grads, strict=True):
                torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(norm.running_mean, slow.mean)
            torch.testing.assert_close(norm.running_var, slow.var)
            assert norm.num_batches_tracked.item() == step

    @pytest.mark.parametrize("affine", [True, False])
    def test_gradcheck_where_both_limits_cut(self, affine):
        """Cut r and d do not change with the input, so the gradient is the whole derivative."""
        norm = BRN(3, affine=affine, momentum=0.0, r_max=2, d_max=0.5, **OPEN).double()
        norm.running_mean.fill_(100)
        norm.running_var.copy_(torch.tensor([1e-3, 1e3, 1e-3]))
        x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)

        def run(x, *parameters):
            state = dict(zip(("weight", "bias"), parameters, strict=bool(parameters)))
            return torch.func.functional_call(norm, state, (x,))

        assert torch.autograd.gradcheck(run, (x, *norm.parameters()))
        x_hat = nn.functional.batch_norm(x, None, None, training=True)
        r = torch.tensor([2, 0.5, 2], dtype=torch.float64)[:, None, None]
        torch.testing.assert_close(norm(x), x_hat * r - 0.5)

    def test_training_computes_what_evaluation_would(self):
        """The method's aim: where nothing is cut, the batch's own statistics cancel."""
        norm = trained(r_max=1e6, d_max=1e6)
        x = torch.randn(1, 4, 3, 3) * 5 + 2
        expected = copy.deepcopy(norm).eval()(x)
        torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(nn.BatchNorm2d(4)(x), expected, rtol=0.1, atol=0.1)

    def test_running_statistics_are_batch_norms_bit_for_bit(self):
        norm, bn = BRN(4, momentum=0.3, **OPEN), nn.BatchNorm2d(4, momentum=0.3)
        for i in range(5):
            x = torch.randn(2, 4, 5, 6) * (i + 1) + i
            norm(x), bn(x)
            for ours, theirs in zip(norm.buffers(), bn.buffers(), strict=True):
                assert torch.equal(ours, theirs)


class TestSchedule:
    @pytest.mark.parametrize(
        "done, r_max, d_max",
        [
            (0, 1, 0),
            (4999, 1, 0),
            (5000, 1 + 2 / 35000, 5 / 20000),
            (14999, 1 + 2 * 10000 / 35000, 2.5),
            (24998, 1 + 2 * 19999 / 35000, 5 * 19999 / 20000),
            (24999, 1 + 2 * 20000 / 35000, 5),
            (39998, 1 + 2 * 34999 / 35000, 5),
            (39999, 3, 5),
            (10**9, 3, 5),
        ],
    )
    def test_the_papers_at_its_corners(self, done, r_max, d_max):
        """The limits after ``done`` steps are those of step ``done + 1``, counted from 1."""
        norm = BRN(4)
        norm.num_batches_tracked.fill_(done)
        assert [limit.item() for limit in norm.limits()] == pytest.approx([r_max, d_max], rel=1e-6)

    @pytest.mark.parametrize("warmup", [0, 3])
    def test_without_a_ramp(self, warmup):
        norm = BRN(4, warmup=warmup, r_end=warmup, d_end=warmup)
        seen = []
        for _ in range(warmup + 2):
            seen.append(tuple(limit.item() for limit in norm.limits()))
            norm(torch.randn(2, 4, 3, 3))
        assert seen == [(1, 0)] * warmup + [(3, 5)] * 2

    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("closed", [dict(warmup=3, r_end=9, d_end=9), dict(r_max=1, d_max=0)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_batch_norm_bit_for_bit_while_closed(self, affine, momentum, closed, dtype):
        norm = BRN(4, momentum=momentum, affine=affine, **{**OPEN, **closed}).to(dtype)
        bn = nn.BatchNorm2d(4, momentum=momentum, affine=affine).to(dtype)
        if affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            bn.load_state_dict(norm.state_dict())
        for _ in range(3):
            x = (torch.randn(2, 4, 5, 6) * 3 + 1).to(dtype)
            results = []
            for module in (norm, bn):
                x_ = x.clone().requires_grad_()
                module.zero_grad()
                y = module(x_)
                y.square().sum().backward()
                grads = [p.grad for p in module.parameters()]
                results.append([y, x_.grad, *grads, *module.buffers()])
            for ours, theirs in zip(*results, strict=True):
                assert torch.equal(ours, theirs)
        if "warmup" in closed:  # it differs after the warm-up
            assert not torch.equal(norm(x), bn(x))


class TestIsBatchNorm:
    def test_state_dict_both_ways(self):
        norm, bn = trained(), nn.BatchNorm2d(4)
        assert list(norm.state_dict()) == list(bn.state_dict())
        bn.load_state_dict(norm.state_dict(), strict=True)
        other = BRN(4)
        other.load_state_dict(bn.state_dict(), strict=True)
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, norm.state_dict()[name])

    def test_one_value_per_channel(self):
        norm = trained()
        before = copy.deepcopy(norm.state_dict())
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            norm(torch.randn(1, 4, 1, 1))
        for name, tensor in norm.state_dict().items():
            assert torch.equal(tensor, before[name])


class TestCheckpointing:
    """A repeated forward would be corrected by other running statistics than the first one."""

    REFUSAL = r"^BRN layer of \d+ channels: activation checkpointing repeats .*\(with_cp=False\)"

    @pytest.mark.parametrize("norm_eval", [True, False])
    def test_a_detectors_backbone(self, norm_eval):
        from mmdet.models import ResNet

        kwargs = dict(depth=50, base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1))
        kwargs |= dict(norm_cfg=dict(type="BRN"), frozen_stages=-1)
        model = ResNet(out_indices=(1,), with_cp=True, norm_eval=norm_eval, **kwargs)
        model.train()
        (y,) = model(torch.randn(1, 3, 32, 32))
        if norm_eval:
            y.sum().backward()
            assert model.conv1.weight.grad.any()
        else:
            with pytest.raises(RuntimeError, match=self.REFUSAL):
                y.sum().backward()


class TestHalfPrecision:
    @pytest.mark.parametrize(
        "dtype", [pytest.param(torch.float16, marks=needs_float16), torch.bfloat16]
    )
    def test_a_half_precision_layer(self, dtype):
        """r and d from float32 statistics: a mean of 300 squared would leave fp16's range."""
        norm = trained(steps=0, momentum=0.5)
        half = copy.deepcopy(norm).to(dtype)
        norm.load_state_dict(half.state_dict())
        for _ in range(3):
            x = (torch.randn(2, 4, 9, 9) * 100 + 300).to(dtype)
            y = half(x)
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), norm(x.float()), rtol=0.03, atol=0.1)
            y.sum().backward()
        assert half.weight.grad.isfinite().all()

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_an_overflow_is_passed_on(self, value):
        """For the gradient scaler to find."""
        norm = trained()
        x = torch.randn(2, 4, 5, 6)
        x[0, 1] = value
        norm(x.requires_grad_()).sum().backward()
        assert norm.weight.grad.isfinite().tolist() == [True, False, True, True]


class TestErrors:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            (dict(d_max=-1), "d_max must be a finite number of at least 0, got -1"),
            (
                dict(warmup=50000),
                "r_end must be a whole number of at least 50000, got 40000: .*end of warmup",
            ),
            (dict(d_end=4000), "d_end must be a whole number of at least 5000, got 4000"),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=f"^BRN: {message}"):
            BRN(**{"num_features": 4, **kwargs})
