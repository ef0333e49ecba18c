# Licensed under the Apache License, Version 2.0.
"""What one forward of a layer leaves for its backward and for the end of the iteration.

Most of what remains to be computed then are short vectors, one number per channel. For small maps,
the number of operations costs more than their size. So once the forward is over, all records of a
model are processed together: :class:`Vectors` concatenates their channels to one dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

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
        past: The past at today's weight, from the window; None if the window was empty.
        share: ``s``, the share of the current batch in the union with the past.
        mean: Mean of the union, ``(C,)``.
        var: Variance of the union, ``(C,)``.
        running: What is averaged into the layer's running mean and variance, each ``(C,)``.
        window: The window that grows; None in a burn-in, where ``running`` replaces the buffers.
        derivative: Derivative of the batch's statistics; None where nothing is compensated.
        weight: The weight that ``derivative`` is for, detached, if the window rounds it; else None.
        bias: The convolution's bias, if the window keeps means without it.
        gamma: The layer's scale, or None for 1.
        backward: Which gradient is asked for.
        is_spread: Whether other processes hold parts of the batch, and take part in the backward.
        scale: Factor of the loss, and hence of every gradient: 1, or a loss scaler's.
        averages: ``E_b`` and ``E_g`` of past iterations, ``(2, C)``, or None.
        sums: ``sum(g)`` and ``sum(g x_hat)`` over backward passes, each ``(C,)``, or None; times
            ``r`` if the batch is spread.
        kind: Key: records of equal kind can be processed together.
        coefficients: What the backward pass applies to its sums; set once the forward is over.
        finish: Function that computes ``coefficients``.
        is_constant_used: Whether a backward pass has added the constants of ``coefficients``.
        original: If this forward is a repetition by activation checkpointing, the record of the
            first one, which receives the sums.
        has_ended: Whether the iteration has ended.
    """

    running: tuple[Tensor, Tensor]
    mean: Tensor
    var: Tensor
    finish: Callable[[Record], None]
    window: Window | None = None
    derivative: Derivative | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    backward = "current"
    is_spread = False
    scale: float | Tensor = 1.0
    averages: Tensor | None = None
    sums: Sequence[Tensor] | None = None
    kind: tuple = ()
    coefficients: Coefficients | None = None
    is_constant_used = False
    original: Record | None = None
    has_ended = False

    def __init__(self, layer: nn.Module, moments: Moments | None, past: Past | None) -> None:
        self.layer, self.moments, self.past = layer, moments, past
        self.share = 1.0 if past is None else past.share

    def end(self) -> None:
        """Releases everything: a loss that is kept keeps its autograd graph, and so this record."""
        self.__dict__ = dict(layer=self.layer, has_ended=True)

    def add_sums(self, sums: Sequence[Tensor]) -> None:
        """Adds the sums of one backward pass to those of earlier ones of the same forward."""
        before = self.sums
        self.sums = sums if before is None else [a + b for a, b in zip(before, sums, strict=True)]


class Vectors:
    """The per-channel values of several records, concatenated over all their ``N`` channels.

    Args:
        records: The records, on one device, in one dtype.

    Attributes:
        sizes: Number of channels of each record.
        batch: Mean ``mu`` and variance ``v`` of the batch, ``(2, N)``.
        past: ``mu_p`` and ``V``, ``(2, N)``; in a first iteration ``mu`` and ``v``.
        union: Mean and variance of the union of batch and past, ``(2, N)``.
        share: ``s``; a number if all records have the same, else ``(N,)``.
        eps: The layers' ``eps``; a number or ``(N,)`` likewise.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.sizes = tuple([record.mean.shape[0] for record in records])
        batch = [record.moments[:2] for record in records]
        self.batch = pairs(batch)
        self.past = pairs(
            [
                now if record.past is None else record.past[:2]
                for record, now in zip(records, batch, strict=True)
            ]
        )
        self.union = pairs([(record.mean, record.var) for record in records])
        self.share, self.eps = self.spread(
            [record.share for record in records], [record.layer.eps for record in records]
        )

    @cached_property
    def from_union(self) -> Tensor:
        """``mu - mu_bar``, which is ``(1 - s) d``, ``(N,)``."""
        return self.batch[0] - self.union[0]

    def spread(self, *rows: list[float]) -> list[Tensor | float]:
        """Repeats each record's number for each of its channels; one number where all agree."""
        return kernels.spread(rows, self.sizes, self.union[0])

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Splits ``(..., N)`` into each record's part."""
        return torch.split_with_sizes(tensor, self.sizes, -1)

    def parts(self, each: list, otherwise: Tensor | float, shape: tuple[int, ...] = ()) -> list:
        """Returns ``each``, one entry per record, with every None replaced from ``otherwise``.

        ``otherwise`` is ``(*shape, N)``, of which a record gets its part, or one number for all.
        """
        if all(part is not None for part in each):
            return each
        if not isinstance(otherwise, Tensor):
            otherwise = self.union.new_full((*shape, self.union.shape[1]), otherwise)
        parts = zip(each, self.split(otherwise), strict=True)
        return [rest if part is None else part for part, rest in parts]

    def cat(self, tensors: list[Tensor | None], otherwise: Tensor | float) -> Tensor:
        """Concatenates the :meth:`parts`, tensors of ``(..., C)``, to ``(..., N)``."""
        some = next((tensor for tensor in tensors if tensor is not None), self.union[0])
        together = torch.cat(self.parts(tensors, otherwise, some.shape[:-1]), -1)
        dtype = self.union.dtype
        return together if together.dtype == dtype else together.to(dtype)

    def cat_pairs(self, each: list[Sequence[Tensor] | None], otherwise: Tensor | float) -> Tensor:
        """Concatenates the :meth:`parts`, pairs of tensors of ``(C,)``, to ``(2, N)``."""
        return pairs(self.parts(each, otherwise, (2,)))


def pairs(each: Sequence[Sequence[Tensor]]) -> Tensor:
    """Puts the first tensors of all pairs in one row, the second ones in another, ``(2, N)``."""
    return torch.cat([tensor for row in zip(*each, strict=True) for tensor in row]).view(2, -1)
