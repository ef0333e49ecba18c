# Licensed under the Apache License, Version 2.0.
"""What the command lines of ``tools/`` share: arguments, checks of what a user typed, launchers."""

import argparse
import ast
import difflib
import errno
import inspect
import json
import os
import os.path as osp
import re
import sys
import tempfile
import textwrap
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import BaseLoop, Runner, checkpoint
from mmengine.utils import digit_version
from torch.distributed.elastic.multiprocessing.errors import record

from .hooks import CBNHook

# The settings that mmengine reads from a config, once it is parsed.
SETTINGS = {
    "activation_checkpointing",
    "compile",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
    *inspect.signature(Runner.__init__).parameters,
} - {"self", "cfg"}


# What makes a training the one that a config describes; where data and results lie does not.
DEFINING = (
    "model",
    "train_cfg",
    "optim_wrapper",
    "param_scheduler",
    "auto_scale_lr",
    "custom_hooks",
    "sync_bn",
    "train_dataloader.batch_size",
    "train_dataloader.dataset.pipeline",
)
# What a resumed training does not read, or only tells by.
HARMLESS = (".init_cfg.checkpoint", ".save_window")
HARMLESS_HOOKS = ("DiagnoseHook",)
EMPTY = (None, [], {})

# What an error in building a part of the runner says if the config is to blame, and what this
# package says of settings that only the start of a training can judge.
BUILD_ERRORS = (
    "unexpected keyword argument",
    "registry",
    "BRN: ",
    "CBN: ",
    "CBNHook: ",
    "DiagnoseHook: ",
    "PreciseStatsHook: ",
)
START_ERRORS = (
    "CBNHook: ",
    "PreciseStatsHook: ",
    "CBN layer ",
    "BRN layer ",
    "DataLoader.__init__() got an unexpected keyword argument",
)

# What a system says when a disk, a quota or the largest allowed size of a file is used up.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What a mistyped norm, or hook, may have meant.
NORMS = ("CBN", "SyncCBN", "BRN", "BN", "SyncBN", "GN", "LN", "IN")
OUR_HOOKS = ("CBNHook", "DiagnoseHook", "PreciseStatsHook")


class UsageError(Exception):
    """A mistake in what the user asked for: its message is all that the user has to read."""


def run_tool(main: Callable[[], None]) -> None:
    """Call ``main``; a :class:`UsageError` becomes one line on stderr and exit status 2."""
    load_weights_only()

    @record  # torchrun ends its report with the error that was recorded
    def run() -> None:
        try:
            main()
        except UsageError as error:
            raise UsageError(str(error)) from None  # without what led to it

    try:
        run()
    except UsageError as error:
        sys.stdout.flush()  # so that the error is the last line where both go to one file
        print(f"{osp.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


def load_weights_only() -> None:
    """Have torch refuse a checkpoint that would run code, where mmengine can do without.

    From torch 2.6 on, the maintained mmengine names which of its classes a checkpoint may hold, but
    on meeting another it unpickles everything. The original one always does, and has to.
    """
    names_classes = hasattr(checkpoint, "get_torch_safe_globals")
    if names_classes and digit_version(torch.__version__) >= digit_version("2.6"):
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")


class CfgOptions(DictAction):
    """mmengine's ``KEY=VALUE`` pairs, with a usage line for what is no such pair."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Read the pairs into ``namespace``."""
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError):
            wrong = next((value for value in values if "=" not in value), " ".join(values))
            parser.error(f"{option_string} takes KEY=VALUE pairs, got: {wrong}")


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that overrides settings of the config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=CfgOptions,
        default={},
        metavar="KEY=VALUE",
        help="settings that override the config, e.g. optim_wrapper.optimizer.lr=0.01; "
        'quote lists: key="[a,b]"',
    )


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number of at least 1, got {text}")
    return int(text)


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


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply the options of :func:`add_launch_arguments` to it."""
    cfg = read_config(args.config)
    merge_options(cfg, args.cfg_options)
    check_norms(cfg)
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
    setting would change nothing, and nobody would notice. Nor would one of a name that the config
    only used while it was read, ``norm_cfg`` say, whose value was copied then.
    """
    settings = cfg.to_dict()
    is_read = set(SETTINGS)
    if "data_preprocessor" in (settings.get("model") or {}):
        is_read.remove("data_preprocessor")  # the model's own goes before
    read = {key: settings[key] for key in is_read & settings.keys()}
    for option, value in options.items():
        if re.search(r"\bdict\(", str(value)):
            raise UsageError(
                f"--cfg-options {option}: dict(...) can only be written in a config; make one with "
                "_base_ and this setting"
            )
        name = option.split(".")[0]
        if name in is_read:
            continue
        if name not in settings:
            hint = _did_you_mean(name, is_read)
            raise UsageError(f"--cfg-options {option}: the config has no {name}{hint}")
        copies = sorted(_copies(read, name, settings[name]))
        if copies:
            more = ", ..." if len(copies) > 5 else ""
            raise UsageError(
                f"--cfg-options {option}: {name} only served while the config was read; give the "
                f"setting that it was copied to: {', '.join(copies[:5])}{more}"
            )
        print(
            f"--cfg-options {option}: no setting of the frameworks is called {name}, so this "
            "changes something only if code of yours reads it",
            file=sys.stderr,
        )
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise UsageError(f"--cfg-options: {error.args[0]}") from error


def _copies(settings: dict, name: str, value: object) -> Iterator[str]:
    """Where ``settings`` have the value of a helper variable, as ``--cfg-options`` names it."""
    # Of numbers many are equal by chance.
    is_telling = isinstance(value, (dict, list, tuple, str)) and len(value) > 0
    for path, inner in _walk(settings):
        named_so = value is not None and re.search(rf"(^|_){re.escape(name)}$", str(path[-1]))
        if (is_telling or named_so) and type(inner) is type(value) and inner == value:
            yield ".".join(map(str, path))


def _walk(settings: object, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """Every value within ``settings``, after the keys and indices that lead to it."""
    items = ()
    if isinstance(settings, dict):
        items = settings.items()
    elif isinstance(settings, (list, tuple)):
        items = enumerate(settings)
    for key, value in items:
        yield (*path, key), value
        yield from _walk(value, (*path, key))


def check_norms(cfg: Config) -> None:
    """Refuse a norm that nobody registered, which mmcv would only call None."""
    import mmcv.cnn  # noqa: F401  registers its norms

    with MODELS.switch_scope_and_registry(cfg.get("default_scope")) as registry:
        for path, norm in _walk(cfg.get("model")):
            kind = norm.get("type") if path[-1] == "norm_cfg" and isinstance(norm, dict) else None
            if isinstance(kind, str) and registry.get(kind) is None:
                where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
                hint = _did_you_mean(kind, NORMS)
                raise UsageError(f"model{where}.type: no norm is called {kind}{hint}")


def default_cbn_hook(cfg: Config) -> CBNHook:
    """The hook for a config that has none, as in the paper: 3 epochs, or a quarter of the run."""
    iterations = cfg.train_cfg.get("max_iters")
    return CBNHook() if iterations is None else CBNHook(iterations // 4, by_epoch=False)


def in_config(hook: CBNHook) -> str:
    """How a config has the hook."""
    count = "" if hook.by_epoch else ", by_epoch=False"
    return f"custom_hooks = [dict(type='CBNHook', burn_in={hook.burn_in}{count})]"


def check_data(cfg: Config, split: str) -> None:
    """Check that the files of ``split`` (train, val or test) exist, before anything is built."""
    datasets = [dataset for dataset, _ in innermost_datasets(cfg, split)]
    if any(dataset.get("backend_args") for dataset in datasets):
        return  # not files of this machine
    needed = []
    for dataset in datasets:
        prefixes = (dataset.get("data_prefix") or {}).values()
        paths = _in_data_root(dataset, dataset.get("ann_file"), *prefixes)
        needed += [(path, dataset) for path in paths]
    needed += [(path, next(iter(datasets), {})) for path in _evaluators_files(cfg, split)]
    for path, dataset in needed:
        if not osp.exists(path):
            raise UsageError(f"the {split} data has no {path}. {_how_to_get_data(dataset)}")


def annotation_files(cfg: Config, split: str) -> list[str]:
    """The annotation files that the data set and the evaluators of ``split`` read."""
    read = [
        path
        for dataset, _ in innermost_datasets(cfg, split)
        for path in _in_data_root(dataset, dataset.get("ann_file"))
    ]
    return read + _evaluators_files(cfg, split)


def _in_data_root(dataset: dict, *paths: str | None) -> list[str]:
    return [osp.join(dataset.get("data_root") or "", path) for path in paths if path]


def _evaluators_files(cfg: Config, split: str) -> list[str]:
    return [each["ann_file"] for each in evaluators(cfg, split) if each.get("ann_file")]


def innermost_datasets(cfg: Config, split: str) -> Iterator[tuple[dict, int | None]]:
    """The data sets of ``split`` within RepeatDataset, ConcatDataset and other wrappers.

    Yields:
        The settings of each, and how often an epoch repeats it; None if its images decide that.
    """
    dataset = (cfg.get(f"{split}_dataloader") or {}).get("dataset")
    if dataset:
        yield from _unwrapped(dataset, 1)


def _unwrapped(dataset: dict, times: int | None) -> Iterator[tuple[dict, int | None]]:
    if "dataset" in dataset:
        # ClassBalancedDataset repeats images of rare classes.
        if times is not None:
            times = None if "oversample_thr" in dataset else times * dataset.get("times", 1)
        yield from _unwrapped(dataset["dataset"], times)
    elif "datasets" in dataset:
        for each in dataset["datasets"]:
            yield from _unwrapped(each, times)
    else:
        yield dataset, times


def evaluators(cfg: Config, split: str) -> list[dict]:
    """The evaluators of ``split``, which a config may give as one, as several, or not at all."""
    given = cfg.get(f"{split}_evaluator") or []
    return [given] if isinstance(given, dict) else list(given)


def _how_to_get_data(dataset: dict) -> str:
    if tuple((dataset.get("metainfo") or {}).get("classes", ())) == tuple("0123456789"):
        root = dataset["data_root"].rstrip("/")
        return f"Build the digits with: python -m cbn_mmdet.datasets.digits {root}"
    return "Set data_root, and the ann_file of dataset and evaluator, to where the data is."


def check_writable(folder: str, setting: str) -> None:
    """Check that ``folder`` can be made and written to, before hours are spent on what goes there.

    Args:
        folder: The folder.
        setting: Who asks for it, as the user knows it.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UsageError(
            f"{setting} {folder}: nothing can be written there ({error.strerror}); name another "
            "folder, or mend that one"
        ) from error


def check_checkpoint(path: str) -> None:
    """Check that ``path`` can be read."""
    if "://" in path:
        return  # mmengine downloads it
    if not osp.isfile(path):
        raise UsageError(f"the checkpoint {path} does not exist")
    with explained_loading(path):
        # torch.save writes a zip file, whose index is at its end: a file cut short has lost it.
        # One that lost its middle would load as other weights, as torch.load compares no sums.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"its {damaged} is damaged")
        else:  # the format of torch before 1.6, which only reading can check
            checkpoint.CheckpointLoader.load_checkpoint(path, map_location="cpu")


@contextmanager
def explained_loading(path: str) -> Iterator[None]:
    """Turn whatever prevents a checkpoint from being loaded into a UsageError."""
    try:
        yield
    except (UsageError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file can fail in any way
        message = str(error)
        if _is_a_mistake_in_a_hook(error) or "CUDA error" in message:
            raise
        if "do not match exactly" in message:
            raise UsageError(f"{path} is of another model: {_mismatch(message)}") from error
        code = _refused_code(error)
        if code:
            raise UsageError(
                f"{path} holds more than weights, {code} first, and could run any code; if you "
                "trust those who wrote it, set TORCH_FORCE_WEIGHTS_ONLY_LOAD=0"
            ) from error
        why = f"{type(error).__name__}: {message.partition(chr(10))[0]}".rstrip(": ")
        raise UsageError(f"{path} is not a checkpoint, or was cut short ({why})") from error


def _is_a_mistake_in_a_hook(error: Exception) -> bool:
    """Whether code of the user's is to blame, which the runner calls with what it has loaded."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AttributeError | NameError | ImportError) and any(
        frame.name == "call_hook" for frame in frames
    )


def _refused_code(error: BaseException | None) -> str | None:
    """Tell what torch did not unpickle, in the first of mmengine's attempts."""
    code = None
    while error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        code = found[1] if found else code
        error = error.__context__
    return code


def _mismatch(message: str) -> str:
    """Sum up what mmengine says of weights that do not fit, of which there may be hundreds."""
    parts = []
    for name, sign in (("missing", "missing keys in"), ("unknown", "unexpected key in")):
        listed = re.search(rf"{sign} source state_dict: (.+)", message)
        if listed:
            keys = listed[1].split(", ")
            parts.append(f"{len(keys)} of its weights are {name} ({keys[0]} first)")
    shapes = re.findall(r"size mismatch for (\S+):", message)
    if shapes:
        parts.append(f"{len(shapes)} have another shape ({shapes[0]} first)")
    return ", ".join(parts) + "; give the config that it was trained with"


class CarefulRunner(Runner):
    """mmengine's runner, but a checkpoint has to be whole, and of the model that is run.

    mmengine warns of weights that do not fit, among hundreds of lines, and goes on without them. So
    does this one only where a training starts from them (``load_from``), which is often meant.
    """

    def load_checkpoint(self, filename, map_location="cpu", strict=False, **kwargs):
        """Load the checkpoint, or say in a line why not."""
        fine_tuning = isinstance(self._train_loop, BaseLoop) and not self._resume
        with explained_loading(filename):
            loaded = super().load_checkpoint(
                filename, map_location, strict or not fine_tuning, **kwargs
            )
        if self._resume:
            self._warn_of_other_settings(loaded)
        return loaded

    def _warn_of_other_settings(self, loaded: dict) -> None:
        """Tell what is set otherwise than in the training that left the checkpoint.

        The weights do not tell: those of BN, of CBN and of every window size have the same names.
        """
        before = loaded.get("meta", {}).get("cfg")
        found = settings_that_differ(before, self.cfg.pretty_text) if before else []
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            self.logger.warning(
                f"--resume: the checkpoint is of a training with other settings: "
                f"{'; '.join(found[:5])}{more}. Learning rate and schedule go on as the checkpoint "
                "has them. For a training of its own, take another --work-dir, without --resume."
            )

    def resume(self, filename, **kwargs):
        """Go on from the checkpoint, or say in a line why not."""
        try:
            super().resume(filename, **kwargs)
        except KeyError as error:
            if error.args[0] not in ("meta", "epoch", "iter", "message_hub", "optimizer"):
                raise
            raise UsageError(
                f"{filename} holds no {error.args[0]}, so that no training can go on from it; to "
                "start one from its weights, set load_from and leave --resume out"
            ) from error
        except ValueError as error:
            if "state dict" not in str(error):
                raise
            raise UsageError(f"{filename} is of another optimizer: {error}") from error


def look_up(settings: dict, key: str) -> object:
    """Get a nested setting, None if there is none of that name."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def settings_that_differ(before: str, now: str) -> list[str]:
    """Tell in which of the settings that define a training two dumped configs differ.

    The dumps are only parsed, not run: one of them comes from a checkpoint.

    Returns:
        Each setting with both its values.
    """
    try:
        old, new = (
            {
                ast.unparse(statement.targets[0]): _value(statement.value)
                for statement in ast.parse(text).body
                if isinstance(statement, ast.Assign)
            }
            for text in (before, now)
        )
    except SyntaxError:  # not all values have a dump that is Python
        return []
    for settings in (old, new):
        hooks = settings.get("custom_hooks")
        if isinstance(hooks, list):
            settings["custom_hooks"] = [
                hook for hook in hooks if look_up(hook, "type") not in HARMLESS_HOOKS
            ]
    return [
        f"{path} was {was}, is {is_now}"
        for key in DEFINING
        for path, was, is_now in _differences(key, look_up(old, key), look_up(new, key))
        if not path.endswith(HARMLESS)
    ]


def _value(node: ast.expr) -> object:
    """The value of a literal, of ``dict(...)`` and of what is within; of all else its text."""
    is_call = isinstance(node, ast.Call) and ast.unparse(node.func) == "dict"
    if is_call and all(isinstance(each, ast.Dict) for each in node.args):
        pairs = {pair.arg: _value(pair.value) for pair in node.keywords}
        return {key: value for each in node.args for key, value in _value(each).items()} | pairs
    if isinstance(node, ast.Dict):
        return dict(zip(map(_value, node.keys), map(_value, node.values), strict=True))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(each) for each in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _differences(path: str, old: object, new: object) -> Iterator[tuple[str, str, str]]:
    """Path, old and new value of all that differs; what is absent is None, and as good as empty."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f"{path}.{key}", old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list):
        for index, pair in enumerate(zip_longest(old, new)):
            yield from _differences(f"{path}.{index}", *pair)
    elif old != new and not (old in EMPTY and new in EMPTY):
        texts = ["not set" if each is None else repr(each) for each in (old, new)]
        # Long values, paths say, may begin alike.
        start = max(len(osp.commonprefix(texts)) - 10, 0) if max(map(len, texts)) > 60 else 0
        yield path, *("..." * (start > 0) + textwrap.shorten(each[start:], 60) for each in texts)


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
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        message = str(error.args[0]) if error.args else ""
        if any(sign in message for sign in signs):
            raise UsageError(message + _hint(message)) from error
        raise


def _hint(message: str) -> str:
    """What a mistyped option, or hook, of this package may have meant."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    if found:
        kind = MODELS.get(found[1]) if found[1] in NORMS else HOOKS.get(found[1])
        names = [] if kind is None else list(inspect.signature(kind).parameters)
        return _did_you_mean(found[2], names) or (f"; it takes {', '.join(names)}" if names else "")
    found = re.search(r"(\w+) is not in the \S*hook registry", message)
    return _did_you_mean(found[1], OUR_HOOKS, " Did") if found else ""


def _did_you_mean(word: str, known: Iterable[str], start: str = "; did") -> str:
    """The nearest of the names that are known, as the end of a message; empty if none is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"{start} you mean {close[0]}?" if close else ""


@contextmanager
def explained_damage(cfg: Config) -> Iterator[None]:
    """Turn what damaged data or a full disk does to a run into a UsageError that names it."""
    try:
        yield
    except (AssertionError, OSError, ValueError) as error:
        why = _unreadable_image(error) or _unreadable_annotations(cfg, error) or _full_disk(error)
        if why is None:
            raise
        raise UsageError(why) from error


def _unreadable_image(error: Exception) -> str | None:
    # A worker process sends its traceback as the message, with the error itself in the last line.
    last = str(error).rstrip().rpartition("\n")[2]
    found = re.search(r"failed to load image: (.+)|No such file or directory: '(.+)'", last)
    if not found:
        return None
    path = found[1] or found[2]
    return f"{path} is missing, or is no image, or was cut short: get it anew"


def _unreadable_annotations(cfg: Config, error: Exception) -> str | None:
    from .datasets.coco import read_annotations  # which imports this module

    decoding = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
    if not decoding and "annotation file format" not in str(error):
        return None
    for split in ("train", "val", "test"):
        for path in annotation_files(cfg, split):
            try:
                read_annotations(path)
            except UsageError as unreadable:
                return str(unreadable)
    return None


def _full_disk(error: Exception) -> str | None:
    if getattr(error, "errno", None) not in FULL:
        return None
    return (
        f"nothing more can be written ({error.strerror}): make room. A training then goes on with "
        "--resume"
    )
