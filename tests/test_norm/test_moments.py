"""The statistics of a batch and their derivatives, against autograd."""

from contextlib import nullcontext

import pytest
import torch
from conftest import computes_in_float16, needs_float16
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layers import as_on_a_gpu, is_computed_by_torch
from torch import nn

from cbn_mmdet.norm import moments
from cbn_mmdet.norm.linking import mark, source_of
from cbn_mmdet.norm.moments import Source, batch_derivative, batch_moments, stride_for

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
@pytest.mark.parametrize("is_gpu", [False, True], ids=["", "as on a GPU"])
@settings(max_examples=60, deadline=None)
@given(
    case=convolutions(),
    stride=st.integers(1, 3),
    dtype=st.sampled_from(list(TOLERANCE)),
    is_last=st.booleans(),
)
def test_derivative_is_autograds(is_gpu, case, stride, dtype, is_last):
    conv, x = case
    assume(is_computed_by_torch(conv, dtype))
    layout = torch.channels_last if is_last else torch.contiguous_format
    conv, x = conv.to(dtype), x.to(dtype, memory_format=layout)
    y = conv(x).detach()
    if is_gpu and dtype == torch.float16:  # of one position, a CPU rounds y r and mean r apart
        assume(y[:, 0, ::stride, ::stride].numel() > 1)
    of_batch = batch_moments(y)
    with as_on_a_gpu() if is_gpu else nullcontext():
        derivative = batch_derivative(Source.of(conv, x), y, of_batch, stride)
    assert {each.dtype for each in derivative} == {of_batch.mean.dtype}
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
    # The products with the weight follow from the moments alone.
    weight = conv.weight.detach().flatten(1)
    of_mean, of_var = ((each * weight).sum(1) for each in (expected_mean, expected_var))
    atol = TOLERANCE[dtype] * max(scale, float(y.abs().max())) ** 2
    torch.testing.assert_close(derivative.mean_at.double(), of_mean, rtol=0, atol=atol)
    torch.testing.assert_close(derivative.half_var_at.double(), of_var / 2, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments_are_those_of_all_positions(dtype):
    y = (torch.randn(3, 5, 7, 4) * 3 + 100).to(dtype)
    found = batch_moments(y)
    assert found.mean.dtype == torch.promote_types(dtype, torch.float32)
    var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.var.double(), var, rtol=1e-4, atol=0)
    unbiased = y.double().var((0, 2, 3))
    torch.testing.assert_close(found.unbiased_var.double(), unbiased, rtol=1e-4, atol=0)
    assert found.count == found.own_count == 3 * 7 * 4
    assert found.own_mean is found.mean and found.own_var is found.var


@pytest.mark.parametrize("size", [(0, 5, 7, 4), (2, 5, 0, 4)])
def test_a_batch_without_positions(size):
    y = torch.empty(size)
    found = batch_moments(y)
    assert found.count == 0 and not found.mean.any() and not found.unbiased_var.any()
    conv = nn.Conv2d(2, 5, 3, bias=False)
    for each in batch_derivative(Source.of(conv, torch.empty(0, 2, 9, 6)), y, found):
        assert not each.any()


def test_one_position_has_an_unbiased_variance_of_zero():
    assert torch.equal(batch_moments(torch.randn(1, 3, 1, 1)).unbiased_var, torch.zeros(3))


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


def test_the_default_stride_is_the_derivatives():
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 42, 42)
    y = conv(x).detach()
    of_batch = batch_moments(y)
    found, asked = (
        batch_derivative(Source.of(conv, x), y, of_batch, stride) for stride in (None, 2)
    )
    assert torch.equal(found.var, asked.var)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shift", [0, 0.5, 100])
def test_derivative_without_a_centred_copy(groups, shift, dtype, monkeypatch):
    """A shorter path is taken where it is as exact: where the mean is not far from 0."""
    near, taken = moments._var_derivative_near, []
    monkeypatch.setattr(
        moments, "_var_derivative_near", lambda *args: taken.append(0) or near(*args)
    )
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=groups).to(dtype)
    x = torch.randn(2, 4, 150, 151, dtype=dtype) + shift
    y = conv(x).detach()
    assert y.numel() >= max(moments._LARGE, 4 * conv.weight.numel())
    of_batch = batch_moments(y)
    expected = autograd_derivatives(conv.double(), x.double(), 1)[1]
    h = batch_derivative(Source.of(conv.to(dtype), x), y, of_batch, 1).var
    error = (h.double() - expected).norm() / expected.norm()
    assert error < (1e-12 if dtype == torch.float64 else 2e-5) * max(1, shift)
    assert len(taken) == (shift < 1)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=needs_float16), torch.bfloat16]
)
def test_half_precision_does_not_overflow(dtype):
    """1e5 positions and activations of 1e3: a plain sum would leave fp16's range."""
    conv = nn.Conv2d(2, 2, 1, bias=False).to(dtype)
    x = (torch.randn(2, 2, 224, 224) * 300 + 1000).to(dtype)
    y = conv(x).detach()
    derivative = batch_derivative(Source.of(conv, x), y, batch_moments(y), 1)
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
    derivative = batch_derivative(Source.of(conv, x), y, batch_moments(y), 3)
    assert derivative.var.isfinite().all() and derivative.mean.isfinite().all()
    assert derivative.var[1].abs().max() < 1e-6


@needs_float16
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 12, 12)])
def test_constant_channels_in_half_precision(shape):
    """Their derivative is zero, however large the constants are."""
    conv, x = nn.Conv2d(3, 64, 1).half(), torch.randn(shape).half()
    nn.init.zeros_(conv.weight), nn.init.uniform_(conv.bias, -1000, 1000)
    y = conv(x).detach()
    derivative = batch_derivative(Source.of(conv, x), y, batch_moments(y), 1)
    assert not derivative.var.any()


@pytest.mark.parametrize("stride, kernel, size", [(1, 3, 9), (2, 3, 16), (2, 5, 15), (2, 1, 8)])
def test_a_convolution_that_pads_by_itself(stride, kernel, size):
    """EfficientNet's pads unevenly to TensorFlow's "same" size; autograd knows how."""
    from mmcv.cnn.bricks import Conv2dAdaptivePadding

    conv = Conv2dAdaptivePadding(2, 3, kernel, stride).double()
    x = torch.randn(2, 2, size, size + 1, dtype=torch.float64) + 1
    y = conv(x)
    mark(conv, x, y)
    _, source, why_not = source_of(y, str)
    assert not why_not and source.weight is conv.weight and source.bias is conv.bias
    derivative = batch_derivative(source, y, batch_moments(y.detach()), 1)
    expected = autograd_derivatives(conv, x, 1)
    torch.testing.assert_close(derivative.mean.expand(3, -1), expected[0])
    torch.testing.assert_close(derivative.var, expected[1])


@pytest.mark.parametrize("padding", ["valid", "same", 0, (2, 1)])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("kernel", [2, (3, 4)])
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_the_input_of_a_plain_convolution(kernel, mode, padding):
    """``Source`` pads it, except with zeros; convolving it gives the module's output."""
    conv = nn.Conv2d(2, 3, kernel, padding=padding, padding_mode=mode, bias=False)
    x = torch.randn(2, 2, 7, 8)
    source = Source.of(conv, x)
    found = nn.functional.conv2d(source.input, conv.weight, padding=tuple(source.padding))
    torch.testing.assert_close(found, conv(x))


def test_what_does_not_train_has_nothing_to_follow():
    conv = nn.Conv2d(2, 3, 1)
    conv.weight.requires_grad_(False)
    assert Source.of(conv, torch.empty(1, 2, 4, 4)) == Source(None, conv.bias)
