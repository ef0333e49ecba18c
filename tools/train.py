# Licensed under the Apache License, Version 2.0.
"""Train a model from a config, as MMDetection's own tool does, on GPUs or on the CPU."""

import argparse
import os

import torch
from common.checkpoint import check_checkpoint, check_writable, latest_checkpoint
from common.coco import check_data, explained_damage
from common.config import check_burn_in, default_cbn_hook, in_config, load_config
from common.errors import UsageError, run_tool
from common.launchers import CarefulRunner, add_launch_arguments, start_processes
from mmengine.config import Config
from mmengine.runner import Runner

from cbn_mmdet import CBN, CBNHook


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="the config file")
    add_launch_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from this checkpoint; without a value, from the last one of the work dir",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (needs a GPU)")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate linearly with the total batch",
    )
    return parser.parse_args()


def main() -> None:
    """Train the model."""
    args = parse_args()
    cfg = load_config(args)
    check_data(cfg, "train")
    check_data(cfg, "val")
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        use_lr_scaling(cfg)
    if args.resume:
        use_checkpoint(cfg, args.resume)
    check_writable(cfg.work_dir, "--work-dir")
    start_processes(cfg)
    runner = CarefulRunner.from_cfg(cfg)
    ensure_cbn_hook(runner, cfg)
    with explained_damage(cfg):
        runner.train()


def use_amp(cfg: Config) -> None:
    """Switch to mmengine's mixed precision, which has no CPU implementation."""
    if not torch.cuda.is_available():
        raise UsageError("--amp needs a GPU and none is available: leave --amp out")
    if cfg.optim_wrapper.get("type", "OptimWrapper") not in ("OptimWrapper", "AmpOptimWrapper"):
        raise UsageError(f"--amp cannot replace optim_wrapper.type={cfg.optim_wrapper.type}")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def use_lr_scaling(cfg: Config) -> None:
    """Let the learning rate follow the total batch size."""
    if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
        raise UsageError("--auto-scale-lr: the config has no auto_scale_lr.base_batch_size")
    cfg.auto_scale_lr.enable = True


def use_checkpoint(cfg: Config, checkpoint: str) -> None:
    """Resume from ``checkpoint``, where ``auto`` means the last one of the work dir."""
    if checkpoint == "auto":
        checkpoint = latest_checkpoint(cfg.work_dir)
    if checkpoint is None:
        if os.environ.get("RANK", "0") == "0":
            print(f"--resume: nothing to resume from in {cfg.work_dir}, training from the start")
        return
    check_checkpoint(checkpoint)
    cfg.resume = True
    cfg.load_from = checkpoint


def ensure_cbn_hook(runner: Runner, cfg: Config) -> None:
    """Add the default CBNHook to a model with CBN that has none, and check the burn-in."""
    if not any(isinstance(module, CBN) for module in runner.model.modules()):
        return
    hooks = [hook for hook in runner.hooks if isinstance(hook, CBNHook)]
    if not hooks:
        hooks = [default_cbn_hook(cfg)]
        runner.register_hook(hooks[0])
        runner.logger.info(
            f"The model contains CBN and the config has no CBNHook: registered the default one "
            f"({in_config(hooks[0])})."
        )
    check_burn_in(cfg, hooks[0])


if __name__ == "__main__":
    run_tool(main)
