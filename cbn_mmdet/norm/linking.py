# Licensed under the Apache License, Version 2.0.
"""Which module's output a tensor is.

A norm layer is handed a tensor and must know the convolution that computed it. Neither the order
of registration nor names tell: some blocks keep convolutions and norms in separate lists. So every
module of a watched model signs the tensor it returns, and the norm layer looks up the signature of
the very tensor it is handed.

Nothing here changes a value, and nothing outlives its use: a signature goes with its tensor, and
lets go of the convolution's input when the watched model returns.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


class Signature:
    """Who computed a tensor.

    Attributes:
        tensor: Reference to the tensor.
        module: Reference to the innermost module that returned it.
        input: The module's input if it is a convolution whose weight trains, else None.
        version: The tensor's version when it was returned: an operation in place raises it.
    """

    __slots__ = ("input", "module", "tensor", "version")

    def __init__(
        self, tensor: Tensor, module: nn.Module, input: Tensor | None, forget: Callable
    ) -> None:
        self.tensor = weakref.ref(tensor, forget)
        self.module = weakref.ref(module)
        self.input = input
        self.version = version_of(tensor)


class _Thread(threading.local):
    """What the forwards that run in this thread have in common."""

    def __init__(self) -> None:
        self.signatures: dict[int, Signature] = {}  # by the tensor's id
        self.running: list[nn.Module] = []  # watched modules with children, outermost first
        self.forward: int | None = None


_here = _Thread()
_forwards = itertools.count()
# The hooks hold no state: a copied or pickled model carries hooks that are still right, and the
# names of the original's modules do not come along.
_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def watch(model: nn.Module) -> None:
    """Makes every module of ``model`` sign its output. Calling it again adds nothing."""
    for name, module in model.named_modules():
        _names[module] = name or type(module).__name__
        if _is_new(_sign, module._forward_hooks):
            module.register_forward_hook(_sign, with_kwargs=True)
        has_children = next(module.children(), None) is not None
        if has_children and _is_new(_enter, module._forward_pre_hooks):
            module.register_forward_pre_hook(_enter, prepend=True)
            module.register_forward_hook(_leave, always_call=True)
    if _is_new(_release, model._forward_hooks):
        model.register_forward_hook(_release, always_call=True)


def unwatch(model: nn.Module) -> None:
    """Takes everything that ``watch`` put on ``model`` away."""
    for module in model.modules():
        _names.pop(module, None)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def is_watched(module: nn.Module) -> bool:
    """Whether ``watch`` was called on a model that contains this very module."""
    return module in _names


def name_of(module: nn.Module) -> str:
    """The module's name in its model and its type, for messages."""
    name, kind = _names.get(module), type(module).__name__
    return f"'{name}' ({kind})" if name else kind


def signature_of(tensor: Tensor) -> Signature | None:
    """The signature of a tensor, or None if no watched module returned it as it is now."""
    signature = _here.signatures.get(id(tensor))
    if signature is None or signature.tensor() is not tensor:
        return None
    return signature if signature.version == version_of(tensor) else None


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as far as autograd counts it."""
    return 0 if tensor.is_inference() else tensor._version


def current_forward() -> int | None:
    """A number for the running forward of the outermost watched module, None outside of one."""
    return _here.forward


def end_iteration() -> None:
    """Lets go of all that is held, and of a forward that was interrupted."""
    _here.running.clear()
    _here.forward = None
    _release()


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing does it."""
    return torch._C._current_graph_task_id() != -1


def is_compiling() -> bool:
    """Whether this code is being traced by torch.compile or torch.export."""
    if hasattr(torch.compiler, "is_compiling"):
        return torch.compiler.is_compiling()
    return torch._dynamo.is_compiling()  # torch 2.1


def refuse_graphs(layer: nn.Module) -> None:
    """Refuses to put a layer that trains into a graph, which would repeat one iteration for ever.

    torch.compile is welcome: it leaves these layers to Python.

    Raises:
        RuntimeError: A trace or an export is under way.
    """
    if torch.jit.is_tracing() or is_compiling():
        raise RuntimeError(
            f"{name_of(layer)}: only its evaluation can be traced or exported. Call model.eval() "
            "first."
        )


def refuse_script(layer: nn.Module) -> None:
    """Refuses torch.jit.script, which would stumble over the first line that is too much for it.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        f"{name_of(layer)}: torch.jit.script does not know it. Turn it into the batch "
        "normalisation that it is in evaluation first: cbn_mmdet.to_batchnorm(model)."
    )


@torch.compiler.disable
def _sign(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    # The innermost module signs first; a container that returns the same tensor changes nothing.
    if not isinstance(output, Tensor) or signature_of(output) is not None:
        return
    held = None
    # A convolution in evaluation mode may still train; without gradients it does not.
    learns = module.training or torch.is_grad_enabled()
    if learns and isinstance(module, nn.Conv2d) and _trains(module):
        held = args[0] if args else kwargs.get("input")
    # Taken out when the tensor dies, before another can have its id; pop's default is the reference
    # that the call brings along. Nothing of it is Python code, in which an interrupt would be lost.
    signatures, key = _here.signatures, id(output)
    signatures[key] = Signature(output, module, held, partial(signatures.pop, key))


@torch.compiler.disable
def _enter(module: nn.Module, args: tuple) -> None:
    if not _here.running:
        _here.forward = next(_forwards)
    _here.running.append(module)


@torch.compiler.disable
def _leave(module: nn.Module, args: tuple, output: object) -> None:
    # A forward that failed may have left some that it had entered; a module may call itself.
    running = _here.running
    depths = [depth for depth, entered in enumerate(running) if entered is module]
    if depths:
        del running[depths[-1] :]
    if not running:
        _here.forward = None


@torch.compiler.disable
def _release(*_: object) -> None:
    if _here.running:  # a watched model within another, which is not at its end
        return
    for signature in list(_here.signatures.values()):
        signature.input = None


_HOOKS = (_sign, _enter, _leave, _release)


def _trains(conv: nn.Conv2d) -> bool:
    # Reading a parametrized weight computes it anew.
    return not nn.utils.parametrize.is_parametrized(conv) and conv.weight.requires_grad


def _is_new(hook: object, hooks: dict) -> bool:
    return hook not in hooks.values()
