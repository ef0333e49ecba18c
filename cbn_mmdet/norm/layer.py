# Licensed under the Apache License, Version 2.0.
"""What this package's norm layers share: their names in messages, and checks of their use."""

from __future__ import annotations

import numbers
import sys

import torch
from torch import Tensor, fx, nn

# Whether torch.compile or torch.export is tracing; torch 2.1 has this function elsewhere.
is_compiling = getattr(torch.compiler, "is_compiling", None) or (
    lambda: torch._dynamo.is_compiling()
)

# ``torch.compiler.disable`` imports the compiler at once, which takes a second; torch's own
# optimisers use the former, which leaves that to the first call.
outside_graphs = getattr(torch, "_disable_dynamo", torch.compiler.disable)


class NormLayer(nn.BatchNorm2d):
    """Batch normalisation of the maps that a convolution returns.

    It subclasses ``nn.BatchNorm2d`` for code that looks for one: other packages' precise
    statistics, parameter groups, freezing and test-time adaptation.

    Attributes:
        kind: What messages call the layer.
    """

    kind: str

    @property
    def title(self) -> str:
        """The layer's name, for messages."""
        return f"{self.kind} layer of {self.num_features} channels"

    def refusal(self, why: str) -> RuntimeError:
        """An error that names the layer."""
        return RuntimeError(f"{self.title}: {why}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input``, ``(N, C, H, W)``, to a tensor of the same shape and dtype.

        Raises:
            ValueError: ``input`` is not 4-dimensional or has another number of channels, or it has
                too few values per channel to train on.
            RuntimeError: The layer cannot train as it is used: it was not linked, say, or a
                training step is traced or exported.
        """
        self._check_input_dim(input)
        return self._train(input) if self.training else super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:
        if isinstance(input, fx.Proxy) or torch.jit.is_tracing():  # no shape, or not a plain one
            return
        if input.dim() != 4:
            raise ValueError(
                f"{self.title}: expected an input of shape (N, C, H, W), got {input.dim()} "
                f"dimensions. {self.kind} normalises maps alone: use nn.BatchNorm1d or 3d, or "
                "another norm here."
            )
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"{self.title}: has num_features={self.num_features}, but its input has "
                f"{input.shape[1]} channels."
            )

    def _refuse_graphs(self, input: Tensor) -> None:
        """Refuses to trace a training step: its graph would repeat one iteration for ever.

        Under torch.compile training works, since these layers are left to Python.
        """
        if torch.jit.is_tracing() or is_compiling() or isinstance(input, fx.Proxy):
            raise self.refusal(
                "only its evaluation can be traced or exported. Call model.eval() first, turn the "
                "layer into batch normalisation by cbn_mmdet.to_batchnorm(model), or, for "
                "torch.fx, have it as a leaf module."
            )

    def _refuse_to_track(self, input: Tensor) -> None:
        """Refuses to train if running statistics were removed, or would change a second time."""
        if input.numel() > 0 and is_recomputation():
            raise self.refusal(
                "activation checkpointing repeats a forward of which the running statistics are "
                "not known any more. Turn checkpointing off (with_cp=False) around this layer."
            )
        if self.running_mean is None:
            raise self.refusal(
                f"{self.kind} needs its running statistics in training, and running_mean is None, "
                "as methods of test-time adaptation set it. Use type='BN' or type='CBN' with them."
            )

    def __prepare_scriptable__(self) -> None:
        # Otherwise torch.jit.script would fail at the first line that it cannot compile.
        raise self.refusal(
            "torch.jit.script does not know it. Turn it into the batch normalisation that it is in "
            "evaluation first: cbn_mmdet.to_batchnorm(model)."
        )


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as under activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def check_count(kind: str, name: str, value: object, meaning: str, least: int = 1) -> None:
    """Refuses a value that is not a whole number of at least ``least``."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise ValueError(
            f"{kind}: {name} must be a whole number of at least {least}, got {value!r}: {meaning}."
        )


def check_choice(kind: str, name: str, value: object, choices: dict[str, str]) -> None:
    """Refuses a value that is none of ``choices``, whose values say what each choice means."""
    if not isinstance(value, str) or value not in choices:
        known = " or ".join(f"{choice!r} ({what})" for choice, what in choices.items())
        raise ValueError(f"{kind}: {name} must be {known}, got {value!r}.")


def check_values(kind: str, *rows: tuple[str, object, bool, str]) -> None:
    """Refuses wrong values. Each row: name, value, whether it is right, what would be right."""
    for name, value, is_right, right in rows:
        if not is_right:
            raise ValueError(f"{kind}: {name} must be {right}, got {value!r}.")


def check_norm(
    kind: str,
    num_features: object,
    eps: object,
    momentum: object,
    affine: object,
    tracks: object,
    must_track: bool = True,
) -> None:
    """Refuses wrong values of the arguments that all norms share."""
    check_count(kind, "num_features", num_features, "the number of channels")
    is_momentum = momentum is None or (is_number(momentum) and 0 <= momentum <= 1)
    switch, tracked = "True or False", "True (type='BN' does without running statistics)"
    is_right = tracks is True or (tracks is False and not must_track)
    check_values(
        kind,
        ("eps", eps, is_number(eps) and eps > 0, "a number above 0"),
        ("momentum", momentum, is_momentum, "None or from 0 to 1"),
        ("affine", affine, isinstance(affine, bool), switch),
        ("track_running_stats", tracks, is_right, tracked if must_track else switch),
    )


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number; True and False do not count as numbers."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max
