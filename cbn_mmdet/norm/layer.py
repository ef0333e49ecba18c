# Licensed under the Apache License, Version 2.0.
"""What this package's norm layers share: checks whose messages name the layer or the argument."""

from __future__ import annotations

import numbers
import sys

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from . import linking


class NormLayer(_BatchNorm):
    """Batch normalisation of the maps that a convolution returns.

    Attributes:
        kind: What messages call the layer.
    """

    kind: str

    @property
    def _title(self) -> str:
        if linking.is_watched(self):
            return f"{self.kind} layer {linking.name_of(self)}"
        return f"{self.kind} layer of {self.num_features} channels"

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(
                f"{self._title}: expected an input of shape (N, C, H, W), got {input.dim()} "
                f"dimensions. {self.kind} normalises maps alone: use nn.BatchNorm1d or 3d, or "
                "another norm here."
            )
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"{self._title}: has num_features={self.num_features}, but its input has "
                f"{input.shape[1]} channels."
            )

    def __prepare_scriptable__(self) -> None:
        linking.refuse_script(self)


def check_count(kind: str, name: str, value: object, meaning: str, least: int = 1) -> None:
    """Refuses what is no whole number of at least ``least``."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise ValueError(
            f"{kind}: {name} must be a whole number of at least {least}, got {value!r}: {meaning}."
        )


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number; True and False are none here."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max
