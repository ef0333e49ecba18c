# Licensed under the Apache License, Version 2.0.
"""Measure what a norm costs torchvision's Faster R-CNN, on machines without MMDetection."""

import argparse

import torch
from norms import build_norm, link_cbn, norm_cfg
from printing import Bar
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from cbn_mmdet import step

from . import memory, timing
from .timing import Clock, Run, warm_up

CHANNELS, CLASSES, OBJECTS = 256, 91, 8
STAGES = {f"layer{number}": CHANNELS * 2 ** (number - 1) for number in range(1, 5)}


def layer(name: str) -> type:
    """The argument ``norm_layer`` of torchvision for a norm."""
    return lambda channels: build_norm(norm_cfg(name), channels)


def build_backbone(name: str) -> nn.Module:
    """Build R-50-FPN with a norm after each convolution."""
    levels = {stage: str(number) for number, stage in enumerate(STAGES)}
    resnet, channels = resnet50(norm_layer=layer(name)), list(STAGES.values())
    return BackboneWithFPN(resnet, levels, channels, CHANNELS, norm_layer=layer(name))


def build_detector(name: str, size: list[int]) -> nn.Module:
    """Build Faster R-CNN R-50-FPN with four convolutions in its head, for images of one size."""
    torch.manual_seed(0)
    head = FastRCNNConvFCHead((CHANNELS, 7, 7), 4 * [CHANNELS], [1024], norm_layer=layer(name))
    low, high = sorted(size)
    regions = min(512, low * high // 500)  # a small image has no room for more
    return FasterRCNN(
        build_backbone(name),
        CLASSES,
        *(low, high),
        box_head=head,
        box_batch_size_per_image=regions,
    )


def batch(args: argparse.Namespace, seed: int) -> tuple[list[Tensor], list[dict]]:
    """Make images of noise, with boxes that mean nothing."""
    torch.manual_seed(seed)
    height, width = args.size
    images = torch.randn(args.batch, 3, height, width, device=args.device)
    corners = torch.rand(args.batch, OBJECTS, 4, device=args.device) / 2
    corners[..., 2:] += corners[..., :2] + 0.1
    boxes = corners.clamp_max(1) * corners.new_tensor([width, height, width, height])
    labels = torch.randint(1, CLASSES, (args.batch, OBJECTS), device=args.device)
    targets = [dict(boxes=box, labels=label) for box, label in zip(boxes, labels, strict=True)]
    return list(images), targets


def step_run(name: str, args: argparse.Namespace) -> tuple[Run, nn.Module]:
    """Build a training step: losses, backward, the end of the iteration, clipping, optimiser."""
    model = build_detector(name, args.size).to(args.device).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    steps, dtype = link_cbn(model), getattr(torch, args.dtype)

    def run(seed: int, clock: Clock) -> None:
        images, targets = batch(args, seed)
        with clock:
            with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
                loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if steps:
                step(model, scaler)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 35)
            scaler.step(optimizer)
            scaler.update()

    return warm_up(model, run, args.device), model


def describe(what: str, args: argparse.Namespace) -> str:
    """The title of a table."""
    height, width = args.size
    return f"{what}, torchvision's Faster R-CNN, {args.batch} image(s) of {height}×{width}, noise"


def measure_step(args: argparse.Namespace, bar: Bar) -> dict:
    """Time a training step with each norm."""
    return {describe("Training step", args): timing.measure(step_run, args, bar)[0]}


def measure_memory(args: argparse.Namespace, bar: Bar) -> dict:
    """Measure peak memory with each norm."""
    return {describe("Memory", args): memory.measure(step_run, args, bar)}
