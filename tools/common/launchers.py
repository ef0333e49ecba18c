# Licensed under the Apache License, Version 2.0.
"""How a run starts: its options, its processes, its runner."""

import argparse
import os
import pickle
import time

import torch
from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner

from .checkpoint import check_fit, read_checkpoint, weights_of
from .config import add_cfg_options, settings_that_differ
from .errors import UsageError


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing have in common."""
    parser.add_argument("--work-dir", help="where logs and results go (work_dirs/CONFIG_NAME)")
    add_cfg_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes were started (pytorch: torchrun, with or without a GPU)",
    )
    # torch.distributed.launch passes one spelling or the other, depending on its version.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)


def import_yapf() -> None:
    """Import the library that mmengine prints a config with, beside processes that do the same.

    Its first import on a machine writes a cache, which is in place before it is complete: another
    process then reads a part of it (https://github.com/google/yapf/issues/1204).
    """
    for _ in range(100):
        try:
            import yapf  # noqa: F401
        except (EOFError, pickle.UnpicklingError):
            time.sleep(0.1)
        else:
            break


def start_processes(cfg: Config) -> None:
    """Prepare ``cfg`` and this process for a launcher on a machine without a GPU.

    If each process has a GPU, the runner joins the processes by itself. Without GPUs, mmengine
    would still select one per process, unless a process group exists already: this makes one.
    """
    import_yapf()
    if cfg.launcher == "none":
        return
    if cfg.launcher == "pytorch" and "RANK" not in os.environ:
        raise UsageError("--launcher pytorch: start the tool with torchrun, as dist_train.sh does")
    if torch.cuda.is_available():
        _check_processes(cfg.launcher)
        return
    if cfg.launcher != "pytorch":
        raise UsageError(f"--launcher {cfg.launcher} needs GPUs; on CPUs use torchrun and pytorch")
    torch.distributed.init_process_group("gloo")
    # mmengine's default wrapper asks for the GPU of this rank; None means the model's own device.
    defaults = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": cfg.get("find_unused_parameters", False),
    }
    cfg.model_wrapper_cfg = {**defaults, **(cfg.get("model_wrapper_cfg") or {}), "device_ids": None}


def _check_processes(launcher: str) -> None:
    """Check what mmengine assumes: that the launcher started the processes, each with a GPU."""
    if launcher == "slurm" and "SLURM_PROCID" not in os.environ:
        raise UsageError("--launcher slurm: start the tool with srun, as slurm_train.sh does")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus:
        raise UsageError(
            f"{processes} processes were started on a machine with {gpus} GPU(s) to be seen; "
            "start as many as there are GPUs"
        )


class CarefulRunner(Runner):
    """mmengine's runner, but it refuses checkpoints that are damaged or belong to another model.

    mmengine warns of weights that do not fit, among hundreds of lines, and goes on without them.
    This runner does so only if a training starts from them (``load_from``): that is often intended.
    """

    def load_checkpoint(self, filename, *args, **kwargs):
        """Load the checkpoint, or raise an error that says in one line why not."""
        found = read_checkpoint(filename)
        fine_tuning = isinstance(self._train_loop, BaseLoop) and not self._resume
        if not fine_tuning:
            model = self.model.module if is_model_wrapper(self.model) else self.model
            check_fit(model, weights_of(found), filename)
        if self._resume:
            self._check_training(found, filename)
        del found  # it is as large as the one read next
        return super().load_checkpoint(filename, *args, **kwargs)

    def _check_training(self, found: dict, filename: str) -> None:
        """Refuse a checkpoint that holds no training; warn of a training with other settings.

        The weights do not tell: BN, CBN and every window size give them the same names.
        """
        meta = found.get("meta")
        absent = [key for key in ("meta", "message_hub", "optimizer") if key not in found]
        absent += [key for key in ("epoch", "iter") if meta is not None and key not in meta]
        if absent:
            raise UsageError(
                f"{filename} holds no {absent[0]}, so that no training can go on from it; to "
                "start one from its weights, set load_from and leave --resume out"
            )
        before = meta.get("cfg")
        found = settings_that_differ(before, self.cfg.pretty_text) if before else []
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            self.logger.warning(
                f"--resume: the checkpoint is of a training with other settings: "
                f"{'; '.join(found[:5])}{more}. Learning rate and schedule go on as the checkpoint "
                "has them. For a training of its own, take another --work-dir, without --resume."
            )
