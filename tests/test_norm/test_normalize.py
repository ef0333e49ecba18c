"""The gradients: gradcheck in float64, and autograd on the reference's graph."""

import sys
from threading import Thread

import pytest
import torch
from torch import nn
from torch.func import functional_call

from cbn_mmdet import CBN, link, step, window_state
from cbn_mmdet.norm.reference import Reference

WINDOWS = pytest.mark.parametrize(
    ("kind", "size"), [("moving", 3), ("moving", "auto"), ("sliding", 3)]
)
BACKWARDS = ["current", "window", "mixed"]


def build(backward, kind="moving", size=4, affine=True, compensate=True, **kwargs):
    """A convolution with its CBN."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, **kwargs)
    norm = CBN(
        4, window=kind, window_size=size, backward=backward, affine=affine, compensate=compensate
    )
    model = nn.Sequential(conv, norm).double()
    if affine:
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
    link(model)
    return model


def batch():
    return torch.randn(2, 2, 6, 5, dtype=torch.float64) * (0.5 + torch.rand(1)) + torch.rand(1)


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def filled(*args, **kwargs):
    """A model of :func:`build`, its window filled by iterations with moving weights."""
    model = build(*args, **kwargs)
    for _ in range(6):
        output = model(batch())
        (output * torch.randn_like(output)).sum().backward()
        step(model)
        move(model)
    model.zero_grad()
    return model


@WINDOWS
@pytest.mark.parametrize(
    ("affine", "conv"),
    [(True, dict()), (False, dict(bias=False)), (True, dict(groups=2, stride=2, padding=1))],
    ids=str,
)
class TestGradcheck:
    def check(self, model, *inputs):
        names = [name for name, _ in model.named_parameters()]

        def run(*tensors):
            parameters = dict(zip(names, tensors[len(inputs) :], strict=True))
            return functional_call(model, parameters, tensors[: len(inputs)] or (x,))

        x, is_mixed = batch(), model[1].backward == "mixed"
        # What averages take off is given back up to rounding, and only in a graph's first backward
        # pass: a gradient of zero leaves a residue, and passes differ.
        tolerant = dict(nondet_tol=1e-9, check_undefined_grad=False) if is_mixed else {}
        return torch.autograd.gradcheck(run, (*inputs, *model.parameters()), **tolerant)

    def test_through_the_window(self, conv, affine, kind, size):
        """The gradient is the whole derivative of the union in the output and the weight."""
        model = filled("window", kind, size, affine=affine, **conv)
        assert self.check(model, batch().requires_grad_())

    def test_of_the_parameters(self, conv, affine, kind, size):
        """The parameters have the whole derivative, though the input gets another gradient."""
        assert self.check(filled("mixed", kind, size, affine=affine, **conv))

    def test_of_the_current_iteration(self, conv, affine, kind, size):
        """With the convolution's weight fixed, the paper's gradient is the whole gradient."""
        model = filled("current", kind, size, affine=affine, **conv)
        names = [name for name, _ in model.named_parameters() if name.startswith("1")]
        x = batch().requires_grad_()

        def run(x, *affine):
            return functional_call(model, dict(zip(names, affine, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *model[1].parameters()))


def descend(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.02 * parameter.grad.sign()


def close(found, expected):
    # The window is held in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("moving", 1), ("moving", 3), ("moving", "auto"), *(("sliding", size) for size in (1, 2, 5))],
)
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("conv", [dict(), dict(bias=False, groups=2)], ids=str)
def test_everything_is_the_references(conv, compensate, backward, kind, size):
    """Output, gradients, running statistics, averages of the gradient and the share."""
    model = build(backward, kind, size, compensate=compensate, **conv)
    conv, norm = model
    slow = Reference(conv, kind, size, norm.eps, compensate, backward)
    for number in range(7):
        x = batch().requires_grad_()
        target = torch.randn(2, 4, 4, 3, dtype=torch.float64) + number % 2
        ends = []
        for output in (model(x), slow.forward(x, norm.weight, norm.bias)):
            model.zero_grad()
            x.grad = None
            (output * target).sum().backward()
            ends.append([output.detach(), x.grad, *(p.grad.clone() for p in model.parameters())])
        for fast, plain in zip(*ends, strict=True):
            close(fast, plain)
        slow.step(x.detach())
        steps = [lambda: step(model), lambda: descend(model)]
        for each in steps[:: 1 - 2 * (number % 2)]:  # a loop may end the iteration before or after
            each()
        close(norm.running_mean, slow.running.mean)
        close(norm.running_var, slow.running.var)
        if size != 1:
            (state,) = window_state(model)["1"]
            assert (slow.averages is None) == ("sums" not in state)
            if slow.averages is not None:
                close(state["sums"].double(), torch.stack(slow.averages))
        if size == "auto":
            assert norm.mean_window_size == pytest.approx(1 / slow.share(), rel=1e-5)
    if size == "auto":
        assert slow.log_share < 0  # the share has set itself


@pytest.mark.parametrize("kind", ["moving", "sliding"])
def test_the_weights_gradient_is_orthogonal_to_it(kind):
    """Only the gradient through the window keeps the invariance to the weight's scale."""
    cosine = {}
    for backward in BACKWARDS:
        model = filled(backward, kind, 8, bias=False)
        weight = model[0].weight
        # V, a first-order expansion, is invariant at a weight that has not moved.
        for _ in range(60 if kind == "moving" else 8):
            output = model(batch())
            (output * torch.randn_like(output)).sum().backward()
            step(model)
        model.zero_grad()
        output = model(batch())
        (output * torch.randn_like(output)).sum().backward()
        dots = (weight * weight.grad).flatten(1).sum(1)
        cosine[backward] = (dots / weight.flatten(1).norm(dim=1)).abs().max().item()
    assert max(cosine[backward] for backward in BACKWARDS[1:]) < 1e-3
    assert cosine["current"] > 100 * cosine["window"]


@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_backward_pass_after_the_iterations_end_is_refused(backward):
    """An error, not a wrong gradient."""
    model = filled(backward)
    loss = model(batch()).square().sum()
    step(model)
    with pytest.raises(RuntimeError, match=r"'1' \(CBN\).*step\(model\) after the backward pass"):
        loss.backward()
    model(batch()).square().sum().backward()


@pytest.mark.parametrize("kind", ["moving", "sliding"])
class TestSeveralBackwardPasses:
    """Of one iteration."""

    def sums(self, model):
        return window_state(model)["1"][0].get("sums")

    @pytest.mark.parametrize("backward", BACKWARDS)
    def test_of_one_graph(self, backward, kind):
        """Two losses of one forward, one after the other, give what their sum gives."""
        ends = []
        for together in (True, False):
            model = filled(backward, kind)
            x = batch().requires_grad_()
            output = model(x)
            losses = [(output * torch.randn_like(output)).sum() for _ in range(2)]
            if together:
                sum(losses).backward()
            else:
                losses[0].backward(retain_graph=True)
                losses[1].backward()
            step(model)
            ends.append([x.grad, *(p.grad for p in model.parameters())])
            if backward == "mixed":
                ends[-1].append(self.sums(model))
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other)

    def test_in_two_threads(self, kind):
        """What all records of a model share is computed once, whichever thread comes first."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        ends = []
        try:
            for is_threaded in (True, False):
                torch.manual_seed(0)
                layers = [(nn.Conv2d(4, 4, 3), CBN(4, window=kind, window_size=3)) for _ in "ab"]
                heads = [nn.Sequential(*pair) for pair in layers]
                model = nn.ModuleList(heads).double()
                link(model)
                for _ in range(40):
                    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
                    losses = [(head(x) * torch.randn(2, 4, 3, 3)).sum() for head in heads]
                    threads = [Thread(target=loss.backward) for loss in losses]
                    for thread in threads:
                        thread.start()
                        if not is_threaded:
                            thread.join()
                    for thread in threads:
                        thread.join()
                    step(model)
                    move(model)
                states = [state for (state,) in window_state(model).values()]
                ends.append([*(p.grad for p in model.parameters()), *(s["h"] for s in states)])
        finally:
            sys.setswitchinterval(interval)
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other)

    def test_no_backward_pass_leaves_the_averages(self, kind):
        model = filled("mixed", kind)
        before = self.sums(model)
        seen = window_state(model)["1"][0]["seen"]
        model(batch())
        step(model)
        assert torch.equal(self.sums(model), before) and before.any()
        assert window_state(model)["1"][0]["seen"] == seen + 1

    def test_there_are_no_averages_before_the_first(self, kind):
        model = build("mixed", kind)
        model(batch())
        step(model)
        assert self.sums(model) is None
        output = model(batch())
        (output * 3).sum().backward()
        step(model)
        # The first gradient is taken as it is, not averaged.
        close(self.sums(model)[0].double(), 3 * model[1].weight.detach())

    def test_accumulation(self, kind):
        """Gradients of several forwards add up; the last one counts for the windows."""
        batches = [batch() for _ in range(3)]
        gradients, ends = [], []
        for used in (batches, *([each] for each in batches)):
            model = filled("mixed", kind)
            for x in used:
                model(x).square().sum().backward()
            step(model)
            gradients.append([p.grad for p in model.parameters()])
            ends.append(window_state(model)["1"][0])
        for whole, *parts in zip(*gradients, strict=True):
            torch.testing.assert_close(whole, sum(parts))
        assert all(torch.equal(ends[0][name], ends[-1][name]) for name in ("m", "h", "sums"))

    def test_without_gradient_of_the_output(self, kind):
        """A frozen convolution on an input without gradient: scale, shift and averages learn."""
        model = build("mixed", kind)
        model[0].requires_grad_(False)
        for _ in range(4):
            model(batch()).square().sum().backward()
            step(model)
        assert self.sums(model).isfinite().all()
        assert model[1].weight.grad.isfinite().all()


def test_a_scale_that_a_hook_sets_is_the_gradients():
    def triple(norm, args):
        nn.init.constant_(norm.weight, 3.0)

    gradients = []
    for is_hooked in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
        link(model)
        if is_hooked:
            model[1].register_forward_pre_hook(triple)
        else:
            nn.init.constant_(model[1].weight, 3.0)
        x = torch.randn(2, 3, 5, 5, requires_grad=True)
        model(x).pow(3).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("kind", ["moving", "sliding"])
def test_a_backward_pass_within_autocast(kind, backward, groups):
    """It computes the same as outside autocast."""
    models = [filled(backward, kind, groups=groups).float() for _ in "ab"]
    x, found = batch().float(), []
    for model, is_within in zip(models, (False, True), strict=True):
        link(model)
        for _ in range(2):
            loss = model(x).pow(3).sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=is_within):
                loss.backward()
            step(model)
        state = window_state(model)["1"][0]
        found.append([*(p.grad for p in model.parameters()), state["m"], state["h"]])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["moving", "sliding"])
def test_autograd_adds_to_the_weights_gradient_in_place(kind):
    """Memory of a weight's size that is asked for anew costs more than the addition."""
    model = filled("mixed", kind)
    model.zero_grad()
    loss = model(batch()).sum()
    with torch.profiler.profile(record_shapes=True) as profiler:
        loss.backward()
    size = list(model[0].weight.shape)
    names = [event.name for event in profiler.events() if event.input_shapes[:1] == [size]]
    assert "aten::add_" in names and "aten::add" not in names


@pytest.mark.parametrize("kind", ["moving", "sliding"])
def test_autograd_takes_over_the_gradients_of_scale_and_shift(kind):
    """The iteration keeps no reference to these gradients, or autograd would copy them."""
    model = filled("mixed", kind)
    model.zero_grad()
    found = {}
    for parameter in model[1].parameters():
        parameter.register_hook(lambda grad, of=parameter: found.update({of: grad.data_ptr()}))
    model(batch()).sum().backward()
    assert found == {each: each.grad.data_ptr() for each in model[1].parameters()}
