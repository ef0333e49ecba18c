# Licensed under the Apache License, Version 2.0.
"""Memory of a process. Needs only torch."""

import resource
import sys

import torch


def peak_memory(device: str) -> int:
    """The most memory that this process held, in bytes; on a GPU, the most GPU memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
