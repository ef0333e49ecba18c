# Licensed under the Apache License, Version 2.0.
"""The hook that re-estimates the statistics for evaluation from training images."""

from __future__ import annotations

import bisect
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Subset

from ..norm import precise_statistics
from ..norm.layer import check_count
from ..norm.population import trained_batch_norms


@HOOKS.register_module()
class PreciseStatsHook(Hook):
    """Replaces running statistics by those of training images, computed with fixed weights.

    It does so after the last iteration before an evaluation, so that the checkpoint of that time
    has the same statistics. It covers every batch normalisation that trains: CBN, BRN, BN and
    SyncBN (see :func:`cbn_mmdet.precise_statistics`). Training goes on as if nothing had happened,
    except for BRN, which corrects towards the running statistics, and for heads that count their
    forwards outside buffers, such as Dynamic R-CNN's. With ``EMAHook``, evaluation uses the
    averaged model, which keeps its own statistics: a warning says so.

    Args:
        num_images: Number of training images over all processes, each of which takes the same
            number (at least one); fewer if the data set has fewer. The images are the same each
            time, evenly spread over the data set, and pass through the training pipeline in batches
            of the training's size. Each costs a forward pass.
        every_evaluation: Whether to do so before each evaluation during training (True), or only
            at the end of training (False).

    Raises:
        ValueError: An argument has a wrong type or value, or (at the start of training) the data
            set has no length, or no batch normalisation trains.
    """

    # Runs after CBNHook, which ends the iteration, and before hooks that write checkpoints.
    priority = "NORMAL"

    def __init__(self, num_images: int = 300, every_evaluation: bool = True) -> None:
        check_count("PreciseStatsHook", "num_images", num_images, "images of all processes")
        if not isinstance(every_evaluation, bool):
            raise ValueError(
                f"PreciseStatsHook: every_evaluation must be True or False, got "
                f"{every_evaluation!r}."
            )
        self.num_images = num_images
        self.every_evaluation = every_evaluation

    def before_train(self, runner) -> None:
        """Checks that images can be picked from the data set, and that there are layers to fill."""
        dataset = runner.train_loop.dataloader.dataset
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                "PreciseStatsHook: picks images all over the data set, but "
                f"{type(dataset).__name__} has no length. Remove the hook, or train on a data set "
                "that has one."
            )
        unwrapped(runner.model).train()  # as the loop is about to do: the modes show what is frozen
        _check_layers(runner.model)
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            runner.logger.warning(
                "PreciseStatsHook: EMAHook evaluates averaged weights, whose statistics stay as "
                "they are: what this hook estimates is seen only where they are not used."
            )

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Estimates before an evaluation and at the end, in a loop that counts iterations."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            self._estimate_if_due(runner, runner.iter + 1, runner.max_iters)

    def after_train_epoch(self, runner) -> None:
        """Estimates before an evaluation and at the end, in a loop that counts epochs."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            self._estimate_if_due(runner, runner.epoch + 1, runner.max_epochs)

    def estimate(self, runner) -> None:
        """Estimates the statistics now; the runner's train loop must have been built."""
        started = time.monotonic()
        _check_layers(runner.model)
        model = unwrapped(runner.model)
        loader = runner.train_loop.dataloader
        length = len(loader.dataset)
        # The same number for each process: the losses of some heads wait for the other processes.
        world = get_world_size()
        count = max(min(self.num_images, length) // world, 1) * world
        chosen = [i * length // count for i in range(count)][get_rank() :: world]
        batches = DataLoader(
            Subset(loader.dataset, chosen),
            batch_size=images_per_step(loader) or 1,
            collate_fn=loader.collate_fn,
        )
        shown = track(
            batches,
            description="population statistics",
            console=Console(stderr=True),
            disable=get_rank() > 0 or not Console(stderr=True).is_terminal,
            transient=True,
        )
        with random_state_kept():
            names = precise_statistics(model, shown, lambda batch: _forward(model, batch))
        runner.logger.info(
            f"PreciseStatsHook: statistics of {len(names)} layers from {count} images in "
            f"{time.monotonic() - started:.1f} s."
        )

    def _estimate_if_due(self, runner, done: int, length: int) -> None:
        if done == length or (self.every_evaluation and _is_evaluated(runner, done)):
            self.estimate(runner)


def _check_layers(model) -> None:
    if not trained_batch_norms(unwrapped(model)):
        raise ValueError(
            "PreciseStatsHook: no batch normalisation of the model trains, so there are no running "
            "statistics to estimate: they are frozen (norm_eval, frozen_stages), or its norm is "
            "another. Remove the hook."
        )


def _is_evaluated(runner, done: int) -> bool:
    """Whether the loop evaluates after ``done`` epochs, or iterations."""
    loop = runner.train_loop
    if runner.val_loop is None or done < loop.val_begin:
        return False
    interval = loop.val_interval
    if loop.dynamic_milestones:
        # The loop itself does the same once it has counted this epoch or iteration.
        interval = loop.dynamic_intervals[bisect.bisect(loop.dynamic_milestones, done + 1) - 1]
    return done % interval == 0


def _forward(model, batch) -> None:
    data = model.data_preprocessor(batch, True)
    if isinstance(data, dict):
        model(**data, mode="loss")
    else:
        model(*data, mode="loss")


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the random number generators, which pipelines and samplers use, on exit."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def images_per_step(loader) -> int | None:
    """The batch size of a data loader; None if it tells none."""
    sources = loader, getattr(loader, "batch_sampler", None)
    found = (getattr(each, "batch_size", None) for each in sources)
    return next((size for size in found if isinstance(size, int)), None)


def unwrapped(model):
    """The model inside any wrappers, such as DDP."""
    while is_model_wrapper(model):
        model = model.module
    return model
