# Licensed under the Apache License, Version 2.0.
"""Which module's output a tensor is, and of which weight it is a function.

A norm layer is handed a tensor and must know the convolution that computed it. Neither the order of
registration nor names tell: some blocks keep convolutions and norms in separate lists. So every
module of a linked model that has a weight marks the tensor it returns, and the norm layer reads the
mark of the very tensor that it is handed. A mark changes no value, rides on its tensor alone, and
is taken off when the model's forward ends.

Which weight the output is a function of, the module tells if it is a plain ``nn.Conv2d``. Of all
others (weights that are normalised, standardised or gated on the way, modules that call
``F.conv2d`` themselves) autograd's graph does: it has the weight that was used, and with which
input. Both are asked in each forward, as what a module does may change.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import kernels
from .layer import NormLayer, is_recomputation, outside_graphs
from .moments import Source

_MARK = "_cbn_mark"  # the attribute of a tensor


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

    @outside_graphs
    def __call__(self, *args: object) -> None:
        """What torch calls."""
        if self.iteration is not None:
            getattr(self.iteration, self.method)(*args)


def mark(module: nn.Module, input: object, output: object) -> list[weakref.ref[Tensor]]:
    """Marks what a module returned, unless a module within has; returns references to it.

    Of lists and tuples, as TridentNet's convolution returns, it marks each tensor.
    """
    if not isinstance(output, Tensor):
        parts = output if isinstance(output, list | tuple) else ()
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return [ref for tensor in tensors for ref in mark(module, None, tensor)]
    version = kernels.version_of(output)
    there = getattr(output, _MARK, None)
    if there is not None and there.version == version:
        return []
    setattr(output, _MARK, Mark(module, input, version))
    return [weakref.ref(output)]


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
    if isinstance(module, NormLayer):
        return False
    # Reading a parametrized weight would compute it.
    return nn.utils.parametrize.is_parametrized(module, "weight") or isinstance(
        getattr(module, "weight", None), Tensor
    )


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


# The weight.


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module's output is the convolution of its input with its parameter, by its code."""
    kind = type(module)
    return (
        isinstance(module, nn.Conv2d)
        and kind.forward is nn.Conv2d.forward
        and kind._conv_forward is nn.Conv2d._conv_forward
        and "forward" not in module.__dict__
        and type(module._parameters.get("weight")) is nn.Parameter  # not FSDP's, between forwards
    )


def source_of(
    y: Tensor,
    name_of: Callable[[nn.Module], str],
    checked: weakref.ref[nn.Module] | None = None,
) -> tuple[nn.Module | None, Source | None, str]:
    """What computed ``y``, as a function of a weight.

    Args:
        y: What the layer was handed, ``(N, C, H, W)``.
        name_of: Names a module.
        checked: A reference to the module whose output's channels are known to be rows of its
            weight, if one is.

    Returns:
        The module that marked ``y``, if one has; the source, or None; and why there is none, as a
        part of a sentence.
    """
    found = mark_of(y)
    module = None if found is None else found.module
    if is_plain(module):
        return module, Source.of(module, found.input), ""
    is_checked = module is not None and checked is not None and checked() is module
    return module, *_source_by_autograd(y, module, name_of, is_checked)


def _source_by_autograd(
    y: Tensor, module: nn.Module | None, name_of: Callable[[nn.Module], str], is_checked: bool
) -> tuple[Source | None, str]:
    """The source of what is no plain convolution's."""
    graph = y.grad_fn
    is_convolution = graph is not None and graph.name() == "ConvolutionBackward0"
    if module is None and not is_convolution:
        return None, (
            f"was handed a tensor of shape {tuple(y.shape)} that no module with a weight of the "
            "linked model returned as it is: the result of an activation, a function or an "
            "operation in place, or of a module that the linked model does not contain"
        )
    fed = "is fed by a convolution" if module is None else f"is fed by {name_of(module)}"
    if module is not None and not any(each.requires_grad for each in module.parameters()):
        return Source(None, None), ""  # it never changes
    # What a checkpoint repeats ran without gradients, and did not know the source either.
    if graph is None or is_recomputation() or _is_checkpointed():
        return None, (
            f"{fed}, which is no plain nn.Conv2d, so that autograd has to tell its derivative, and "
            "this forward runs without gradients, as that of activation checkpointing does (turn "
            "with_cp off around this layer)"
        )
    if is_convolution and not graph._saved_transposed:
        return _convolution(graph), ""
    weight = graph._saved_weight if is_convolution else module._parameters.get("weight")
    if weight is None or not weight.requires_grad:
        return None, f"{fed}, which has no weight of its own that trains"
    channels, groups = y.shape[1], graph._saved_groups if is_convolution else None
    bias = None if module is None else module._parameters.get("bias")
    if bias is not None and bias.shape != (channels,):
        bias = None  # taken as a constant
    rows = 0 if weight.dim() == 0 else len(weight)
    if groups is not None:
        rows = groups * weight.shape[1]
    if rows == channels:
        source = Source.by_autograd(weight, bias, groups)
        if is_checked or _has_rows_of_channels(source, y):
            return source, ""
    return None, f"{fed}, whose weight has not one row for each of its {channels} channels"


def _has_rows_of_channels(source: Source, y: Tensor) -> bool:
    """Whether each channel is a function of its own row alone: that of ``Linear`` is no channel."""
    with torch.no_grad():
        channels = y.shape[1]
        number = torch.arange(1, channels + 1, device=y.device).view(-1, 1, 1) / channels + 1
        # So that sums stay in the range of half precision, and numbers out of its subnormal one.
        least = max(channels / max(y.numel(), 1), 2.0**-12)
        one, each = (
            source.rows(
                # A bias may be there and not be used.
                torch.autograd.grad(y, source.leaf, grad, retain_graph=True, materialize_grads=True)
            ).double()
            for grad in (
                torch.full_like(y, least),
                (number * least).to(y).expand_as(y).contiguous(),
            )
        )
        expected = one * number.flatten(1).double()
        return not bool((each - expected).norm() > 1e-2 * each.norm())  # NaN tells nothing


def _convolution(graph: torch.autograd.graph.Node) -> Source:
    """The convolution that autograd recorded."""
    _, weight, bias = (_parameter(each) for each, _ in graph.next_functions)
    weight = graph._saved_weight if weight is None else weight
    trains = weight.requires_grad
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


def _parameter(graph: torch.autograd.graph.Node | None) -> Tensor | None:
    """The parameter that a gradient ends in, maybe through autocast's copy of it."""
    if graph is not None and graph.name() == "ToCopyBackward0":
        graph = graph.next_functions[0][0]
    return getattr(graph, "variable", None)


def _is_checkpointed() -> bool:
    """Whether a checkpoint that is not reentrant holds back what autograd saves."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None:
        hooks = top(True)
        return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
    frame = sys._getframe()  # before torch 2.8 nothing else tells
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame is not None
