# Licensed under the Apache License, Version 2.0.
"""Statistics of one batch that is spread over the processes of a distributed training.

They follow from each process's own mean, variance and number of positions. That number may differ
between processes, and some processes may have no position.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .moments import Moments


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def joint_moments(own: Moments) -> Moments:
    """Computes the statistics over the positions of all processes; each process calls this once.

    Args:
        own: The statistics of this process's batch, zeros where it is empty.

    Returns:
        The joint statistics, with a count of shape ``(1,)``; the same on every process. All zeros
        if no process has a position.
    """
    one = torch.cat([own.mean, own.var, own.mean.new_full((1,), own.count)])  # 2C + 1
    each = one.new_empty(dist.get_world_size(), one.numel())
    if one.is_cuda:
        dist.all_gather_into_tensor(each, one)
    else:  # torch 2.1's gloo fills no single tensor
        dist.all_gather(list(each), one)
    means, variances, counts = each.split(
        [own.mean.numel(), own.var.numel(), 1], dim=1
    )  # W, C and W, C and W, 1
    count = counts.sum(0)
    share = counts / count.clamp_min(1)
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return Moments(mean, var, count, *own[3:])


def joint_sum(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Sums each vector over all processes, in one reduction; the vectors have one shape."""
    stacked = torch.stack(vectors)
    dist.all_reduce(stacked)
    return stacked.unbind()
