"""The statistics of a batch and their derivatives, against autograd."""

import pytest
import torch
from conftest import computes_in_float16, needs_float16
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cbn_mmdet.norm import moments
from cbn_mmdet.norm.moments import batch_derivative, batch_moments, channel_sums, is_plain

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
if not computes_in_float16():
    del TOLERANCE[torch.float16]


@st.composite
def convolutions(draw):
    """A convolution of any geometry, and an input that it accepts."""
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 3)))
    padding_mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["valid", "same", (0, 0), (1, 2), (2, 0)]))
    stride = (1, 1) if padding == "same" else draw(st.tuples(*[st.integers(1, 3)] * 2))
    conv = nn.Conv2d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        draw(st.tuples(*[st.integers(1, 2)] * 2)),
        groups,
        draw(st.booleans()),
        padding_mode,
    )
    size = draw(st.tuples(st.integers(7, 12), st.integers(7, 12)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(draw(st.integers(1, 3)), conv.in_channels, *size, generator=generator) + 1
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
    return conv, x


def autograd_derivatives(conv, x, stride):
    """d mean / dw over all positions and d variance / dw over the subgrid, channel by channel."""
    y = conv(x)
    subset = y[:, :, ::stride, ::stride]
    means, variances = y.mean((0, 2, 3)), subset.var((0, 2, 3), correction=0)
    grads = [
        [torch.autograd.grad(v[c], conv.weight, retain_graph=True)[0][c] for c in range(len(v))]
        for v in (means, variances)
    ]
    return [torch.stack(g).flatten(1) for g in grads]


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@settings(max_examples=80, deadline=None)
@given(
    case=convolutions(),
    stride=st.integers(1, 3),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_derivative_is_autograds(case, stride, dtype):
    conv, x = case
    conv, x = conv.to(dtype), x.to(dtype)
    y = conv(x).detach()
    mean, var = batch_moments(y)
    derivative = batch_derivative(conv, x, y, mean, stride)
    assert derivative.mean.dtype == derivative.var.dtype == mean.dtype
    expected_mean, expected_var = autograd_derivatives(conv.double(), x.double(), stride)
    per_group = conv.out_channels // conv.groups
    got_mean = derivative.mean.repeat_interleave(per_group, 0).double()
    scale = max(1.0, float(x.abs().max()))
    torch.testing.assert_close(got_mean, expected_mean, rtol=0, atol=TOLERANCE[dtype] * scale)
    torch.testing.assert_close(
        derivative.var.double(),
        expected_var,
        rtol=0,
        atol=TOLERANCE[dtype] * max(scale**2, float(expected_var.abs().max())),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments_are_those_of_all_positions(dtype):
    y = (torch.randn(3, 5, 7, 4) * 3 + 100).to(dtype)
    mean, var = batch_moments(y)
    assert mean.dtype == torch.promote_types(dtype, torch.float32)
    expected = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), expected[0], rtol=1e-4, atol=0)


def test_variance_survives_a_large_mean():
    y = torch.randn(2, 3, 20, 20) + 1000
    _, var = batch_moments(y)
    expected = y.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shift", [0, 0.5, 100])
def test_derivative_without_a_centred_copy(groups, shift, dtype, monkeypatch):
    """With the variance it takes a shorter way, where that is as good: not far from 0."""
    near, taken = moments._var_derivative_near, []
    monkeypatch.setattr(
        moments, "_var_derivative_near", lambda *args: taken.append(0) or near(*args)
    )
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=groups).to(dtype)
    x = torch.randn(2, 4, 30, 31, dtype=dtype) + shift
    y = conv(x).detach()
    mean, var = batch_moments(y)
    expected = autograd_derivatives(conv.double(), x.double(), 1)[1]
    conv.to(dtype)
    for known in (None, var):
        h = batch_derivative(conv, x, y, mean, 1, known).var
        error = (h.double() - expected).norm() / expected.norm()
        assert error < (1e-12 if dtype == torch.float64 else 2e-5) * max(1, shift)
    assert len(taken) == (shift < 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mean", [0, 1, 7.9, 8.1, 100, 1500, 2e4, 1e5])
def test_moments_of_large_maps(channels, mean):
    """They have a faster way, which is only as good where the mean is not far from 0."""
    y = torch.randn(2, channels, 300, 300)
    y[:, 0] += mean  # alone in it, or among others
    assert y.numel() >= moments._LARGE
    got_mean, got_var = batch_moments(y)
    var, expected_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(got_mean.double(), expected_mean, rtol=1e-6, atol=1e-6)
    # The rounding of the mean is what torch's own kernel is left with.
    rtol = 2e-5 + (mean * 6e-8) ** 2
    torch.testing.assert_close(got_var.double(), var, rtol=rtol, atol=0)


def test_moments_of_large_maps_that_are_constant():
    y = torch.zeros(2, 3, 200, 200)
    y[:, 1] = 0.3
    y[:, 2] = -1e4
    mean, var = batch_moments(y)
    torch.testing.assert_close(mean, y[0, :, 0, 0], rtol=1e-6, atol=0)
    assert (var >= 0).all() and (var <= 1e-10 * mean.square()).all()


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=needs_float16), torch.bfloat16]
)
def test_half_precision_does_not_overflow(dtype):
    """1e5 positions and activations of 1e3: a plain sum would leave fp16's range."""
    conv = nn.Conv2d(2, 2, 1, bias=False).to(dtype)
    x = (torch.randn(2, 2, 224, 224) * 300 + 1000).to(dtype)
    y = conv(x).detach()
    mean, var = batch_moments(y)
    derivative = batch_derivative(conv, x, y, mean, 1)
    expected = autograd_derivatives(conv.double(), x.double(), 1)
    torch.testing.assert_close(derivative.var.double(), expected[1], rtol=0.05, atol=2e3)
    torch.testing.assert_close(derivative.mean.double(), expected[0][:1], rtol=0.01, atol=0)


@needs_float16
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (1, 2, 3, 3)])
def test_half_precision_with_few_positions_or_a_constant_channel(shape):
    conv = nn.Conv2d(2, 3, 1).half()
    with torch.no_grad():
        conv.weight[1] = 0
    x = torch.randn(shape).half()
    y = conv(x).detach()
    derivative = batch_derivative(conv, x, y, batch_moments(y)[0], 3)
    assert derivative.var.isfinite().all() and derivative.mean.isfinite().all()
    assert not derivative.var[1].any()


@pytest.mark.parametrize("stride, kernel, size", [(1, 3, 9), (2, 3, 16), (2, 5, 15), (2, 1, 8)])
def test_a_convolution_that_pads_by_itself(stride, kernel, size):
    """EfficientNet's, which pads to TensorFlow's "same" size, unevenly."""
    from mmcv.cnn.bricks import Conv2dAdaptivePadding

    conv = Conv2dAdaptivePadding(2, 3, kernel, stride).double()
    x = torch.randn(2, 2, size, size + 1, dtype=torch.float64) + 1
    y = conv(x).detach()
    assert is_plain(conv, x, y)
    derivative = batch_derivative(conv, x, y, batch_moments(y)[0], 1)
    expected = autograd_derivatives(conv, x, 1)
    torch.testing.assert_close(derivative.mean.expand(3, -1), expected[0])
    torch.testing.assert_close(derivative.var, expected[1])


def test_what_is_no_plain_convolution():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 8, 8)
    y = conv(x).detach()
    assert is_plain(conv, x, y)
    assert is_plain(conv.bfloat16(), x, conv(x.bfloat16()))
    conv.float()
    striped = y.clone()
    striped[:, :, 1::2] *= 2
    for other in (2 * y, y + y.std(), y.flip(1), striped, y[:, :, :4], y[:, :, ::2, ::2], y[:, :2]):
        assert not is_plain(conv, x, other)
    assert not is_plain(conv, x[:, :2], y)


@pytest.mark.parametrize(
    ("of_y", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ],
)
def test_channel_sums(of_y, dtype):
    torch.manual_seed(0)
    grad, y = torch.randn(2, 3, 4, 5, 6).to(of_y)
    mean, var = torch.randn(4, dtype=dtype), torch.rand(4, dtype=dtype) + 0.1
    r = (var + 1e-3).rsqrt()
    sums = channel_sums(grad, y, mean, var, 1e-3, r)
    grad, y, mean, r = (each.double() for each in (grad, y, mean, r))
    x_hat = (y - mean[:, None, None]) * r[:, None, None]
    expected = (grad * x_hat).sum((0, 2, 3)), grad.sum((0, 2, 3))
    for found, of in zip(sums, expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), of, rtol=1e-4, atol=1e-4)


def test_channel_sums_hand_over_what_the_kernel_of_a_gpu_reads():
    """It takes no scale and no saved statistics for an error; that of the CPU reads neither."""
    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "batch_norm_backward" in str(function):
                calls.append(args)
            return function(*args, **(kwargs or {}))

    y, mean, var = torch.randn(2, 4, 5, 6), torch.zeros(4), torch.rand(4)
    with Watch():
        channel_sums(y, y, mean, var, 0.0, var.rsqrt())
    (given,) = calls
    assert [given[3].data_ptr(), given[5].data_ptr()] == [mean.data_ptr()] * 2
    torch.testing.assert_close(given[6], given[4].rsqrt())
    assert given[2].dtype == mean.dtype and given[2].shape == mean.shape
