"""CBN over several processes, against plain autograd over the union of their batches."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layers import as_on_a_gpu
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbn_mmdet import CBN, SyncCBN, link, load_window_state, set_window, step, window_state
from cbn_mmdet.norm.reference import RATE, Reference

WORLD = 2
MOVES = 5
WINDOWS = {
    "moving": dict(window="moving", window_size=3),
    "auto": dict(window="moving", window_size="auto"),
    "sliding": dict(window="sliding", window_size=3),
}
LAYERS = {
    f"{name}, {backward}": dict(window, backward=backward)
    for name, window in WINDOWS.items()
    for backward in ("mixed", "window", "current")
}
LAYERS |= {f"{name}, naive": dict(window, compensate=False) for name, window in WINDOWS.items()}
LAYERS["window 1"] = dict(window="moving", window_size=1)
# Unequal batches, and one process without any position.
SIZES = [(2, 3), (1, 0), (2, 2)]
CASES = {
    (name, recompute): dict(layer=layer, sizes=SIZES, recompute=recompute)
    for name, layer in LAYERS.items()
    for recompute in (False, True)
}
CASES |= {
    (name, "as on a GPU"): dict(layer=layer, sizes=SIZES, as_gpu=True)
    for name, layer in LAYERS.items()
}
FIRST_EMPTY = [(0, 2), (3, 0), (2, 2)]
CASES |= {
    (name, "first empty"): dict(layer=LAYERS[name], sizes=FIRST_EMPTY)
    for name in ("moving, mixed", "auto, window", "sliding, mixed")
}
# A process that forgets its window has a share of its own from then on.
UNEQUAL = ["moving, window", "moving, current", "sliding, window", "sliding, current"]
CASES |= {
    (name, "unequal windows"): dict(layer=LAYERS[name], sizes=SIZES, forget=2) for name in UNEQUAL
}
for name in ("moving, mixed", "sliding, window", "window 1"):
    CASES[name, "all empty"] = dict(layer=LAYERS[name], sizes=[(2, 3), (0, 0)])
    CASES[name, "plain average"] = dict(layer=dict(LAYERS[name], momentum=None), sizes=SIZES)
    CASES[name, "burn-in"] = dict(layer=LAYERS[name], sizes=SIZES, limit=1)
CASES["moving, mixed", "burn-in, plain average"] = dict(
    layer=dict(LAYERS["moving, mixed"], momentum=None), sizes=SIZES, limit=1
)


def build(momentum=0.3, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        SyncCBN(6, momentum=momentum, derivative_stride=1, **kwargs),
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
    weights = torch.randn(sizes[rank], 6, 5, 6, dtype=torch.float64, generator=generator)
    return weights + 0.3  # a constant part, alike for past batches


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
    torch.save(seen, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def train(rank, layer, sizes, recompute=False, forget=None, limit=None, as_gpu=False):
    """Of each iteration output, gradients, buffers, windows, and whether anything changed early."""
    if as_gpu:
        with as_on_a_gpu():
            return train(rank, layer, sizes)
    model = build(**layer)
    link(model)
    set_window(model, limit)
    seen = []
    for iteration in range(MOVES):
        now = sizes[iteration % len(sizes)]
        if iteration == forget and rank == 1:
            set_window(model, 2)
            set_window(model, None)
        before = everything(model)
        x = batch(rank, iteration, now).requires_grad_()
        out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        model.zero_grad()
        (out * head(rank, iteration, now)).sum().backward()
        is_early = any(
            not torch.equal(*pair) for pair in zip(before, everything(model), strict=True)
        )
        step(model)
        if iteration == 0 and layer.get("window_size") == "auto" and limit is None:
            widen(model)
        gradients = [x.grad, *(parameter.grad.clone() for parameter in model.parameters())]
        buffers = [buffer.clone() for buffer in model.buffers()]
        seen.append((out.detach(), gradients, buffers, window_state(model)["1"], is_early))
        move(model[0], iteration)
    return seen


def everything(model):
    """Copies of what only the end of an iteration may change."""
    windows = [each for each in window_state(model)["1"] if each["seen"]]
    held = [value for window in windows for value in window.values() if torch.is_tensor(value)]
    return [buffer.clone() for buffer in model.buffers()] + held


LOG_SHARE = -1.2


def widen(model):
    """Makes a window that sets its own as wide as it is later in a training."""
    state = window_state(model)
    state["1"][0]["log_share"] = LOG_SHARE
    load_window_state(model, state)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process saw."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pth") for rank in range(WORLD)]


class Rank(Reference):
    """The past of one process; its surprises are judged together with those of all."""

    last = None

    def forget(self):
        """Empties the window."""
        super().forget()
        self.last = None

    def set_share(self, surprise):
        """Keeps the last two surprises."""
        self.last, self.surprise = self.surprise, surprise


class Union:
    """The same iterations in one process: the plainest code, with autograd throughout."""

    def __init__(self, **layer):
        self.model = build(**layer)
        self.conv, self.norm = self.model
        norm = self.norm
        self.ranks = [
            Rank(self.conv, norm.window, norm.window_size, norm.eps, norm.compensate, norm.backward)
            for _ in range(WORLD)
        ]

    def iterate(self, iteration, sizes):
        """Outputs, means and variances, gradients of each process; those of parameters summed."""
        self.model.zero_grad()
        heads = [head(rank, iteration, sizes) for rank in range(WORLD)]
        inputs = [batch(rank, iteration, sizes).requires_grad_() for rank in range(WORLD)]
        outputs = [self.conv(x) for x in inputs]
        union = torch.cat(outputs)
        self.of_batch = union.mean((0, 2, 3)).detach(), union.var((0, 2, 3), correction=0).detach()
        of = [rank.statistics(union) for rank in self.ranks]
        scale, shift = self.norm.weight, self.norm.bias
        out = [
            rank.normalize(y, each, scale, shift)
            for rank, y, each in zip(self.ranks, outputs, of, strict=True)
        ]
        losses = [(each * weights).sum() for each, weights in zip(out, heads, strict=True)]
        sum(losses).backward(retain_graph=True)
        gradients = [parameter.grad.clone() for parameter in self.model.parameters()]
        x_gradients = [x.grad.clone() for x in inputs]
        if self.norm.compensate and self.norm.backward == "mixed":
            off = self.taken_off(union, of, losses)
            x_gradients = [
                torch.autograd.grad(y, x, grad, retain_graph=True)[0]
                for x, y, grad in zip(
                    inputs, outputs, self.y_gradients(outputs, of, heads, off), strict=True
                )
            ]
        for rank, x in zip(self.ranks, inputs, strict=True):
            rank.push(self.entry(rank, inputs, x), union.detach())
        self.set_share()
        if iteration == 0 and self.norm.window_size == "auto":
            for rank in self.ranks:
                rank.log_share = LOG_SHARE
        move(self.conv, iteration)
        means = [(each.mean.detach(), each.var.detach()) for each in of]
        return [each.detach() for each in out], means, x_gradients, gradients

    def taken_off(self, union, of, losses):
        """What each process takes off for ``E[g]`` and ``E[g x_hat]``: it is linear in ``y``.

        The losses of all processes, by the joint statistics, pull alike at each position.
        """
        count, now = len(union) * union[0, 0].numel(), union.mean((0, 2, 3)).detach()
        pull = slope = 0
        for each, loss in zip(of, losses, strict=True):
            of_mean, of_var = torch.autograd.grad(loss, each, retain_graph=True)
            # A mean that moves by the batch's moves the variance by their distance.
            pull = pull + of_mean + 2 * of_var * (now - each.mean)
            slope = slope + of_var
        found = []
        for rank, each in zip(self.ranks, of, strict=True):
            r = (each.var + rank.eps).rsqrt()
            # dL/dy = (pull + 2 (y - mu) slope) / M, and y - mu = x_hat / r + mu_bar - mu.
            at_centre = pull + 2 * (each.mean - now) * slope
            own = [-at_centre / (r * count), -2 * slope / (r * r * count)]
            own = [value.detach() for value in own]
            rank.sums, s = tuple(own), 1 - (1 - rank.share()) ** 2
            averages = rank.averages or (0, 0)
            found.append(
                [s * now + (1 - s) * past for now, past in zip(own, averages, strict=True)]
            )
        return found

    def y_gradients(self, outputs, of, heads, off):
        """The gradient that reaches each process's output once ``off`` is taken off."""
        found = []
        for y, each, weights, (of_mean, of_var) in zip(outputs, of, heads, off, strict=True):
            r = (each.var + self.norm.eps).rsqrt()
            x_hat = (y - maps(each.mean)) * maps(r)
            g = weights * maps(self.norm.weight)
            found.append((maps(r) * (g - maps(of_mean) - x_hat * maps(of_var))).detach())
        return found

    def entry(self, rank, inputs, x):
        """Joint moments, with the derivatives of this process's own batch."""
        joint = rank.new_entry(torch.cat(inputs).detach())
        if len(x) == 0:
            nothing = torch.zeros_like(joint.weight)
            return joint._replace(mean_in_w=nothing, var_in_w=nothing)
        own = rank.new_entry(x.detach())
        return joint._replace(mean_in_w=own.mean_in_w, var_in_w=own.var_in_w)

    def set_share(self):
        """Sets the share by the agreement of surprises over the channels of all processes."""
        if any(rank.last is None for rank in self.ranks):
            return
        product, now, last = (
            sum((a * b).sum() for a, b in pairs)
            for pairs in (
                [(rank.surprise, rank.last) for rank in self.ranks],
                [(rank.surprise, rank.surprise) for rank in self.ranks],
                [(rank.last, rank.last) for rank in self.ranks],
            )
        )
        for rank in self.ranks:
            rank.log_share += RATE * (product / (now * last).sqrt()).item()


def maps(vector):
    return vector[:, None, None]


def assert_union(seen, union, sizes, forget=None):
    """Both processes saw what a single process sees on the union of their batches."""
    momentum = union.norm.momentum
    running = [[torch.zeros(6).double(), torch.ones(6).double()] for _ in range(WORLD)]
    # The window is held in float32.
    is_open = union.norm.window_size != 1
    tolerance = dict(rtol=1e-6, atol=1e-6) if is_open else {}
    gradients_tolerance = dict(rtol=1e-5, atol=1e-5) if is_open else {}
    for iteration in range(MOVES):
        if iteration == forget:
            union.ranks[1].forget()
        now = sizes[iteration % len(sizes)]
        is_first = [not rank.past for rank in union.ranks]
        outputs, of, x_gradients, gradients = union.iterate(iteration, now)
        count = sum(now) * 30
        for rank in range(WORLD):
            out, (x_gradient, *_), buffers, (window,), _ = seen[rank][iteration]
            torch.testing.assert_close(out, outputs[rank], **tolerance)
            torch.testing.assert_close(x_gradient, x_gradients[rank], **gradients_tolerance)
            mean, var = of[rank]
            if union.norm.backward == "current":
                mean, var = union.of_batch
            if union.norm.backward == "current" or is_first[rank] or not is_open:
                var = var * count / (count - 1)
            weight = 1 / (iteration + 1) if momentum is None else momentum
            running[rank] = [
                old.lerp(new, weight) for old, new in zip(running[rank], (mean, var), strict=True)
            ]
            torch.testing.assert_close(buffers[:2], running[rank], **tolerance)
            assert buffers[2] == iteration + 1
            if union.norm.window_size == "auto":
                share = union.ranks[rank].log_share
                assert window["log_share"] == pytest.approx(share, abs=1e-6)
        for index, expected in enumerate(gradients, 1):
            total = sum(seen[rank][iteration][1][index] for rank in range(WORLD))
            torch.testing.assert_close(total, expected, **gradients_tolerance)


@pytest.mark.parametrize(
    "what", [False, True, "as on a GPU"], ids=["", "checkpointed", "as on a GPU"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_union(ranks, name, what):
    assert_union([each[name, what] for each in ranks], Union(**LAYERS[name]), SIZES)


@pytest.mark.parametrize("name", [name for name, what in CASES if what == "first empty"])
def test_a_process_that_starts_without_a_position(ranks, name):
    seen = [each[name, "first empty"] for each in ranks]
    assert_union(seen, Union(**LAYERS[name]), FIRST_EMPTY)


@pytest.mark.parametrize("name", UNEQUAL)
def test_windows_of_unequal_length(ranks, name):
    """Each process's own share of the union sets the gradient its statistics send to batches."""
    seen = [each[name, "unequal windows"] for each in ranks]
    assert_union(seen, Union(**LAYERS[name]), SIZES, forget=2)


@pytest.mark.parametrize("name", [name for name, what in CASES if what == "plain average"])
def test_plain_average_of_the_running_statistics(ranks, name):
    case = CASES[name, "plain average"]
    assert_union([each[name, "plain average"] for each in ranks], Union(**case["layer"]), SIZES)


@pytest.mark.parametrize("name", [name for name, _ in CASES if name.startswith("auto")])
def test_one_share_for_all_processes(ranks, name):
    cases = [what for which, what in CASES if which == name]
    for what in cases:
        one, other = ([windows for *_, (windows,), _ in each[name, what]] for each in ranks)
        assert [each["log_share"] for each in one] == [each["log_share"] for each in other]
    assert one[-1]["log_share"] != one[0]["log_share"]


@pytest.mark.parametrize("name, what", [key for key in CASES if str(key[1]).startswith("burn-in")])
def test_a_burn_in_is_batch_normalisation_of_the_union(ranks, name, what):
    layer = dict(CASES[name, what]["layer"], window="moving", window_size=1)
    seen = [each[name, what] for each in ranks]
    assert_union(seen, Union(**layer), SIZES)
    windows = [window for each in seen for *_, (window,), _ in each]
    assert all(window["seen"] == 0 for window in windows)


def test_nothing_changes_before_the_end_of_an_iteration(ranks):
    early = [name for each in ranks for name, seen in each.items() if any(it[-1] for it in seen)]
    assert early == []


@pytest.mark.parametrize("name", ["window 1", *(name for name in LAYERS if "current" in name)])
def test_running_statistics_of_the_union(ranks, name):
    """With a window of 1, or the paper's gradient, they are nn.BatchNorm2d's on the union."""
    union = build(window_size=1)
    bn = nn.BatchNorm2d(6, momentum=0.3).double()
    for iteration in range(MOVES):
        sizes = SIZES[iteration % len(SIZES)]
        bn(union[0](torch.cat([batch(rank, iteration, sizes) for rank in range(WORLD)])))
        move(union[0], iteration)
        for rank in range(WORLD):
            buffers = ranks[rank][name, False][iteration][2]
            torch.testing.assert_close(buffers, list(bn.buffers()))


@pytest.mark.parametrize("name", [name for name, what in CASES if what == "all empty"])
def test_all_empty(ranks, name):
    """An iteration without a position on any process leaves everything as it was."""
    for rank in range(WORLD):
        seen = ranks[rank][name, "all empty"]
        torch.testing.assert_close(seen[1][2], seen[0][2], rtol=0, atol=0)
        assert seen[1][3][0]["seen"] == seen[0][3][0]["seen"]
        assert all(tensor.isfinite().all() for tensor in seen[2][1])


@pytest.mark.parametrize("name", ["moving, mixed", "auto, window", "sliding, current", "window 1"])
def test_alone_it_is_cbn(name):
    synced = build(**LAYERS[name]).float()
    alone = copy.deepcopy(synced)
    alone[1] = CBN(6, momentum=0.3, derivative_stride=1, **LAYERS[name])
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
