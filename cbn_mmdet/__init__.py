# Licensed under the Apache License, Version 2.0.
"""Cross-Iteration Batch Normalization for MMDetection.

Importing the package registers the layers ``CBN``, ``SyncCBN``, ``CmBN``, ``BRN`` and ``MABN``, and
the convolution ``CenConv2d`` that goes with ``MABN``, in mmengine's root ``MODELS`` registry. There
mmdet and the rest of the OpenMMLab family find them: ``norm_cfg=dict(type='CBN')``. ``CBNHook``,
``DiagnoseHook`` and ``PreciseStatsHook`` are registered in ``HOOKS``. Without mmengine, the layers
and their functions work in any torch training loop.
"""

from importlib.util import find_spec

from .norm import (
    BRN,
    CBN,
    MABN,
    CenConv2d,
    CmBN,
    Diagnosis,
    SyncCBN,
    diagnose,
    from_batchnorm,
    link,
    links,
    load_window_state,
    precise_statistics,
    set_window,
    step,
    to_batchnorm,
    window_state,
)

__version__ = "0.2.0"

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

if find_spec("mmengine") is not None:
    from mmengine.registry import MODELS

    from .hooks import CBNHook, DiagnoseHook, PreciseStatsHook

    for layer in (BRN, CBN, CenConv2d, CmBN, MABN, SyncCBN):
        MODELS.register_module(module=layer)
    __all__ += ["CBNHook", "DiagnoseHook", "PreciseStatsHook"]
