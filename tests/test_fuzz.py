"""Settings of a wrong type or range, options that do not exist, and CBN where it cannot work.

Each ends in one message that names the option, or the layer, what it was handed and the way out.
"""

import inspect
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import BENT_CONV
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cbn_mmdet import (
    BRN,
    CBN,
    CBNHook,
    DiagnoseHook,
    PreciseStatsHook,
    SyncCBN,
    link,
    links,
    set_window,
    step,
)
from cbn_mmdet.norm.window import LARGEST

same_every_time = settings(max_examples=80, deadline=None, derandomize=True)

# What a config may hold, and much that it should not.
words = st.one_of(
    st.sampled_from(["moving", "sliding", "auto", "full", "own", "window", "current"]),
    st.sampled_from(["True", "False", "no", "none", "0.1", "8", "Auto", ""]),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.integers(1000, 10**6),
    st.floats(),
    st.floats(0, 1),
    st.complex_numbers(),
    words,
    st.text(max_size=5),
    st.binary(max_size=3),
)
junk = st.one_of(
    scalars,
    scalars,
    st.lists(scalars, max_size=2),
    st.tuples(scalars),
    st.dictionaries(st.text(max_size=3), scalars, max_size=1),
    st.just(10**310),
)


def is_switch(value):
    return isinstance(value, bool)


def is_whole(value, least):
    return type(value) is int and value >= least


def is_number(value, least, most=sys.float_info.max):
    return type(value) in (int, float) and least <= value <= most


LAYER = {
    "num_features": lambda value: is_whole(value, 1),
    "eps": lambda value: is_number(value, 0),
    "momentum": lambda value: value is None or is_number(value, 0, 1),
    "affine": is_switch,
    "track_running_stats": is_switch,
}
CBN_OPTIONS = {
    **LAYER,
    "window": lambda value: value in ("moving", "sliding"),
    "window_size": lambda value: is_whole(value, 1) or value == "auto",
    "compensate": is_switch,
    "backward": lambda value: value in ("mixed", "full", "own", "window", "current"),
    "derivative_stride": lambda value: value is None or is_whole(value, 1),
    "sync": is_switch,
    "window_dtype": lambda value: value in ("float32", "bfloat16"),
}
OPTIONS = {
    CBN: CBN_OPTIONS,
    SyncCBN: CBN_OPTIONS,
    BRN: {
        **LAYER,
        "eps": lambda value: is_number(value, 0) and value > 0,
        "track_running_stats": lambda value: value is True,
        "r_max": lambda value: is_number(value, 1),
        "d_max": lambda value: is_number(value, 0),
        "warmup": lambda value: is_whole(value, 0) and value <= 25000,  # the default d_end
        "r_end": lambda value: is_whole(value, 5000),  # the default warmup
        "d_end": lambda value: is_whole(value, 5000),
    },
    CBNHook: {
        "burn_in": lambda value: is_whole(value, 0),
        "by_epoch": is_switch,
        "save_window": is_switch,
    },
    DiagnoseHook: {"interval": lambda value: is_whole(value, 1)},
    PreciseStatsHook: {
        "num_images": lambda value: is_whole(value, 1),
        "every_evaluation": is_switch,
    },
}
HOOKS = (CBNHook, DiagnoseHook, PreciseStatsHook)
ALL_OPTIONS = [(made, option) for made, options in OPTIONS.items() for option in options]


def accepts_or_names(call, option, is_legal):
    """What is legal is accepted; anything else is refused by its name, in one line."""
    if is_legal:
        call()
        return
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    message = str(error.value)
    assert option in message and "\n" not in message


class TestOptions:
    def test_none_is_left_out(self):
        for made, options in OPTIONS.items():
            parent = CBN if made is SyncCBN else made
            names = set(inspect.signature(parent.__init__).parameters)
            assert set(options) == names - {"self", "device", "dtype"}

    @pytest.mark.parametrize("made, option", ALL_OPTIONS)
    @same_every_time
    @given(value=junk)
    def test_any_value(self, made, option, value):
        needed = {} if made in HOOKS else dict(num_features=4)
        if option == "window":
            needed["window_size"] = 4  # a sliding one has a number
        is_legal = OPTIONS[made][option](value)
        if option == "num_features" and is_legal and value > 1000:
            return  # a matter of memory
        accepts_or_names(lambda: made(**{**needed, option: value}), option, is_legal)

    @same_every_time
    @given(size=junk)
    def test_any_window_in_force(self, size):
        model = nn.Sequential(CBN(4, window_size=3))
        is_legal = size is None or (is_whole(size, 1) and size <= 3)
        accepts_or_names(lambda: set_window(model, size), "size", is_legal)
        assert model[0].window_in_force == (size or 3 if is_legal else 3)

    @same_every_time
    @given(size=junk)
    def test_any_limit_of_a_window_that_sets_its_own(self, size):
        model = nn.Sequential(CBN(4))
        is_legal = size is None or is_whole(size, 1)
        accepts_or_names(lambda: set_window(model, size), "size", is_legal)
        assert model[0].window_in_force == (min(size or LARGEST, LARGEST) if is_legal else LARGEST)

    @same_every_time
    @given(scale=junk)
    def test_any_loss_scale(self, scale):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
        link(model)
        is_legal = scale is None or (
            is_number(scale, 0) and scale > 0 and not isinstance(scale, bool)
        )
        model(torch.randn(2, 3, 5, 5)).sum().backward()
        accepts_or_names(lambda: step(model, scale), "loss_scale", is_legal)

    def test_a_sliding_window_has_a_number(self):
        with pytest.raises(ValueError, match="window_size='auto' is for window='moving'"):
            CBN(4, window="sliding")

    @pytest.mark.parametrize("kind", ["CBN", "SyncCBN", "BRN"])
    @same_every_time
    @given(option=st.from_regex(r"[a-z][a-z_]{2,12}", fullmatch=True))
    def test_unknown_options_of_norm_cfg(self, kind, option):
        from mmcv.cnn import build_norm_layer

        known = {*CBN_OPTIONS, *OPTIONS[BRN], "device", "dtype", "requires_grad"}
        if option in known:
            return
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            build_norm_layer({"type": kind, option: 1}, 4)

    @same_every_time
    @given(
        window=st.sampled_from(["moving", "sliding"]),
        window_size=st.integers(1, 9),
        compensate=st.booleans(),
        backward=st.sampled_from(["mixed", "full", "own", "window", "current"]),
        momentum=st.one_of(st.none(), st.floats(0, 1)),
    )
    def test_legal_options_of_norm_cfg_arrive(self, **options):
        from mmcv.cnn import build_norm_layer

        name, layer = build_norm_layer(dict(type="CBN", requires_grad=False, **options), 4)
        assert name == "bn" and not layer.weight.requires_grad
        assert {key: getattr(layer, key) for key in options} == options


@pytest.mark.slow
@pytest.mark.parametrize(
    "option, message",
    [
        ("model.neck.norm_cfg.compensate=no", "compensate must be True"),
        ("custom_hooks.0.burnin=1", "CBNHook has no option 'burnin'; did you mean burn_in?"),
    ],
)
def test_a_mistaken_setting_of_a_training_is_one_line(
    option, message, small_config, tmp_path, tool
):
    config = small_config(tmp_path, "faster-rcnn_r18_fpn_cbn-all_1xb2_digits")
    done = tool(
        "train.py", config, "--work-dir", tmp_path / "work", "--cfg-options", option,
        check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stdout
    assert message in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_refusal_ends_a_training_with_its_line(small_config, tmp_path, tool):
    config = small_config(
        tmp_path,
        "faster-rcnn_r18_fpn_cbn-all_1xb2_digits",
        f'{BENT_CONV}\nmodel = dict(backbone=dict(conv_cfg=dict(type="Bent")))\n',
    )
    done = tool("train.py", config, "--work-dir", tmp_path / "work", check=False)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    for part in ("'backbone.bn1' (CBN)", "no module with a weight", "compensate=False"):
        assert part in last


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


# From (N, 4, 8, 8) to the same. What a function or a module without a weight returns, no module
# with a weight is known to have computed.
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


class TestPlaces:
    @settings(max_examples=250, deadline=None, derandomize=True)
    @given(parts=chains)
    def test_after_a_convolution_and_nowhere_else(self, parts):
        """A norm works if what it is handed is a convolution's output; else the first is named."""
        chain = Chain(parts)
        link(chain)
        x = torch.randn(2, 4, 8, 8)
        for norm, feeder in feeders(chain).items():
            if feeder is None:
                what = f"was handed a tensor of shape {tuple(x.shape)} that no module with a weight"
            elif not isinstance(parts[feeder], nn.Linear | nn.PReLU):
                continue
            else:
                kind = type(parts[feeder]).__name__
                what = f"is fed by 'parts.{feeder}' ({kind}), whose weight has not one row"
            self.assert_refused(chain, x.clone(), f"'parts.{norm}' ", what)
            for part in parts:
                if isinstance(part, CBN):
                    part.compensate = False  # the way out
            break
        for _ in range(3):
            chain(x.clone())
            step(chain)
        assert links(chain) == expected_links(chain)

    def assert_refused(self, model, x, *what):
        """In the first forward of a training, be it of a burn-in, with a line that tells all."""
        for window in (1, 3):
            set_window(model, window)
            with pytest.raises(RuntimeError) as error:
                model(x)
            message = str(error.value)
            assert "\n" not in message
            for part in (*what, "directly after one", "another norm", "compensate=False"):
                assert part in message

    @pytest.mark.parametrize(
        "order",
        [
            ("norm", "conv", "act"),
            ("conv", "act", "norm"),
            ("act", "norm", "conv"),
        ],
    )
    def test_the_order_of_a_conv_module(self, order):
        from mmcv.cnn import ConvModule

        model = ConvModule(
            4, 4, 3, norm_cfg=dict(type="CBN", window_size=3), order=order, bias=False
        )
        assert link(model) == 1
        # mmcv's module activates in place: what the norm is handed was a convolution's output.
        what = "was handed a tensor of shape (2, 4, ", "that no module with a weight"
        self.assert_refused(model, torch.randn(2, 4, 8, 8), "'bn' (CBN)", *what)

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
    def test_after_two_convolutions_or_a_part_of_one(self, join):
        class Joined(nn.Module):
            def __init__(self):
                super().__init__()
                self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
                self.norm = CBN(4, window_size=3)

            def forward(self, x):
                return self.norm(join(self.left(x), self.right(x)))

        model = Joined()
        link(model)
        self.assert_refused(
            model, torch.randn(2, 4, 8, 8), "'norm' (CBN)", "that no module with a weight"
        )

    def test_two_convolutions_by_turns(self):
        """Each call within a forward has its window, and must keep its convolution."""

        class Turns(nn.Module):
            def __init__(self):
                super().__init__()
                self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
                self.norm = CBN(4, window_size=3)

            def forward(self, x, *turns):
                for turn in turns:
                    x = self.norm(self.convs[turn](x))
                return x

        model, x = Turns(), torch.randn(2, 4, 8, 8)
        link(model)
        for _ in range(3):
            model(x, 0, 1)
            step(model)
        with pytest.raises(
            RuntimeError,
            match=r"'norm' \(CBN\): was fed by 'convs.0' .* now by 'convs.1' .* its own CBN",
        ):
            model(x, 1, 0)
