"""Settings of a wrong type or range, and options that do not exist.

Each ends in one message that names the option.
"""

import inspect
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cbn_mmdet import (
    BRN,
    CBN,
    MABN,
    CBNHook,
    CmBN,
    DiagnoseHook,
    PreciseStatsHook,
    SyncCBN,
    link,
    set_window,
    step,
)
from cbn_mmdet.norm.window import LARGEST

same_every_time = settings(max_examples=80, deadline=None, derandomize=True)

# What a config may hold, and much that it should not.
words = st.one_of(
    st.sampled_from(["moving", "sliding", "step", "auto", "where_possible"]),
    st.sampled_from(["mixed", "full", "own", "window", "current", "float32", "bfloat16"]),
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
    "eps": lambda value: is_number(value, 0) and value > 0,
    "momentum": lambda value: value is None or is_number(value, 0, 1),
    "affine": is_switch,
    "track_running_stats": is_switch,
}
CBN_OPTIONS = {
    **LAYER,
    "window": lambda value: value in ("moving", "sliding", "step"),
    "window_size": lambda value: is_whole(value, 1) or value == "auto",
    "compensate": lambda value: is_switch(value) or value == "where_possible",
    "backward": lambda value: value in ("mixed", "window", "current"),
    "derivative_stride": lambda value: value is None or is_whole(value, 1),
    "sync": is_switch,
    "window_dtype": lambda value: value in ("float32", "bfloat16"),
}
OPTIONS = {
    CBN: CBN_OPTIONS,
    SyncCBN: CBN_OPTIONS,
    CmBN: CBN_OPTIONS,
    BRN: {
        **LAYER,
        "track_running_stats": lambda value: value is True,
        "r_max": lambda value: is_number(value, 1),
        "d_max": lambda value: is_number(value, 0),
        "warmup": lambda value: is_whole(value, 0) and value <= 25000,  # the default d_end
        "r_end": lambda value: is_whole(value, 5000),  # the default warmup
        "d_end": lambda value: is_whole(value, 5000),
    },
    MABN: {
        **LAYER,
        "track_running_stats": lambda value: value is True,
        "buffer_size": lambda value: is_whole(value, 1),
        "warmup": lambda value: is_whole(value, 0) and value <= 1000,  # the default r_warmup
        "r_warmup": lambda value: is_whole(value, 100),  # the default warmup
        "r_max": lambda value: is_number(value, 1),
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
    """A legal value is accepted; any other raises a one-line error that names the option."""
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
            parent = CBN if made in (SyncCBN, CmBN) else made
            names = set(inspect.signature(parent.__init__).parameters)
            assert set(options) == names - {"self", "device", "dtype"}

    @pytest.mark.parametrize("made, option", ALL_OPTIONS)
    @same_every_time
    @given(value=junk)
    def test_any_value(self, made, option, value):
        needed = {} if made in HOOKS else dict(num_features=4)
        if option == "window":
            needed["window_size"] = 4  # window='sliding' refuses 'auto'
        is_legal = OPTIONS[made][option](value)
        if option in ("num_features", "buffer_size") and is_legal and value > 1000:
            return  # legal, but it would only fill memory
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

    @pytest.mark.parametrize("kind", ["CBN", "SyncCBN", "CmBN", "BRN", "MABN"])
    @same_every_time
    @given(option=st.from_regex(r"[a-z][a-z_]{2,12}", fullmatch=True))
    def test_unknown_options_of_norm_cfg(self, kind, option):
        from mmcv.cnn import build_norm_layer

        known = {*CBN_OPTIONS, *OPTIONS[BRN], *OPTIONS[MABN], "device", "dtype", "requires_grad"}
        if option in known:
            return
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            build_norm_layer({"type": kind, option: 1}, 4)

    @same_every_time
    @given(
        window=st.sampled_from(["moving", "sliding", "step"]),
        window_size=st.integers(1, 9),
        compensate=st.sampled_from([True, False, "where_possible"]),
        backward=st.sampled_from(["mixed", "window", "current"]),
        momentum=st.one_of(st.none(), st.floats(0, 1)),
    )
    def test_legal_options_of_norm_cfg_arrive(self, **options):
        from mmcv.cnn import build_norm_layer

        name, layer = build_norm_layer(dict(type="CBN", requires_grad=False, **options), 4)
        assert name == "bn" and not layer.weight.requires_grad
        assert {key: getattr(layer, key) for key in options} == options
