# Licensed under the Apache License, Version 2.0.
"""The hooks for mmengine's runner."""

from .cbn_hook import CBNHook
from .diagnose_hook import DiagnoseHook
from .precise_stats_hook import PreciseStatsHook

__all__ = ["CBNHook", "DiagnoseHook", "PreciseStatsHook"]
