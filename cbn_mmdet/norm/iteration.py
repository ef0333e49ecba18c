# Licensed under the Apache License, Version 2.0.
"""What a training loop calls: link the model once, end each iteration, set the window in force."""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict

import torch
from torch import Tensor, nn

from . import linking
from .cbn import CBN, WINDOW_DTYPES, update_running_stats
from .layer import check_count
from .window import Window, accompany


def link(model: nn.Module) -> int:
    """Makes every CBN of ``model`` know the convolution whose output it receives.

    From then on each module signs the tensor that it returns, and a CBN reads the signature from
    the tensor that it is handed. Call it on the model whose forward is one iteration (inside any
    wrapper), before training. Calling it again is harmless.

    Args:
        model: Any module, a single layer included.

    Returns:
        The number of CBN layers in the model.
    """
    linking.watch(model)
    return len(cbn_layers(model))


def links(model: nn.Module) -> dict[str, str]:
    """The module that feeds each CBN, as of the layer's last run.

    Args:
        model: A linked model. Its module names are the keys and values.

    Returns:
        CBN name to feeding module's name, for each CBN that has run.
    """
    names = {module: name for name, module in model.named_modules()}
    return {
        name: names[layer.feeder]
        for name, layer in cbn_layers(model).items()
        if layer.feeder in names
    }


def set_window(model: nn.Module, size: int) -> None:
    """Sets the window size in force, as a burn-in does.

    A change forgets the past, so that a window that opens again starts empty.

    Args:
        model: A model with CBN layers.
        size: From 1, which is batch normalisation, to the layers' ``window_size``; a layer whose
            own ``window_size`` is smaller keeps to that.

    Raises:
        ValueError: ``size`` is no whole number, below 1, or above every layer's ``window_size``.
    """
    check_count("CBN", "size", size, "the window size to put in force")
    layers = cbn_layers(model).values()
    largest = max((layer.window_size for layer in layers), default=size)
    if size > largest:
        raise ValueError(
            f"set_window: size {size} is above the largest window_size of the model's CBN layers, "
            f"{largest}. Pass at most that, or build the layers with a larger window_size."
        )
    for layer in layers:
        layer.set_window(size)


def step(model: nn.Module) -> Tensor | None:
    """Ends an iteration: what its forward recorded becomes part of the window.

    Call it once per iteration, after the backward pass. Until then a forward can be repeated
    without changing window or running statistics; of several forwards the last one counts. (With a
    window of 1, as in a burn-in, each forward updates the running statistics, as BN's does.)

    What came from a batch with NaN or infinite values is dropped, with a warning: window and
    running statistics stay as they were before it. To know, it waits for the device once.

    Args:
        model: A model with CBN layers.

    Returns:
        The fraction of compensated past channel variances that the maximum cut to zero in this
        iteration, a tensor without dimensions; None if nothing was compensated.
    """
    clamped, warning = end_iteration(model)
    if warning:
        warnings.warn(warning, stacklevel=2)
    return clamped


def end_iteration(model: nn.Module) -> tuple[Tensor | None, str | None]:
    """Does what :func:`step` does; returns the warning, if there is one, with the fraction."""
    linking.end_iteration()
    layers = cbn_layers(model)
    checks = {name: layer.checks() for name, layer in layers.items()}
    finite = iter(_are_finite([check for each in checks.values() for _, check in each]))
    positive, spoilt = [], []
    windows = defaultdict(list)  # by the forward that they grew in
    learnt = defaultdict(list)  # by the number of the call: none has a layer twice
    for name, layer in layers.items():
        kept = [next(finite) for _ in checks[name]]
        forward = layer._forward_id
        for number, (window, record) in enumerate(layer.step(kept)):
            windows[forward].append(window)
            learnt[number].append((layer, record))
            if record.positive is not None:
                positive.append(record.positive)
        spoilt += [
            (order, name)
            for (order, _), is_kept in zip(checks[name], kept, strict=True)
            if not is_kept
        ]
    for forward, together in windows.items():
        for group in [together] if forward is not None else [[each] for each in together]:
            accompany(group)
    for records in learnt.values():
        update_running_stats(records)
    warning = None
    if spoilt:
        count = len({name for _, name in spoilt})
        warning = (
            f"CBN layer '{min(spoilt)[1]}' is the first of {count} that met NaN or infinite values "
            "in this iteration, which is left out of their windows and running statistics."
        )
    if not positive:
        return None, warning
    unclamped = torch.cat([each.flatten().to(positive[0].device) for each in positive])
    return 1 - unclamped.mean(dtype=torch.float32), warning


def _are_finite(values: list[Tensor]) -> list[bool]:
    if not values:
        return []
    together = torch.cat([value.to(values[0].device) for value in values])
    if together.isfinite().all():
        return [True] * len(values)
    return [bool(value.isfinite().all()) for value in values]


def window_state(model: nn.Module) -> dict:
    """What the windows hold: the one thing that ``model.state_dict()`` leaves out.

    A training that resumes with it goes on as if it had not been interrupted; without it the
    windows fill again within ``window_size - 1`` iterations. Each process of a distributed
    training has its own.

    Args:
        model: A linked model, between two iterations.

    Returns:
        Plain values and the windows' own tensors, for ``torch.save``.
    """
    names = {module: name for name, module in model.named_modules()}
    return {
        name: [
            dict(window.state(), feeder=names.get(window.feeder and window.feeder()))
            for window in layer._windows
        ]
        for name, layer in cbn_layers(model).items()
    }


def load_window_state(model: nn.Module, state: dict) -> None:
    """Fills the windows with what :func:`window_state` returned.

    Args:
        model: The same model with the weights of that time, linked, and with the same window in
            force.
        state: What :func:`window_state` returned.

    Raises:
        ValueError: The model has other CBN layers or convolutions, or a layer has another window
            in force.
    """
    layers = cbn_layers(model)
    if layers.keys() != state.keys():
        odd = sorted(layers.keys() ^ state.keys())[0]
        raise ValueError(
            f"load_window_state: only one of the model and the state has a CBN layer '{odd}'. "
            "Windows can only be loaded into the model that they were saved from."
        )
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        if not all(_fits(window, layer, modules) for window in state[name]):
            raise ValueError(
                f"load_window_state: the window of CBN layer '{name}' is of another number of "
                "channels, another convolution or another setting of compensate or window_dtype. "
                "Build the model as the one that was saved."
            )
        for window in state[name]:
            if window["capacity"] != layer.window - 1:
                raise ValueError(
                    f"load_window_state: CBN layer '{name}' has a window of {layer.window} in "
                    f"force, the state one of {window['capacity'] + 1}. Build the model with the "
                    "same window_size and call set_window first."
                )
    for name, layer in layers.items():
        # A layer may have neither parameters nor buffers.
        own = itertools.chain(layer.parameters(), layer.buffers(), model.parameters())
        device = next(own, torch.empty(0)).device
        layer._windows[:] = [
            Window.from_state(window, modules.get(window["feeder"]), device)
            for window in state[name]
        ]


def _fits(window: dict, layer: CBN, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer can use a window, as far as their shapes tell."""
    vectors, h, conv = window["vectors"], window["h"], modules.get(window["feeder"])
    if vectors is not None and vectors.shape[2] != layer.num_features:
        return False
    if h is None:
        return True
    is_of_dtype = h.dtype == WINDOW_DTYPES[layer.window_dtype]
    is_of_conv = conv is not None and h.shape[2] == conv.weight[0].numel()
    return layer.compensate and is_of_dtype and is_of_conv


def cbn_layers(model: nn.Module) -> dict[str, CBN]:
    """The CBN layers of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CBN)}
