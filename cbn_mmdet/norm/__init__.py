# Licensed under the Apache License, Version 2.0.
"""The layers and the functions that a training loop calls; depends on torch alone."""

from .brn import BRN
from .cbn import CBN, CmBN, SyncCBN
from .convert import from_batchnorm, to_batchnorm
from .diagnostics import Diagnosis, diagnose
from .iteration import link, links, load_window_state, set_window, step, window_state
from .mabn import MABN, CenConv2d
from .population import precise_statistics

__all__ = [
    "BRN",
    "CBN",
    "MABN",
    "CenConv2d",
    "CmBN",
    "Diagnosis",
    "SyncCBN",
    "diagnose",
    "from_batchnorm",
    "link",
    "links",
    "load_window_state",
    "precise_statistics",
    "set_window",
    "step",
    "to_batchnorm",
    "window_state",
]
