# Licensed under the Apache License, Version 2.0.
"""Report on a training run: its COCO table, its curves, and what the detector sees.

A run with a DiagnoseHook also gets a plot of how well the window suits it.
"""

import argparse
import os.path as osp

import mmcv
import numpy as np
import torch
from common.checkpoint import (
    check_fit,
    check_writable,
    find_checkpoint,
    read_checkpoint,
    weights_of,
)
from common.coco import check_data, explained_damage
from common.config import read_config
from common.errors import UsageError, run_tool
from common.runs import Run, read_run
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from rich.console import Console
from rich.table import Table

IMAGES = 12
PAIRS_PER_ROW = 3
SCORE = 0.3
COLOURS = colormaps["tab10"].colors


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work_dir", help="the work dir of tools/train.py")
    return parser.parse_args()


def main() -> None:
    """Write the plots, then print the COCO table and the paths of all files."""
    work_dir = parse_args().work_dir
    run = read_run(work_dir)
    training, evaluations = run.training, run.evaluations
    if not training:
        raise UsageError(f"{work_dir} holds no logged training step: train first, or longer")
    checkpoint = find_checkpoint(work_dir)
    cfg = read_config(osp.join(run.folder, "vis_data", "config.py"))
    has_images = cfg.get("val_dataloader") is not None
    if has_images:
        check_data(cfg, "val")

    check_writable(work_dir, "the work dir")
    files = {"log": osp.join(run.folder, f"{osp.basename(run.folder)}.log")}
    files["checkpoint"] = checkpoint
    files["loss and AP"] = osp.join(work_dir, "curves.png")
    plot_curves(run, files["loss and AP"])
    diagnosed = [record for record in training if "cbn/correction" in record]
    if diagnosed:
        files["window"] = osp.join(work_dir, "window.png")
        plot_window(diagnosed, files["window"])
    if has_images:
        files["detections"] = osp.join(work_dir, "detections.png")
        with explained_damage(cfg):
            draw_detections(cfg, checkpoint, files["detections"])

    if evaluations:
        print_table(evaluations[-1], run.unit)
    else:
        print("There is no COCO evaluation yet.")
    for name, path in files.items():
        print(f"{name + ':':13}{osp.relpath(path)}")


def plot_curves(run: Run, path: str) -> None:
    """Plot the loss and the AP over time."""
    training, evaluations = run.training, run.evaluations
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [record["step"] for record in training]
    left.plot(steps, [record["loss"] for record in training], ".-")
    left.set(xlabel="iteration", ylabel="training loss", ylim=(0, None))
    times = [record["step"] for record in evaluations]
    names = {key for record in evaluations for key in record if key.endswith("_mAP")}
    for key in sorted(names):
        right.plot(times, [record.get(key) for record in evaluations], ".-", label=key)
    right.set(xlabel=run.unit, ylabel="AP", ylim=(0, None))
    if names:
        right.legend()
    save(figure, path)


def save(figure: Figure, path: str) -> None:
    """Give all axes a grid and ticks at whole numbers, and write the figure."""
    for axes in figure.axes:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_window(diagnosed: list[dict], path: str) -> None:
    """Plot what the hooks logged of the window: corrections and noise, clamping, and sizes."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    left, *others = figure.subplots(1, 3)
    steps = [record["step"] for record in diagnosed]
    for name in ("correction", "worst_correction", "noise"):
        values = [record.get(f"cbn/{name}", np.nan) for record in diagnosed]
        left.plot(steps, values, label=f"cbn/{name}")
    left.set(xlabel="iteration", ylabel="standard deviations", yscale="log")
    left.legend()
    for axes, name in zip(others, ("cbn/clamped", "cbn/window_size"), strict=True):
        axes.plot(steps, [record[name] for record in diagnosed])
        axes.set(xlabel="iteration", ylabel=name, ylim=(0, None))
    save(figure, path)


def draw_detections(cfg: Config, checkpoint: str, path: str) -> None:
    """Draw validation images in pairs: the truth on the left, the detections on the right."""
    model = load_detector(cfg, checkpoint)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    count = min(IMAGES, len(dataset))
    rows = -(-count // PAIRS_PER_ROW)
    # A cell of 2.5 inches and no wider gaps: mmdet's own visualizer would draw its labels in the
    # pixels of the image, and these images are too small for that.
    figure = Figure(figsize=(5 * PAIRS_PER_ROW, 2.75 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * PAIRS_PER_ROW, squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    for index, (left, right) in enumerate(axes.reshape(-1, 2)[:count]):
        sample = detect(model, dataset[index])
        image = mmcv.imread(sample.img_path, channel_order="rgb")
        found = sample.pred_instances
        draw_instances(left, image, sample.gt_instances, dataset.metainfo["classes"])
        draw_instances(right, image, found[found.scores > SCORE], dataset.metainfo["classes"])
        left.set_title("truth")
        right.set_title(f"detected, score > {SCORE}")
    figure.savefig(path, dpi=80)


def load_detector(cfg: Config, checkpoint: str) -> torch.nn.Module:
    """Build the detector and load a checkpoint, all of which must fit."""
    init_default_scope(cfg.get("default_scope", "mmdet"))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    check_fit(model, weights_of(read_checkpoint(checkpoint)), checkpoint)
    return model.to(get_device()).eval()


def detect(model: torch.nn.Module, data: dict) -> DetDataSample:
    """Run the detector on one image of a data set; the result also holds the truth."""
    with torch.no_grad():
        (sample,) = model.test_step(pseudo_collate([data]))
    sample = sample.cpu()
    # Detections have the scale of the image file, the truth that of the pipeline's Resize.
    boxes = sample.gt_instances.bboxes
    sample.gt_instances.bboxes = boxes / boxes.new_tensor(sample.scale_factor).repeat(2)
    return sample


def draw_instances(axes: Axes, image: np.ndarray, instances: InstanceData, names: tuple):
    """Draw an image with labelled boxes, and masks where there are any, one colour per class."""
    axes.imshow(image)
    axes.autoscale(False)
    for index, (x1, y1, x2, y2) in enumerate(instances.bboxes.tolist()):
        label = int(instances.labels[index])
        text = names[label]
        if "scores" in instances:
            text += f" {instances.scores[index]:.2f}"
        colour = COLOURS[label % len(COLOURS)]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=1.5))
        background = {"facecolor": colour, "edgecolor": "none", "pad": 0.5}
        axes.text(
            x1, y1, text, va="bottom", color="white", fontsize=8, bbox=background, clip_on=True
        )
        if isinstance(instances.get("masks"), torch.Tensor):
            axes.contour(instances.masks[index].numpy(), [0.5], colors=[colour], linewidths=1)


def print_table(evaluation: dict, unit: str) -> None:
    """Print the COCO table of one evaluation, under the names that MMDetection logs."""
    names = {"box": "coco/bbox_", "mask": "coco/segm_"}
    columns = {
        title: [f"{key}: {value:.3f}" for key, value in evaluation.items() if key.startswith(name)]
        for title, name in names.items()
    }
    columns = {title: cells for title, cells in columns.items() if cells}
    table = Table(title=f"COCO evaluation of {unit} {evaluation['step']}", title_justify="left")
    for title in columns:
        table.add_column(title, no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    if -1 in evaluation.values():
        table.caption = "-1: no such objects"
    Console().print(table)


if __name__ == "__main__":
    run_tool(main)
