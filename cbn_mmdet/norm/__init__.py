# Licensed under the Apache License, Version 2.0.
"""The layer and what a training loop calls; depends on torch alone."""

from .cbn import CBN
from .iteration import link, links, set_window, step

__all__ = ["CBN", "link", "links", "set_window", "step"]
