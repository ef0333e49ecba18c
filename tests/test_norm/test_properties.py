"""The whole layer in any sequence of what a training does, against the paper's formulas.

Everything is compared after each operation: the output, the gradients in the input and in all
parameters, the running statistics, the number of past iterations held and their memory.
"""

import copy
import io

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import Reference
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbn_mmdet import CBN, link, links, load_window_state, set_window, step, window_state

# Largest error of an entry, relative to the largest entry of the tensor, or to 1 if that is less.
# The reference computes in float64. The window is stored in float32 even so, each past statistic
# rounded by 2^-24 of what its product with the weight was, and the normalisation magnifies that by
# (var + eps)^-1/2, up to 30 here: that sets the tolerance of a float64 layer.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 0.1}


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


norms = st.fixed_dictionaries(
    dict(
        eps=st.sampled_from([1e-3, 0.1]),
        momentum=st.sampled_from([0.1, 0.7, None]),
        affine=st.booleans(),
        track_running_stats=st.sampled_from([True, True, False]),
        window_size=st.sampled_from([3, 2, 4, 5, 1]),
        compensate=st.sampled_from([True, True, True, False]),
        backward=st.sampled_from(["window", "current"]),
        derivative_stride=st.sampled_from([1, 1, 2, None]),
    )
)
small = st.tuples(st.integers(1, 9), st.integers(1, 9))
# The mean patch of a map of more than 1,024 positions is computed in another way.
sizes = st.one_of(small, small, small, st.just((30, 40)))
batches = dict(
    images=st.sampled_from([0, 1, 1, 2, 3]),
    size=sizes,
    shift=st.sampled_from([0, 1, -3]),
    times=st.integers(1, 2),
    how=st.sampled_from(["backward", "backward", "checkpointed", "no_grad"]),
)
distances = st.sampled_from([0.01, 0.1, "flip"])


class Training(RuleBasedStateMachine):
    """A convolution with its CBN, and the same in float64 from the paper's formulas."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    @initialize(
        conv=convolutions(),
        norm=norms,
        channels_last=st.booleans(),
        seed=st.integers(0, 99),
        iterations=st.integers(1, 6),
        size=sizes,
    )
    def build(self, conv, norm, channels_last, seed, iterations, size):
        torch.manual_seed(seed)
        if self.dtype == torch.bfloat16:
            channels_last = False  # torch's gradient of a dilated depthwise one is wrong on the CPU
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        conv = nn.Conv2d(**conv)
        norm = CBN(conv.out_channels, **norm)
        if norm.affine:
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias)
        self.model = nn.Sequential(conv, norm).to(dtype=self.dtype, memory_format=self.format)
        link(self.model)
        self.saved = copy.deepcopy(self.model.state_dict())
        self.slow = Reference(
            copy.deepcopy(conv).double(),
            norm.window_size,
            norm.eps,
            norm.compensate,
            flow=norm.backward == "window",
            stride=norm.derivative_stride,
            momentum=norm.momentum,
            dtype=self.dtype,
        )
        self.pending = None  # what the last forward leaves for the end of the iteration
        self.iterate(iterations, 0.1, True, images=2, size=size, shift=1, times=1, how="backward")

    @property
    def conv(self):
        return self.model[0]

    @property
    def norm(self):
        return self.model[1]

    # What a training does.

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
        opened = self.norm.window > 1
        for _ in range(times):
            if positions == 1 and not (opened and self.slow.past):
                self.learn_nothing(opened)
                with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                    self.model(x)
                return
            if positions == 0:
                self.learn_nothing(opened)
                expected = None
            else:
                expected = self.learn(x, opened)
            self.compare(x, expected, how)
        assert links(self.model) == {"1": "0"}

    @rule()
    def end(self):
        """The iteration ends."""
        clamped = step(self.model)
        if self.pending is None:
            assert clamped is None
            return
        entry, running, cut = self.pending
        self.slow.push(entry)
        if self.norm.track_running_stats:
            self.slow.average(*running)
        if cut is None:
            assert clamped is None
        elif self.is_clear_cut:
            assert clamped.item() == pytest.approx(cut, abs=1e-6)
        self.pending = None

    @rule(value=st.sampled_from([float("nan"), float("inf")]))
    def diverge(self, value):
        """An iteration with NaN or infinite values leaves nothing behind."""
        self.end()
        x = self.input(2, (9, 9), 0)
        x[0, 0] = value
        self.model(x)
        if self.norm.window > 1 or self.norm.track_running_stats:
            with pytest.warns(UserWarning, match="'1' is the first of 1 that met NaN or infinite"):
                step(self.model)

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
            args = (x.double(), *self.affine())
            if not self.norm.track_running_stats:
                past, self.slow.past = self.slow.past, []
                expected = self.slow.forward(*args)
                self.slow.past = past
            else:
                expected = self.slow.evaluate(*args)
        self.assert_close("output in evaluation", y, expected)

    @rule(data=st.data())
    def set_window(self, data):
        """The window opens, closes or changes."""
        size = data.draw(st.integers(1, self.norm.window_size))
        if size != self.norm.window:
            self.slow.past, self.pending = [], None
        self.slow.window = size
        set_window(self.model, size)
        assert self.norm.window == size

    @rule()
    def save(self):
        self.saved = copy.deepcopy(self.model.state_dict())

    @rule()
    def load(self):
        """Loading weights forgets the past, which was of others."""
        self.model.load_state_dict(self.saved)
        self.slow.past, self.pending = [], None
        if self.norm.track_running_stats:
            self.slow.running_mean = self.norm.running_mean.double().clone()
            self.slow.running_var = self.norm.running_var.double().clone()
            self.slow.tracked = self.norm.num_batches_tracked.item()

    @precondition(lambda self: self.pending is None)
    @rule(with_window=st.booleans())
    def resume(self, with_window):
        """Training goes on with a copy, whose window is the original's or empty."""
        original, self.model = self.model, copy.deepcopy(self.model)
        link(self.model)
        if with_window:
            buffer = io.BytesIO()
            torch.save(window_state(original), buffer)
            buffer.seek(0)
            load_window_state(self.model, torch.load(buffer, weights_only=True))
        else:
            self.slow.past = []

    @rule()
    def train_a_copy(self):
        """What a copy does is no matter of the original's."""
        other = copy.deepcopy(self.model)
        link(other)
        other(self.input(2, (9, 9), 0).requires_grad_()).sum().backward()
        step(other)
        set_window(other, 1)

    # What must hold after each.

    @invariant()
    def window_is_the_references(self):
        held = [window["count"] for window in window_state(self.model)["1"]]
        past = self.slow.past
        assert sum(held) == len(past)
        expected = 0
        if past:
            channels, patch = self.conv.weight.flatten(1).shape
            numbers = 2 * channels
            if past[0].moves:
                numbers = 3 * channels + (channels + self.conv.groups) * patch
            expected = (self.norm.window - 1) * 4 * numbers
        assert self.norm.window_bytes == expected

    @invariant()
    def running_statistics_are_the_references(self):
        if not self.norm.track_running_stats:
            assert self.norm.running_mean is None
            return
        assert self.norm.num_batches_tracked.item() == self.slow.tracked
        for name in ("running_mean", "running_var"):
            self.assert_close(name, getattr(self.norm, name), getattr(self.slow, name))

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

    def learn_nothing(self, opened):
        self.pending = None
        if not opened and self.norm.track_running_stats:
            self.slow.tracked += 1  # as batch normalisation does, even before it raises its error

    def learn(self, x, opened):
        """The reference's output and gradients; what it learns waits for the iteration's end."""
        self.sync()
        slow = self.slow
        running = slow.new_running_statistics(x.double())
        self.pending = None
        if opened:
            cut = None
            if slow.past and slow.past[0].moves:
                cut = (slow.past_variances() <= 0).double().mean().item()
            self.pending = slow.entry(x.double()), running, cut
        elif self.norm.track_running_stats:
            slow.average(*running)

        slow.conv.zero_grad()
        x, affine = x.double().clone().requires_grad_(), self.affine()
        y = slow.forward(x, *affine)
        target = torch.randn_like(y).to(self.dtype)
        (y * target).sum().backward()
        # Sums over all positions nearly cancel in some gradients: what is rounded are their terms.
        slope = affine[0] * (slow.statistics(x)[1] + slow.eps).rsqrt()
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
        (y * target).sum().backward()
        names = ["x", *(name for name, _ in self.model.named_parameters())]
        for name, ours, slow in zip(names, (x, *self.model.parameters()), leaves, strict=False):
            assert (ours.grad is None) == (not ours.requires_grad)
            if ours.requires_grad and self.is_clear_cut:
                scale = 1.0 if name == "x" else terms
                self.assert_close(f"gradient in {name}", ours.grad, slow.grad, scale)

    @property
    def is_clear_cut(self):
        """Whether no past variance is so near zero that rounding decides whether it is cut."""
        if not self.slow.past or not self.slow.past[0].moves:
            return True
        self.sync()
        variances = self.slow.past_variances()
        return bool((variances.abs() > 10 * TOLERANCE[self.dtype] * variances.abs().max()).all())

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
@pytest.mark.parametrize(
    "dtype, examples", [(torch.float64, 200), (torch.float32, 40), (torch.bfloat16, 40)]
)
def test_any_training_is_the_references(dtype, examples):
    run_state_machine_as_test(
        lambda: Training(dtype),
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # add Phase.shrink to look into a failure: it takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
