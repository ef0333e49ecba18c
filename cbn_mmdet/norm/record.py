# Licensed under the Apache License, Version 2.0.
"""What one forward of a layer leaves for its backward and for the end of the iteration.

Most of what is left to compute then are short vectors, one number per channel. Where maps are small
the number of operations costs more than their size, so all records of a model are worked on
together, when the forward is over: their channels are one dimension of :class:`Vectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .moments import Derivative, Moments

if TYPE_CHECKING:
    from .normalize import Coefficients
    from .window import Past, Window


class Record:
    """One forward of a layer.

    Attributes:
        layer: The layer.
        moments: Statistics of the batch; None in a burn-in.
        past: What the window told, or None if it was empty.
        share: ``s``, the current batch's in the union with the past.
        distance: ``d``, ``(C,)``, or None.
        mean: Of the union, ``(C,)``.
        var: Of the union, ``(C,)``.
        running: What is averaged into the layer's running mean and variance, each ``(C,)``.
        window: The window that grows, or None in a burn-in, where ``running`` replaces them.
        derivative: Of the batch's statistics, or None where nothing is to be compensated.
        bias: The convolution's, if means are to be kept without it.
        gamma: The layer's scale, or None for 1.
        backward: Which gradient is asked for.
        is_spread: Whether other processes hold parts of the batch, and take part in the backward.
        scale: What the loss is multiplied by, and hence every gradient: 1, or a loss scaler's.
        averages: ``E_b`` and ``E_g`` of past iterations, ``(2, C)``, or None.
        sums: Of the backward passes ``sum(g)`` and ``sum(g x_hat)``, less the scale, or None.
        kind: What records have in common that can be worked on together.
        coefficients: What the backward pass makes of its sums, once the forward is over.
        finish: Called for them.
        is_constant_used: Whether a backward pass has added their constants.
        original: Of a forward that activation checkpointing repeats the first, which gets the sums.
        has_ended: Whether the iteration has.
    """

    running: tuple[Tensor, Tensor]
    mean: Tensor
    var: Tensor
    finish: Callable[[Record], None]
    distance: Tensor | None = None
    window: Window | None = None
    derivative: Derivative | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    backward = "current"
    is_spread = False
    scale: float | Tensor = 1.0
    averages: Tensor | None = None
    sums: tuple[Tensor, Tensor] | None = None
    kind: tuple = ()
    coefficients: Coefficients | None = None
    is_constant_used = False
    original: Record | None = None
    has_ended = False

    def __init__(self, layer: nn.Module, moments: Moments | None, past: Past | None) -> None:
        self.layer, self.moments, self.past = layer, moments, past
        self.share = 1.0 if past is None else past.share

    def end(self) -> None:
        """Lets go of everything: a loss that is kept keeps its graph, and that this record."""
        self.has_ended = True
        self.__dict__.update(dict.fromkeys(_HELD))

    def add_sums(self, of_mean: Tensor, of_var: Tensor) -> None:
        """Adds what a backward pass found to what earlier ones of the same forward have."""
        if self.sums is not None:
            of_mean, of_var = of_mean + self.sums[0], of_var + self.sums[1]
        self.sums = of_mean, of_var


_HELD = (
    *("moments", "past", "distance", "running", "window", "derivative", "bias", "gamma"),
    *("averages", "sums", "coefficients", "finish", "original"),
)


class Vectors(NamedTuple):
    """What records have in one number per channel, ``(N,)`` each, for all channels together.

    Attributes:
        records: The records, on one device, in one dtype.
        sizes: Each one's number of channels.
        batch_mean: ``mu``.
        batch_var: ``v``.
        past_mean: ``mu_p``; of a first iteration ``mu``.
        past_var: ``V``; of a first iteration ``v``.
        mean: Of the union.
        var: Of the union.
        share: ``s``; a number if all records have the same.
        eps: Of the layer; likewise.
    """

    records: Sequence[Record]
    sizes: tuple[int, ...]
    batch_mean: Tensor
    batch_var: Tensor
    past_mean: Tensor
    past_var: Tensor
    mean: Tensor
    var: Tensor
    share: Tensor | float
    eps: Tensor | float

    @classmethod
    def of(cls, records: Sequence[Record]) -> Vectors:
        """Puts them together."""
        rows = []
        for record in records:
            moments, past = record.moments, record.past
            batch = moments.mean, moments.var
            rows.append((*batch, *(batch if past is None else past[:2]), record.mean, record.var))
        together = [torch.cat(each) for each in zip(*rows, strict=True)]
        sizes = tuple([record.mean.shape[0] for record in records])
        like = together[0]
        share = kernels.spread([record.share for record in records], sizes, like)
        eps = kernels.spread([record.layer.eps for record in records], sizes, like)
        return cls(records, sizes, *together, share, eps)

    def spread(self, values: list[float]) -> Tensor | float:
        """Each record's number for each of its channels; one number if all agree."""
        return kernels.spread(values, self.sizes, self.mean)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Each record's part of ``(..., N)``."""
        return torch.split_with_sizes(tensor, self.sizes, -1)

    def cat(self, tensors: list[Tensor | None], otherwise: Tensor) -> Tensor:
        """Each record's tensor, ``(..., C)``, and parts of ``otherwise`` for those without one."""
        if any(tensor is None for tensor in tensors):
            parts = self.split(otherwise)
            tensors = [
                part if tensor is None else tensor.to(part.dtype)
                for tensor, part in zip(tensors, parts, strict=True)
            ]
        together = torch.cat(tensors, -1)
        return together if together.dtype == otherwise.dtype else together.to(otherwise.dtype)
