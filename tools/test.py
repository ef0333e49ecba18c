# Licensed under the Apache License, Version 2.0.
"""Evaluate a checkpoint on the test data of a config, as MMDetection's own tool does."""

import argparse
import os.path as osp

from common.checkpoint import check_checkpoint, check_writable
from common.coco import check_data, explained_damage
from common.config import load_config
from common.errors import UsageError, positive, run_tool
from common.launchers import CarefulRunner, add_launch_arguments, start_processes
from mmdet.engine.hooks import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmengine.config import Config
from mmengine.hooks import Hook, IterTimerHook
from mmengine.runner import Runner

from cbn_mmdet import PreciseStatsHook  # the import registers CBN as well


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="the config file")
    parser.add_argument("checkpoint", help="the checkpoint to evaluate")
    add_launch_arguments(parser)
    parser.add_argument(
        "--precise-stats",
        type=positive,
        metavar="N",
        help="first estimate all running statistics anew from N training images",
    )
    parser.add_argument("--out", metavar="FILE.pkl", help="write the detections to a pickle file")
    parser.add_argument("--show", action="store_true", help="show the detections in a window")
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="draw the results into this folder; a detector's below WORK_DIR/TIMESTAMP if relative",
    )
    parser.add_argument("--wait-time", type=float, default=2, help="seconds per shown image")
    return parser.parse_args()


def main() -> None:
    """Evaluate the checkpoint."""
    args = parse_args()
    cfg = load_config(args)
    check_data(cfg, "test")
    cfg.pop("precise_stats", None)  # left by the test that dumped this config
    if args.precise_stats:
        check_data(cfg, "train")
        cfg.precise_stats = args.precise_stats  # a note for those who read the results
    check_checkpoint(args.checkpoint)
    cfg.resume = False
    cfg.load_from = args.checkpoint if "://" in args.checkpoint else osp.abspath(args.checkpoint)
    if args.out:
        if not args.out.endswith((".pkl", ".pickle")):
            raise UsageError(f"--out {args.out}: the name must end with .pkl or .pickle")
        check_writable(osp.dirname(args.out) or ".", "--out")
    if args.show or args.show_dir:
        if "visualization" not in (cfg.get("default_hooks") or {}):
            raise UsageError("--show and --show-dir need default_hooks.visualization in the config")
        draw(cfg, args)
    check_writable(cfg.work_dir, "--work-dir")
    start_processes(cfg)
    runner = CarefulRunner.from_cfg(cfg)
    if args.precise_stats:
        runner.register_hook(EstimateStats(args.precise_stats))
    with explained_damage(cfg):
        if args.out:
            runner.test_evaluator.metrics.append(DumpDetResults(args.out))
        runner.test()


def draw(cfg: Config, args: argparse.Namespace) -> None:
    """Switch on the hook that draws; each framework names its options differently."""
    hook, scope = cfg.default_hooks.visualization, cfg.get("default_scope")
    if scope == "mmpretrain":
        hook.update(enable=True, interval=1, show=args.show, wait_time=args.wait_time)
        if args.show_dir:
            hook.out_dir = args.show_dir
    elif scope == "mmseg":
        hook.update(draw=True, show=args.show, wait_time=args.wait_time)
        if args.show_dir:
            cfg.visualizer.save_dir = args.show_dir
    else:
        trigger_visualization_hook(cfg, args)


class EstimateStats(Hook):
    """Estimates running statistics anew before a test, for the weights under test.

    Args:
        num_images: Number of training images to estimate them from.
    """

    priority = "LOWEST"  # after EMAHook has put the averaged weights into the model

    def __init__(self, num_images: int) -> None:
        self.precise_stats = PreciseStatsHook(num_images)

    def before_test_epoch(self, runner: Runner) -> None:
        """Estimates in training mode; the test loop itself goes back to evaluation mode."""
        shown = runner.visualizer.dataset_meta  # building the train loop replaces it
        runner.model.train()
        self.precise_stats.estimate(runner)
        runner.visualizer.dataset_meta = shown
        for hook in runner.hooks:
            if isinstance(hook, IterTimerHook):
                hook.before_test_epoch(runner)  # restarts its clock, which ran meanwhile


if __name__ == "__main__":
    run_tool(main)
