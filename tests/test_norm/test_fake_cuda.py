"""What the layers ask of a GPU, on a machine without one: launches, waits, and no mix of devices.

Where launches are limited, the message of a failure says which line makes each of them.
"""

from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from fake_cuda import backward, fake_cuda
from torch import nn

from cbn_mmdet import BRN, CBN, MABN, SyncCBN, link, set_window, step

PAPER = dict(window="sliding", window_size=4, backward="current")
SETTINGS = {
    "default": dict(),
    "fixed": dict(window_size=8),
    "window": dict(backward="window", window_size=4),
    "current": dict(backward="current"),
    "naive": dict(compensate=False),
    "bfloat16": dict(window_dtype="bfloat16"),
    "stride 1": dict(derivative_stride=1),
    "stride 2": dict(derivative_stride=2, backward="window"),
    "stride 4": dict(derivative_stride=4, compensate="where_possible"),
    "sliding": dict(PAPER, backward="mixed"),
    "sliding, window": dict(PAPER, backward="window"),
    "paper": PAPER,
    "paper, bfloat16": dict(PAPER, window_dtype="bfloat16", derivative_stride=1),
    "paper, naive": dict(PAPER, compensate=False),
    "step": dict(window="step", window_size=4),
    "burn-in": dict(window_size=1),
    "no parameters": dict(affine=False, track_running_stats=False),
}
# In full and in mixed precision, where bfloat16 differs from float16 in the derivative alone.
CASES = [(name, half) for name in SETTINGS for half in (None, torch.float16)]
CASES.append(("default", torch.bfloat16))


def build(norm, layers=3, odd=False, **settings):
    """Convolutions of 3x3 and 1x1 in turn, no two of them alike."""
    modules, inputs = [], 4
    with torch.device("cuda"):
        for number in range(layers):
            channels = 8 * (number + 1)
            taps, pad = ((3, 1), (1, 0))[number % 2]
            if odd and number == 2:  # maps are small from here on
                conv = nn.Conv2d(inputs, channels, 3, 3, 1, groups=4)
            else:
                conv = nn.Conv2d(inputs, channels, taps, 1, pad, bias=odd and number == 1)
            modules += [conv, norm(channels, **settings), nn.ReLU()]
            inputs = channels
        return nn.Sequential(*modules)


def iterate(watch, model, half=None, scaler=None, size=(2, 40, 36)):
    """One iteration's forward, backward and end, counted."""
    images, *size = size
    x = torch.empty(images, 4, *size, device="cuda")
    watch.take()
    with torch.autocast("cuda", half, enabled=half is not None):
        y = model(x)
    forward = watch.take()
    backward(y if scaler is None else scaler.scale(y))
    counts = forward, watch.take()
    if any(isinstance(layer, CBN) for layer in model):
        step(model, scaler)
    counts = *counts, watch.take()
    with torch.no_grad():  # the optimiser
        for parameter in model.parameters():
            parameter.add_(1)
    return counts


def assert_no_wait(forward, backward, ended):
    """Nothing waits for the device, but ``step`` once."""
    assert forward.waits == []
    assert backward.waits == []
    assert len(ended.waits) <= 1, ended.waits


class TestWaits:
    @pytest.mark.parametrize(("name", "half"), CASES)
    def test_of_cbn(self, name, half):
        """One wait in ``step``; a new image size adds none."""
        with fake_cuda() as watch:
            model = build(CBN, odd=True, **SETTINGS[name])
            link(model)
            for size in ((2, 40, 36), (1, 64, 48), (2, 12, 12), (2, 40, 36)):
                assert_no_wait(*iterate(watch, model, half, size=size))

    def test_of_windows_that_differ(self):
        """After a burn-in, with shares that differ by layer, and after a layer is frozen."""
        with fake_cuda() as watch:
            model = build(CBN, 4, odd=True, momentum=0.02)
            link(model)
            set_window(model, 1)
            assert_no_wait(*iterate(watch, model))
            set_window(model, None)
            for _ in range(3):
                assert_no_wait(*iterate(watch, model))
                tell_apart(model)
            model[0].weight.requires_grad_(False)
            for _ in range(2):
                assert_no_wait(*iterate(watch, model))

    def test_of_kinds_that_are_mixed(self):
        """Two gradients and a naive layer are processed apart, and read together."""
        with fake_cuda() as watch:
            model = build(CBN, 3)
            model[1].compensate, model[4].backward = False, "window"
            link(model)
            for _ in range(3):
                assert_no_wait(*iterate(watch, model))

    def test_of_plain_averages(self):
        """Without momentum each layer reads its count of batches, as batch normalisation does."""
        with fake_cuda(answer=1.0) as watch:
            model, layers = build(CBN, momentum=None), 3
            link(model)
            for limit in (1, None, None):
                set_window(model, limit)
                forward, back, ended = iterate(watch, model)
                assert back.waits == []
                assert len(forward.waits) + len(ended.waits) == layers + 1

    def test_of_a_loss_scaler(self):
        with fake_cuda() as watch:
            model, scaler = build(CBN), torch.amp.GradScaler("cuda")
            link(model)
            for _ in range(3):
                assert_no_wait(*iterate(watch, model, torch.float16, scaler))

    @pytest.mark.parametrize("half", [None, torch.float16], ids=str)
    @pytest.mark.parametrize("norm", [BRN, MABN])
    def test_of_norms_without_a_step(self, norm, half):
        with fake_cuda() as watch:
            model = build(norm, odd=True)
            for _ in range(2):
                assert_no_wait(*iterate(watch, model, half))


@pytest.fixture
def two_processes():
    """Makes this the first of two processes; collectives return at once."""
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=0, world_size=2, store=fake_pg.FakeStore())
    yield
    dist.destroy_process_group()


COLLECTIVES = {"allgather_", "_allgather_base_", "allreduce_", "broadcast_", "reduce_scatter_"}


def collectives(counted):
    return sum(count for (name, _), count in counted.launches.items() if name in COLLECTIVES)


class TestSync:
    @pytest.mark.parametrize(("name", "half"), CASES)
    def test_waits_and_collectives(self, name, half, two_processes):
        """One collective per layer in each direction, as in SyncBN; one for all layers in step."""
        with fake_cuda() as watch:
            model = build(SyncCBN, odd=True, **SETTINGS[name])
            link(model)
            for _ in range(3):
                counts = iterate(watch, model, half)
                assert_no_wait(*counts)
                forward, back, ended = map(collectives, counts)
                assert forward == 3 and back <= 3 and ended <= 1
                names = {name for name, _ in counts[0].launches}
                assert "allgather_" not in names  # it takes lists, and copies them


def tell_apart(model):
    """Gives each moving window a share of its own, as they come to have with ``'auto'``."""
    layers = [layer for layer in model if isinstance(layer, CBN)]
    for number, layer in enumerate(layers, 1):
        for window in layer._windows:
            window.log_share = -0.1 * number


@lru_cache
def launches(name, layers, half=None):
    """Forward, backward and end of an iteration with full windows."""
    with fake_cuda() as watch:
        if name == "BN":
            model = build(nn.BatchNorm2d, layers)
        else:
            model = build(CBN, layers, **SETTINGS[name])
            link(model)
        for _ in range(4):
            counts = iterate(watch, model, half)
            tell_apart(model)
    return counts


class TestLaunches:
    """Compared with batch normalisation, with full windows whose shares differ."""

    # Launches beyond BN's in forward, backward and step, each as (per layer, for the model).
    # A forward includes its beginning, which moves all pasts. Where maps have 256 positions or
    # more, as here, it also picks out those of the derivative ("stride 1" does not).
    LIMITS = {
        ("default", None): ((10.5, 8), (9, 55), (0, 28)),
        ("stride 1", None): ((9, 8), (9, 55), (0, 28)),
        ("window", None): ((10.5, 8), (8, 30), (0, 23)),
        ("current", None): ((11.5, 8), (5, 34), (0, 23)),
        ("naive", None): ((4, 6), (3, 28), (0, 22)),
        ("bfloat16", None): ((11.5, 8), (10, 55), (8, 28)),
        ("default", torch.float16): ((12.5, 8), (9, 55), (0, 28)),
        ("default", torch.bfloat16): ((12.5, 8), (9, 55), (0, 28)),
        ("paper", None): ((25.5, 2), (3, 25), (8, 15)),
    }
    LAYERS = 61  # of a ResNet-50 with FPN
    BUDGET = 12, 10, 30 / LAYERS  # forward, backward, step: of each layer, in float32

    @pytest.mark.parametrize("name", ["default", "stride 1", "window"])
    def test_a_layers_budget(self, name):
        """Launches made once for a detector count in equal parts for its layers."""
        parts = (zip(launches(name, n), launches("BN", n), strict=True) for n in (2, 6))
        for few, many, budget in zip(*parts, self.BUDGET, strict=True):
            few_more, more = (one.total - of_bn.total for one, of_bn in (few, many))
            each = (more - few_more) / 4
            assert each + (few_more - 2 * each) / self.LAYERS <= budget

    @pytest.mark.parametrize(("name", "half"), LIMITS)
    def test_of_an_iteration(self, name, half):
        few, many = (
            list(zip(launches(name, n, half), launches("BN", n, half), strict=True)) for n in (2, 6)
        )
        limits = self.LIMITS[name, half]
        for (one, plain), (other, of_bn), (a_layer, model) in zip(few, many, limits, strict=True):
            few_more, more = one.total - plain.total, other.total - of_bn.total
            each = (more - few_more) / 4
            assert each <= a_layer, f"{each:.1f} a layer:\n{other}"
            assert few_more - 2 * each <= model, f"{few_more - 2 * each:.1f} a model:\n{one}"


@pytest.mark.parametrize("name", ["default", "window", "bfloat16"])
def test_no_product_of_matrices_in_a_backward(name):
    """TF32 would round what nearly cancels there: the past's mean patch and the batch's."""
    _, backward, _ = launches(name, 2)
    called = {call.strip("_") for call, _ in backward.launches}
    assert "addcmul" in called and not called & {"addmm", "baddbmm", "bmm", "mm"}


def test_products_write_no_more_than_a_weight():
    """The first thing that a forward does is to move all pasts to today's weights."""
    with fake_cuda() as watch:
        model = build(CBN, 4)
        link(model)
        iterate(watch, model)
        largest = max(conv.weight.numel() for conv in model[::3])
        for counted in iterate(watch, model, size=(1, 4, 4)):  # maps smaller than weights
            within = {where: size for where, size in counted.largest.items() if size > largest}
            assert within == {}


class TestTheCount:
    """Tests of the counting itself."""

    def test_a_read_value_and_a_copy_are_waits(self):
        with fake_cuda() as watch:
            x = torch.empty(3, device="cuda")
            for wait in (
                lambda: x.sum().item(),
                lambda: bool(x.any()),
                lambda: x.tolist(),
                lambda: x.cpu(),
                lambda: torch.tensor([1.0], device="cuda"),
                lambda: x.copy_(torch.zeros(3)),
            ):
                watch.take()
                wait()
                assert len(watch.take().waits) == 1
            torch.zeros(3).tolist()
            torch.zeros(3).pin_memory().to("cuda", non_blocking=True)
            x.copy_(torch.zeros(3).pin_memory(), non_blocking=True)
            assert watch.take().waits == []

    def test_a_mix_of_devices_raises(self):
        with fake_cuda(), pytest.raises(RuntimeError, match="two (different )?devices"):
            torch.empty(3, device="cuda") + torch.empty(3)

    def test_launches(self):
        with fake_cuda() as watch:
            x, y = torch.empty(2, 4, 3, device="cuda")
            watch.take()
            x.view(2, 6)[0].t().detach(), torch.empty_like(x), torch.zeros(3) + 1
            assert watch.take().total == 0
            torch._foreach_add([x, y[:2], y[:1]], [y, x[:2], x[:1]])
            assert watch.take().total == 1
            torch._foreach_add([x, x], [y, y[0]])  # of other shapes: one by one
            assert watch.take().total == 2
            x.isfinite().all()  # ==, abs, !=, and
            assert watch.take().total == 5

    def test_backward_goes_through_the_graph(self):
        """Each operation once, and one addition where two gradients meet."""
        with fake_cuda() as watch:
            model = build(nn.BatchNorm2d, 1)[:2]
            y = model(torch.empty(2, 4, 5, 5, device="cuda"))
            y = y.relu() + y
            watch.take()
            backward(y)
            names = [name.removeprefix("cudnn_") for name, _ in watch.take().launches]
        expected = "threshold_backward batch_norm_backward convolution_backward add"
        assert sorted(names) == sorted(expected.split())
