# Licensed under the Apache License, Version 2.0.
"""Compare norms at small batches: what CBN gains, and which of its settings matter.

classifier trains a plain CNN on handwritten digits of varied tone and contrast with batches of 1
to 32 images, and momentum trains it with other momenta of CBN's running statistics. detector trains
the Faster R-CNN of configs/digits at 1, 2 and 4 images per step, and ablation does with other
windows and burn-ins. Each adds its results to FOLDER/NAME.json, prints them as a table and plots
them to FOLDER/NAME.png. What the file has is not run again, so an interrupted command goes on where
it stopped, and one with more --seeds adds to what is there.

A norm is named as its norm_cfg: BN, GN, or CBN(window_size=4, backward='current'), say.
CBN(compensate=False) is the paper's naive CBN.
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

from cbn_mmdet import link, precise_statistics, set_window, step
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
NAIVE, CURRENT = "CBN(compensate=False)", "CBN(backward='current')"
# Of 32 channels, which both models have, GN's usual 32 groups would leave one in each.
SMALL_GN = "GN(num_groups=8)"
LABELS = {NAIVE: "naive CBN", CURRENT: "CBN, current", "CBN": "CBN, window", SMALL_GN: "GN"}
LABELS["GN"] = "GN(num_groups=32)"
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


class Job(NamedTuple):
    """One training.

    Attributes:
        norm: The norm's name.
        batch: Images per step.
        seed: Of weights, order and data.
        burn_in: Epochs before the window opens; None where the study does not vary it.
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
    """

    norms: list[str]
    batches: list[int]
    seeds: dict[int, int]
    settings: dict
    train: callable
    figure: str


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
    text = "share of the images that are seen, to see a study run; needs a --folder of its own"
    add("--shorten", type=float, default=1.0, metavar="SHARE", help=text)
    add("--jobs", type=positive, metavar="N", help="trainings at a time (the number of cores)")
    add("--data", default="data", metavar="DIR", help="where digits are built (data)")
    return parser.parse_args()


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
    check_writable(args.folder, "--folder")
    path = osp.join(args.folder, f"{args.study}.json")
    settings = dict(study.settings, shorten=args.shorten)
    with alone_with(path):
        results = read_results(path, settings)
        run_missing(args, study, plan(args, study), results, path, settings)
    rows = list(results.values())
    report(args.study, study, rows)
    draw_all = plot_ablation if args.study == "ablation" else plot_batches
    plot = osp.join(args.folder, f"{args.study}.png")
    draw_all(rows, study.figure, plot)
    print(f"figures: {path}")
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
    burn_in = ABLATION["burn_in"] if args.study == "ablation" else None
    variants = [(name, burn_in) for name in args.norms or study.norms]
    if not variants:  # the ablation's own, which cross at a window of 8
        variants = [(f"CBN(window_size={k})", burn_in) for k in WINDOWS]
        variants += [("CBN(window_size=8)", other) for other in BURN_INS if other != burn_in]
    jobs = []
    for seed in range(most):
        for batch in batches:
            if seed >= (args.seeds or study.seeds.get(batch, min(study.seeds.values()))):
                continue
            jobs += [Job(name, batch, seed, burn_in) for name, burn_in in variants]
    return jobs


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
    window = max([getattr(layer, "window_size", 1) for layer in model])
    burn_in = round(options["burn_in_images"] * options["shorten"]) // job.batch
    order = torch.cat([torch.randperm(len(images)) for _ in range(seen // len(images) + 1)])
    for number in range(steps):
        set_window(model, 1 if number < burn_in else window)
        chosen = order[number * job.batch : (number + 1) * job.batch]
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step(model)
        schedule.step()
    result = dict(accuracy=accuracy(model.eval(), test_images, test_labels))
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model):
        precise_statistics(model.train(), images[:POPULATION].split(job.batch))
        result["precise"] = accuracy(model.eval(), test_images, test_labels)
    return result


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


# The detector.


def train_detector(job: Job, options: dict) -> dict:
    """Train once; returns the box AP, for BN and CBN with both kinds of statistics."""
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
    if job.norm in ("BN", "CBN"):
        test = osp.join(work_dir, "precise")
        precise = "--precise-stats", str(POPULATION)
        call("test.py", path, latest_checkpoint(run), "--work-dir", test, *precise)
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
    for group, values in grouped(rows, study.figure).items():
        cells = [summary(values.get(batch, []), study.figure) for batch in batches]
        table.add_row(title(*group), *cells)
    Console(width=200).print(table)


def grouped(rows: list[dict], figure: str) -> dict[tuple, dict[int, list[float]]]:
    """The values of all seeds by norm, burn-in and kind of statistics, and then by batch."""
    groups = defaultdict(lambda: defaultdict(list))
    order = {name: number for number, name in enumerate(["BN", "BRN", *LABELS])}
    for row in sorted(rows, key=lambda row: (order.get(row["norm"], 9), natural(row))):
        label = LABELS.get(row["norm"], row["norm"])
        for key in (figure, "precise"):
            if key in row:
                groups[label, row["burn_in"], key][row["batch"]].append(row[key])
    return groups


def title(label: str, burn_in: int | None, key: str) -> str:
    """What a table calls a group of :func:`grouped`."""
    parts = [label, *([] if burn_in is None else [f"burn-in {burn_in}"])]
    return ", ".join([*parts, "precise statistics"] if key == "precise" else parts)


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


def plot_batches(rows: list[dict], figure: str, path: str) -> None:
    """Plot the results over the batch."""
    canvas, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    for (label, _, key), groups in grouped(rows, figure).items():
        if key == "precise":
            continue
        draw(axes, groups, label)
    axes.set(xscale="log", xlabel="images per step", ylabel=AXES[figure])
    ticks = sorted({row["batch"] for row in rows})
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    finish(canvas, [axes], path)


def plot_ablation(rows: list[dict], figure: str, path: str) -> None:
    """Plot the results over the window, and over the burn-in."""
    canvas, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    default = ABLATION["burn_in"]
    for batch in sorted({row["batch"] for row in rows}):
        windows, burn_ins = defaultdict(list), defaultdict(list)
        for row in rows:
            found = re.fullmatch(r"CBN\(window_size=(\d+)\)", row["norm"])
            if row["batch"] == batch and found:
                size = int(found[1])
                if row["burn_in"] == default:
                    windows[size].append(row[figure])
                if size == 8:
                    burn_ins[row["burn_in"]].append(row[figure])
        draw(panels[0], windows, f"{batch} per step")
        draw(panels[1], burn_ins, f"{batch} per step")
    panels[0].set(xscale="log", xlabel=f"window_size (burn-in {default})", ylabel=AXES[figure])
    panels[0].set_xticks(WINDOWS, WINDOWS)
    panels[0].minorticks_off()
    epochs = ABLATION["epochs"]
    panels[1].set(xlabel=f"burn-in, of {epochs} epochs (window_size 8)")
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
    # Beside the panels, where it hides no point; they have the same lines.
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    canvas.savefig(path, dpi=100)
    plt.close(canvas)


AXES = {
    "accuracy": "test accuracy, %",
    "ap": "box AP",
}
ALL = ["BN", "BRN", NAIVE, CURRENT, "CBN", SMALL_GN]
STUDIES = {
    "classifier": Study(
        ALL,
        [1, 2, 4, 8, 16, 32],
        {1: 5},
        CLASSIFIER,
        train_classifier,
        "accuracy",
    ),
    "momentum": Study(
        [f"CBN(momentum={momentum})" for momentum in MOMENTA],
        [1, 2],
        {1: 3},
        CLASSIFIER,
        train_classifier,
        "accuracy",
    ),
    "detector": Study(ALL, [1, 2, 4], {1: 3, 2: 2, 4: 1}, DETECTOR, train_detector, "ap"),
    "ablation": Study([], [1, 2], {1: 3}, ABLATION, train_detector, "ap"),
}


if __name__ == "__main__":
    run_tool(main)
