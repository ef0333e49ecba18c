"""Loops other than the plain one, which docs/pytorch.md has (tests/test_docs.py)."""

import copy
import gc
import math
import os
import warnings

import pytest
import torch
from layers import (
    KINDS,
    assert_same_window,
    backward,
    chain,
    descend,
    iterate,
    linked,
    state_of,
    tensors,
)
from torch import nn

from cbn_mmdet import CBN, link, load_window_state, set_window, step, window_state
from cbn_mmdet.norm.normalize import coefficients
from cbn_mmdet.norm.reference import Reference


def test_a_loop_that_never_steps_is_told():
    model = linked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 3, 8, 8))  # a repetition is no missed step
    optimizer.step()
    with pytest.warns(UserWarning, match=r"cbn_mmdet.step\(model\) was not called"):
        model(torch.randn(2, 3, 8, 8))


def test_forwards_without_a_step_are_told_of_once():
    """Such forwards gather statistics, as domain adaptation does by hand."""
    model, told = linked(), []
    for number in range(25):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(torch.randn(2, 3, 8, 8))
        told += [(number, str(each.message)) for each in caught]
    ((number, message),) = told
    assert number == 9
    assert "10 forwards in training mode, and cbn_mmdet.step(model) was" in message
    assert not model[1].running_mean.any()


class Alone(nn.Module):
    """Keeps its loss to itself; its forward returns nothing."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
        link(self)

    def forward(self, x):
        self.loss = self.body(x).square().mean()


def test_a_forward_without_an_output_has_not_failed():
    """What it recorded counts."""
    model = Alone()
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8))
        model.loss.backward()
        step(model)
    (window,) = window_state(model)["body.1"]
    assert window["seen"] == model.body[1].num_batches_tracked == 3


def test_training_while_an_error_is_handled():
    """That error is not the forward's."""
    model = Alone()
    try:
        raise FileNotFoundError("no checkpoint")
    except FileNotFoundError:
        model(torch.randn(2, 3, 6, 6))
        step(model)
    (window,) = window_state(model)["body.1"]
    assert window["seen"] == 1


def test_a_search_on_a_line_is_not_told_of():
    """In a model that trains, one step of LBFGS may take many forwards."""
    model = linked()
    iterate(model, 6)
    backward(model, torch.randn(2, 3, 8, 8))
    step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(25):
            model(torch.randn(2, 3, 8, 8))
    with pytest.warns(UserWarning, match="100 forwards in training mode"):  # no search is so long
        for _ in range(75):
            model(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("frames", "size", "count"), [(20, "auto", 1), (1, "auto", 0), (20, 8, 0)])
def test_windows_that_stay_narrow_are_told_of_once(frames, size, count):
    """Images in an order, as a film has: the last is the best guess of the next."""
    model, told = linked(size=size), []
    for number in range(500):
        if number % frames == 0:
            x = torch.randn(1, 3, 8, 8) * torch.rand(3, 1, 1) + torch.randn(3, 1, 1)
        model(x).square().sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model)
        told += [str(each.message) for each in caught]
    assert len(told) == count
    for message in told:
        assert "windows have averaged 1." in message and "for 100 iterations" in message


@pytest.mark.parametrize(
    ("share", "limit", "told_at"),
    [
        (lambda number: 1, None, [99]),
        (lambda number: 1, 2, []),  # windows of at most 2 are narrow on purpose
        (lambda number: 1 if number % 100 else 1 / 8, None, []),  # never 100 in a row
        (lambda number: 1 if number else 1 / 8, None, [100]),
    ],
)
def test_which_windows_are_narrow(share, limit, told_at):
    """A ``step`` without a forward neither counts nor interrupts."""
    model, told = linked(size="auto"), []
    set_window(model, limit)
    iterate(model, 3)
    for number in range(250):
        state = window_state(model)
        state["1"][0].update(log_share=math.log(share(number)), seen=1000)
        load_window_state(model, state)
        model(torch.randn(1, 3, 8, 8)).square().sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model)
            step(model)
        told += [number for each in caught if "windows have averaged" in str(each.message)]
    assert told == told_at


@KINDS
def test_the_first_iterations_may_run_in_inference_mode(kind):
    model = linked(kind)
    for _ in range(2):
        with torch.inference_mode():
            model(torch.randn(2, 3, 8, 8))
            step(model)
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        step(model)
    assert state_of(model)["seen"] == 4


@pytest.mark.filterwarnings("ignore:CBN. the weights changed since the last forward")
def test_a_closure_that_is_evaluated_again():
    """LBFGS: many forwards in a step of the optimiser, the last of which counts."""
    torch.manual_seed(0)
    model = chain(nn.Conv2d(3, 4, 3, bias=False), CBN(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
    slow = Reference(copy.deepcopy(model[0]))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    for iteration in range(1, 4):
        x, weights = torch.randn(2, 3, 8, 8), []

        def closure(x=x, weights=weights):
            optimizer.zero_grad()
            weights.append(model[0].weight.detach().clone())
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        before = closure().item()
        assert closure().item() == before  # the same weights, the same loss
        optimizer.step(closure)
        assert len(weights) > 4
        step(model)
        assert state_of(model)["seen"] == iteration
        assert model[1].num_batches_tracked == iteration
        slow.conv.load_state_dict({"weight": weights[-1]})
        slow.step(x)
        state = state_of(model)
        for name, value in (("recorded", slow.past[0].mean), ("h", slow.past[0].var_in_w)):
            value = value.flatten(1) if value.dim() > 1 else value
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)


def test_two_optimisers_in_turn():
    """A generator and a critic: each has its own step, and the other's window stays."""
    torch.manual_seed(0)
    generator = chain(nn.Conv2d(3, 3, 3), CBN(3, window_size=3))
    critic = chain(nn.Conv2d(3, 4, 3), CBN(4, window_size=3))
    slow = {
        model: Reference(copy.deepcopy(model[0]).double(), "moving", 3, model[1].eps)
        for model in (generator, critic)
    }
    for index in range(6):
        z = torch.randn(2, 3, 10, 10)
        fake = generator(z)
        score = critic(fake)
        for model, x, y in ((generator, z, fake), (critic, fake.detach(), score)):
            reference = slow[model]
            reference.conv.load_state_dict(model[0].state_dict())
            expected = reference.forward(x.double(), model[1].weight, model[1].bias)
            torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
        trained, x = ((generator, z), (critic, fake.detach().double()))[index % 2]
        (score.square().mean()).backward()
        slow[trained].step(x.double())
        step(trained)
        descend(trained)


@KINDS
@pytest.mark.parametrize("inference", [False, True])
def test_parts_whose_forward_and_backward_alternate(inference, kind):
    """A layer's record is the same whether another's backward pass comes before its forward.

    Up to rounding: after a backward pass, pasts are not computed together any more.
    """

    def train(parts, alternate):
        windows = []
        for number in range(4):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
            if alternate:
                parts[0](x).sum().backward()
            with torch.inference_mode(inference):
                parts[1](x)
            if not alternate:
                parts[0](x).sum().backward()
            step(parts)
            with torch.no_grad():
                for part in parts:
                    part[0].weight += 0.05
            windows.append(window_state(parts))
        return windows

    torch.manual_seed(0)
    parts = nn.ModuleList(linked(kind) for _ in range(2))
    link(parts)
    twin = copy.deepcopy(parts)
    link(twin)
    for ours, theirs in zip(train(parts, True), train(twin, False), strict=True):
        for name in ours:
            torch.testing.assert_close(*(tensors(each[name][0]) for each in (ours, theirs)))


def test_a_backward_pass_that_fails_can_be_repeated(monkeypatch):
    """Such as by lack of memory: nothing is added to the batch's derivative twice."""
    torch.manual_seed(0)
    model = linked()
    iterate(model, 3)
    twin = copy.deepcopy(model)
    link(twin)
    load_window_state(twin, window_state(model))
    x, place = torch.randn(2, 3, 8, 8), "cbn_mmdet.norm.iteration.coefficients"

    def fail(vectors):
        monkeypatch.setattr(place, coefficients)
        raise MemoryError

    monkeypatch.setattr(place, fail)
    loss = model(x).square().sum()
    with pytest.raises(MemoryError):
        loss.backward(retain_graph=True)
    loss.backward()
    twin(x).square().sum().backward()
    assert torch.equal(model[0].weight.grad, twin[0].weight.grad)
    step(model), step(twin)
    assert_same_window(state_of(model), state_of(twin))


@pytest.mark.slow
def test_2000_steps_hold_no_more_than_200():
    torch.manual_seed(0)
    sliding = CBN(8, window="sliding", window_size=4, backward="window")
    model = chain(nn.Conv2d(3, 8, 3), sliding, nn.ReLU(), nn.Conv2d(8, 8, 3), CBN(8))
    sizes = [(9, 9), (12, 9), (16, 16)]
    alive, memory = {}, {}
    for index in range(2001):
        backward(model, torch.randn(2, 3, *sizes[index % 3]))
        step(model)
        descend(model)
        if index % 50 == 0:
            model.eval()(torch.randn(1, 3, 10, 10))
            model.train()
        if index in (200, 2000):
            gc.collect()
            count = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
            alive[index] = count, model[1].window_bytes, model[4].window_bytes
            memory[index] = resident_bytes()
    assert alive[2000] == alive[200]
    assert memory[2000] - memory[200] < 2 * 1024**2  # a window entry alone is 3 kB a step


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
