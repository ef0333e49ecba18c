# Licensed under the Apache License, Version 2.0.
"""Check a config, its data and its weights before you book a cluster for it.

Each check prints one line: OK, NOTE (is this intended?) or FAIL with a way to fix it. The exit
status is 1 if a check failed. The tool leaves nothing behind but weights that mmengine downloads.
"""

import argparse
import copy
import io
import math
import os
import os.path as osp
import re
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from common.checkpoint import check_checkpoint, misfits, read_checkpoint, weights_of
from common.coco import (
    build_coco,
    check_annotations,
    check_data,
    check_images,
    check_listed,
    check_sizes,
    innermost_datasets,
    read_annotations,
)
from common.config import (
    add_cfg_options,
    check_burn_in,
    check_hooks,
    check_norms,
    default_cbn_hook,
    in_config,
    is_cbn_hook,
    merge_options,
    read_config,
)
from common.errors import UsageError, explain, positive, run_tool, some
from common.memory import peak_memory
from mmdet.evaluation import CocoMetric
from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch import nn

from cbn_mmdet import links
from cbn_mmdet.hooks.cbn_hook import plain_batch_norms
from cbn_mmdet.norm.iteration import cbn_layers

STEPS = 2
DOWNLOAD_TIMEOUT = 60  # seconds without an answer


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("config", help="the config file")
    add_cfg_options(parser)
    parser.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="GPUs of the run (from the config's name, as in 4xb2; else WORLD_SIZE; else 1)",
    )
    parser.add_argument("--images", type=positive, default=4, metavar="N", help="to evaluate (4)")
    parser.add_argument("--no-run", action="store_true", help="leave out training and evaluation")
    parser.add_argument("--verbose", action="store_true", help="show mmengine's log and tracebacks")
    return parser.parse_args()


def main() -> None:
    """Run all checks and print their result."""
    args = parse_args()
    cfg = read_config(args.config)
    merge_options(cfg, args.cfg_options)
    init_default_scope(cfg.get("default_scope", "mmdet"))
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)

    report = Report(args.verbose)
    train_images = check_datasets(report, cfg)
    epoch_length = check_batch(report, cfg, args, train_images)
    model = None
    with report.check("model") as ok:
        check_norms(cfg)
        try:
            model = MODELS.build(copy.deepcopy(cfg.model))
        except Exception as error:  # a wrong setting of any part
            raise UsageError(f"{explain(error)}; mend that setting of model") from error
        ok(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    if model is None:
        report.line("NOTE", "weights, CBN, training, evaluation", "left out, for want of a model")
        report.end()
    no_weights = check_weights(report, cfg, model)
    check_hook(report, cfg, model, epoch_length)
    del model
    if args.no_run:
        report.line("NOTE", "training", "left out, and with it the links of CBN: --no-run")
    else:
        run_briefly(report, cfg, args.images, no_weights)
    report.end()


class Report:
    """Prints a line for each check and counts those that failed.

    Args:
        verbose: Whether to show what the frameworks print during a check, and tracebacks.
    """

    def __init__(self, verbose: bool) -> None:
        width = None if sys.stdout.isatty() else 160
        self.console = Console(file=sys.stdout, highlight=False, width=width)
        self.verbose = verbose
        self.failed = 0

    @contextmanager
    def check(self, name: str) -> Iterator[Callable[[str], None]]:
        """Run a check; yields a function that prints its OK line. Any error prints FAIL."""
        try:
            out, err = (sys.stdout, sys.stderr) if self.verbose else (io.StringIO(), io.StringIO())
            with redirect_stdout(out), redirect_stderr(err):
                yield lambda text: self.line("OK", name, text)
        except Exception as error:  # a wrong setting can fail anywhere, far from where it is set
            self.failed += 1
            known = isinstance(error, UsageError)
            self.line("FAIL", name, str(error) if known else f"{explain(error)} (see --verbose)")
            if self.verbose:
                traceback.print_exc()

    def line(self, status: str, name: str, text: str) -> None:
        """Print one line; its status is OK, NOTE, FAIL, or ... before a slow check."""
        colour = {"OK": "green", "NOTE": "yellow", "FAIL": "bold red"}.get(status, "dim")
        text = " ".join(text.split())
        line = Text.assemble((f"{status:4}  ", colour), (name, "bold"), ": ", text)
        self.console.print(line, soft_wrap=True)

    def end(self) -> None:
        """Print the result; exits with status 1 if a check failed."""
        if self.failed:
            self.console.print(f"{self.failed} check(s) failed", style="bold red")
            sys.exit(1)
        self.console.print("no check failed", style="bold green")


# Data.


def check_datasets(report: Report, cfg: Config) -> int | None:
    """Check the data of all splits; returns the number of training images if known."""
    counts = {}
    for split in ("train", "val", "test"):
        loader = cfg.get(f"{split}_dataloader")
        if not loader:
            report.line("NOTE", f"{split} data", "the config has none")
        elif split == "test" and loader == cfg.get("val_dataloader"):
            if "val" in counts:
                report.line("OK", "test data", "the same as val")
        else:
            with report.check(f"{split} data"):
                check_data(cfg, split)
                total = 0
                for dataset, times in innermost_datasets(cfg, split):
                    images = check_dataset(report, split, dataset)
                    total = None if None in (images, times, total) else total + images * times
                counts[split] = total
    return counts.get("train")


def check_dataset(report: Report, split: str, settings: dict) -> int | None:
    """Check a data set's annotations and images; returns the number of images if known."""
    dataset = build_coco(settings)
    if dataset is None:
        count = None
        if settings.get("backend_args"):
            report.line("NOTE", f"{split} data", "not checked: it is on no disk of this machine")
        else:
            with report.check(f"{split} images") as ok:
                text, count = check_listed(settings)
                ok(text)
        return count
    content = None
    with report.check(f"{split} annotations, {dataset.ann_file}") as ok:
        content = read_annotations(dataset.ann_file)
        ok(check_annotations(content, dataset.metainfo["classes"]))
    if content is None:
        return None
    for name, check in ("images", check_images), ("image sizes", check_sizes):
        with report.check(f"{split} {name}") as ok:
            ok(check(content, dataset.data_prefix["img"]))
    return len(content["images"])


# Batch and learning rate.


def check_batch(
    report: Report, cfg: Config, args: argparse.Namespace, train_images: int | None
) -> int | None:
    """Report the total batch and the learning rate; returns the steps per epoch if known."""
    epoch_length = None
    with report.check("batch") as ok:
        per_gpu = cfg.train_dataloader.batch_size
        named = re.search(r"(?:^|_)(\d+)xb(\d+)[-_.]", osp.basename(args.config))
        if args.gpus:
            gpus, source = args.gpus, "--gpus"
        elif named:
            gpus, source = int(named[1]), "the config's name"
        else:
            gpus, source = int(os.environ.get("WORLD_SIZE", 1)), "WORLD_SIZE, or 1"
        total = gpus * per_gpu
        text = f"{gpus} GPU(s) ({source}) x {per_gpu} image(s) = {total} images per step"
        if train_images is not None:
            epoch_length = math.ceil(train_images / total)
            text += f", at most {epoch_length} steps per epoch"
        ok(text)
        if named and int(named[2]) != per_gpu:
            report.line("NOTE", "batch", f"the config's name says {named[2]} image(s) per GPU")
        tell_learning_rate(report, cfg, total)
    return epoch_length


def tell_learning_rate(report: Report, cfg: Config, total: int) -> None:
    """Compare the learning rate in force with the one for the total batch."""
    name, scaling = "learning rate", cfg.get("auto_scale_lr") or {}
    lr, base = cfg.optim_wrapper.get("optimizer", {}).get("lr"), scaling.get("base_batch_size")
    if lr is None or base is None:
        absent = "optim_wrapper.optimizer.lr" if lr is None else "auto_scale_lr.base_batch_size"
        report.line("NOTE", name, f"{lr} whatever the batch: the config has no {absent}")
        return
    scaled, meant = lr * total / base, f"{lr:g} is for {base} images per step"
    if scaling.get("enable") or total == base:
        report.line("OK", name, f"{scaled:g} in force ({meant})")
    else:
        report.line(
            "NOTE",
            name,
            f"{lr:g} in force, but {meant} and these are {total}: auto_scale_lr.enable=True, or "
            f"tools/train.py --auto-scale-lr, makes it {scaled:g}",
        )


# Weights and burn-in.


def check_weights(report: Report, cfg: Config, model: nn.Module) -> list[str]:
    """Check the weights that the model starts from; returns the settings that failed."""
    sources = list(pretrained_parts(model))
    if cfg.get("load_from"):
        sources.append(("load_from", model, cfg.load_from, None))
    if not sources:
        report.line("NOTE", "weights", "init_cfg and load_from name no file")
    failed = []
    for setting, part, path, prefix in sources:
        failed.append(setting)
        with report.check(setting):
            try:
                check_checkpoint(path)
                found = read_checkpoint(path)
            except UsageError as error:
                mend = f"give a file with --cfg-options {setting}=PATH"
                raise UsageError(f"{error}; {mend}") from error
            below = f"{prefix.rstrip('.')}." if prefix else ""
            status, text = compare_weights(part, weights_of(found, below), path)
            report.line(status, setting, text)
            failed.remove(setting)
    return failed


def pretrained_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, str | None]]:
    """Yield each part that has a checkpoint of its own: setting, part, path and prefix."""
    for name, module in model.named_modules():
        given = getattr(module, "init_cfg", None) or {}
        several = enumerate(given) if isinstance(given, list) else [("", given)]
        for index, init in several:
            if init.get("type") == "Pretrained":
                keys = ["model", name, "init_cfg", str(index), "checkpoint"]
                setting = ".".join(key for key in keys if key)
                yield setting, module, init["checkpoint"], init.get("prefix")


def compare_weights(part: nn.Module, weights: dict, path: str) -> tuple[str, str]:
    """Compare names and shapes; returns the line to print, OK if all of the part's weights fit."""
    own = [key for key in part.state_dict() if not key.endswith("num_batches_tracked")]
    kind = type(part).__name__
    missing, unused, others = misfits(part, weights)
    found = len(own) - len(missing) - len(others)
    if not found:
        raise UsageError(
            f"{path} is the checkpoint of another model: it holds {some(weights)}, and none of the "
            f"{len(own)} weights of {kind}, {some(own)}"
        )
    text = f"{found} of the {len(own)} weights of {kind} are in {path}"
    for keys, what in (
        (missing, "are not, and keep their initial values"),
        (others, "have another shape there, and keep their initial values"),
        (unused, "of the file are not used"),
    ):
        text += f"; {len(keys)} {what}: {some(keys)}" if keys else ""
    return "NOTE" if missing or others else "OK", text


def check_hook(report: Report, cfg: Config, model: nn.Module, epoch_length: int | None) -> None:
    """Check that the config has a CBNHook and that it opens the window before the run ends."""
    layers = cbn_layers(model)
    if not layers:
        report.line("OK", "CBN", "there is none in the model")
        return
    hook = default_cbn_hook(cfg)
    with report.check("CBNHook") as ok:
        check_hooks(cfg)
        hooks = [given for given in cfg.get("custom_hooks") or [] if is_cbn_hook(given)]
        if hooks:
            hook = HOOKS.build(dict(hooks[0]))
        else:
            report.line(
                "NOTE",
                "CBNHook",
                "the config has none: tools/train.py adds the default one, but MMDetection's own "
                f"tool does not; set {in_config(hook)}",
            )
        if cfg.get("sync_bn"):
            raise UsageError(
                f"sync_bn turns all {len(layers)} CBN layers into SyncBN: take it out of the "
                "config; for statistics over all GPUs set norm_cfg=dict(type='SyncCBN')"
            )
        length = check_burn_in(cfg, hook, epoch_length)
        unit = "epochs" if hook.by_epoch else "iterations"
        ok(f"the window opens after {hook.burn_in} {unit}" + (f" of {length}" if length else ""))


# Two training steps and an evaluation.


def run_briefly(report: Report, cfg: Config, images: int, no_weights: list[str]) -> None:
    """Train and evaluate on a few images, with the config's own pipelines and evaluators."""
    with tempfile.TemporaryDirectory() as folder:
        runner = None
        with report.check("training") as ok:
            short = shortened(cfg, images, folder)
            if "load_from" in no_weights:
                short.load_from = None
            runner = Runner.from_cfg(short)
            for setting, part, *_ in list(pretrained_parts(runner.model)):
                if setting in no_weights:
                    part.init_cfg = None
            device = next(runner.model.parameters()).device
            without = f", without {some(no_weights)}" if no_weights else ""
            slow = ": a large model takes minutes there" if device.type == "cpu" else ""
            batch = f"{STEPS} steps of {cfg.train_dataloader.batch_size} image(s)"
            report.line("...", "training", f"{batch} on {device}{without}{slow}")
            runner.train()
            ok(describe_steps(runner, device))
        if runner is None:
            return
        if links(runner.model) or "train/loss" in runner.message_hub.log_scalars:
            check_links(report, runner.model)
        else:
            report.line("NOTE", "links", "left out, as no step was taken")
        if cfg.get("val_cfg") is not None:  # MMPretrain's is an empty dict
            with report.check("evaluation") as ok:
                ok(evaluate(runner))


def shortened(cfg: Config, images: int, folder: str) -> Config:
    """Make the config of a few steps with an open window, which leave nothing behind."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir, cfg.launcher, cfg.resume = folder, "none", False
    for split, count in ("train", STEPS * cfg.train_dataloader.batch_size), ("val", images):
        loader = cfg.get(f"{split}_dataloader")
        if loader:
            # Load in this process, so that an error is the pipeline's own and not a worker's.
            loader.update(num_workers=0, persistent_workers=False)
            loader.pop("prefetch_factor", None)
            for dataset, _ in innermost_datasets(cfg, split):
                dataset.indices = count
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=STEPS, val_begin=STEPS + 1)
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    hooks = [hook for hook in cfg.get("custom_hooks") or [] if not is_cbn_hook(hook)]
    cfg.custom_hooks = [*hooks, dict(type="CBNHook", burn_in=0)]
    cfg.default_hooks = dict(cfg.get("default_hooks") or {}, checkpoint=None)
    if cfg.get("visualizer"):
        cfg.visualizer.vis_backends = [dict(type="LocalVisBackend")]  # no online service
    return cfg


def describe_steps(runner: Runner, device: torch.device) -> str:
    """Summarise what mmengine logged of the steps; a loss that is not finite is an error."""
    losses = runner.message_hub.get_scalar("train/loss").data[0].tolist()
    told = ", ".join(f"{loss:.4g}" for loss in losses)
    if not all(map(math.isfinite, losses)):
        raise UsageError(
            f"the loss is not finite ({told}): lower optim_wrapper.optimizer.lr, or look for "
            "broken boxes in the annotations"
        )
    whose = "on the GPU" if device.type == "cuda" else "of this process"
    memory = f"{decimal(peak_memory(device.type))} {whose}"
    seconds = runner.message_hub.get_scalar("train/time").current()
    return f"loss {told}; {seconds:.2f} s for the last step; at most {memory}"


def check_links(report: Report, model: nn.Module) -> None:
    """Check that every CBN layer is linked to its convolution, and print all layers."""
    layers, fed_by = cbn_layers(model), links(model)
    if not layers:
        return
    idle = [name for name, layer in layers.items() if not layer.training]
    needy = [name for name, layer in layers.items() if layer.compensate and layer.window_size != 1]
    alone = [name for name in needy if name not in {*idle, *fed_by}]
    memory = decimal(sum(layer.window_bytes for layer in layers.values()))
    with report.check("links") as ok:
        if alone:
            raise UsageError(
                f"{len(alone)} of {len(layers)} CBN layers met no convolution, {some(alone)}: mend "
                "the training if it failed; if not, they do not run: give them another norm"
            )
        ok(f"all {len(layers)} CBN layers have what they need; their windows take {memory}")
    if idle:
        report.line(
            "NOTE",
            "links",
            f"{len(idle)} of {len(layers)} CBN layers only repeat their running statistics, "
            f"{some(idle)}: to train them, set the backbone's norm_eval=False, frozen_stages=-1",
        )
    plain = plain_batch_norms(model)
    if plain:
        report.line(
            "NOTE",
            "other norms",
            f"{len(plain)} batch norms that are no CBN train, too, {some(plain)}: no norm_cfg of "
            "the config reaches them; cbn_mmdet.from_batchnorm turns them into CBN",
        )
    table = Table("layer", "convolution")
    for column in ("channels", "window", "memory"):
        table.add_column(column, justify="right")
    for name, layer in layers.items():
        source = fed_by.get(name, "none" if name in alone else "not needed")
        size = decimal(layer.window_bytes) if layer.window_bytes else "–"
        table.add_row(name, source, str(layer.num_features), str(layer.window_size), size)
    report.console.print(table)


def evaluate(runner: Runner) -> str:
    """Evaluate on a few images; returns a summary to print."""
    # After two steps, no detection scores high enough to be kept: nothing would be evaluated.
    for module in runner.model.modules():
        if "score_thr" in (getattr(module, "test_cfg", None) or {}):
            module.test_cfg.score_thr = 0.0
    dataset = runner.val_loop.dataloader.dataset
    for metric in runner.val_loop.evaluator.metrics:
        if isinstance(metric, CocoMetric):  # it would count all images of its file
            metric.img_ids = [dataset.get_data_info(i)["img_id"] for i in range(len(dataset))]
    start = time.perf_counter()
    metrics = runner.val()
    seconds = time.perf_counter() - start
    summary = [name for name in metrics if name.endswith("mAP")] or metrics
    computed = some(summary) if metrics else "nothing, for nothing was detected"
    return f"{len(dataset)} images in {seconds:.1f} s; computed: {computed}"


if __name__ == "__main__":
    run_tool(main)
