# Licensed under the Apache License, Version 2.0.
"""Which module's output a tensor is.

A norm layer is handed a tensor and must know the convolution that computed it. Neither the order
of registration nor names tell: some blocks keep convolutions and norms in separate lists. So every
module of a watched model signs the tensor it returns, and the norm layer reads the signature from
the very tensor it is handed.

Nothing here changes a value, and nothing outlives the model's forward: a signature lives on its
tensor, and lets go of the convolution's input when the outermost watched module returns.
"""

from __future__ import annotations

import itertools
import threading
import weakref

import torch
from torch import Tensor, nn


class Signature:
    """Who computed a tensor.

    Attributes:
        module: The innermost module that returned the tensor.
        input: The module's input if it is a convolution that trains, else None.
        version: The tensor's version when it was returned: an operation in place raises it.
    """

    __slots__ = ("__weakref__", "input", "module", "version")

    def __init__(self, module: nn.Module, tensor: Tensor, input: Tensor | None) -> None:
        self.module = module
        self.input = input
        self.version = _version(tensor)


# The hooks hold no state: a copied or pickled model carries hooks that are still right, and the
# names of the original's modules do not come along.
_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_holding: weakref.WeakSet[Signature] = weakref.WeakSet()
_forwards = itertools.count()


class _Scope(threading.local):
    depth = 0
    forward: int | None = None


_scope = _Scope()


def watch(model: nn.Module) -> None:
    """Makes every module of ``model`` sign its output. Calling it again adds nothing."""
    for name, module in model.named_modules():
        _names[module] = name or type(module).__name__
        if _sign not in module._forward_hooks.values():
            module.register_forward_hook(_sign, with_kwargs=True)
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)


def is_watched(module: nn.Module) -> bool:
    """Whether ``watch`` was called on a model that contains this very module."""
    return module in _names


def name_of(module: nn.Module) -> str:
    """The module's name in its model and its type, for messages."""
    name, kind = _names.get(module), type(module).__name__
    return f"'{name}' ({kind})" if name else kind


def signature_of(tensor: Tensor) -> Signature | None:
    """The signature of a tensor, or None if no watched module returned it as it is now."""
    signature = getattr(tensor, "_cbn_signature", None)
    if signature is None or signature.version != _version(tensor):
        return None
    return signature


def current_forward() -> int | None:
    """A number for the running forward of the outermost watched model, None outside of one."""
    return _scope.forward


def release() -> None:
    """Lets go of every convolution input that is still held."""
    for signature in list(_holding):
        signature.input = None
    _holding.clear()


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing does it."""
    return torch._C._current_graph_task_id() != -1


def _sign(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    # The innermost module signs first; a container that returns the same tensor changes nothing.
    if not isinstance(output, Tensor) or signature_of(output) is not None:
        return
    held = None
    if isinstance(module, nn.Conv2d) and module.training:
        held = args[0] if args else kwargs.get("input")
    output._cbn_signature = signature = Signature(module, output, held)
    if held is not None:
        _holding.add(signature)


def _enter(module: nn.Module, args: tuple) -> None:
    if _scope.depth == 0:
        _scope.forward = next(_forwards)
    _scope.depth += 1


def _leave(module: nn.Module, args: tuple, output: object) -> None:
    _scope.depth = max(_scope.depth - 1, 0)
    if _scope.depth == 0:
        _scope.forward = None
        release()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
