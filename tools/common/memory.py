# Licensed under the Apache License, Version 2.0.
"""What a process takes. Needs torch alone."""

import resource
import sys

import torch


def peak_memory(device: str) -> int:
    """The most bytes that this process held; on a GPU, of the GPU's memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
