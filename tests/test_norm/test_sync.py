"""CBN over several processes, against plain autograd over the union of their batches."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbn_mmdet import CBN, SyncCBN, link, set_window, step, window_state

WORLD = 2
MOVES = 4
LAYERS = {
    "window 1": dict(window=1),
    "window": dict(window=3),
    "current": dict(window=3, backward="current"),
    "naive": dict(window=3, compensate=False),
}
# Unequal batches, and one process without any position.
SIZES = [(2, 3), (1, 0), (2, 2)]
CASES = {
    (name, recompute): dict(layer=layer, sizes=SIZES, recompute=recompute)
    for name, layer in LAYERS.items()
    for recompute in (False, True)
}
CASES["unequal windows"] = dict(layer=LAYERS["window"], sizes=SIZES, recompute=False, forget=2)
CASES["all empty"] = dict(layer=dict(window=3), sizes=[(2, 3), (0, 0)], recompute=False)


def build(window, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        SyncCBN(6, window_size=window, momentum=0.3, **kwargs),
    ).double()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.normal_()
    return model


def batch(rank, iteration, sizes):
    generator = torch.Generator().manual_seed(100 * iteration + rank)
    x = torch.randn(sizes[rank], 4, 5, 6, dtype=torch.float64, generator=generator)
    return x * (1 + iteration / 2) + rank


def head(rank, iteration, sizes):
    """A loss that is linear in the output with random weights."""
    generator = torch.Generator().manual_seed(7 + 100 * iteration + rank)
    return torch.randn(sizes[rank], 6, 5, 6, dtype=torch.float64, generator=generator)


def move(conv, iteration):
    generator = torch.Generator().manual_seed(1000 + iteration)
    with torch.no_grad():
        conv.weight += 0.05 * torch.randn(conv.weight.shape, generator=generator)
        conv.bias += 0.05 * torch.randn(conv.bias.shape, generator=generator)


def worker(rank, folder):
    """Every case on this process's part of the batches."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    seen = {name: train(rank, **case) for name, case in CASES.items()}
    seen["burn-in"] = burn_in(rank)
    torch.save(seen, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def train(rank, layer, sizes, recompute, forget=None):
    """Outputs, gradients and buffers of some iterations."""
    model = build(**layer)
    link(model)
    seen = []
    for iteration in range(MOVES):
        now = sizes[iteration % len(sizes)]
        if iteration == forget and rank == 1:
            model[1]._windows.clear()
        x = batch(rank, iteration, now).requires_grad_()
        out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        model.zero_grad()
        (out * head(rank, iteration, now)).sum().backward()
        step(model)
        gradients = [x.grad, *(parameter.grad.clone() for parameter in model.parameters())]
        buffers = [buffer.clone() for buffer in model.buffers()]
        seen.append((out.detach(), gradients, buffers))
        move(model[0], iteration)
    return seen


def burn_in(rank):
    """What the windows hold after an iteration in which they are closed."""
    model = build(window=3)
    link(model)
    set_window(model, 1)
    model(batch(rank, 0, (2, 3))).sum().backward()
    step(model)
    return window_state(model)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process saw."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pth") for rank in range(WORLD)]


class Union:
    """The same iterations in one process: the paper's formulas, with autograd throughout."""

    def __init__(self, window, backward="window", compensate=True, **_):
        self.model, self.window = build(window), window
        self.flow, self.compensate = backward == "window", compensate
        self.past = [[] for _ in range(WORLD)]

    def iterate(self, iteration, sizes):
        conv, norm = self.model
        self.model.zero_grad()
        inputs = [batch(rank, iteration, sizes).requires_grad_() for rank in range(WORLD)]
        outputs = [conv(x) for x in inputs]
        union = torch.cat(outputs)
        mean, second = union.mean((0, 2, 3)), union.square().mean((0, 2, 3))
        result, loss = [], 0
        for rank, y in enumerate(outputs):
            terms = [(mean, second)] + [self.compensated(entry) for entry in self.past[rank]]
            bar = torch.stack([mu for mu, _ in terms]).mean(0)
            nu = torch.stack([torch.maximum(nu, mu**2) for mu, nu in terms]).mean(0)
            scale = norm.weight * (nu - bar**2 + norm.eps).rsqrt()
            out = (y - bar[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
            loss = loss + (out * head(rank, iteration, sizes)).sum()
            result.append((out.detach(), bar.detach(), (nu - bar**2).detach()))
        loss.backward(retain_graph=True)
        gradients = [parameter.grad.clone() for parameter in self.model.parameters()]
        x_gradients = [x.grad.clone() for x in inputs]
        for rank, y in enumerate(outputs):
            self.past[rank].insert(0, self.entry(mean, second, y))
            del self.past[rank][self.window - 1 :]
        move(conv, iteration)
        return result, x_gradients, gradients

    def entry(self, mean, second, own):
        """Joint moments, and derivatives of this process's own."""
        conv = self.model[0]

        def derivative(values):
            return torch.stack(
                [
                    torch.autograd.grad(value, conv.weight, retain_graph=True)[0][channel]
                    for channel, value in enumerate(values)
                ]
            )

        if len(own):
            mu = own.mean((0, 2, 3))
            of_mean = derivative(mu)
            of_var = derivative((own - mu[:, None, None]).square().mean((0, 2, 3)))
        else:
            of_mean = of_var = torch.zeros_like(conv.weight)
        now = conv.weight.detach().clone(), conv.bias.detach().clone()
        return mean.detach(), (second - mean**2).detach(), of_mean, of_var, *now

    def compensated(self, entry):
        mean, var, of_mean, of_var, weight, bias = entry
        if not self.compensate:
            return mean, var + mean**2
        conv = self.model[0]
        now = (conv.weight, conv.bias) if self.flow else (conv.weight.detach(), conv.bias.detach())
        delta = (of_mean * (now[0] - weight)).flatten(1).sum(1)
        var = var + (of_var * (now[0] - weight)).flatten(1).sum(1) - delta**2
        mean = mean + delta + now[1] - bias
        return mean, var + mean**2


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_union(ranks, name, recompute):
    layer, seen = LAYERS[name], [each[name, recompute] for each in ranks]
    union = Union(**layer)
    running = [[torch.zeros(6), torch.ones(6)] for _ in range(WORLD)]
    # The window is held in float32.
    tolerance = dict(rtol=1e-6, atol=1e-6) if layer["window"] > 1 else {}
    for iteration in range(MOVES):
        sizes = SIZES[iteration % len(SIZES)]
        result, x_gradients, gradients = union.iterate(iteration, sizes)
        count = sum(sizes) * 30
        for rank in range(WORLD):
            out, (x_gradient, *_), buffers = seen[rank][iteration]
            expected, mean, var = result[rank]
            torch.testing.assert_close(out, expected, **tolerance)
            torch.testing.assert_close(x_gradient, x_gradients[rank], **tolerance)
            if name == "current":
                continue
            if layer["window"] == 1 or iteration == 0:
                var = var * count / (count - 1)
            running[rank] = [
                old.lerp(new.to(old), 0.3)
                for old, new in zip(running[rank], (mean, var), strict=True)
            ]
            torch.testing.assert_close(
                buffers[:2], [each.double() for each in running[rank]], rtol=1e-5, atol=1e-5
            )
        for index, expected in enumerate(gradients, 1):
            total = sum(seen[rank][iteration][1][index] for rank in range(WORLD))
            torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_a_burn_in_leaves_no_window(ranks):
    assert [each["burn-in"] for each in ranks] == [{"1": []}] * WORLD


def test_windows_of_unequal_length(ranks):
    """Each process divides by the length of its own window."""
    union, seen = Union(**LAYERS["window"]), [each["unequal windows"] for each in ranks]
    for iteration in range(MOVES):
        if iteration == 2:
            union.past[1].clear()
        result, x_gradients, gradients = union.iterate(iteration, SIZES[iteration % len(SIZES)])
        for rank in range(WORLD):
            out, (x_gradient, *own), _ = seen[rank][iteration]
            torch.testing.assert_close(out, result[rank][0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(x_gradient, x_gradients[rank], rtol=1e-6, atol=1e-6)
        for index, expected in enumerate(gradients, 1):
            total = sum(seen[rank][iteration][1][index] for rank in range(WORLD))
            torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["window 1", "current"])
def test_running_statistics_of_the_union(ranks, name):
    """With a window of 1, or the paper's gradient, they are nn.BatchNorm2d's on the union."""
    union = build(1)
    bn = nn.BatchNorm2d(6, momentum=0.3).double()
    for iteration in range(MOVES):
        sizes = SIZES[iteration % len(SIZES)]
        bn(union[0](torch.cat([batch(rank, iteration, sizes) for rank in range(WORLD)])))
        move(union[0], iteration)
        for rank in range(WORLD):
            buffers = ranks[rank][name, False][iteration][2]
            torch.testing.assert_close(buffers, list(bn.buffers()))


def test_all_empty(ranks):
    """An iteration without a position on any process leaves everything as it was."""
    for rank in range(WORLD):
        seen = ranks[rank]["all empty"]
        torch.testing.assert_close(seen[1][2], seen[0][2], rtol=0, atol=0)
        assert all(tensor.isfinite().all() for tensor in seen[2][1])


@pytest.mark.parametrize("window", [1, 4])
def test_alone_it_is_cbn(window):
    synced = build(window).float()
    alone = copy.deepcopy(synced)
    alone[1] = CBN(6, window_size=window, momentum=0.3)
    alone.load_state_dict(synced.state_dict())
    for model in (synced, alone):
        link(model)
    for iteration in range(6):
        x = batch(0, iteration, (2, 0)).float()
        out = [model(x) for model in (synced, alone)]
        assert torch.equal(*out)
        for model, y in zip((synced, alone), out, strict=True):
            model.zero_grad()
            y.square().sum().backward()
            step(model)
            move(model[0], iteration)
        assert torch.equal(synced[0].weight.grad, alone[0].weight.grad)
    for one, other in zip(synced.buffers(), alone.buffers(), strict=True):
        assert torch.equal(one, other)


def test_arguments():
    assert SyncCBN(4).sync and CBN(4, sync=True).sync and not CBN(4).sync
    assert "sync=True" in repr(SyncCBN(4)) and "sync" not in repr(CBN(4))
    with pytest.raises(ValueError, match="sync must be True or False, got 1"):
        CBN(4, sync=1)
