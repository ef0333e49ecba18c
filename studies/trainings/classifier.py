# Licensed under the Apache License, Version 2.0.
"""A plain CNN on handwritten digits of varied tone and contrast."""

import numpy as np
import torch
from digits.build import split_glyphs
from norms import build_norm, link_cbn, norm_cfg
from sklearn.datasets import load_digits
from torch import Tensor, nn

from cbn_mmdet import CenConv2d, precise_statistics, set_window, step

from .shared import (
    POPULATION,
    SHARED,
    Job,
    accumulated,
    accuracy,
    burn_in,
    descend,
    one_cycle,
    shuffled,
    with_defaults,
    with_latest,
)

CLASSIFIER = dict(SHARED, train_glyphs=360, images_seen=5760, lr_at_32=0.03, burn_in_images=720)


def render(glyphs: np.ndarray, rng: np.random.Generator, is_even: bool) -> Tensor:
    """Draw digits in faint or strong ink on grounds of any tone, ``(N, 1, 8, 8)``.

    The images then differ in mean and variance, as photographs do, so the statistics of a few of
    them are a bad estimate of the population's. Even images (``is_even``) differ only in content.
    """
    count = len(glyphs)
    contrast = np.exp(rng.uniform(np.log(0.3), np.log(1.5), count))
    tone = rng.normal(0, 1, count)
    slope = rng.normal(0, 0.3, (count, 2, 1, 1))
    if is_even:
        contrast, tone, slope = np.ones(count), np.zeros(count), np.zeros_like(slope)
    place = np.linspace(-1, 1, 8)
    light = slope[:, 0] * place[:, None] + slope[:, 1] * place
    grain = rng.normal(0, 0.05, glyphs.shape) * contrast[:, None, None]
    images = contrast[:, None, None] * glyphs + tone[:, None, None] + light + grain
    return torch.from_numpy(images[:, None]).float()


def classifier_data(seed: int, count: int, is_even: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels, for training (one image for each of ``count`` glyphs) and for testing."""
    digits = load_digits()
    split, rng, data = split_glyphs(), np.random.default_rng(seed), []
    for indices in (rng.permutation(split["train"])[:count], np.tile(split["val"], 5)):
        images = render(digits.images[indices] / 16, rng, is_even)
        data += [images, torch.from_numpy(digits.target[indices])]
    return tuple(data)


def classifier(settings: dict, centred: bool = False) -> nn.Sequential:
    """Build six 3x3 convolutions, five of them with maps of 2x2, each with a norm behind it."""
    layers, channels = [], 1
    convolution = CenConv2d if centred or settings["type"] == "MABN" else nn.Conv2d
    for width, stride in ((32, 2), (64, 2), (64, 1), (128, 1), (128, 1), (128, 1)):
        conv = convolution(channels, width, 3, stride, padding=1, bias=False)
        layers += [conv, build_norm(settings, width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def train_classifier(job: Job, options: dict) -> dict:
    """Train once; returns accuracies in per cent, with running and with precise statistics."""
    images, labels, test_images, test_labels = classifier_data(
        job.seed, options["train_glyphs"], options.get("even", False)
    )
    torch.manual_seed(job.seed)
    parts = accumulated(job)
    steps = max(1, round(options["images_seen"] * options["shorten"]) // (job.batch * parts))
    settings = with_defaults(norm_cfg(job.norm), job.batch, steps)
    model = classifier(settings, options.get("centred", False))
    rate = options["lr_at_32"] * job.batch * parts / 32
    optimizer, schedule = one_cycle(model, rate, steps, weight_decay=1e-4)
    windows = link_cbn(model)
    held_images = options["burn_in_images"] * burn_in(job, 1)  # burn-ins are eighths
    opens = round(held_images * options["shorten"]) // job.batch
    order = shuffled(len(images), job.batch, steps * parts, options.get("frames", 1))
    for number, (chosen, targets) in enumerate(with_latest(order, labels, options)):
        if windows and number in (0, opens):
            set_window(model, 1 if number < opens else None)
        is_last = (number + 1) % parts == 0
        descend(model, optimizer, images[chosen], targets, parts, is_last)
        if windows:
            step(model, updated=is_last)
        if is_last:
            schedule.step()
    result = dict(accuracy=accuracy(model.eval(), test_images, test_labels))
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model):
        precise_statistics(model.train(), images[:POPULATION].split(job.batch))
        result["precise"] = accuracy(model.eval(), test_images, test_labels)
    return result
