# Licensed under the Apache License, Version 2.0.
"""Turns batch normalisation into CBN, and this package's layers into batch normalisation."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from . import linking
from .cbn import CBN
from .layer import NormLayer
from .mabn import MABN

# Settings that the new layer takes from the old one, so that they cannot be options.
_KEPT = ("num_features", "affine", "track_running_stats", "device", "dtype")


def to_batchnorm(model: nn.Module) -> nn.Module:
    """Turns every CBN, SyncCBN, CmBN, BRN and MABN of ``model`` into ``nn.BatchNorm2d``, in place.

    In evaluation mode, these layers are batch normalisation, so outputs stay the same, bit for bit.
    A layer whose class has a ``forward`` of its own stays as it is, with a warning.
    The new layers take over the very parameters and buffers (so an optimiser keeps working), the
    mode and the names. Everything that :func:`cbn_mmdet.link` put on the model is removed, so that
    a saved or pickled model no longer needs this package. (The exception is a
    :class:`cbn_mmdet.CenConv2d` before a MABN: it stays, and centralises its weight.)

    Args:
        model: Any module, a single layer included.

    Returns:
        The model; the new layer if ``model`` is itself a layer to turn.

    Raises:
        ValueError: A layer is parametrized; the model stays as it was.
    """
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, NormLayer):
            continue
        if is_parametrized(module):
            raise ValueError(
                f"to_batchnorm: '{name}' ({module.kind}) is parametrized: make its values plain "
                "first, by torch.nn.utils.parametrize.remove_parametrizations."
            )
        if type(module).forward is NormLayer.forward:
            layers.append(module)
        else:
            kind = type(module).__name__
            warnings.warn(
                f"to_batchnorm: {f'{name!r} ({kind})' if name else kind} stays as it is, but "
                "unlinked: its class has a forward of its own, which may do more than normalise.",
                stacklevel=2,
            )
    linking.unhook(model)
    return _replace(model, {layer: _to_batchnorm(layer) for layer in layers})


def from_batchnorm(model: nn.Module, **options) -> nn.Module:
    """Turns every ``nn.BatchNorm2d`` and ``nn.SyncBatchNorm`` of ``model`` into a CBN, in place.

    The new layers take over the very parameters and buffers, whether these train, the mode and the
    names: a layer that is frozen, or kept in evaluation mode, stays so, and does what it did. Link
    the model next, or add ``CBNHook`` in mmengine. The first training step refuses, by name, a
    layer that no convolution feeds, such as the first ones of a DenseNet's blocks;
    ``compensate=False`` accepts all layers.

    Other kinds of batch normalisation stay as they are, and a warning names the first of them:
    ``nn.BatchNorm1d`` and ``nn.BatchNorm3d``, for which there is no CBN, and subclasses, which may
    do more than normalise.

    Args:
        model: Any module, a single layer included.
        **options: Arguments of :class:`cbn_mmdet.CBN`. ``eps`` and ``momentum`` are each layer's
            own unless given, and ``sync`` is True for ``nn.SyncBatchNorm`` unless given.

    Returns:
        The model; the new layer if ``model`` is itself a layer to turn.

    Raises:
        TypeError: An option is none of CBN's, or one that each layer keeps (``affine``, say).
        ValueError: An option is out of its range, or a ``nn.SyncBatchNorm`` synchronises a process
            group of its own, which CBN cannot.
    """
    for name in _KEPT:
        if name in options:
            raise TypeError(
                f"from_batchnorm: each layer keeps its own {name}; leave the option out."
            )
    layers = {}
    left = []
    for name, layer in model.named_modules():
        if type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            layers[layer] = _from_batchnorm(name, layer, options)
        elif isinstance(layer, _BatchNorm) and not isinstance(layer, NormLayer):
            left.append(f"'{name}' ({type(layer).__name__})")
    if left:
        warnings.warn(
            f"from_batchnorm: {len(left)} layers stay as they are, {left[0]} first: only "
            "nn.BatchNorm2d and nn.SyncBatchNorm themselves become CBN.",
            stacklevel=2,
        )
    elif not layers:
        warnings.warn(
            "from_batchnorm: the model has no nn.BatchNorm2d or nn.SyncBatchNorm, so nothing "
            "changed.",
            stacklevel=2,
        )
    return _replace(model, layers)


def _to_batchnorm(layer: NormLayer) -> nn.BatchNorm2d:
    own = layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    new = nn.BatchNorm2d(layer.num_features, *own, device="meta")
    more = MABN.more_buffers if isinstance(layer, MABN) else ()
    kept = {name: buffer for name, buffer in layer._buffers.items() if name not in more}
    _taking_over(layer, new)._buffers = kept
    return new


def _from_batchnorm(name: str, layer: _BatchNorm, options: dict) -> CBN:
    syncs = isinstance(layer, nn.SyncBatchNorm)
    if syncs and layer.process_group is not None and "sync" not in options:
        raise ValueError(
            f"from_batchnorm: '{name}' (SyncBatchNorm) synchronises a process group of its own, "
            "and CBN that of all processes. Choose: sync=True for all, sync=False for none."
        )
    own = dict(eps=layer.eps, momentum=layer.momentum, sync=syncs)
    new = CBN(
        layer.num_features,
        affine=layer.affine,
        track_running_stats=layer.track_running_stats,
        device="meta",
        **{**own, **options},
    )
    for attribute, value in vars(layer).items():  # a user's own, such as lr_mult
        is_own = attribute.startswith("_") or hasattr(new, attribute) or callable(value)
        if not is_own and attribute != "process_group":
            setattr(new, attribute, value)
    return _taking_over(layer, new)


def _taking_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Gives ``new`` all state of ``old`` that any module has: parameters, buffers, mode, hooks."""
    for attribute in vars(nn.Module()):
        setattr(new, attribute, getattr(old, attribute))
    return new


def _replace(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> nn.Module:
    """Replaces each key of ``layers`` by its value, in every place of the model that holds it."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]
    return layers.get(model, model)
