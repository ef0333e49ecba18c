# Licensed under the Apache License, Version 2.0.
"""What the studies of evidence.py share: norms, jobs and training steps."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cbn_mmdet.hooks.cbn_hook import LARGEST_MOMENTUM, MOMENTUM, momentum_for

NAIVE = "CBN(window='sliding', window_size=8, compensate=False, backward='window')"
CURRENT = "CBN(window='sliding', window_size=8, backward='current')"
SLIDING = "CBN(window='sliding', window_size=8, backward='window')"
# Both models have layers of 32 channels: GN's usual 32 groups would have one channel each.
SMALL_GN = "GN(num_groups=8)"
LABELS = {"none": "none", "MABN": "MABN", "CmBN": "CmBN"}  # after BN and BRN
LABELS.update({NAIVE: "naive CBN", CURRENT: "CBN, current", SLIDING: "CBN, sliding", "CBN": "CBN"})
LABELS.update({SMALL_GN: "GN", "GN": "GN(num_groups=32)"})

# All norms share these. Learning rates follow the batch linearly.
POPULATION = 300  # images that statistics for evaluation are estimated from
AVERAGES = dict(momentum=MOMENTUM, largest_momentum=LARGEST_MOMENTUM)
SHARED = dict(AVERAGES, population=POPULATION)
FORWARDS = 8  # per optimiser step, over which CmBN accumulates gradients: its n


class Job(NamedTuple):
    """One training."""

    norm: str
    batch: int  # images per step
    seed: int  # of weights, order and data
    # Epochs before the window opens; eighths of the run for the classifier. None: the study's
    # own burn-in, or a norm without a window.
    burn_in: int | None = None


class Study(NamedTuple):
    """What a study compares, and how."""

    norms: list[str]  # default norms; none if the study has a plan of its own
    batches: list[int]  # default batches
    seeds: dict[int, int]  # default number of seeds at each batch
    settings: dict  # of all trainings, stored beside their results
    train: Callable[[Job, dict], dict]  # returns what was measured
    figure: str  # name of a result
    draw: Callable | None = None  # plots the results
    labels: dict[str, str] = LABELS  # of norms, in tables and plots; others go by their names


def sliding(size: int) -> str:
    """CBN with the paper's sliding window and the gradient through all of it."""
    return SLIDING.replace("window_size=8", f"window_size={size}")


def accumulated(job: Job) -> int:
    """The forwards per optimiser step: 8 with CmBN, otherwise 1."""
    return FORWARDS if "CmBN" in job.norm else 1


def burn_in(job: Job, usual: int) -> int:
    """The job's or the study's burn-in; 0 for CmBN, in whose window weights are the same."""
    if "CmBN" in job.norm:
        return 0
    return usual if job.burn_in is None else job.burn_in


def with_defaults(settings: dict, batch: int, steps: int) -> dict:
    """Add the settings that a norm takes from the training, unless they are given."""
    defaults = {}
    if settings["type"] not in ("GN", "none"):
        defaults.update(momentum=momentum_for(batch))
    if settings["type"] == "BRN":  # its paper's shares of the run
        defaults.update(warmup=steps // 18, r_end=4 * steps // 9, d_end=5 * steps // 18)
    return {**defaults, **settings}


def one_cycle(
    model: nn.Module, rate: float, steps: int, weight_decay: float = 0.0
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.OneCycleLR]:
    """The optimiser of a short training, and its schedule."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=0.1, cycle_momentum=False
    )
    return optimizer, schedule


def shuffled(count: int, batch: int, steps: int, frames: int = 1) -> Iterator[Tensor]:
    """Yield the indices of each step's images: ``count`` images in one random order after another.

    Each image comes ``frames`` times in a row, as from a camera in front of which little moves.
    """
    order = torch.cat([torch.randperm(count) for _ in range(steps * batch // (count * frames) + 1)])
    order = order.repeat_interleave(frames)
    for start in range(0, steps * batch, batch):
        yield order[start : start + batch]


def with_latest(
    batches: Iterator[Tensor], labels: Tensor, options: dict
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images of each batch and their labels, after those of earlier batches.

    Of ``options["together"]`` batches (1), the earlier ones take part in the statistics alone:
    their labels are such as torch's cross entropy leaves out.
    """
    latest = deque(maxlen=options.get("together", 1))
    for chosen in batches:
        latest.append(chosen)
        targets = [torch.full_like(each, -100) for each in latest]
        targets[-1] = labels[chosen]
        yield torch.cat(tuple(latest)), torch.cat(targets)


def descend(
    model, optimizer, images: Tensor, labels: Tensor, parts=1, is_last=True, clip=math.inf
) -> float:
    """Run one of the ``parts`` of a step; the last part updates the weights. Returns the loss."""
    loss = nn.functional.cross_entropy(model(images), labels)
    (loss / parts).backward()
    if is_last:
        if clip < math.inf:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The percentage of images that are classified correctly."""
    return 100 * (model(images).argmax(1) == labels).float().mean().item()
