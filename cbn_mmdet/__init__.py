# Licensed under the Apache License, Version 2.0.
"""Cross-Iteration Batch Normalization for MMDetection.

Importing the package registers ``CBN`` in mmengine's root ``MODELS`` registry, where mmdet and the
rest of the OpenMMLab family find it as ``norm_cfg=dict(type='CBN')``, and ``CBNHook`` in
``HOOKS``. Without mmengine, the layer and its functions work in any torch training loop.
"""

from importlib.util import find_spec

from .norm import CBN, link, links, set_window, step

__version__ = "0.1.0"

__all__ = ["CBN", "link", "links", "set_window", "step"]

if find_spec("mmengine") is not None:
    from mmengine.registry import MODELS

    from .hooks import CBNHook

    MODELS.register_module(name="CBN", module=CBN)
    __all__ += ["CBNHook"]
