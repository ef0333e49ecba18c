# Licensed under the Apache License, Version 2.0.
"""Cross-Iteration Batch Normalization for MMDetection.

Importing the package registers the layers ``CBN``, ``SyncCBN`` and ``BRN`` in mmengine's root
``MODELS`` registry, where mmdet and the rest of the OpenMMLab family find them as
``norm_cfg=dict(type='CBN')``, and ``CBNHook``, ``DiagnoseHook`` and
``PreciseStatsHook`` in ``HOOKS``. Without
mmengine, the layers and their functions work in any torch training loop.
"""

from importlib.util import find_spec

from .norm import (
    BRN,
    CBN,
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

__version__ = "0.1.0"

__all__ = [
    "BRN",
    "CBN",
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

    MODELS.register_module(name="BRN", module=BRN)
    MODELS.register_module(name="CBN", module=CBN)
    MODELS.register_module(name="SyncCBN", module=SyncCBN)
    __all__ += ["CBNHook", "DiagnoseHook", "PreciseStatsHook"]
