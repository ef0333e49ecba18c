"""The whole layer in any sequence of what a training does, against the plain reference.

Everything is compared after each operation: the output, the gradients in the input and in all
parameters, the running statistics, the number of past iterations seen, the window's size and its
memory. Before an iteration ends, nothing may have changed.
"""

import copy
import io
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from cbn_mmdet import CBN, link, links, load_window_state, set_window, step, window_state
from cbn_mmdet.norm.reference import Reference

# Largest error of an entry, relative to the largest entry of the tensor, or to 1 if that is less.
# The reference computes in float64. The window is stored in float32 even so, each past statistic
# rounded by 2^-24 of what its product with the weight was. The normalisation magnifies that by
# (var + eps)^-1/2, up to 30 here, and its gradient once more: hence a float64 layer's tolerance.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-5, torch.bfloat16: 0.1}


@st.composite
def convolutions(draw):
    """The arguments of a convolution of any geometry."""
    groups = draw(st.integers(1, 3))
    padding = draw(st.sampled_from([0, 1, (1, 0), (2, 1), "valid", "same"]))
    if padding == "same":  # an even kernel wants a row or column more on one side
        stride, kernel = 1, draw(st.sampled_from([2, (3, 2), 3]))
    else:
        stride = draw(st.sampled_from([1, 2, (1, 3), (2, 1)]))
        kernel = draw(st.sampled_from([1, 2, 3, (1, 3), (3, 2)]))
    return dict(
        in_channels=groups * draw(st.integers(1, 2)),  # 1: depthwise
        out_channels=groups * draw(st.integers(1, 2)),
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=draw(st.sampled_from([1, 2, (1, 2)])),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )


# Every window with every gradient has runs of its own.
WINDOWS = {
    "moving": dict(window="moving", window_size=st.sampled_from([3, 2, 4, 5, 3, 2, 4, 1])),
    "auto": dict(window="moving", window_size=st.just("auto")),
    "sliding": dict(window="sliding", window_size=st.sampled_from([3, 2, 4, 5, 3, 2, 4, 1])),
}
BACKWARDS = ["mixed", "window", "current"]


@st.composite
def norms(draw):
    """The arguments of a CBN that every run draws for itself."""
    return dict(
        eps=draw(st.sampled_from([1e-3, 0.1])),
        momentum=draw(st.sampled_from([0.1, 0.7, None])),
        affine=draw(st.booleans()),
        track_running_stats=draw(st.sampled_from([True, True, False])),
        compensate=draw(st.sampled_from([True, True, True, False])),
        derivative_stride=draw(st.sampled_from([1, 1, 2, None])),
    )


small = st.tuples(st.integers(1, 9), st.integers(1, 9))
# The mean patch of a map of more than 1,024 positions is computed in another way.
sizes = st.one_of(small, small, small, st.just((30, 40)))
batches = dict(
    images=st.sampled_from([0, 1, 1, 2, 3]),
    size=sizes,
    shift=st.sampled_from([0, 1, -3]),
    times=st.integers(1, 2),
    how=st.sampled_from(
        ["backward", "backward", "backward", "in two parts", "overflow", "checkpointed", "no_grad"]
    ),
)
distances = st.sampled_from([0.01, 0.1, "flip"])


class Limited(Reference):
    """The reference with a largest window size in force, as ``set_window`` sets it."""

    limit: int | None = None

    def largest(self):
        """The largest window size."""
        own = super().largest()
        return own if self.limit is None else min(own, self.limit)

    def uncut_variances(self):
        """Past variances at today's weight before those below zero are cut, ``(T, C)``."""
        found = []
        for entry in self.past:
            mean, var = entry.at(self.conv.weight.detach())
            if self.window == "sliding":
                var = var - (mean - entry.mean).square()
            found.append(var)
        return torch.stack(found)


class Pending(NamedTuple):
    """What a forward of the reference leaves for the end of its iteration.

    Attributes:
        running: What is averaged into the running statistics.
        entry: What enters the window, or None in a burn-in.
        y: The convolution's output.
        conv: State of the convolution.
        variances: Of the past, before those below zero were cut, or None.
        is_clear_cut: Whether it is clear which were cut, whatever the rounding.
    """

    running: tuple
    entry: tuple | None = None
    y: torch.Tensor | None = None
    conv: dict | None = None
    variances: torch.Tensor | None = None
    is_clear_cut: bool = True


class Training(RuleBasedStateMachine):
    """A convolution with its CBN, and the same in float64 in the plainest code."""

    def __init__(self, dtype, window, backward):
        super().__init__()
        self.dtype, self.window, self.backward = dtype, WINDOWS[window], backward

    @initialize(
        conv=convolutions(),
        norm=norms(),
        data=st.data(),
        loss_scale=st.sampled_from([None, None, 8.0]),
        channels_last=st.booleans(),
        seed=st.integers(0, 99),
        iterations=st.integers(1, 6),
        size=sizes,
    )
    def build(self, conv, norm, data, loss_scale, channels_last, seed, iterations, size):
        torch.manual_seed(seed)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        if self.dtype == torch.bfloat16:
            conv["dilation"] = 1  # layers.is_computed_by_torch
        conv = nn.Conv2d(**conv)
        norm.update(self.window, window_size=data.draw(self.window["window_size"]))
        if self.backward == "mixed":
            # What it gives back to the weight is made of the derivative, estimated or not.
            norm["derivative_stride"] = 1
        norm = CBN(conv.out_channels, backward=self.backward, **norm)
        if norm.affine:
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias)
        self.model = nn.Sequential(conv, norm).to(dtype=self.dtype, memory_format=self.format)
        link(self.model)
        self.saved = copy.deepcopy(self.model.state_dict())
        self.slow = Limited(
            copy.deepcopy(conv).double(),
            norm.window,
            norm.window_size,
            norm.eps,
            norm.compensate,
            norm.backward,
            norm.derivative_stride,
            norm.momentum,
            self.dtype,
        )
        self.loss_scale = loss_scale
        self.pending = None  # what the last forward leaves for the end of the iteration
        self.is_plain = False  # batch normalisation itself, which averages in the forward
        self.iterate(iterations, 0.1, True, images=2, size=size, shift=1, times=1, how="backward")

    @property
    def conv(self):
        return self.model[0]

    @property
    def norm(self):
        return self.model[1]

    # The events of a training.

    @rule(count=st.integers(1, 6), distance=distances, biases=st.booleans(), **batches)
    def iterate(self, count, distance, biases, **batch):
        """Whole iterations, in the order of a training loop."""
        for _ in range(count):
            self.forward(**batch)
            self.optimize(distance, biases)
            self.end()
            self.window_is_the_references()
            self.running_statistics_are_the_references()

    @rule(**batches)
    def forward(self, images, size, shift, times, how):
        """A training step's forward and backward, repeated or not."""
        x = self.input(images, size, shift)
        positions = self.conv(x).numel() // self.conv.out_channels
        if self.is_plain and how == "checkpointed":
            how = "backward"  # torch's own would average once more in the repetition
        for _ in range(times):
            self.pending = self.slow.sums = None
            if positions == 1 and not self.fitting().past:
                self.count_nothing()
                with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                    self.model(x)
                return
            if positions == 0:
                self.count_nothing()
                expected = None
            else:
                expected = self.learn(x)
            before = self.everything()
            self.compare(x, expected, how)
            if not self.is_plain:
                self.assert_same(self.everything(), before)
        if not self.is_plain:
            assert links(self.model) == {"1": "0"}

    @rule()
    def end(self):
        """The iteration ends."""
        clamped = step(self.model, self.loss_scale)
        self.is_plain = False
        pending, self.pending = self.pending, None
        if pending is None:
            assert clamped is None
            return
        if self.norm.track_running_stats:
            self.slow.average(*pending.running)
        cut = None
        if pending.entry is not None:
            if pending.variances is not None:
                cut = (pending.variances <= 0).double().mean().item()
            self.slow.conv.load_state_dict(pending.conv)  # the weights have moved since
            last = self.slow.surprise
            self.slow.push(pending.entry, pending.y)
            if self.is_rounding(last, self.slow.surprise):
                (window,) = window_state(self.model)["1"]
                self.slow.log_share = window.get("log_share", 0.0)
        if cut is None:
            assert clamped is None
        elif pending.is_clear_cut:
            assert clamped.item() == pytest.approx(cut, abs=1e-6)

    def is_rounding(self, *surprises):
        """Whether a surprise is rounding alone: of an output that sees only padding, say."""
        return any(each is not None and each.abs().max() < 1e-5 for each in surprises)

    @rule(
        value=st.sampled_from([float("nan"), float("inf"), "overflow"]), has_backward=st.booleans()
    )
    def diverge(self, value, has_backward):
        """An iteration with NaN or infinite values leaves nothing behind."""
        self.end()
        x = self.input(2, (9, 9), 0)
        # The square root of the largest number: the output is finite, its variance is not.
        limit = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).max
        x[0, 0] *= 1e4 * limit**0.5 if value == "overflow" else value
        y = self.model(x.requires_grad_())
        if has_backward:
            y.sum().backward()
        if self.slow.largest() > 1 or self.norm.track_running_stats:
            with pytest.warns(UserWarning, match="'1' is the first of 1 that met NaN or infinite"):
                step(self.model, self.loss_scale)

    @rule(distance=distances, biases=st.booleans())
    def optimize(self, distance, biases):
        """The weights move: a little, or so far that past variances are cut."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if distance == "flip" and parameter is self.conv.weight:
                    if parameter.requires_grad:
                        parameter[0] *= -1
                elif parameter.requires_grad and (biases or parameter is self.conv.weight):
                    parameter += (0.1 if distance == "flip" else distance) * torch.randn_like(
                        parameter
                    )

    @rule()
    def freeze_or_thaw(self):
        """The convolution's weight stops to train, or starts again."""
        self.conv.weight.requires_grad_(not self.conv.weight.requires_grad)

    @rule(images=st.integers(0, 2), size=sizes)
    def evaluate(self, images, size):
        x = self.input(images, size, 0)
        if not self.norm.track_running_stats and self.conv(x).numel() == self.norm.num_features:
            return  # batch normalisation's error
        self.sync()
        with torch.no_grad():
            y = self.model.eval()(x)
            self.model.train()
            slow, statistics = self.slow, self.slow.running
            if not self.norm.track_running_stats and y.numel() > 0:
                maps = slow.output(x.double())
                statistics = maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0)
            of = type(slow.running)(*statistics)
            expected = slow.normalize(slow.output(x.double()), of, *self.affine())
        self.assert_close("output in evaluation", y, expected)

    @rule(data=st.data())
    def set_window(self, data):
        """The window opens, closes or changes."""
        own = self.norm.window_size
        size = data.draw(st.none() | st.integers(1, 6 if own == "auto" else own))
        before, self.slow.limit = self.slow.largest(), size
        if self.slow.largest() != before:
            self.forget()
        set_window(self.model, size)
        assert self.norm.window_in_force == self.slow.largest()

    @precondition(
        lambda self: (
            self.norm.window_size == "auto" and self.pending is None and self.fitting() is self.slow
        )
    )
    @rule(log_share=st.sampled_from([-0.3, -1.5, -4.0]))
    def widen(self, log_share):
        """The window is as wide as after a long training."""
        state = window_state(self.model)
        if self.slow.past:
            state["1"][0]["log_share"] = self.slow.log_share = log_share
        load_window_state(self.model, state)

    @rule()
    def save(self):
        self.saved = copy.deepcopy(self.model.state_dict())

    @rule()
    def load(self):
        """Loading weights forgets the past, which was of others."""
        self.model.load_state_dict(self.saved)
        self.forget()
        if self.norm.track_running_stats:
            self.slow.running = type(self.slow.running)(
                self.norm.running_mean.double().clone(), self.norm.running_var.double().clone()
            )
            self.slow.tracked = self.norm.num_batches_tracked.item()

    @rule()
    def reset(self):
        """As in torch's ``update_bn``, which then averages by setting ``momentum`` to None."""
        self.norm.reset_running_stats()
        self.forget()
        self.is_plain = self.norm.momentum is None
        fresh = Reference(self.slow.conv)
        self.slow.running, self.slow.tracked = fresh.running, 0

    @precondition(lambda self: self.pending is None)
    @rule(with_window=st.booleans())
    def resume(self, with_window):
        """Training goes on with a copy, whose window is the original's or empty."""
        original, self.model = self.model, copy.deepcopy(self.model)
        self.is_plain = False
        link(self.model)
        step(self.model, self.loss_scale)  # so that it knows the scale of the first iteration
        if with_window and self.fitting() is self.slow:
            buffer = io.BytesIO()
            torch.save(window_state(original), buffer)
            buffer.seek(0)
            load_window_state(self.model, torch.load(buffer, weights_only=True))
            self.assert_same(window_state(self.model), window_state(original))
        else:
            self.slow.forget()

    @rule()
    def train_a_copy(self):
        """Training a copy leaves the original alone."""
        other = copy.deepcopy(self.model)
        link(other)
        other(self.input(2, (9, 9), 0).requires_grad_()).sum().backward()
        step(other)
        set_window(other, 1)

    # What must hold after each.

    @invariant()
    def window_is_the_references(self):
        """Number of past iterations, size and memory are the reference's."""
        slow, windows = self.slow, window_state(self.model)["1"]
        assert len(windows) <= 1
        seen = sum(window["seen"] for window in windows)
        if self.norm.window == "moving":
            assert seen == slow.seen
        else:
            assert min(seen, slow.largest() - 1) == len(slow.past)
        numbers = 0
        if slow.past:
            channels, patch = self.conv.weight.flatten(1).shape
            derivative = (self.conv.groups + channels) * patch if slow.past[0].moves else 0
            if self.norm.window == "moving":
                numbers = 3 * channels + derivative  # A, R, and the mean where they were found
            else:
                numbers = (slow.largest() - 1) * (3 * channels + derivative)
            numbers += channels * (seen > 1)  # the last surprise
            numbers += 2 * channels * (slow.averages is not None)
        assert self.norm.window_bytes == 4 * numbers
        tensors = [each for window in windows for each in window.values() if torch.is_tensor(each)]
        assert sum(each.numel() * each.element_size() for each in tensors) == 4 * numbers
        size = slow.largest()
        if self.norm.window_size == "auto":
            size = 1 / slow.share() if slow.past and size > 1 else 1
        # In half precision the sign of a surprise may be a matter of rounding.
        tolerance = 0.1 if self.dtype == torch.bfloat16 else 1e-3
        assert self.norm.mean_window_size == pytest.approx(size, rel=tolerance)

    @invariant()
    def running_statistics_are_the_references(self):
        if not self.norm.track_running_stats:
            assert self.norm.running_mean is None
            return
        assert self.norm.num_batches_tracked.item() == self.slow.tracked
        self.assert_close("running_mean", self.norm.running_mean, self.slow.running.mean)
        self.assert_close("running_var", self.norm.running_var, self.slow.running.var)

    # The two sides of a comparison.

    def input(self, images, size, shift):
        """A batch; sizes too small for the convolution are raised to the least that is possible."""
        conv, pads = self.conv, self.conv.padding
        pads = (0, 0) if isinstance(pads, str) else pads
        least = []
        for kernel, dilation, pad in zip(conv.kernel_size, conv.dilation, pads, strict=True):
            reach = (kernel - 1) * dilation + 1
            if conv.padding_mode == "zeros":
                least.append(max(reach - 2 * pad, 1))
            else:
                least.append(max(reach, pad + 1))
        if self.dtype == torch.bfloat16 and conv.stride[1] > 1:
            least[1] += conv.stride[1]  # torch's own is wrong on some CPUs where one column is left
        size = [max(pair) for pair in zip(size, least, strict=True)]
        x = torch.randn(images, conv.in_channels, *size) + shift
        return x.to(dtype=self.dtype, memory_format=self.format)

    def sync(self):
        """Gives the reference today's weights."""
        pairs = zip(self.slow.conv.parameters(), self.conv.parameters(), strict=True)
        for slow, ours in pairs:
            slow.data.copy_(ours.data)
            slow.requires_grad_(ours.requires_grad)

    def affine(self):
        """Scale and shift in float64."""
        if not self.norm.affine:
            channels = self.norm.num_features
            return torch.ones(channels).double(), torch.zeros(channels).double()
        return [p.detach().double().clone().requires_grad_() for p in self.norm.parameters()]

    def forget(self):
        """Empties the reference's window, and drops what the running iteration learnt."""
        self.slow.forget()
        self.pending = None

    def fitting(self):
        """The reference at today's weights, without a past that its weight does not fit."""
        self.sync()
        slow = self.slow
        if slow.past and slow.past[0].moves != slow.moves():
            slow = copy.copy(slow)
            slow.forget()
        return slow

    def everything(self):
        """What may only change when the iteration ends."""
        windows = [window for window in window_state(self.model)["1"] if window["seen"]]
        return windows, [buffer.clone() for buffer in self.norm.buffers()]

    def count_nothing(self):
        """Batch normalisation counts a batch even if it is empty, or before it raises its error."""
        if not self.norm.track_running_stats:
            return
        if self.is_plain:
            self.slow.tracked += 1
        elif self.slow.largest() == 1:
            self.pending = Pending(self.slow.running)

    def learn(self, x):
        """The reference's output and gradients; what it learns waits for the iteration's end."""
        slow = self.fitting()
        running = slow.new_running_statistics(x.double())
        if self.is_plain:
            if self.norm.track_running_stats:
                slow.average(*running)
        elif slow.largest() == 1:
            self.pending = Pending(running)
        else:
            self.pending = Pending(
                running,
                slow.new_entry(x.double()),
                slow.output(x.double()).detach(),
                copy.deepcopy(slow.conv.state_dict()),
                slow.uncut_variances() if slow.past and slow.moves() else None,
                self.is_clear_cut,
            )

        slow.conv.zero_grad()
        x, affine = x.double().clone().requires_grad_(), self.affine()
        y = slow.forward(x, *affine)
        target = torch.randn_like(y).to(self.dtype)
        (y * target).sum().backward()
        self.slow.sums = slow.sums
        # Some gradients are sums that nearly cancel: rounding is relative to their terms.
        slope = affine[0] * (slow.statistics(slow.output(x)).var + slow.eps).rsqrt()
        terms = (target.abs().sum((0, 2, 3)) * slope.abs()).max().item()
        return y.detach(), target, terms, [x, *slow.conv.parameters(), *affine]

    def compare(self, x, expected, how):
        """Runs the layer, and compares what it computes."""
        self.model.zero_grad()
        x = x.clone().requires_grad_()
        if how == "checkpointed":
            y = checkpoint(self.model, x, use_reentrant=False)
        else:
            with torch.set_grad_enabled(how != "no_grad"):
                y = self.model(x)
        assert y.dtype == self.dtype
        if how in ("no_grad", "overflow"):  # nothing of such a backward pass is kept
            self.slow.sums = None
        if expected is None:
            assert y.numel() == 0
            if how != "no_grad":
                y.sum().backward()
            return
        expected, target, terms, leaves = expected
        self.assert_close("output", y, expected)
        if self.format is torch.channels_last:
            assert y.is_contiguous(memory_format=self.format) == self.conv(x).is_contiguous(
                memory_format=self.format
            )
        if how == "no_grad":
            return
        scale = self.loss_scale or 1.0
        if how == "overflow":
            (y * float("inf")).sum().backward()
            return
        if how == "in two parts":
            part = torch.where(torch.rand_like(y) < 0.5, target, 0)
            (y * part).sum().mul(scale).backward(retain_graph=True)
            target = target - part
        (y * target).sum().mul(scale).backward()
        names = ["x", *(name for name, _ in self.model.named_parameters())]
        for name, ours, slow in zip(names, (x, *self.model.parameters()), leaves, strict=False):
            assert (ours.grad is None) == (not ours.requires_grad)
            if ours.requires_grad and self.is_clear_cut:
                size = 1.0 if name == "x" else terms
                self.assert_close(f"gradient in {name}", ours.grad / scale, slow.grad, size)

    @property
    def is_clear_cut(self):
        """Whether no past variance is so near zero that rounding decides whether it is cut."""
        slow = self.fitting()
        if not slow.past or not slow.moves():
            return True
        variances = slow.uncut_variances()
        return bool((variances.abs() > 10 * TOLERANCE[self.dtype] * variances.abs().max()).all())

    def assert_same(self, one, other):
        """Both are equal, tensors bit for bit."""
        (ours, of_ours), (others, of_others) = tree_flatten(one), tree_flatten(other)
        assert of_ours == of_others
        for here, there in zip(ours, others, strict=True):
            assert torch.equal(here, there) if torch.is_tensor(here) else here == there

    def assert_close(self, name, ours, slow, scale=1.0):
        ours, slow = ours.detach().double(), slow.detach()
        assert ours.shape == slow.shape
        if slow.numel():
            scale = max(scale, slow.abs().max().item())
        torch.testing.assert_close(
            ours,
            slow,
            rtol=0,
            atol=TOLERANCE[self.dtype] * scale,
            msg=lambda why: f"{name}: {why}",
        )


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.filterwarnings("ignore:CBN. the weights changed since:UserWarning")
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "dtype, examples", [(torch.float64, 30), (torch.float32, 8), (torch.bfloat16, 6)]
)
def test_any_training_is_the_references(dtype, examples, window, backward):
    settled = seed(f"{dtype} {window} {backward}")  # the same runs every time
    run_state_machine_as_test(
        settled(lambda: Training(dtype, window, backward)),
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # add Phase.shrink to look into a failure: it takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
