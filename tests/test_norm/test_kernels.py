"""The fast ways, each against the plain formula that it equals."""

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_float16
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layers import is_computed_by_torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cbn_mmdet.norm import kernels
from cbn_mmdet.norm.moments import Source


def close(found, expected, tolerance=1e-4):
    """Within a tolerance relative to the largest number, or to 1."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=tolerance * scale, check_device=False
    )


class TestMoments:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_of_all_positions(self, dtype):
        y = (torch.randn(3, 5, 7, 4) * 3 + 100).to(dtype)
        mean, var = kernels.moments(y)
        assert mean.dtype == var.dtype == torch.promote_types(dtype, torch.float32)
        expected = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), expected[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(var.double(), expected[0], rtol=1e-4, atol=0)

    def test_a_large_mean_costs_no_digits(self):
        y = torch.randn(2, 3, 20, 20) + 1000
        expected = y.double().var((0, 2, 3), correction=0)
        torch.testing.assert_close(kernels.moments(y)[1].double(), expected, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("mean", [0, 1, 7.9, 8.1, 100, 1500, 2e4, 1e5])
    def test_of_large_maps(self, channels, mean):
        """Large maps have a faster path, as exact only where the mean is not far from 0."""
        y = torch.randn(2, channels, 200, 200)
        y[:, 0] += mean  # in the only channel, or in one of three
        assert y.numel() >= kernels._LARGE
        got_mean, got_var = kernels.moments(y)
        var, expected_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(got_mean.double(), expected_mean, rtol=1e-6, atol=1e-6)
        # The rounding of the mean is what torch's own kernel is left with.
        rtol = 2e-5 + (mean * 6e-8) ** 2
        torch.testing.assert_close(got_var.double(), var, rtol=rtol, atol=0)

    def test_of_large_maps_that_are_constant(self):
        y = torch.zeros(2, 3, 200, 200)
        y[:, 1] = 0.3
        y[:, 2] = -1e4
        mean, var = kernels.moments(y)
        torch.testing.assert_close(mean, y[0, :, 0, 0], rtol=1e-6, atol=0)
        assert (var >= 0).all() and (var <= 1e-10 * mean.square()).all()


class TestChannelSums:
    @pytest.mark.parametrize(
        ("of_y", "dtype"),
        [
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
            (torch.bfloat16, torch.float32),
        ],
    )
    def test_are_the_sums(self, of_y, dtype):
        torch.manual_seed(0)
        grad, y = torch.randn(2, 3, 4, 5, 6).to(of_y)
        mean, var = torch.randn(4, dtype=dtype), torch.rand(4, dtype=dtype) + 0.1
        r = (var + 1e-3).rsqrt()
        sums = kernels.channel_sums(grad, y, mean, var, 1e-3, r)
        grad, y, mean, r = (each.double() for each in (grad, y, mean, r))
        x_hat = (y - mean[:, None, None]) * r[:, None, None]
        expected = (grad * x_hat).sum((0, 2, 3)), grad.sum((0, 2, 3))
        for found, of in zip(sums, expected, strict=True):
            assert found.dtype == dtype
            close(found, of)

    def test_of_nothing_are_zero(self):
        y, mean = torch.empty(0, 4, 5, 6), torch.randn(4)
        for found in kernels.channel_sums(y, y, mean, mean.square(), 0.1, mean):
            assert torch.equal(found, torch.zeros(4))

    def test_hand_over_what_the_kernel_of_a_gpu_reads(self):
        """The GPU's kernel rejects a missing scale or saved statistics; the CPU's reads neither."""
        calls = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if "batch_norm_backward" in str(function):
                    calls.append(args)
                return function(*args, **(kwargs or {}))

        y, mean, var = torch.randn(2, 4, 5, 6), torch.zeros(4), torch.rand(4)
        with Watch():
            kernels.channel_sums(y, y, mean, var, 0.0, var.rsqrt())
        (given,) = calls
        assert [given[3].data_ptr(), given[5].data_ptr()] == [mean.data_ptr()] * 2
        torch.testing.assert_close(given[6], given[4].rsqrt())
        assert given[2].dtype == mean.dtype and given[2].shape == mean.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_standardize(affine, dtype):
    y = (torch.randn(2, 4, 5, 6) * 2 + 1).to(dtype)
    wide = kernels.statistics_dtype(dtype)
    mean, var = torch.randn(4, dtype=wide), torch.rand(4, dtype=wide)
    gamma, beta = torch.randn(2, 4, dtype=wide) if affine else (None, None)
    found = kernels.standardize(y, gamma, beta, mean, var, 0.01)
    assert found.dtype == dtype
    expected = (y.double() - mean[:, None, None]) / (var[:, None, None] + 0.01).sqrt()
    if affine:
        expected = expected * gamma[:, None, None] + beta[:, None, None]
    close(found, expected, 1e-2 if dtype == torch.bfloat16 else 1e-5)


@st.composite
def convolutions(draw):
    """A convolution of any geometry, and an input on either side of the limit for small maps."""
    groups = draw(st.sampled_from([1, 2]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 2), (1, 4)]))
    padding = draw(st.sampled_from([(0, 0), (1, 0), (1, 2)]))
    stride, dilation = (draw(st.tuples(*[st.integers(1, 3)] * 2)) for _ in range(2))
    conv = nn.Conv2d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
    )
    size = draw(st.sampled_from([(10, 11), (31, 33), (32, 32), (30, 41)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(draw(st.integers(1, 3)), conv.in_channels, *size, generator=generator) + 1
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    return conv, x


def patches(conv, x):
    """The patch of each position, ``(groups, P, N * positions)``, in float64."""
    columns = F.unfold(
        x.double(), conv.kernel_size, conv.dilation, conv.padding, conv.stride
    )  # N, C_in kh kw, positions
    return columns.transpose(0, 1).reshape(conv.groups, -1, columns.shape[0] * columns.shape[2])


DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


class TestPatches:
    @settings(max_examples=60, deadline=None)
    @given(case=convolutions(), dtype=DTYPES)
    def test_mean_patch(self, case, dtype):
        conv, x = case
        assume(is_computed_by_torch(conv, dtype))
        x = x.to(dtype)
        y = conv.to(dtype)(x)
        found = kernels.mean_patch(Source.of(conv, x), y)
        assert found.dtype == kernels.statistics_dtype(dtype)
        exact = 1e-12 if dtype == torch.float64 else 1e-5
        close(found, patches(conv, x).mean(2), 1e-2 if dtype == torch.bfloat16 else exact)

    @settings(max_examples=60, deadline=None)
    @given(case=convolutions(), dtype=DTYPES, stride=st.integers(1, 3))
    def test_weight_gradient(self, case, dtype, stride):
        conv, x = case
        assume(is_computed_by_torch(conv, dtype))
        x = x.to(dtype)
        gradient = torch.randn_like(conv.to(dtype)(x))[:, :, ::stride, ::stride].contiguous()
        found = kernels.weight_gradient(Source.of(conv, x), gradient, stride)
        whole = torch.zeros_like(conv(x).double())
        whole[:, :, ::stride, ::stride] = gradient
        by_group = whole.transpose(0, 1).reshape(conv.groups, -1, whole[:, 0].numel())
        phi = patches(conv, x).transpose(1, 2)
        expected, largest = ((f(by_group) @ f(phi)).flatten(0, 1) for f in (torch.clone, torch.abs))
        exact = 1e-12 if dtype == torch.float64 else 1e-5
        # Relative to the sum of absolute terms, as the terms may cancel.
        error = (found.double() - expected).abs() / largest.clamp_min(1)
        assert error.max() < (1e-2 if dtype == torch.bfloat16 else exact)

    @needs_float16
    def test_a_sum_over_rows_stays_in_the_range_of_half_precision(self):
        conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        x = torch.full((1, 2, 200, 60), 6e4, dtype=torch.float16)
        found = kernels.mean_patch(Source.of(conv, x), torch.empty(1, 3, 200, 60))
        close(found, patches(conv, x).mean(2), 1e-3)


class TestWeightProducts:
    # Channels, inputs per group, groups. The third and fourth are alike: their patches have one
    # size, and their groups equally many channels. The last is large.
    SHAPES = ((6, 4, 1), (8, 4, 2), (4, 4, 2), (6, 4, 3), (5, 3, 1), (130, 16, 1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("block", [64, 1 << 17])
    def test_alike_layers_together(self, block, held, dtype, monkeypatch):
        monkeypatch.setattr(kernels, "_BLOCK", block)  # converted in several parts, or in one
        batches, products = [], kernels._products
        monkeypatch.setattr(
            kernels, "_products", lambda m, *rest: batches.append(len(m)) or products(m, *rest)
        )
        ms, hs, weights = [], [], []
        for channels, inputs, groups in self.SHAPES:
            ms.append(torch.randn(groups, inputs * 9))
            hs.append(torch.randn(channels, inputs * 9).to(held))
            weights.append(torch.randn(channels, inputs, 3, 3, dtype=dtype))
        assert hs[-1].numel() > kernels._SMALL_WEIGHT
        found = kernels.weight_products(ms, hs, weights, dtype)
        assert sorted(batches) == [1, 1, 1, 2, 2 + 3]  # rows of m: one for each group
        for (of_mean, of_var), m, h, weight in zip(found, ms, hs, weights, strict=True):
            w = weight.flatten(1).double()
            each = m.double().repeat_interleave(len(w) // len(m), 0)
            assert of_mean.dtype == of_var.dtype == dtype
            close(of_mean, (w * each).sum(1), 1e-6)
            close(of_var, (w * h.double()).sum(1), 1e-6)

    def test_of_no_layer(self):
        assert kernels.weight_products([], [], [], torch.float32) == []


def test_outer_products():
    """Of layers of different sizes and groups."""
    shapes = [(6, 5, 1), (6, 5, 2), (4, 9, 4), (1, 1, 1)]
    grads, lefts, rights = zip(
        *((torch.randn(c, p), torch.randn(c), torch.randn(g, p)) for c, p, g in shapes),
        strict=True,
    )
    expected = [
        grad - 0.3 * left[:, None] * right.repeat_interleave(len(left) // len(right), 0)
        for grad, left, right in zip(grads, lefts, rights, strict=True)
    ]
    alone = [grad.clone() for grad in grads]
    for grad, left, right in zip(alone, lefts, rights, strict=True):
        kernels.add_outer_(grad, -0.3 * left, right)
    kernels.add_outers_(grads, lefts, rights, -0.3)
    for of_all, of_one, of in zip(grads, alone, expected, strict=True):
        torch.testing.assert_close(of_all, of)
        torch.testing.assert_close(of_one, of)


@pytest.mark.parametrize("weights", [[0.25, 0.25], [0.25, 0.5], []])
def test_lerp_each(weights):
    starts, ends = ([torch.randn(size, 2) for size in range(len(weights))] for _ in range(2))
    expected = [a + w * (b - a) for a, b, w in zip(starts, ends, weights, strict=True)]
    kernels.lerp_each_(starts, ends, weights)
    for found, of in zip(starts, expected, strict=True):
        torch.testing.assert_close(found, of)


@pytest.mark.parametrize("sizes", [(3, 1, 4), (5,)])
def test_segment_sums(sizes):
    values = torch.randn(sum(sizes), dtype=torch.float64)
    expected = torch.stack([part.sum() for part in values.split(sizes)])
    torch.testing.assert_close(kernels.segment_sums(values, sizes), expected)


def test_spread():
    like = torch.empty(6, dtype=torch.float64)
    found, one = kernels.spread([[0.5, 0.25, 1.0], [2, 2, 2]], (3, 1, 2), like)
    assert found.dtype == like.dtype
    assert found.tolist() == [0.5, 0.5, 0.5, 0.25, 1.0, 1.0]
    assert one == 2


def test_constants_are_not_of_inference_mode():
    """They are kept for the next iteration, which trains."""
    with torch.inference_mode():
        made = kernels.constant(3, 0.7, torch.float32, torch.device("cpu"))
    assert torch.equal(made, torch.full((3,), 0.7)) and not made.is_inference()
