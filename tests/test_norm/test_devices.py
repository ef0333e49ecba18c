"""The layers on each device that is there, against themselves in float64 on the CPU."""

import copy

import pytest
import torch
from conftest import needs_float16
from layers import as_on_a_gpu
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cbn_mmdet import (
    BRN,
    CBN,
    diagnose,
    link,
    load_window_state,
    precise_statistics,
    set_window,
    step,
    to_batchnorm,
    window_state,
)
from cbn_mmdet.norm import kernels

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
# Large and small maps take different kernels.
SIZES = [(2, 40, 36), (3, 9, 9), (1, 40, 36), (2, 9, 9)]
LARGE = [(2, 96, 90), (3, 9, 9)]
SLIDING = dict(window="sliding", window_size=8)
LAYERS = {
    "mixed": dict(),
    "mixed, 8": dict(window_size=8),
    "window": dict(backward="window"),
    "current": dict(backward="current"),
    "naive": dict(compensate=False),
    "bfloat16": dict(window_dtype="bfloat16", derivative_stride=1),
    "stride 2": dict(derivative_stride=2),
    "sliding": SLIDING,
    "sliding, window": dict(SLIDING, backward="window"),
    "sliding, current": dict(SLIDING, backward="current"),
    "sliding, naive": dict(SLIDING, compensate=False),
    "sliding, bfloat16": dict(SLIDING, window_dtype="bfloat16", derivative_stride=1),
}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Turns TF32 off, which rounds as half precision does."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def products_in_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def build(norm, dtype=torch.float64, bias=True, **layer):
    torch.manual_seed(0)
    layer = dict(layer, momentum=0.3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        norm(8, **layer),
        nn.Tanh(),  # whose derivative, unlike ReLU's, does not jump with the last digit
        nn.Conv2d(8, 12, 3, stride=2, groups=2, padding=1, bias=bias),
        norm(12, **layer),
    )
    return model.to(dtype)


def images(number, sizes=SIZES):
    """The images of one iteration, in float64 on the CPU."""
    count, *size = sizes[number % len(sizes)]
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(count, 3, *size, dtype=torch.float64, generator=generator)
    return (1 + number % 3) * x + number % 2


def train(
    model,
    device,
    half=None,
    channels_last=False,
    repeat=False,
    burn_in=2,
    count=8,
    scaler=None,
    sizes=SIZES,
):
    """Trains for some iterations; returns outputs, gradients and buffers of each, in float64."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    link(model)
    dtype = next(model.parameters()).dtype
    seen = []
    for number in range(count):
        if any(isinstance(layer, CBN) for layer in model):
            set_window(model, 1 if number < burn_in else 4)
        x = images(number, sizes).to(device, dtype, memory_format=layout).requires_grad_()
        with torch.autocast(device, half, enabled=half is not None):
            y = checkpoint(model, x, use_reentrant=False) if repeat else model(x)
        generator = torch.Generator().manual_seed(1000 + number)
        head = torch.randn(y.shape, dtype=torch.float64, generator=generator)
        model.zero_grad()
        loss = (y * head.to(device, dtype)).sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        step(model, scaler)
        scale = 1 if scaler is None else scaler.get_scale()
        gradients = [x.grad / scale, *(p.grad / scale for p in model.parameters())]
        found = [y.detach(), *gradients, *model.buffers()]
        seen.append([each.to("cpu", torch.float64, copy=True) for each in found])
        with torch.no_grad():
            for parameter in model.parameters():
                move = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                parameter.add_(0.03 * move.to(device, parameter.dtype))
    return seen


def assert_close(found, expected, tolerance):
    """Within a tolerance relative to the largest number of each tensor, or to 1."""
    for iteration, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            limit = tolerance * max(1.0, float(other.abs().max()))
            where = f"iteration {iteration}, tensor {place}"
            torch.testing.assert_close(
                one, other, rtol=0, atol=limit, msg=lambda text, where=where: f"{where}: {text}"
            )


def assert_similar(found, expected):
    """Equal but for the rounding of half precision."""
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).norm() < 0.1 * max(1.0, float(other.norm()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("repeat", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", LAYERS)
def test_cbn(name, repeat, channels_last, device):
    expected = train(build(CBN, **LAYERS[name]), "cpu")
    model = build(CBN, torch.float32, **LAYERS[name])
    found = train(model, device, repeat=repeat, channels_last=channels_last)
    assert_close(found, expected, 4e-3 if "bfloat16" in name else 2e-4)


def train_as_on_a_gpu(*args, **kwargs):
    """Trains on the CPU by a GPU's code paths."""
    with as_on_a_gpu():
        return train(*args, **kwargs)


class TestTheWaysOfAGPU:
    @pytest.mark.parametrize("sizes", [SIZES, LARGE], ids=["", "large"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("name", LAYERS)
    def test_cbn(self, name, dtype, sizes):
        expected = train(build(CBN, **LAYERS[name]), "cpu", sizes=sizes)
        model = build(CBN, dtype, **LAYERS[name])
        found = train_as_on_a_gpu(model, "cpu", sizes=sizes)
        tolerance = 1e-6 if dtype == torch.float64 else 5e-4  # windows are in float32
        assert_close(found, expected, 4e-3 if "bfloat16" in name else tolerance)

    @pytest.mark.parametrize(
        "half", [torch.bfloat16, pytest.param(torch.float16, marks=needs_float16)]
    )
    @pytest.mark.parametrize("name", ["mixed", "current", "sliding, bfloat16"])
    def test_autocast(self, name, half):
        expected = train(build(CBN, bias=False, **LAYERS[name]), "cpu")
        model = build(CBN, torch.float32, bias=False, **LAYERS[name])
        found = train_as_on_a_gpu(model, "cpu", half)
        assert_similar(found, expected)

    def test_a_window_at_once_and_in_parts(self, monkeypatch):
        """The CPU reads a large window in bfloat16 in parts that fit a cache."""
        monkeypatch.setattr(kernels, "_BLOCK", 16)
        for name in ("bfloat16", "sliding, bfloat16"):
            of_gpu, in_parts = (
                run(build(CBN, torch.float32, **LAYERS[name]), "cpu")
                for run in (train_as_on_a_gpu, train)
            )
            assert_close(of_gpu, in_parts, 1e-4)


@pytest.mark.parametrize("device", [*DEVICES, "cpu, as a GPU"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_affine_sum(dtype, channels_last, device, monkeypatch):
    """Of channels with a scale of zero, too."""
    torch.manual_seed(0)
    if device == "cpu, as a GPU":
        device = "cpu"
        monkeypatch.setattr(kernels, "is_gpu", lambda tensor: True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    grad, y = (each.to(dtype) for each in torch.randn(2, 3, 5, 4, 7, dtype=torch.float64))
    scale = torch.tensor([0.0, 1e-25, -1e-3, 1.0, 30.0], dtype=exact)
    rows = torch.randn(2, 5, dtype=exact)
    offset, slope, factor = (each.view(-1, 1, 1).double() for each in (*rows, scale))
    expected = factor * grad.double() + offset + slope * y.double()
    scale, rows = kernels.not_zero(scale.to(device)), rows.to(device)
    if kernels.is_gpu(rows):
        rows = rows / scale
    y = y.to(device, memory_format=layout)
    found = kernels.affine_sum(grad.to(device), y, scale, *rows)
    assert found.dtype == dtype and found.is_contiguous(memory_format=layout)
    digits = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=digits, atol=digits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.bfloat16,
        pytest.param(torch.float16, marks=needs_float16),
    ],
)
def test_statistics_and_centring(dtype, channels_last, step, device):
    """Also of every second row and column."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = (torch.randn(2, 5, 12, 14, dtype=torch.float64) * 3 + 1).to(dtype)
    part = y.to(device, memory_format=layout)[:, :, ::step, ::step]
    of = part.cpu().double()
    var, mean = torch.var_mean(of, (0, 2, 3), correction=0)
    digits = 1e-12 if dtype == torch.float64 else 1e-5
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    moments = kernels.moments(part)
    for found, expected in zip(moments, (mean, var), strict=True):
        assert found.dtype == exact
        torch.testing.assert_close(found.cpu().double(), expected, rtol=digits, atol=digits)
    found, r, var_again = kernels.centred(part, *moments)
    assert found.dtype == dtype and (r is None) == (dtype != torch.float16)
    torch.testing.assert_close(var_again.cpu().double(), var, rtol=10 * digits, atol=0)
    scale = 1.0 if r is None else kernels.HALF_SCALE * r.cpu().double()[:, None, None]
    count = of[:, 0].numel()
    digits = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    expected = 2 * scale * (of - mean[:, None, None])
    torch.testing.assert_close(
        count * found.cpu().double(), expected, rtol=digits, atol=10 * digits
    )


class FirstInputs(TorchDispatchMode):
    """Keeps the first input of each of batch norm's operations."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "batch_norm" in func.name():
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


@needs_float16
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
def test_a_gpu_is_given_no_gaps_in_float16(channels_last):
    """Of such maps its kernels round the mean to float16: see docs/gpu.md."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    whole = torch.randn(2, 5, 12, 14).to(torch.float16).contiguous(memory_format=layout)
    for y in (whole, whole[:, :, ::2, ::2]):
        with as_on_a_gpu(), FirstInputs() as inputs:
            kernels.centred(y, *kernels.moments(y))
        assert len(inputs.found) == 2
        for found in inputs.found:
            assert found.is_contiguous(memory_format=layout)
            assert torch.equal(found, y) and (y is not whole or found is whole)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 2])
def test_products_with_weights_keep_all_digits(groups, device, products_in_tf32):
    torch.manual_seed(0)
    m, h, w = torch.randn(groups, 900), torch.randn(64, 900), torch.randn(64, 900 // 9, 3, 3)
    found = kernels.weight_products(*([each.to(device)] for each in (m, h, w)), torch.float32)
    rows, by_channel = w.flatten(1).double(), m.double().repeat_interleave(64 // groups, 0)
    for one, other in zip(found[0], (by_channel, h.double()), strict=True):
        torch.testing.assert_close(one.cpu().double(), (rows * other).sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_brn(dtype, device):
    limits = dict(warmup=2, r_end=6, d_end=6)
    found = train(build(BRN, dtype, **limits), device)
    assert_close(found, train(build(BRN, **limits), "cpu"), 2e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize(
    "name", ["mixed", "current", "naive", "bfloat16", "sliding", "sliding, bfloat16"]
)
def test_autocast(name, channels_last, device):
    """To the rounding of bfloat16, or float16 on a GPU. (A bias's gradient is rounding alone.)"""
    expected = train(build(CBN, bias=False, **LAYERS[name]), "cpu")
    half = torch.float16 if device == "cuda" else torch.bfloat16
    model = build(CBN, torch.float32, bias=False, **LAYERS[name])
    assert_similar(train(model, device, half, channels_last), expected)
    for (state,) in window_state(model).values():
        dtypes = {key: value.dtype for key, value in state.items() if torch.is_tensor(value)}
        assert dtypes.pop("h", None) == (
            None if name == "naive" else torch.bfloat16 if "bfloat16" in name else torch.float32
        )
        assert set(dtypes.values()) == {torch.float32}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["mixed", "sliding"])
def test_a_loss_scaler(name, device):
    """Averages of gradients are kept without the scale, wherever the scaler lives."""
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("needs torch 2.3")
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    model = build(CBN, torch.float32, **LAYERS[name])
    found = train(model, device, scaler=scaler)
    assert_close(found, train(build(CBN, **LAYERS[name]), "cpu"), 2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_training_leaves(device):
    """Windows, their diagnosis, statistics of a population, and batch normalisation."""
    model, reference = build(CBN, torch.float32), build(CBN)
    train(model, device)
    train(reference, "cpu")
    held = [tensor for (state,) in window_state(model).values() for tensor in state.values()]
    assert {tensor.device.type for tensor in held if torch.is_tensor(tensor)} == {device}
    for name, figures in diagnose(reference).items():
        assert diagnose(model)[name] == pytest.approx(figures, rel=1e-2, abs=1e-4)

    other = copy.deepcopy(model)
    link(other)
    set_window(other, 4)
    load_window_state(other, window_state(model))
    x = images(9).to(device, torch.float32)
    assert torch.equal(model(x), other(x))

    batches = [images(number) for number in range(4)]
    precise_statistics(reference, batches)
    precise_statistics(model, [batch.to(device, torch.float32) for batch in batches])
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(
            ours.cpu().double(), theirs.double(), rtol=2e-3, atol=2e-3, check_dtype=False
        )
    expected = model.eval()(x)
    assert torch.equal(to_batchnorm(model)(x), expected)
