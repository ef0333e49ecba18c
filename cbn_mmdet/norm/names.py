# Licensed under the Apache License, Version 2.0.
"""Norms by name, as in a table of results: ``GN``, ``CBN(window_size=4, backward='current')``."""

from __future__ import annotations

import ast
import math

from torch import nn

from .brn import BRN
from .cbn import CBN

GROUPS = 32
NORMS = {
    "BN": nn.BatchNorm2d,
    "GN": lambda channels, num_groups: nn.GroupNorm(math.gcd(num_groups, channels), channels),
    "SyncBN": nn.SyncBatchNorm,
    "BRN": BRN,
    "CBN": CBN,
}


def norm_cfg(name: str) -> dict:
    """Reads a name as OpenMMLab's ``norm_cfg``; ``GN`` alone has 32 groups.

    Raises:
        SyntaxError, AttributeError: It is no name of a norm with arguments in parentheses.
        ValueError: An argument has no name.
    """
    call = ast.parse(name if name.endswith(")") else f"{name}()", mode="eval").body
    if call.args:
        raise ValueError("its arguments need their names")
    groups = {"num_groups": GROUPS} if call.func.id == "GN" else {}
    given = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    return {"type": call.func.id, **groups, **given}


def build_norm(cfg: dict, channels: int) -> nn.Module:
    """Builds a layer from what :func:`norm_cfg` returned.

    Raises:
        KeyError: There is no such norm.
        TypeError, ValueError: The norm does not take these arguments.
    """
    return NORMS[cfg["type"]](channels, **{key: cfg[key] for key in cfg if key != "type"})


def replace_norms(settings: dict, cfg: dict) -> int:
    """Puts ``cfg`` in the place of each ``norm_cfg`` that trains; returns how many there were."""
    count = 0
    for key, value in settings.items():
        if key == "norm_cfg" and value and value.get("requires_grad", True):
            settings[key] = dict(cfg, requires_grad=True)
            count += 1
        else:
            parts = value if isinstance(value, (list, tuple)) else [value]
            count += sum(replace_norms(part, cfg) for part in parts if isinstance(part, dict))
    return count
