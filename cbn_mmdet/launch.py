# Licensed under the Apache License, Version 2.0.
"""What the command lines of ``tools/`` share: arguments, checks of what a user typed, launchers."""

import argparse
import difflib
import inspect
import os
import os.path as osp
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch.distributed.elastic.multiprocessing.errors import record

# Settings that mmengine reads from a config and that no config has to name.
OPTIONAL_SETTINGS = {
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
    *inspect.signature(Runner.__init__).parameters,
}


# What an error in building a part of the runner says if the config is to blame, and what this
# package says of settings that only the start of a training can judge.
BUILD_ERRORS = ("unexpected keyword argument", "registry", "BRN: ", "CBN: ", "CBNHook: ")
START_ERRORS = ("CBNHook: ",)


class UsageError(Exception):
    """A mistake in what the user asked for: its message is all that the user has to read."""


def run_tool(main: Callable[[], None]) -> None:
    """Call ``main``; a :class:`UsageError` becomes one line on stderr and exit status 2."""
    try:
        record(main)()  # torchrun ends its report with the error that was recorded
    except UsageError as error:
        print(f"{osp.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


class CfgOptions(DictAction):
    """mmengine's ``KEY=VALUE`` pairs, with a usage line for what is no such pair."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Read the pairs into ``namespace``."""
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError):
            parser.error(f"{option_string} takes KEY=VALUE pairs, got: {' '.join(values)}")


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing have in common."""
    parser.add_argument("--work-dir", help="where logs and results go (work_dirs/CONFIG_NAME)")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=CfgOptions,
        default={},
        metavar="KEY=VALUE",
        help="settings that override the config, e.g. optim_wrapper.optimizer.lr=0.01; "
        'quote lists: key="[a,b]"',
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes were started (pytorch: torchrun, with or without a GPU)",
    )
    # torch.distributed.launch passes one spelling or the other, depending on its version.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply the options of :func:`add_launch_arguments` to it."""
    cfg = read_config(args.config)
    merge_options(cfg, args.cfg_options)
    cfg.launcher = args.launcher
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or osp.join("work_dirs", name)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    return cfg


def read_config(path: str) -> Config:
    """Read a config file; a missing or broken one is the user's to mend."""
    if not osp.isfile(path):
        raise UsageError(f"the config file {path} does not exist")
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is code of the user's: it can fail in any way
        why = str(error).partition("\n")[0]
        raise UsageError(f"cannot read the config {path}: {type(error).__name__}: {why}") from error


def merge_options(cfg: Config, options: dict) -> None:
    """Merge ``--cfg-options`` into ``cfg``.

    mmengine adds any name it does not know to the config, where nothing reads it: a mistyped
    setting would change nothing, and nobody would notice.
    """
    known = {*cfg, *OPTIONAL_SETTINGS}
    for option in options:
        name = option.split(".")[0]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"--cfg-options {option}: the config has no {name}{hint}")
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise UsageError(f"--cfg-options: {error.args[0]}") from error


def check_data(cfg: Config, split: str) -> None:
    """Check that the files of ``split`` (train, val or test) exist, before anything is built."""
    dataset = (cfg.get(f"{split}_dataloader") or {}).get("dataset", {})
    while "dataset" in dataset:  # RepeatDataset and other wrappers
        dataset = dataset["dataset"]
    if dataset.get("backend_args"):
        return  # not files of this machine
    root = dataset.get("data_root") or ""
    needed = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
    paths = [osp.join(root, path) for path in needed if path]
    paths += [each["ann_file"] for each in evaluators(cfg, split) if each.get("ann_file")]
    for path in paths:
        if not osp.exists(path):
            raise UsageError(f"the {split} data has no {path}. {_how_to_get_data(dataset)}")


def evaluators(cfg: Config, split: str) -> list[dict]:
    """The evaluators of ``split``, which a config may give as one, as several, or not at all."""
    given = cfg.get(f"{split}_evaluator") or []
    return [given] if isinstance(given, dict) else list(given)


def _how_to_get_data(dataset: dict) -> str:
    if tuple((dataset.get("metainfo") or {}).get("classes", ())) == tuple("0123456789"):
        root = dataset["data_root"].rstrip("/")
        return f"Build the digits with: python -m cbn_mmdet.datasets.digits {root}"
    return "Set data_root, and the ann_file of dataset and evaluator, to where the data is."


def check_checkpoint(path: str) -> None:
    """Check that ``path`` can be read, without reading a good file twice."""
    if "://" in path:
        return  # mmengine downloads it
    if not osp.isfile(path):
        raise UsageError(f"the checkpoint {path} does not exist")
    # torch.save writes a zip file, whose index is at its end: a file cut short has lost it.
    # Files of torch before 1.6 have another format, which only reading can check.
    if zipfile.is_zipfile(path):
        return
    try:
        CheckpointLoader.load_checkpoint(path, map_location="cpu")
    except Exception as error:
        raise UsageError(f"{path} is not a checkpoint, or was cut short") from error


def start_processes(cfg: Config) -> None:
    """Prepare ``cfg`` and this process for a launcher where there is no GPU.

    The runner joins the processes by itself when each has a GPU. Without one, mmengine would
    still select a GPU per process; but a process group that exists already it leaves alone.
    """
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
    """Check what mmengine takes for granted when each process is to have a GPU."""
    if launcher == "slurm" and "SLURM_PROCID" not in os.environ:
        raise UsageError("--launcher slurm: start the tool with srun, as slurm_train.sh does")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus:
        raise UsageError(
            f"{processes} processes were started on a machine with {gpus} GPU(s) to be seen; "
            "start as many as there are GPUs"
        )


@contextmanager
def explained_errors(*signs: str) -> Iterator[None]:
    """Turn an error that a wrong setting causes into a UsageError: its message holds a sign."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        message = str(error.args[0]) if error.args else ""
        if any(sign in message for sign in signs):
            raise UsageError(message) from error
        raise
