# Licensed under the Apache License, Version 2.0.
"""Compare norms at small batches: what CBN gains, and which of its settings matter.

classifier trains a plain CNN on handwritten digits of varied tone and contrast with batches of 1
to 32 images, and momentum trains it with other momenta of CBN's running statistics. detector trains
the Faster R-CNN of configs/digits at 1, 2 and 4 images per step, and ablation does with other
windows and burn-ins. continued goes on with a ResNet-18 that batch normalisation has trained, at
one image per step: its mean loss, and the worst accuracy on the way. Each adds its results to
FOLDER/NAME.json, prints them as a table and plots them (but for continued) to FOLDER/NAME.png. What
the file has is not run again, so an interrupted command goes on where it stopped, and one with more
--seeds adds to what is there.

A norm is named as its norm_cfg: BN, GN, or CBN(window_size=4, backward='own'), say.
CBN(window='sliding', window_size=8, compensate=False, backward='window') is the paper's naive CBN.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import os.path as osp
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none has to be there

import matplotlib.pyplot as plt
import numpy as np
import torch
from filelock import FileLock, Timeout  # which torch depends on
from mmengine.config import Config
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import resnet18

from cbn_mmdet import from_batchnorm, link, precise_statistics, set_window, step
from cbn_mmdet.datasets import build_digits, split_glyphs
from cbn_mmdet.launch import UsageError, check_writable, positive, run_tool
from cbn_mmdet.norm.names import build_norm, norm_cfg, replace_norms
from cbn_mmdet.runs import latest_checkpoint, read_run

TOOLS = osp.dirname(osp.abspath(__file__))
DIGITS = osp.join(
    osp.dirname(TOOLS), "configs", "digits", "faster-rcnn_r18_fpn_cbn-all_1xb2_digits.py"
)
# The results that docs/evidence.md shows, and their runs, which an interrupted command resumes.
KEPT, RUNS = "docs/evidence", "work_dirs/evidence"
NAIVE = "CBN(window='sliding', window_size=8, compensate=False, backward='window')"
CURRENT = "CBN(window='sliding', window_size=8, backward='current')"
SLIDING = "CBN(window='sliding', window_size=8, backward='window')"
# Of 32 channels, which both models have, GN's usual 32 groups would leave one in each.
SMALL_GN = "GN(num_groups=8)"
LABELS = {NAIVE: "naive CBN", CURRENT: "CBN, current", SLIDING: "CBN, sliding", "CBN": "CBN"}
LABELS.update({SMALL_GN: "GN", "GN": "GN(num_groups=32)"})
# What a table calls the other figures of a row.
KINDS = {"precise": "precise statistics", "worst": "worst accuracy"}
WINDOWS, BURN_INS = (1, 2, 4, 8, 16), (0, 1, 3, 5)
MOMENTA = (0.005, 0.02, 0.1, 0.5)

# What all norms share. Learning rates follow the batch linearly; running statistics average over
# 50 images, as many at each batch until that is the usual momentum of 0.1.
MOMENTUM, LARGEST_MOMENTUM = 0.02, 0.1
POPULATION = 300  # images of which the statistics for evaluation are estimated anew
SHARED = dict(momentum=MOMENTUM, largest_momentum=LARGEST_MOMENTUM, population=POPULATION)
CLASSIFIER = dict(SHARED, train_glyphs=360, images_seen=5760, lr_at_32=0.03, burn_in_images=720)
DETECTOR = dict(SHARED, train_images=1000, val_images=200, epochs=4, burn_in=1, lr_at_2=0.02)
ABLATION = dict(DETECTOR, train_images=400, epochs=6)  # which leaves room for a burn-in of 5
CONTINUED = dict(
    momentum=MOMENTUM,
    largest_momentum=LARGEST_MOMENTUM,
    train_images=1400,
    images_seen=5600,  # by BN, with 32 in a step; then come the iterations that are measured
    lr_at_32=0.05,
    iterations=300,
    lr_at_1=0.0016,
    evaluate_every=50,
)


class Job(NamedTuple):
    """One training.

    Attributes:
        norm: The norm's name.
        batch: Images per step.
        seed: Of weights, order and data.
        burn_in: Epochs before the window opens, of the classifier eighths of the run; None for the
            study's own, and for norms without a window.
    """

    norm: str
    batch: int
    seed: int
    burn_in: int | None = None


class Study(NamedTuple):
    """What a command compares.

    Attributes:
        norms: By default.
        batches: By default.
        seeds: Seeds at each batch by default.
        settings: What the trainings have in common, kept beside their results.
        train: Trains, and returns what was measured.
        figure: What a result is called.
        draw: Plots the results; None where there is no plot.
        labels: What tables and plots call norms; others go by their names.
    """

    norms: list[str]
    batches: list[int]
    seeds: dict[int, int]
    settings: dict
    train: callable
    figure: str
    draw: callable | None
    labels: dict[str, str] = LABELS


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=list(STUDIES))
    add = parser.add_argument
    text = f"of results, plots and, but for the default ({KEPT}), of the detector's runs"
    add("--folder", default=KEPT, help=text)
    add("--norms", nargs="+", type=norm, metavar="NORM", help="the norms to compare")
    add("--batches", nargs="+", type=positive, metavar="N", help="images per step")
    text = "seeds of each (5 for classifier, else 3; 2 and 1 for detector at 2 and 4 images)"
    add("--seeds", type=positive, metavar="N", help=text)
    text = "epochs before windows open, of classifier and momentum eighths of the run (1)"
    add("--burn-in", type=whole, metavar="N", help=text)
    text = "share of the images that are seen, to see a study run; needs a --folder of its own"
    add("--shorten", type=float, default=1.0, metavar="SHARE", help=text)
    add("--jobs", type=positive, metavar="N", help="trainings at a time (the number of cores)")
    add("--data", default="data", metavar="DIR", help="where digits are built (data)")
    return parser.parse_args()


def whole(text: str) -> int:
    """Read a whole number."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"takes a whole number, got {text}")
    return int(text)


def norm(text: str) -> str:
    """Check that a norm can be built; its name is all that is kept."""
    try:
        build_norm(norm_cfg(text), 32)
    except (SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot build {text}: {error}") from error
    return text


def main() -> None:
    """Run what is missing, and report all there is."""
    args = parse_args()
    if not 0 < args.shorten <= 1:
        raise UsageError(f"--shorten {args.shorten:g}: takes a share above 0, up to 1")
    study = STUDIES[args.study]
    if args.study == "continued":
        check_continued(args)
    check_writable(args.folder, "--folder")
    path = osp.join(args.folder, f"{args.study}.json")
    settings = dict(study.settings, shorten=args.shorten)
    with alone_with(path):
        results = read_results(path, settings)
        run_missing(args, study, plan(args, study), results, path, settings)
    rows = list(results.values())
    report(args.study, study, rows)
    print(f"figures: {path}")
    if study.draw:
        plot = osp.join(args.folder, f"{args.study}.png")
        study.draw(rows, study, plot)
        print(f"plot: {plot}")


@contextmanager
def alone_with(path: str) -> Iterator[None]:
    """Keep other commands from what this one trains and writes, until it ends or is killed."""
    try:
        with FileLock(f"{path}.lock", timeout=0):
            yield
    except Timeout as error:
        raise UsageError(
            f"another command adds to {path}: wait for it, or take another --folder"
        ) from error


def plan(args: argparse.Namespace, study: Study) -> list[Job]:
    """All trainings that are asked for, seed by seed, so that early results compare all norms."""
    batches = args.batches or study.batches
    most = args.seeds or max(study.seeds.values())
    default = ABLATION["burn_in"] if args.study == "ablation" else None
    variants = [(name, default) for name in args.norms or study.norms]
    if not variants:  # the ablation's own, of which the sliding ones cross at a window of 8
        variants = [(sliding(k), default) for k in WINDOWS]
        variants += [(SLIDING, other) for other in BURN_INS if other != default]
        variants += [(name, each) for name in ("CBN", "CBN(window_size=8)") for each in (0, 1)]
    if args.burn_in is not None:
        variants = [(name, args.burn_in) for name in dict.fromkeys(name for name, _ in variants)]
    jobs = []
    for seed in range(most):
        for batch in batches:
            if seed >= (args.seeds or study.seeds.get(batch, min(study.seeds.values()))):
                continue
            jobs += [
                Job(name, batch, seed, burn_in if "CBN" in name else None)
                for name, burn_in in variants
            ]
    return jobs


def sliding(size: int) -> str:
    """CBN with the paper's window and the gradient through it."""
    return SLIDING.replace("window_size=8", f"window_size={size}")


def read_results(path: str, settings: dict) -> dict[Job, dict]:
    """Read what was measured before, under the same settings."""
    if not osp.isfile(path):
        return {}
    try:
        with open(path) as file:
            saved = json.load(file)
        rows = {Job(*(row[key] for key in Job._fields)): row for row in saved["runs"]}
        measured = saved["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: delete it, or take another --folder") from error
    if measured != settings:
        raise UsageError(
            f"{path} has results of other settings, {measured}, than these, {settings}: "
            "take another --folder"
        )
    return rows


def run_missing(args, study: Study, jobs: list[Job], results: dict, path: str, settings) -> None:
    """Train what ``results`` lacks, and write each result at once."""
    missing = [job for job in jobs if job not in results]
    if results:
        kept = len(jobs) - len(missing)
        print(f"{kept} of {len(jobs)} trainings are in {path}; --folder NEW measures all anew")
    workers = args.jobs or os.cpu_count()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # One thread each: two small trainings side by side use two cores better than in turn.
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=Console(stderr=True)) as bar,
        ProcessPoolExecutor(
            workers, context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        task = bar.add_task(args.study, total=len(jobs), completed=len(jobs) - len(missing))
        runs = RUNS if osp.normpath(args.folder) == KEPT else osp.join(args.folder, "runs")
        work_dir = osp.join(runs, args.study, f"{args.shorten:g}")
        options = dict(settings, work_dir=work_dir, data=args.data)
        running = {pool.submit(study.train, job, options): job for job in missing}
        try:
            for done in as_completed(running):
                job = running[done]
                results[job] = {**job._asdict(), **done.result()}
                write_results(path, settings, results)
                bar.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_results(path: str, settings: dict, results: dict[Job, dict]) -> None:
    """Write all results, so that a death while writing loses none."""
    rows = [results[job] for job in sorted(results, key=lambda job: tuple(map(str, job)))]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    with open(path + ".part", "w") as file:
        file.write(f'{{"settings": {json.dumps(settings)},\n "runs": [\n{lines}\n]}}\n')
    os.replace(path + ".part", path)


# The classifier.


def render(glyphs: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Digits in faint or strong ink on grounds of any tone, ``(N, 1, 8, 8)``.

    So that images differ in mean and variance, as photographs do: then the statistics of few of
    them are a bad estimate of the population's.
    """
    count = len(glyphs)
    contrast = np.exp(rng.uniform(np.log(0.3), np.log(1.5), count))
    tone = rng.normal(0, 1, count)
    slope = rng.normal(0, 0.3, (count, 2, 1, 1))
    place = np.linspace(-1, 1, 8)
    light = slope[:, 0] * place[:, None] + slope[:, 1] * place
    grain = rng.normal(0, 0.05, glyphs.shape) * contrast[:, None, None]
    images = contrast[:, None, None] * glyphs + tone[:, None, None] + light + grain
    return torch.from_numpy(images[:, None]).float()


def classifier_data(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training, one of each of ``count`` glyphs, and for testing."""
    digits = load_digits()
    split, rng = split_glyphs(), np.random.default_rng(seed)
    chosen = rng.permutation(split["train"])[:count]
    tested = np.tile(split["val"], 5)
    data = []
    for indices in (chosen, tested):
        data += [
            render(digits.images[indices] / 16, rng),
            torch.from_numpy(digits.target[indices]),
        ]
    return tuple(data)


def classifier(settings: dict) -> nn.Sequential:
    """Six 3x3 convolutions, five of them with maps of 2x2, a norm after each."""
    layers, channels = [], 1
    for width, stride in ((32, 2), (64, 2), (64, 1), (128, 1), (128, 1), (128, 1)):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        layers += [conv, build_norm(settings, width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def train_classifier(job: Job, options: dict) -> dict:
    """Train once; returns the accuracy in percent, with both kinds of statistics."""
    images, labels, test_images, test_labels = classifier_data(job.seed, options["train_glyphs"])
    torch.manual_seed(job.seed)
    seen = round(options["images_seen"] * options["shorten"])
    steps = seen // job.batch
    model = classifier(with_defaults(norm_cfg(job.norm), job.batch, steps))
    rate = options["lr_at_32"] * job.batch / 32
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=0.1, cycle_momentum=False
    )
    link(model)
    eighths = 1 if job.burn_in is None else job.burn_in
    burn_in = round(options["burn_in_images"] * eighths * options["shorten"]) // job.batch
    for number, chosen in enumerate(shuffled(len(images), job.batch, steps)):
        if number in (0, burn_in):
            set_window(model, 1 if number < burn_in else None)
        descend(model, optimizer, images[chosen], labels[chosen])
        step(model)
        schedule.step()
    result = dict(accuracy=accuracy(model.eval(), test_images, test_labels))
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model):
        precise_statistics(model.train(), images[:POPULATION].split(job.batch))
        result["precise"] = accuracy(model.eval(), test_images, test_labels)
    return result


def shuffled(count: int, batch: int, steps: int) -> Iterator[Tensor]:
    """The indices of each step's images, of ``count`` in one random order after another."""
    order = torch.cat([torch.randperm(count) for _ in range(steps * batch // count + 1)])
    for start in range(0, steps * batch, batch):
        yield order[start : start + batch]


def descend(model: nn.Module, optimizer, images: Tensor, labels: Tensor) -> float:
    """One step of the training; returns the loss."""
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent of the images that are named right."""
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def with_defaults(settings: dict, batch: int, steps: int) -> dict:
    """What a norm needs to know of the training and was not told."""
    if settings["type"] == "GN":
        return settings
    settings.setdefault("momentum", min(LARGEST_MOMENTUM, round(MOMENTUM * batch, 4)))
    if settings["type"] == "BRN":  # the paper's shares of its run
        limits = dict(warmup=steps // 18, r_end=4 * steps // 9, d_end=5 * steps // 18)
        return {**limits, **settings}
    return settings


# The trained network that goes on.


def check_continued(args: argparse.Namespace) -> None:
    """Refuse what this study has no use for."""
    if args.burn_in is not None:
        raise UsageError("--burn-in: continued has none")
    for name in args.norms or []:
        if norm_cfg(name)["type"] not in ("BN", "CBN"):
            raise UsageError(f"--norms {name}: continued goes on with BN or CBN")


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
    """A ResNet-18 that batch normalisation has trained, once for all norms."""
    torch.manual_seed(seed)
    model = resnet18(num_classes=10)
    model.maxpool = nn.Identity()  # or one image's last maps would have a single position
    given = [options[key] for key in ("train_images", "images_seen", "lr_at_32")]
    path = osp.join(options["work_dir"], "-".join(map(str, ["resnet18", seed, *given])) + ".pth")
    os.makedirs(options["work_dir"], exist_ok=True)
    with FileLock(f"{path}.lock"):  # of the workers that need it, one trains it
        if not osp.isfile(path):
            steps = round(options["images_seen"] * options["shorten"]) // 32
            rate = options["lr_at_32"]
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, rate, steps, pct_start=0.1, cycle_momentum=False
            )
            for chosen in shuffled(len(images), 32, steps):
                descend(model, optimizer, images[chosen], labels[chosen])
                schedule.step()
            torch.save(model.state_dict(), path + ".part")
            os.replace(path + ".part", path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def train_continued(job: Job, options: dict) -> dict:
    """Go on once; returns the mean loss and the worst accuracy on the way, as a share."""
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
    link(model)
    rate = options["lr_at_1"] * job.batch
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    torch.manual_seed(job.seed)  # whether or not the network was trained just now
    losses, accuracies = [], []
    for number, chosen in enumerate(shuffled(len(images), job.batch, steps), 1):
        losses.append(descend(model.train(), optimizer, images[chosen], labels[chosen]))
        step(model)
        if number % every == 0:
            accuracies.append(accuracy(model.eval(), *held_out))
    return dict(loss=mean(losses), worst=min(accuracies) / 100)


# The detector.


def train_detector(job: Job, options: dict, precise: Iterable[str] = ()) -> dict:
    """Train once; returns the box AP, of the norms in ``precise`` with both kinds of statistics."""
    cfg = detector_config(job, options)
    name = f"{job.norm}_{job.batch}_{job.burn_in}_{job.seed}".translate(
        str.maketrans("(=',) ", "-" * 6)
    )
    work_dir = osp.join(options["work_dir"], name)
    path = osp.join(work_dir, "config.py")
    if osp.isfile(path) and Config.fromfile(path).to_dict() != cfg.to_dict():
        shutil.rmtree(work_dir)  # of other settings: not to be resumed
    os.makedirs(work_dir, exist_ok=True)
    cfg.dump(path)
    run = osp.join(work_dir, "run")
    call("train.py", path, "--resume", "--work-dir", run)
    if not read_run(run).evaluations:  # interrupted between the last checkpoint and its evaluation
        call("test.py", path, latest_checkpoint(run), "--work-dir", run)
    result = dict(ap=last_ap(run))
    if job.norm in precise:
        test = osp.join(work_dir, "precise")
        statistics = "--precise-stats", str(POPULATION)
        call("test.py", path, latest_checkpoint(run), "--work-dir", test, *statistics)
        result["precise"] = last_ap(test)
    return result


def last_ap(work_dir: str) -> float:
    """The box AP of the last evaluation that a training, or a test, left in its work dir."""
    return read_run(work_dir).evaluations[-1]["coco/bbox_mAP"]


def detector_config(job: Job, options: dict) -> Config:
    """The digits detector with the norm of the job."""
    epochs = options["epochs"]
    count, held_out = (
        round(options[split] * options["shorten"]) for split in ("train_images", "val_images")
    )
    folder = osp.join(options["data"], f"digits_{count}_{held_out}")
    root = f"{build_digits(folder, num_train=count, num_val=held_out, progress=False)}/"
    cfg = Config.fromfile(DIGITS)
    settings = with_defaults(norm_cfg(job.norm), job.batch, epochs * count // job.batch)
    replace_norms(cfg.model, settings)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = root
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = f"{root}annotations/instances_val.json"
    cfg.train_dataloader.update(batch_size=job.batch)
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    cfg.param_scheduler[1].update(end=epochs, milestones=[epochs - 1])
    cfg.optim_wrapper.optimizer.lr = options["lr_at_2"]  # auto_scale_lr does the rest
    burn_in = options["burn_in"] if job.burn_in is None else job.burn_in
    cfg.custom_hooks = [dict(type="CBNHook", burn_in=burn_in)] if "CBN" in job.norm else []
    cfg.default_hooks.checkpoint.update(max_keep_ckpts=1)
    cfg.randomness = dict(seed=job.seed)
    return cfg


def call(tool: str, *args: str) -> None:
    """Run another tool, and show what it said if it fails."""
    done = subprocess.run(
        [sys.executable, osp.join(TOOLS, tool), *args],
        # Where there is a GPU, too, so that all figures of a file are comparable.
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UsageError(f"{tool} {' '.join(args)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


# The report.


def report(name: str, study: Study, rows: list[dict]) -> None:
    """Print the mean over the seeds, their standard deviation and their number."""
    batches = sorted({row["batch"] for row in rows})
    table = Table(
        "norm",
        *(f"{batch} per step" for batch in batches),
        title=f"{name}: {study.figure}, mean ± standard deviation (seeds)",
        box=box.MARKDOWN,
    )
    for group, values in grouped(rows, study).items():
        cells = [summary(values.get(batch, []), study.figure) for batch in batches]
        table.add_row(title(*group), *cells)
    Console(width=200).print(table)


def grouped(rows: list[dict], study: Study) -> dict[tuple, dict[int, list[float]]]:
    """The values of all seeds by norm, burn-in and kind of figure, and then by batch."""
    groups = defaultdict(lambda: defaultdict(list))
    order = {name: number for number, name in enumerate(["BN", "BRN", *study.labels])}
    for row in sorted(rows, key=lambda row: (order.get(row["norm"], 9), natural(row))):
        label = study.labels.get(row["norm"], row["norm"])
        for key in (study.figure, *KINDS):
            if key in row:
                groups[label, row["burn_in"], key][row["batch"]].append(row[key])
    return groups


def title(label: str, burn_in: int | None, key: str) -> str:
    """What a table calls a group of :func:`grouped`."""
    parts = [label, *([] if burn_in is None else [f"burn-in {burn_in}"])]
    return ", ".join([*parts, KINDS[key]] if key in KINDS else parts)


def natural(row: dict) -> tuple:
    """What sorts window_size=16 behind window_size=4, momentum=0.1 behind 0.02, and burn-ins."""
    numbers = re.findall(r"\d+(?:\.\d+)?", row["norm"])
    return tuple(map(float, numbers)), row["norm"], row["burn_in"] or 0


def summary(values: list[float], figure: str) -> str:
    """Mean, spread and number of ``values``."""
    if not values:
        return ""
    digits = 1 if figure == "accuracy" else 3
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread} ({len(values)})"


def plot_batches(rows: list[dict], study: Study, path: str) -> None:
    """Plot the results over the batch."""
    canvas, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    for group, values in grouped(rows, study).items():
        if group[-1] == study.figure:
            draw(axes, values, title(*group))
    axes.set(xscale="log", xlabel="images per step", ylabel=AXES[study.figure])
    ticks = sorted({row["batch"] for row in rows})
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    finish(canvas, [axes], path)


def plot_ablation(rows: list[dict], study: Study, path: str) -> None:
    """Plot the results over the sliding window, and over the burn-in."""
    canvas, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    default, figure = ABLATION["burn_in"], study.figure
    windows, burn_ins = (defaultdict(lambda: defaultdict(list)) for _ in panels)
    for row in sorted(rows, key=lambda row: (row["norm"] == "CBN", row["batch"])):
        found = re.fullmatch(re.escape(SLIDING).replace("8", r"(\d+)"), row["norm"])
        label = f"{'sliding' if found else 'CBN'}, {row['batch']} per step"
        if found and row["burn_in"] == default:
            windows[label][int(found[1])].append(row[figure])
        if row["norm"] in (SLIDING, "CBN"):
            burn_ins[label][row["burn_in"]].append(row[figure])
    for axes, lines in zip(panels, (windows, burn_ins), strict=True):
        for label, values in lines.items():
            draw(axes, values, label)
    panels[0].set(xscale="log", xlabel=f"window_size (burn-in {default})", ylabel=AXES[figure])
    panels[0].set_xticks(WINDOWS, WINDOWS)
    panels[0].minorticks_off()
    panels[1].set(xlabel=f"burn-in, of {ABLATION['epochs']} epochs (sliding: window_size 8)")
    finish(canvas, panels, path)


def draw(axes, groups: dict[int, list[float]], label: str) -> None:
    """Draw means with the spread of the seeds."""
    places = sorted(groups)
    means = [mean(groups[place]) for place in places]
    spreads = [stdev(groups[place]) if len(groups[place]) > 1 else 0 for place in places]
    axes.errorbar(places, means, spreads, marker=".", capsize=3, label=label)


def finish(canvas, panels: Iterable, path: str) -> None:
    """Add a legend, and write the file."""
    for axes in panels:
        axes.grid(alpha=0.3)
    # Beside the panels, where it hides no point; the last one has all lines.
    if axes.has_data():
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    canvas.savefig(path, dpi=100)
    plt.close(canvas)


AXES = {
    "accuracy": "test accuracy, %",
    "ap": "box AP",
}
ALL = ["BN", "BRN", NAIVE, CURRENT, SLIDING, "CBN", SMALL_GN]
STUDIES = {
    "classifier": Study(
        ALL,
        [1, 2, 4, 8, 16, 32],
        {1: 5},
        CLASSIFIER,
        train_classifier,
        "accuracy",
        plot_batches,
    ),
    "momentum": Study(
        [f"CBN(momentum={momentum})" for momentum in MOMENTA],
        [1, 2],
        {1: 3},
        CLASSIFIER,
        train_classifier,
        "accuracy",
        plot_batches,
        {f"{SLIDING[:-1]}, momentum={each})": f"CBN, sliding, momentum={each}" for each in MOMENTA},
    ),
    "continued": Study(
        ["BN", SLIDING, "CBN", "CBN(window_size=8)", "CBN(window_size=8, backward='own')"],
        [1],
        {1: 3},
        CONTINUED,
        train_continued,
        "loss",
        None,
    ),
    "detector": Study(
        ALL,
        [1, 2, 4],
        {1: 3, 2: 2, 4: 1},
        DETECTOR,
        partial(train_detector, precise=("BN", SLIDING, "CBN")),
        "ap",
        plot_batches,
    ),
    "ablation": Study(
        [],
        [1, 2],
        {1: 3},
        ABLATION,
        train_detector,
        "ap",
        plot_ablation,
        {sliding(k): f"CBN, sliding, window_size={k}" for k in WINDOWS},
    ),
}


if __name__ == "__main__":
    run_tool(main)
