# Licensed under the Apache License, Version 2.0.
"""A ResNet-18 that was trained with BN, and whose training goes on at one image per step."""

import math
import os
import os.path as osp
from statistics import mean

import numpy as np
import torch
from filelock import FileLock  # a dependency of torch
from norms import link_cbn, norm_cfg
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import resnet18

from cbn_mmdet import from_batchnorm, step

from .shared import (
    AVERAGES,
    Job,
    accuracy,
    descend,
    one_cycle,
    shuffled,
    with_defaults,
    with_latest,
)

# First, BN trains on images_seen images, 32 per step; then come the measured iterations.
CONTINUED = dict(AVERAGES, train_images=1400, images_seen=5600, lr_at_32=0.05)
CONTINUED.update(iterations=300, lr_at_1=0.0016, evaluate_every=50)


def continued_data(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of 24x24 pixels and labels, ``count`` for training, the others for validation."""
    digits = load_digits()
    images = torch.from_numpy(digits.images[:, None]).float()
    images = nn.functional.interpolate(images, size=24, mode="bilinear")
    images = ((images - images.mean()) / images.std()).expand(-1, 3, -1, -1)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order], torch.from_numpy(digits.target[order])
    return images[:count], labels[:count], images[count:], labels[count:]


def trained_resnet(seed: int, options: dict, images: Tensor, labels: Tensor) -> nn.Module:
    """Return a ResNet-18 that was trained with BN, just once for all norms."""
    torch.manual_seed(seed)
    model = resnet18(num_classes=10)
    model.maxpool = nn.Identity()  # else one image's last maps would have a single position
    given = [options[key] for key in ("train_images", "images_seen", "lr_at_32")]
    path = osp.join(options["work_dir"], "-".join(map(str, ["resnet18", seed, *given])) + ".pth")
    os.makedirs(options["work_dir"], exist_ok=True)
    with FileLock(f"{path}.lock"):  # only one of the workers that need it trains it
        if not osp.isfile(path):
            steps = round(options["images_seen"] * options["shorten"]) // 32
            optimizer, schedule = one_cycle(model, options["lr_at_32"], steps)
            for chosen in shuffled(len(images), 32, steps):
                descend(model, optimizer, images[chosen], labels[chosen])
                schedule.step()
            torch.save(model.state_dict(), path + ".part")
            os.replace(path + ".part", path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def train_continued(job: Job, options: dict) -> dict:
    """Continue once; returns the mean loss, and the accuracies on the way as shares."""
    images, labels, *held_out = continued_data(job.seed, options["train_images"])
    model = trained_resnet(job.seed, options, images, labels)
    every = max(1, round(options["evaluate_every"] * options["shorten"]))
    steps = max(every, round(options["iterations"] * options["shorten"]))
    settings = with_defaults(norm_cfg(job.norm), job.batch, steps)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = settings["momentum"]
    if settings.pop("type") == "CBN":
        from_batchnorm(model, **settings)
    windows = link_cbn(model)
    rate = options["lr_at_1"] * job.batch
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    torch.manual_seed(job.seed)  # the same, whether or not the network was trained just now
    clip, losses, accuracies = options.get("clip", math.inf), [], []
    order = with_latest(shuffled(len(images), job.batch, steps), labels, options)
    for number, (chosen, targets) in enumerate(order, 1):
        losses.append(descend(model.train(), optimizer, images[chosen], targets, clip=clip))
        if windows:
            step(model)
        if number % every == 0:
            accuracies.append(accuracy(model.eval(), *held_out) / 100)
    ways = {f"after {number * every}": each for number, each in enumerate(accuracies, 1)}
    return dict(loss=mean(losses), worst=min(accuracies), ways=ways)
