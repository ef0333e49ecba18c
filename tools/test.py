# Licensed under the Apache License, Version 2.0.
"""Evaluate a checkpoint on the test data of a config, as MMDetection's own tool does."""

import argparse
import os.path as osp

from mmengine.config import Config
from mmengine.hooks import Hook, IterTimerHook
from mmengine.runner import Runner

from cbn_mmdet import PreciseStatsHook  # the import registers CBN as well
from cbn_mmdet.launch import (
    BUILD_ERRORS,
    START_ERRORS,
    CarefulRunner,
    UsageError,
    add_launch_arguments,
    check_checkpoint,
    check_data,
    check_writable,
    evaluators,
    explained_damage,
    explained_errors,
    load_config,
    run_tool,
    start_processes,
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="the config file")
    parser.add_argument("checkpoint", help="the checkpoint to evaluate")
    add_launch_arguments(parser)
    parser.add_argument(
        "--precise-stats",
        type=int,
        metavar="N",
        help="first estimate all running statistics anew from N training images",
    )
    parser.add_argument("--out", metavar="FILE.pkl", help="write the detections to a pickle file")
    parser.add_argument("--show", action="store_true", help="show the detections in a window")
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="draw the detections into this folder; a relative one lies in WORK_DIR/TIMESTAMP",
    )
    parser.add_argument("--wait-time", type=float, default=2, help="seconds per shown image")
    return parser.parse_args()


def main() -> None:
    """Evaluate."""
    args = parse_args()
    cfg = load_config(args)
    check_data(cfg, "test")
    hook = precise_stats(cfg, args.precise_stats)
    check_checkpoint(args.checkpoint)
    cfg.resume = False
    remote = "://" in args.checkpoint
    cfg.load_from = args.checkpoint if remote else osp.abspath(args.checkpoint)
    if args.out:
        write_detections(cfg, args.out)
    if args.show or args.show_dir:
        draw_detections(cfg, args)
    check_writable(cfg.work_dir, "--work-dir")
    start_processes(cfg)
    with explained_damage(cfg), explained_errors(*BUILD_ERRORS, *START_ERRORS):
        runner = CarefulRunner.from_cfg(cfg)
        if hook:
            runner.register_hook(hook)
        runner.test()


class EstimateStats(Hook):
    """Estimates running statistics anew before a test, for the weights that are tested.

    Args:
        num_images: Number of training images to estimate them from.
    """

    priority = "LOWEST"  # after EMAHook has put the averaged weights into the model

    def __init__(self, num_images: int) -> None:
        self.precise_stats = PreciseStatsHook(num_images)

    def before_test_epoch(self, runner: Runner) -> None:
        """Estimates; the test loop goes back to evaluation mode."""
        shown = runner.visualizer.dataset_meta  # the train loop, which is built here, puts its own
        runner.model.train()
        self.precise_stats.estimate(runner)
        runner.visualizer.dataset_meta = shown
        for hook in runner.hooks:
            if isinstance(hook, IterTimerHook):
                hook.before_test_epoch(runner)  # starts its clock, which ran meanwhile


def precise_stats(cfg: Config, num_images: int | None) -> EstimateStats | None:
    """What estimates the statistics; its images are those of the training."""
    cfg.pop("precise_stats", None)  # of the test that dumped this config
    if num_images is None:
        return None
    if num_images < 1:
        raise UsageError(f"--precise-stats {num_images}: takes at least 1 image")
    check_data(cfg, "train")
    cfg.precise_stats = num_images  # a note for who reads the results
    return EstimateStats(num_images)


def write_detections(cfg: Config, path: str) -> None:
    """Add the evaluator that writes all detections to ``path``."""
    if not path.endswith((".pkl", ".pickle")):
        raise UsageError(f"--out {path}: the name must end with .pkl or .pickle")
    check_writable(osp.dirname(path) or ".", "--out")
    dump = {"type": "DumpDetResults", "out_file_path": path}
    cfg.test_evaluator = [*evaluators(cfg, "test"), dump]


def draw_detections(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the drawing of MMDetection's visualization hook."""
    if "visualization" not in cfg.get("default_hooks", {}):
        raise UsageError("--show and --show-dir need default_hooks.visualization in the config")
    cfg.default_hooks.visualization.update(
        draw=True, show=args.show, wait_time=args.wait_time, test_out_dir=args.show_dir
    )


if __name__ == "__main__":
    run_tool(main)
