# Licensed under the Apache License, Version 2.0.
"""Which module's output a tensor is, and whether its statistics can follow that module's weight.

A norm layer is handed a tensor and must know the convolution that computed it. Neither the order of
registration nor names tell: some blocks keep convolutions and norms in separate lists. So every
module of a linked model that has a weight marks the tensor it returns, and the norm layer reads the
mark of the very tensor that it is handed.

A mark changes no value, rides on its tensor alone, and is taken off when the model's forward ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .layer import NormLayer
from .moments import statistics_dtype

_MARK = "_cbn_mark"  # the attribute of a tensor

# What two computations of one convolution may differ by; other mathematics is far outside.
_SAME_OUTPUT = {torch.float64: 1e-6, torch.float32: 1e-2}
_SAME_OUTPUT_HALF = 5e-2


class Mark:
    """Who computed a tensor.

    Attributes:
        module: The innermost module with a weight that returned it.
        input: That module's input.
        version: The tensor's version when it was returned: an operation in place raises it.
    """

    __slots__ = ("input", "module", "version")

    def __init__(self, module: nn.Module, input: object, version: int) -> None:
        self.module, self.input, self.version = module, input, version


class Hook:
    """A hook that :func:`cbn_mmdet.link` puts on a model: it calls a method of the iteration.

    A copied or unpickled model's hooks have no iteration, and do nothing.

    Args:
        iteration: Of the linked model.
        method: The name of its method.
    """

    def __init__(self, iteration: object, method: str) -> None:
        self.iteration, self.method = iteration, method

    @torch.compiler.disable
    def __call__(self, *args: object) -> None:
        """What torch calls."""
        if self.iteration is not None:
            getattr(self.iteration, self.method)(*args)


def mark(module: nn.Module, input: object, output: object) -> weakref.ref[Tensor] | None:
    """Marks a module's output, unless a module within has; returns a reference to it if so."""
    if not isinstance(output, Tensor):
        return None
    version = kernels.version_of(output)
    there = getattr(output, _MARK, None)
    if there is not None and there.version == version:
        return None
    setattr(output, _MARK, Mark(module, input, version))
    return weakref.ref(output)


def mark_of(tensor: Tensor) -> Mark | None:
    """The mark of a tensor, or None if no marking module returned it as it is now."""
    there = getattr(tensor, _MARK, None)
    return there if there is not None and there.version == kernels.version_of(tensor) else None


def unmark(tensors: list[weakref.ref[Tensor]]) -> None:
    """Takes marks off the tensors that are still there."""
    for ref in tensors:
        tensor = ref()
        if tensor is not None:
            tensor.__dict__.pop(_MARK, None)
    tensors.clear()


def marks(module: nn.Module) -> bool:
    """Whether a module is one whose output is to be marked."""
    return isinstance(getattr(module, "weight", None), Tensor) and not isinstance(module, NormLayer)


def hooks_of(module: nn.Module) -> list[tuple[dict, int, Hook]]:
    """This package's hooks on a module: where each is, its key, and itself."""
    return [
        (hooks, key, hook)
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in hooks.items()
        if isinstance(hook, Hook)
    ]


def unhook(model: nn.Module) -> None:
    """Takes everything that :func:`cbn_mmdet.link` put on ``model`` away."""
    for module in model.modules():
        for hooks, key, _ in hooks_of(module):
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def why_not(
    found: Mark | None, y: Tensor, is_to_verify: bool, name_of: Callable[[nn.Module], str]
) -> str | None:
    """Why the statistics of ``y`` cannot follow the weight of the module that returned it.

    Args:
        found: The tensor's mark.
        y: The tensor.
        is_to_verify: Whether to compute once more what the module should have.
        name_of: Names a module.

    Returns:
        A part of a sentence; None if they can.
    """
    if found is None:
        return (
            f"was handed a tensor of shape {tuple(y.shape)} that no module with a weight of the "
            "linked model returned as it is: the result of an activation, a function or an "
            "operation in place, or of a module that the linked model does not contain"
        )
    conv, x = found.module, found.input
    if not isinstance(conv, nn.Conv2d):
        return f"is fed by {name_of(conv)}, which is no nn.Conv2d"
    if nn.utils.parametrize.is_parametrized(conv, "weight"):
        return (
            f"is fed by {name_of(conv)}, whose weight is parametrized, so that its value may "
            "change each time it is read"
        )
    if is_to_verify and not is_plain(conv, x, y):
        return (
            f"is fed by {name_of(conv)}, whose output is not the plain convolution of its weight "
            "(a standardised or modulated one, say)"
        )
    return None


@torch.no_grad()
def is_plain(conv: nn.Conv2d, x: Tensor, y: Tensor) -> bool:
    """Whether ``y`` is the plain convolution of ``x`` with the weight of ``conv``.

    It is not if the weight is standardised or modulated on the way, say. Computes the convolution
    once more, and allows for the rounding of half precision or of TF32.
    """
    if x.dim() != 4 or x.shape[1] != conv.in_channels or y.shape[1] != conv.out_channels:
        return False
    padded, padding = kernels.padded(conv, x.to(y.dtype), y)
    weight = conv.weight.to(y.dtype)
    bias = None if conv.bias is None else conv.bias.to(y.dtype)
    again = F.conv2d(padded, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
    if again.shape != y.shape:
        return False
    dtype = statistics_dtype(y.dtype)
    error, size = (torch.linalg.vector_norm(each, dtype=dtype) for each in (again.sub_(y), y))
    # What is not finite tells nothing.
    return not bool(error > _SAME_OUTPUT.get(y.dtype, _SAME_OUTPUT_HALF) * size)


def trains(module: nn.Module | None) -> bool:
    """Whether it is a convolution whose weight is a parameter that trains."""
    # Reading a parametrized weight computes it anew.
    if not isinstance(module, nn.Conv2d) or nn.utils.parametrize.is_parametrized(module, "weight"):
        return False
    return module.weight.requires_grad


@torch.no_grad()  # else abs saves y, and a checkpoint's repetition, which does not ask, saves less
def tells(y: Tensor) -> bool:
    """Whether an output shows what computed it: it is neither all zero nor infinite."""
    return bool(y.any()) and bool(y.isfinite().all())


def keeps_weight(conv: nn.Module | None) -> bool:
    """Whether the weight is there before the convolution's forward as it will be in it.

    A subclass or a hook may set ``weight.data`` first, which nothing would tell of.
    """
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv).forward is nn.Conv2d.forward
        and not conv._forward_pre_hooks
        and is_whole(conv.weight)
    )


def is_whole(weight: Tensor) -> bool:
    """Whether a weight is not spread over processes: FSDP gathers it for the forward alone."""
    return type(weight) is nn.Parameter
