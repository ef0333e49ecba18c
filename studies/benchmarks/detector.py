# Licensed under the Apache License, Version 2.0.
"""Measure what a norm costs a detector: training step, evaluation and memory."""

import argparse
import copy
import os.path as osp
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common.config import read_config, walk
from common.errors import UsageError
from mmdet.registry import DATASETS, MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from norms import link_cbn, norm_cfg, replace_norms
from printing import Bar
from torch import nn

from cbn_mmdet import step

from . import memory, timing
from .timing import Clock, Run, warm_up


def read_detector(args: argparse.Namespace) -> Config:
    """Read the detector's config, and set the library that its parts come from."""
    cfg = read_config(args.config)
    init_default_scope(cfg.get("default_scope", "mmdet"))
    return cfg


def build_detector(cfg: Config, name: str, args: argparse.Namespace) -> nn.Module:
    """Build the detector with a norm, from the same random weights for all norms."""
    settings = copy.deepcopy(cfg.model)
    if not replace_norms(settings, norm_cfg(name)):
        raise UsageError(
            f"{args.config}: none of its norms trains: set a norm_cfg without requires_grad=False"
        )
    settings.get("backbone", {}).pop("init_cfg", None)  # nothing to download
    torch.manual_seed(0)
    try:
        model = MODELS.build(settings)
    except (TypeError, ValueError) as error:  # such as a number of groups that does not fit
        raise UsageError(f"{args.config} with {name}: {error}") from error
    model.init_weights()
    return model.to(args.device)


def batches(cfg: Config, args: argparse.Namespace) -> tuple[Callable[[int], dict], str]:
    """Return a function that makes the data of a step anew each time, and a description of them."""
    settings = cfg.train_dataloader.dataset
    if args.digits and osp.isfile(osp.join(settings.data_root, settings.ann_file)):
        data = DATASETS.build(settings)

        def read(seed: int) -> dict:
            first = seed * args.batch
            return pseudo_collate([data[i % len(data)] for i in range(first, first + args.batch)])

        return read, f"{args.batch} image(s) of {settings.data_root}"

    def invent(seed: int) -> dict:
        shapes, objects = [(3, *args.size)] * args.batch, [8] * args.batch
        masks = "mask_head" in cfg.model.get("roi_head", {})
        known = [value for path, value in walk(cfg.model) if path[-1] == "num_classes"]
        classes = min([10, *known])
        return demo_mm_inputs(args.batch, shapes, objects, num_classes=classes, with_mask=masks)

    return invent, f"{args.batch} image(s) of {args.size[0]}×{args.size[1]}, noise"


def step_run(name: str, args: argparse.Namespace) -> tuple[Run, nn.Module]:
    """Build a training step: losses, backward, clipping, optimiser, the end of the iteration."""
    cfg = read_detector(args)
    batch, _ = batches(cfg, args)
    model = build_detector(cfg, name, args).train()
    settings = copy.deepcopy(cfg.optim_wrapper)
    settings.optimizer.lr *= 0.01  # no warm-up: train, but do not diverge
    if args.dtype != "float32":
        settings.update(type="AmpOptimWrapper", dtype=args.dtype)
    optim_wrapper, steps, loss = build_optim_wrapper(model, settings), link_cbn(model), []

    def run(seed: int, clock: Clock) -> None:
        data = batch(seed)
        torch.manual_seed(seed)  # for the sampling of regions
        np.random.seed(seed)
        with clock:
            loss[:] = [model.train_step(data, optim_wrapper)["loss"]]
            if steps:
                step(model)

    warm_up(model, run, args.device)
    if not loss[0].isfinite():
        raise UsageError(f"{args.config}: the loss is not finite: give a lower learning rate")
    return run, model


def inference_run(name: str, args: argparse.Namespace) -> tuple[Run, nn.Module]:
    """Build an evaluation step, from images to detections."""
    cfg = read_detector(args)
    batch, _ = batches(cfg, args)
    model, dtype = build_detector(cfg, name, args).eval(), getattr(torch, args.dtype)

    def run(seed: int, clock: Clock) -> None:
        data = batch(seed)
        half = torch.autocast(args.device, dtype, enabled=dtype != torch.float32)
        with clock, torch.no_grad(), half:
            model.test_step(data)

    return warm_up(model, run, args.device), model


def describe(what: str, args: argparse.Namespace) -> str:
    """The title of a table."""
    _, data = batches(read_detector(args), args)
    return f"{what}, {Path(args.config).stem}, {data}"


def measure_step(args: argparse.Namespace, bar: Bar) -> dict:
    """Time a training step with each norm."""
    return {describe("Training step", args): timing.measure(step_run, args, bar)[0]}


def measure_inference(args: argparse.Namespace, bar: Bar) -> dict:
    """Time evaluation with each norm, and compare its operations with BN's."""
    title = describe("Evaluation", args)
    rows, runs = timing.measure(inference_run, args, bar)
    operations = {name: operations_of(run, args.device) for name, run in runs.items()}
    for row in rows:
        row["calls BN's operations"] = operations[row["norm"]] == operations["BN"]
    return {title: rows}


def operations_of(run: Run, device: str) -> list[list[str]]:
    """List the operations that a run calls, and a GPU's kernels, each in their order."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] + [kinds.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run(0, Clock(device))
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    called = [each.name for each in events if each.name.startswith("aten::")]
    return [called, [each.name for each in events if each.device_type.name == "CUDA"]]


def measure_memory(args: argparse.Namespace, bar: Bar) -> dict:
    """Measure peak memory with each norm."""
    return {describe("Memory", args): memory.measure(step_run, args, bar)}
