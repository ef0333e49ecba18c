"""Where in a model a norm may stand, and what is told where it may not."""

import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cbn_mmdet import CBN, SyncCBN, link, links, set_window, step, window_state


class Chain(nn.Module):
    """Modules and functions, one after the other."""

    def __init__(self, parts):
        super().__init__()
        self.order = parts
        self.parts = nn.ModuleDict(
            {f"{i}": part for i, part in enumerate(parts) if isinstance(part, nn.Module)}
        )

    def forward(self, x):
        for part in self.order:
            x = part(x)
        return x


class Residual(nn.Module):
    def forward(self, x):
        return x + 1


def half_and_half(x):
    return torch.cat([x[:, :2], x[:, 2:]], 1)


# All map (N, 4, 8, 8) to the same shape. No module with a weight is known to have computed
# what a function or a module without a weight returns.
CONVOLUTIONS = [lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.Conv2d(4, 4, 1, groups=2)]
NORMS = [lambda: CBN(4, window_size=3), lambda: SyncCBN(4, window_size=3)]
WEIGHTED = [
    lambda: nn.Linear(8, 8),
    lambda: nn.ConvTranspose2d(4, 4, 1),
    lambda: nn.GroupNorm(2, 4),
    lambda: nn.PReLU(),
]
OTHERS = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.MaxPool2d(3, 1, 1),
    Residual,
]
THROUGH = [nn.Identity, lambda: torch.Tensor.contiguous]
FUNCTIONS = [F.relu, F.relu_, half_and_half, torch.Tensor.clone, lambda x: x + x, lambda x: x[:]]
chains = st.lists(
    st.one_of(
        st.sampled_from(CONVOLUTIONS).map(lambda make: make()),
        st.sampled_from(NORMS).map(lambda make: make()),
        st.sampled_from(NORMS).map(lambda make: make()),
        st.sampled_from(WEIGHTED).map(lambda make: make()),
        st.sampled_from(OTHERS).map(lambda make: make()),
        st.sampled_from(THROUGH).map(lambda make: make()),
        st.sampled_from(FUNCTIONS),
    ),
    min_size=1,
    max_size=7,
)


# Why a place is refused where no weight is known.
NO_WEIGHT = (
    "that no module with a weight of the linked model returned as it is: the result of an "
    "activation, a function or an operation in place"
)


def feeders(chain):
    """For each norm of a chain the place of the module with a weight that feeds it, or None."""
    found, feeder = {}, None
    for place, part in enumerate(chain.order):
        if isinstance(part, CBN):
            found[place] = feeder
        if part is torch.Tensor.contiguous or isinstance(part, nn.Identity):
            continue
        has_weight = isinstance(getattr(part, "weight", None), torch.Tensor)
        feeder = place if has_weight and not isinstance(part, CBN) else None
    return found


def expected_links(chain):
    return {
        f"parts.{norm}": f"parts.{feeder}"
        for norm, feeder in feeders(chain).items()
        if feeder is not None
    }


def assert_refused(model, x, *what):
    """The first training forward, in a burn-in too, raises one line that says everything."""
    for window in (1, 3):
        set_window(model, window)
        with pytest.raises(RuntimeError) as error:
            model(x)
        message = str(error.value)
        assert "\n" not in message
        for part in (*what, "directly after one", "another norm", "compensate=False"):
            assert part in message


@settings(max_examples=250, deadline=None, derandomize=True)
@given(parts=chains)
def test_after_a_convolution_and_nowhere_else(parts):
    """A norm works on a convolution's output; else the error names the first without one."""
    chain = Chain(parts)
    link(chain)
    x = torch.randn(2, 4, 8, 8)
    for norm, feeder in feeders(chain).items():
        if feeder is None:
            what = f"was handed a tensor of shape {tuple(x.shape)} {NO_WEIGHT}"
        elif not isinstance(parts[feeder], nn.Linear | nn.PReLU):
            continue
        else:
            kind = type(parts[feeder]).__name__
            what = f"is fed by 'parts.{feeder}' ({kind}), whose weight has not one row"
        assert_refused(chain, x.clone(), f"'parts.{norm}' ", what)
        for part in parts:
            if isinstance(part, CBN):
                part.compensate = False  # the way out
        break
    for _ in range(3):
        chain(x.clone())
        step(chain)
    assert links(chain) == expected_links(chain)


@pytest.mark.parametrize(
    "order",
    [
        ("norm", "conv", "act"),
        ("conv", "act", "norm"),
        ("act", "norm", "conv"),
    ],
)
def test_the_order_of_a_conv_module(order):
    from mmcv.cnn import ConvModule

    model = ConvModule(4, 4, 3, norm_cfg=dict(type="CBN", window_size=3), order=order, bias=False)
    assert link(model) == 1
    # mmcv's module activates in place: it overwrote the convolution's output that the norm gets.
    what = "was handed a tensor of shape (2, 4, ", NO_WEIGHT
    assert_refused(model, torch.randn(2, 4, 8, 8), "'bn' (CBN)", *what)


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: a + b,
        lambda a, b: a.add_(b),
        lambda a, b: torch.cat([a[:, :2], b[:, 2:]], 1),
        lambda a, b: torch.maximum(a, b),
        lambda a, b: a.detach(),
        lambda a, b: a[:, :, ::2],
        lambda a, b: F.interpolate(b, scale_factor=2),
    ],
)
def test_after_two_convolutions_or_a_part_of_one(join):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm = CBN(4, window_size=3)

        def forward(self, x):
            return self.norm(join(self.left(x), self.right(x)))

    model = Joined()
    link(model)
    assert_refused(model, torch.randn(2, 4, 8, 8), "'norm' (CBN)", NO_WEIGHT)


@pytest.mark.parametrize("calls, others", [([0], [1]), ([0, 1], [1, 0])])
def test_another_convolution_in_the_same_place(calls, others):
    """Each call within a forward has its window, and must keep its convolution."""

    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)])
            self.norm = CBN(4, window_size=3)

        def forward(self, x, turns):
            for turn in turns:
                x = self.norm(self.convs[turn](x))
            return x

    model, x = Turns(), torch.randn(2, 4, 8, 8)
    link(model)
    for _ in range(3):
        model(x, calls)
        step(model)
    with pytest.raises(
        RuntimeError,
        match=r"'norm' \(CBN\): was fed by 'convs.0' .* now by 'convs.1' .* its own CBN",
    ):
        model(x, others)


@pytest.mark.parametrize("is_linked", [True, False])
def test_another_convolution_after_the_former_is_gone(is_linked):
    """The past says nothing of it, so the window starts empty."""
    other, x = nn.Conv2d(3, 4, 1), torch.randn(2, 3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4), *([other] if is_linked else []))
    model.forward = lambda x: model[1](model[0](x))
    link(model)
    for _ in range(3):
        model(x)
        step(model)
    model[0] = other
    gc.collect()
    for seen in (1, 2):
        model(x)
        step(model)
        (window,) = window_state(model)["1"]
        assert window["seen"] == seen
        assert links(model) == {"1": "0" if is_linked else "(a function)"}


def test_another_convolution_while_the_former_is_kept():
    """It has no hook, so that only its weight tells; linking anew takes it on."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4)), torch.randn(2, 3, 5, 5)
    link(model)
    for _ in range(3):
        model(x)
        step(model)
    former, model[0] = model[0], nn.Conv2d(3, 4, 1)
    with pytest.raises(
        RuntimeError, match=r"'1' \(CBN\): was fed by Conv2d so far, and now by one"
    ):
        model(x)
    link(model)
    model(x)
    step(model)
    assert window_state(model)["1"][0]["seen"] == 1 and former is not model[0]


def test_a_convolution_that_is_called_as_a_function_at_times():
    """The weight is the same, so the past is its own."""

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.turn = nn.Conv2d(3, 4, 1), CBN(4), 0

        def forward(self, x):
            self.turn += 1
            is_function = self.turn in (2, 3, 5)
            y = F.conv2d(x, self.conv.weight, self.conv.bias) if is_function else self.conv(x)
            return self.norm(y)

    model = Either()
    link(model)
    for seen in range(1, 7):
        model(torch.randn(2, 3, 5, 5))
        step(model)
        (window,) = window_state(model)["norm"]
        assert window["seen"] == seen and links(model) == {"norm": "conv"} or seen == 1


def test_a_model_that_is_gone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
    link(model)
    norm = model[1]
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="a part of a model that is gone. Call cbn_mmdet.li"):
        norm(torch.randn(2, 4, 5, 5))
