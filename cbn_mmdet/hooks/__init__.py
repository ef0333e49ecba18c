# Licensed under the Apache License, Version 2.0.
"""mmengine hooks."""

from .cbn_hook import CBNHook

__all__ = ["CBNHook"]
