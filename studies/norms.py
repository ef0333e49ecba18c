# Licensed under the Apache License, Version 2.0.
"""Build norms from their names in tables: ``GN``, ``CBN(window_size=4, backward='current')``."""

import argparse
import ast
import math
import operator
from functools import reduce

from torch import nn

from cbn_mmdet import BRN, CBN, MABN, CmBN, link

GROUPS = 32
PAPERS = "CBN(window='sliding', window_size=4, backward='current', derivative_stride=1)"
NORMS = {
    "BN": nn.BatchNorm2d,
    "GN": lambda channels, num_groups: nn.GroupNorm(math.gcd(num_groups, channels), channels),
    "SyncBN": nn.SyncBatchNorm,
    "BRN": BRN,
    "MABN": MABN,
    "CmBN": CmBN,
    "CBN": CBN,
    "none": lambda channels: nn.Identity(),
}


def norm_cfg(name: str) -> dict:
    """Turns a name into OpenMMLab's ``norm_cfg``; plain ``GN`` has 32 groups.

    Raises:
        SyntaxError, AttributeError: The text is not a name, alone or with arguments in parentheses.
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


def link_cbn(model: nn.Module) -> bool:
    """Link a model that has CBN; returns whether it does, and so needs ``step``."""
    return any(isinstance(module, CBN) for module in model.modules()) and link(model) > 0


def norm(text: str) -> str:
    """Check that a name on the command line can be built; returns the name."""
    try:
        build_norm(norm_cfg(text), 32)
    except (SyntaxError, AttributeError, KeyError) as error:
        raise argparse.ArgumentTypeError(
            f"takes {', '.join(NORMS)}, or CBN(derivative_stride=2), say, got {text}"
        ) from error
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot build {text}: {error}") from error
    return text


def replace_norms(model: dict, cfg: dict) -> int:
    """Puts ``cfg`` in the place of each ``norm_cfg`` that trains; returns how many there were.

    The ``eps`` of each stays. MABN does not subtract a mean, so it gets convolutions that do so.
    """
    from common.config import norm_settings  # here, as this module also serves without MMDetection
    from common.errors import UsageError

    found = norm_settings(model)
    trained = [(path, each) for path, each in found if each.get("requires_grad", True)]
    for path, settings in trained:
        part = reduce(operator.getitem, path[:-1], model)
        if cfg["type"] == "none":
            if path[0] == "backbone":
                raise UsageError("--norms none: the backbone's norm trains here; leave none out")
            part["norm_cfg"] = None
            continue
        eps = {key: settings[key] for key in ("eps",) if key in settings}
        settings.clear()
        settings.update({**eps, **cfg}, requires_grad=True)
        if cfg["type"] == "MABN":
            part["conv_cfg"] = dict(type="CenConv2d")
    return len(trained)
