# Licensed under the Apache License, Version 2.0.
"""Finds the module that returned a tensor, and the weight that the tensor is a function of.

A norm layer receives a tensor and must know the convolution that computed it. Neither the order of
registration nor names show it: some blocks keep convolutions and norms in separate lists. So every
module of a linked model that has a weight marks the tensor it returns, and the norm layer reads the
mark of the very tensor that it receives. A mark changes no value, belongs to its tensor alone, and
is removed when the model's forward ends.

If the module is a plain ``nn.Conv2d``, the output is a function of its weight. For all others
(weights that are normalised, standardised or gated on the way, modules that call ``F.conv2d``
themselves), the autograd graph holds the weight and the input that were used. Mark and graph are
read in each forward, as a module may change what it does.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import kernels
from .layer import NormLayer, is_recomputation, outside_graphs
from .moments import Source

_MARK = "_cbn_mark"  # the attribute of a tensor that holds its mark


class Mark:
    """A note on a tensor of what computed it.

    Attributes:
        module: The innermost module with a weight that returned the tensor.
        input: That module's input.
        version: The tensor's version when it was returned; each in-place operation raises it.
    """

    __slots__ = ("input", "module", "version")

    def __init__(self, module: nn.Module, input: object, version: int) -> None:
        self.module, self.input, self.version = module, input, version

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copied or pickled tensor has no mark


class Hook:
    """A hook that :func:`cbn_mmdet.link` puts on a model: it calls a method of the iteration.

    The hooks of a copied or unpickled model have no iteration, and do nothing.

    Args:
        iteration: The iteration of the linked model.
        method: The name of the iteration's method.
    """

    def __init__(self, iteration: object, method: str) -> None:
        self.iteration, self.method = iteration, method

    @outside_graphs
    def __call__(self, *args: object) -> None:
        """Calls the method with what torch hands to the hook."""
        if self.iteration is not None:
            getattr(self.iteration, self.method)(*args)


def mark(module: nn.Module, input: object, output: object) -> list[weakref.ref[Tensor]]:
    """Marks a module's output, unless an inner module has; returns references to what it marked.

    In a list or tuple, such as TridentNet's convolution returns, it marks each tensor.
    """
    if not isinstance(output, Tensor):
        parts = output if isinstance(output, list | tuple) else ()
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return [ref for tensor in tensors for ref in mark(module, None, tensor)]
    if mark_of(output) is not None:
        return []
    setattr(output, _MARK, Mark(module, input, kernels.version_of(output)))
    return [weakref.ref(output)]


def mark_of(tensor: Tensor) -> Mark | None:
    """The mark of a tensor; None if it has none, or was changed in place since."""
    there = getattr(tensor, _MARK, None)
    if there is None and (base := tensor._base) is not None and _is_whole(tensor, base):
        there = getattr(base, _MARK, None)
    return there if there is not None and there.version == kernels.version_of(tensor) else None


def _is_whole(view: Tensor, base: Tensor) -> bool:
    """Whether a view is all of its base as it is, such as torch's backward hooks hand on."""
    return (
        view.shape == base.shape
        and view.stride() == base.stride()
        and view.storage_offset() == base.storage_offset()
        and view.dtype == base.dtype
    )


def unmark(tensors: list[weakref.ref[Tensor]]) -> None:
    """Removes the marks of those tensors that still exist."""
    for ref in tensors:
        tensor = ref()
        if tensor is not None:
            tensor.__dict__.pop(_MARK, None)
    tensors.clear()


def marks(module: nn.Module) -> bool:
    """Whether to mark a module's output: it has a weight, and is no norm layer of this package."""
    if isinstance(module, (NormLayer, torch.jit.ScriptModule)):  # the latter takes no hook
        return False
    # Reading a parametrized weight would compute it.
    return nn.utils.parametrize.is_parametrized(module, "weight") or isinstance(
        getattr(module, "weight", None), Tensor
    )


def hooks_of(module: nn.Module) -> list[tuple[dict, int, Hook]]:
    """This package's hooks on a module: for each the dict that holds it, its key, and the hook."""
    return [
        (hooks, key, hook)
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in hooks.items()
        if isinstance(hook, Hook)
    ]


def unhook(model: nn.Module) -> None:
    """Removes everything that :func:`cbn_mmdet.link` put on ``model``."""
    for module in model.modules():
        for hooks, key, _ in hooks_of(module):
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


# Finding the weight.


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module, by its code, merely convolves its input with its weight parameter."""
    kind = type(module)
    return (
        isinstance(module, nn.Conv2d)
        and kind.forward is nn.Conv2d.forward
        and kind._conv_forward is nn.Conv2d._conv_forward
        and "forward" not in module.__dict__
        and "_conv_forward" not in module.__dict__
        and type(module._parameters.get("weight")) is nn.Parameter  # not FSDP's, between forwards
    )


def source_of(
    y: Tensor,
    name_of: Callable[[nn.Module], str],
    checked: weakref.ref[nn.Module] | None = None,
    follows: bool = False,
) -> tuple[nn.Module | None, Source | None, str]:
    """Finds what computed ``y`` as a function of a weight.

    Args:
        y: The tensor that the layer received, ``(N, C, H, W)``.
        name_of: A function that names a module, for messages.
        checked: A reference to a module whose output channels are known to be rows of its weight,
            if there is one.
        follows: Whether the window has followed a weight so far. It goes on if this is frozen.

    Returns:
        The module that marked ``y``, or None; the source, or None; and, as a part of a sentence,
        why there is no source.
    """
    found = mark_of(y)
    module = None if found is None else found.module
    if is_plain(module):
        return module, Source.of(module, found.input, follows), ""
    is_checked = module is not None and checked is not None and checked() is module
    return module, *_source_by_autograd(y, module, name_of, is_checked, follows)


def _source_by_autograd(
    y: Tensor,
    module: nn.Module | None,
    name_of: Callable[[nn.Module], str],
    is_checked: bool,
    follows: bool,
) -> tuple[Source | None, str]:
    """The source of a tensor that no plain convolution returned, or why there is none."""
    graph, place = y.grad_fn, y.output_nr
    while graph is not None and graph.name() == "BackwardHookFunctionBackward":
        graph, place = graph.next_functions[place]

    def fed() -> str:  # for messages alone, because to find a name takes a walk through the model
        return f"is fed by {'a convolution' if module is None else name_of(module)}"

    is_convolution = graph is not None and graph.name() == "ConvolutionBackward0"
    has_rows = is_convolution and not graph._saved_transposed
    if module is None and not is_convolution:
        return None, (
            f"was handed a tensor of shape {tuple(y.shape)} that no module with a weight of the "
            "linked model returned as it is: the result of an activation, a function or an "
            "operation in place, or of a module that the linked model does not contain"
        )
    # A checkpoint's first forward ran without gradients, so its source was unknown as well.
    hides = graph is None or is_recomputation() or _is_checkpointed()
    is_frozen = module is not None and not any(each.requires_grad for each in module.parameters())
    if is_frozen and (hides or not (follows and has_rows)):
        return Source(None, None), ""
    if hides:
        return None, (
            f"{fed()}, which is no plain nn.Conv2d, so that autograd has to tell its derivative, "
            "and this forward runs without gradients, as that of activation checkpointing does "
            "(turn with_cp off around this layer)"
        )
    if has_rows:
        return _convolution(graph, module, follows), ""
    weight = graph._saved_weight if is_convolution else module._parameters.get("weight")
    if weight is None or not weight.requires_grad:
        return None, f"{fed()}, which has no weight of its own that trains"
    channels, groups = y.shape[1], graph._saved_groups if is_convolution else None
    bias = None if module is None else module._parameters.get("bias")
    if bias is not None and bias.shape != (channels,):
        bias = None  # the bias counts as a constant
    rows = 0 if weight.dim() == 0 else len(weight)
    if groups is not None:
        rows = groups * weight.shape[1]
    if rows == channels:
        source = Source.by_autograd(weight, bias, groups)
        if is_checked or _has_rows_of_channels(source, y):
            return source, ""
    return None, f"{fed()}, whose weight has not one row for each of its {channels} channels"


def _has_rows_of_channels(source: Source, y: Tensor) -> bool:
    """Whether each channel depends on its own row of the weight alone (not so after ``Linear``)."""
    with torch.no_grad():
        channels = y.shape[1]
        number = torch.arange(1, channels + 1, device=y.device).view(-1, 1, 1) / channels + 1
        # Keeps sums within half precision's range, and numbers above its subnormal range.
        least = max(channels / max(y.numel(), 1), 2.0**-12)
        numbered = (number * least).to(y).expand_as(y).contiguous()
        grads = torch.full_like(y, least), numbered
        one, each = (source.gradient(y, grad).double() for grad in grads)
        expected = one * number.flatten(1).double()
        return not bool((each - expected).norm() > 1e-2 * each.norm())  # NaN proves nothing


def _convolution(
    graph: torch.autograd.graph.Node, module: nn.Module | None, follows: bool
) -> Source:
    """The source that a convolution's node in the autograd graph describes."""
    _, of_weight, of_bias = (_before_cast(each) for each, _ in graph.next_functions)
    weight, bias = (getattr(each, "variable", None) for each in (of_weight, of_bias))
    weight = graph._saved_weight if weight is None else weight
    if bias is None and of_bias is not None:
        bias = None if module is None else module.__dict__.get("bias")  # a pruned one
        if getattr(bias, "grad_fn", None) is not of_bias:
            bias = None
            warnings.warn(
                f"CBN: the bias of {'a convolution' if module is None else type(module).__name__} "
                "is computed in its forward (by a parametrization, or functional_call), where "
                "windows cannot follow it: past means lag while it moves. Before a norm a "
                "convolution needs no bias: build it with bias=False.",
                stacklevel=2,
            )
    trains = weight.requires_grad
    # A bias that is frozen with its weight; the graph has no more than its size.
    if follows and not trains and module is not None and any(graph._saved_bias_sym_sizes_opt):
        bias = module._parameters.get("bias")
    trains = trains or follows
    return Source(
        weight if trains else None,
        bias,
        graph._saved_input.detach() if trains else None,
        graph._saved_padding,
        graph._saved_stride,
        graph._saved_dilation,
        graph._saved_groups,
        is_exact=False,
    )


def _before_cast(graph: torch.autograd.graph.Node | None) -> torch.autograd.graph.Node | None:
    """The node behind autocast's copy; a parameter's node has it as its ``variable``."""
    if graph is not None and graph.name() == "ToCopyBackward0":
        graph = graph.next_functions[0][0]
    return graph


def _is_checkpointed() -> bool:
    """Whether a non-reentrant checkpoint is holding back the tensors that autograd saves."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None:
        hooks = top(True)
        return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
    frame = sys._getframe()  # before torch 2.8, only the call stack shows it
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame is not None
