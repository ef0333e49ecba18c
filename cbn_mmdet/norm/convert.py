# Licensed under the Apache License, Version 2.0.
"""Between batch normalisation and this package's layers, which have its parameters and buffers."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import linking
from .cbn import CBN
from .layer import NormLayer

# What a layer has already, and passes on as it is.
_KEPT = ("num_features", "affine", "track_running_stats", "device", "dtype")


def to_batchnorm(model: nn.Module) -> nn.Module:
    """Turns every CBN, SyncCBN, CmBN, BRN and MABN of ``model`` into ``nn.BatchNorm2d``, in place.

    That is what these layers are in evaluation mode: the outputs there stay the same, bit for bit.
    The new layers take over parameters and buffers themselves (so an optimiser keeps working), the
    mode and the names. What :func:`cbn_mmdet.link` has put on the model goes, so that a saved or
    pickled model needs this package no more. (But for the :class:`cbn_mmdet.CenConv2d` before a
    MABN, which centralises its weight.)

    Args:
        model: Any module, a single layer included.

    Returns:
        The model; the new layer if ``model`` is itself a layer to turn.
    """
    linking.unhook(model)
    layers = [module for module in model.modules() if isinstance(module, NormLayer)]
    return _replace(model, {layer: _to_batchnorm(layer) for layer in layers})


def from_batchnorm(model: nn.Module, **options) -> nn.Module:
    """Turns every ``nn.BatchNorm2d`` and ``nn.SyncBatchNorm`` of ``model`` into a CBN, in place.

    The new layers take over parameters and buffers themselves, whether these train, the mode and
    the names: a layer that is frozen, or kept in evaluation mode, stays so, and does what it did.
    Link the model next, or add ``CBNHook`` in mmengine. A layer that is not fed by a convolution,
    as the first ones of a DenseNet's blocks, is refused by name in the first training step:
    ``compensate=False`` takes them all.

    Other kinds of batch normalisation stay as they are, and a warning names them:
    ``nn.BatchNorm1d`` and ``nn.BatchNorm3d``, for which there is no CBN, and subclasses, which may
    do more than normalise.

    Args:
        model: Any module, a single layer included.
        **options: Arguments of :class:`cbn_mmdet.CBN`. ``eps`` and ``momentum`` are each layer's
            own unless given, and ``sync`` is True for ``nn.SyncBatchNorm`` unless given.

    Returns:
        The model; the new layer if ``model`` is itself a layer to turn.

    Raises:
        TypeError: An option is none of CBN's, or what each layer has already (``affine``, say).
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
    names = list(new._buffers)  # MABN has more
    _taking_over(layer, new)._buffers = {name: layer._buffers[name] for name in names}
    return new


def _from_batchnorm(name: str, layer: _BatchNorm, options: dict) -> CBN:
    syncs = isinstance(layer, nn.SyncBatchNorm)
    if syncs and layer.process_group is not None and "sync" not in options:
        raise ValueError(
            f"from_batchnorm: '{name}' (SyncBatchNorm) synchronises a process group of its own, "
            "and CBN that of all processes. Choose: sync=True for all, sync=False for none."
        )
    own = dict(eps=layer.eps, momentum=layer.momentum, sync=syncs)
    return _taking_over(
        layer,
        CBN(
            layer.num_features,
            affine=layer.affine,
            track_running_stats=layer.track_running_stats,
            device="meta",
            **{**own, **options},
        ),
    )


def _taking_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` with all that every module has of ``old``: parameters, buffers, mode, hooks."""
    for attribute in vars(nn.Module()):
        setattr(new, attribute, getattr(old, attribute))
    return new


def _replace(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts the values of ``layers`` in the places of its keys; a layer may have several."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]
    return layers.get(model, model)
