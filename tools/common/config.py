# Licensed under the Apache License, Version 2.0.
"""Read, override, check and compare configs, and parse those that mmengine dumped."""

import argparse
import ast
import inspect
import os
import os.path as osp
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import zip_longest

import mmcv.cnn  # noqa: F401  registers its norms
from mmengine.config import Config, DictAction
from mmengine.registry import HOOKS, MODELS, Registry
from mmengine.runner import Runner

from cbn_mmdet import CBNHook

from .errors import UsageError, did_you_mean, explain

# The settings that mmengine reads from a parsed config.
SETTINGS = {
    "activation_checkpointing",
    "compile",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
    *inspect.signature(Runner.__init__).parameters,
} - {"self", "cfg"}

# The settings that define a training; the places of data and results do not.
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
# Settings that a resumed training does not read, or only reports with.
HARMLESS = (".init_cfg.checkpoint", ".save_window")
HARMLESS_HOOKS = ("DiagnoseHook",)
EMPTY = (None, [], {})

# What this package registers, and other norms that a mistyped name may have meant.
OUR_NORMS = ("CBN", "SyncCBN", "CmBN", "BRN", "MABN")
OUR_HOOKS = ("CBNHook", "DiagnoseHook", "PreciseStatsHook")
NORMS = (*OUR_NORMS, "BN", "SyncBN", "GN", "LN", "IN")
# Keys that mmcv and mmengine take out of the settings of a norm or a hook before building it.
TAKEN_OUT = {"type", "_scope_", "requires_grad", "priority"}


# Reading configs, and --cfg-options.


class CfgOptions(DictAction):
    """mmengine's ``KEY=VALUE`` pairs, with a usage error for anything else."""

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


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply the options of ``add_launch_arguments`` to it."""
    cfg = read_config(args.config)
    merge_options(cfg, args.cfg_options)
    check_norms(cfg)
    check_hooks(cfg)
    cfg.launcher = args.launcher
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or osp.join("work_dirs", name)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    return cfg


def read_config(path: str, **kwargs) -> Config:
    """Read a config file; a missing or broken one is a UsageError."""
    if not osp.isfile(path):
        raise UsageError(f"the config file {path} does not exist")
    try:
        return Config.fromfile(path, **kwargs)
    except Exception as error:  # a config is the user's code: it can fail in any way
        raise UsageError(f"cannot read the config {path}: {explain(error)}") from error


def merge_options(cfg: Config, options: dict) -> None:
    """Merge ``--cfg-options`` into ``cfg``.

    mmengine adds any unknown name to the config, where nothing reads it: a mistyped setting would
    change nothing, and nobody would notice. The same holds for a helper variable of the config,
    such as ``norm_cfg``, whose value was copied while the config was read.
    """
    settings = cfg.to_dict()
    is_read = set(SETTINGS)
    if "data_preprocessor" in (settings.get("model") or {}):
        is_read.remove("data_preprocessor")  # the model's own takes precedence
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
            hint = did_you_mean(name, is_read)
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
    """Yield where ``settings`` hold the value of a helper variable, as ``--cfg-options`` keys."""
    # Many numbers are equal by chance.
    is_telling = isinstance(value, (dict, list, tuple, str)) and len(value) > 0
    for path, inner in walk(settings):
        named_so = value is not None and re.search(rf"(^|_){re.escape(name)}$", str(path[-1]))
        if (is_telling or named_so) and type(inner) is type(value) and inner == value:
            yield ".".join(map(str, path))


# The content of a config.


def walk(settings: object, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """Yield every value within ``settings``, each after the keys and indices that lead to it."""
    items = ()
    if isinstance(settings, dict):
        items = settings.items()
    elif isinstance(settings, (list, tuple)):
        items = enumerate(settings)
    for key, value in items:
        yield (*path, key), value
        yield from walk(value, (*path, key))


def norm_settings(model: object) -> Iterator[tuple[tuple, dict]]:
    """Yield every ``norm_cfg`` in a model's settings, after its path; callers may change it."""
    for path, value in walk(model):
        if path[-1] == "norm_cfg" and isinstance(value, dict):
            yield path, value


def look_up(settings: dict, key: str) -> object:
    """Get a nested setting by its dotted key; None if there is none."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def check_norms(cfg: Config) -> None:
    """Refuse a norm that is not registered, or a setting that the norm does not take."""
    for path, norm in norm_settings(cfg.get("model")):
        where = "model" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
        _check_part(cfg, MODELS, "no norm is called", norm, where, NORMS, OUR_NORMS, num_features=1)


def check_hooks(cfg: Config) -> None:
    """Refuse unknown hooks in ``custom_hooks``, and settings that they do not take."""
    for index, hook in enumerate(cfg.get("custom_hooks") or []):
        if isinstance(hook, dict):
            where = f"custom_hooks[{index}]"
            _check_part(cfg, HOOKS, "no hook is called", hook, where, OUR_HOOKS, OUR_HOOKS)
    ours = [each for each in cfg.get("custom_hooks") or [] if is_cbn_hook(each)]
    if len(ours) > 1:
        raise UsageError(
            f"custom_hooks has {len(ours)} CBNHooks, each with a burn-in of its own: keep one. (If "
            "the list repeats the base config's, which has one, leave that out.)"
        )


def is_cbn_hook(settings: object) -> bool:
    """Whether an entry of ``custom_hooks`` is the CBNHook."""
    return isinstance(settings, CBNHook) or kind_of(settings) == "CBNHook"


def kind_of(settings: object) -> str:
    """The type that a config entry builds, without a scope or module before its name."""
    kind = settings.get("type", "") if isinstance(settings, dict) else ""
    return getattr(kind, "__name__", str(kind)).rpartition(".")[2]


def _check_part(
    cfg: Config,
    registry: Registry,
    unknown_is: str,
    settings: dict,
    where: str,
    known,
    ours,
    **needed,
) -> None:
    """Check a part's type and options now: its building would fail far from where they are set.

    Parts of this package (``ours``) are built on trial, with the arguments that their builder adds
    (``needed``), as only they can judge values.
    """
    kind = settings.get("type")
    if isinstance(kind, str):
        scope = settings.get("_scope_") or cfg.get("default_scope")
        with registry.switch_scope_and_registry(scope) as scoped:
            name, kind = kind, scoped.get(kind)
        if kind is None:
            hint = did_you_mean(name, known)
            raise UsageError(f"{where}.type: {unknown_is} {name}{hint}")
    options = {key: value for key, value in settings.items() if key not in TAKEN_OUT}
    taken = _options_of(kind)
    unknown = [option for option in options if taken and option not in taken]
    if unknown:
        if "_delete_" in unknown:
            raise UsageError(
                f"{where}: the base config has nothing there that _delete_=True could delete: take "
                "it out"
            )
        hint = did_you_mean(unknown[0], taken) or f"; it takes {', '.join(taken)}"
        if where.endswith("norm_cfg"):
            hint += "" if hint.endswith("?") else "."
            hint += " (Options of a base config stay, unless this dict has _delete_=True.)"
        raise UsageError(f"{where}: {kind.__name__} has no option {unknown[0]!r}{hint}")
    if getattr(kind, "__name__", None) in ours:
        try:
            kind(**{**needed, **options})
        except (TypeError, ValueError) as error:
            raise UsageError(f"{where}: {error}") from error


def _options_of(kind: object) -> list[str]:
    """The options that a class takes, with those handed on to its parents; empty if any."""
    names = []
    for each in inspect.getmro(kind) if inspect.isclass(kind) else ():
        if inspect.isfunction(vars(each).get("__init__")):
            found = inspect.getfullargspec(each.__init__)
            names += [*found.args[1:], *found.kwonlyargs]
            if found.varkw is None:
                return list(dict.fromkeys(names))
    return []


# The hook of a training with CBN.


def default_cbn_hook(cfg: Config) -> CBNHook:
    """The hook of a config without one: the paper's 3 epochs, or a quarter of the iterations."""
    iterations = cfg.train_cfg.get("max_iters")
    return CBNHook() if iterations is None else CBNHook(iterations // 4, by_epoch=False)


def check_burn_in(cfg: Config, hook: CBNHook, epoch_length: int | None = None) -> int | None:
    """Check that the window opens before the run ends; returns the run's length if known."""
    epochs, iterations = cfg.train_cfg.get("max_epochs", 1), cfg.train_cfg.get("max_iters")
    if iterations is None and epoch_length is not None:
        iterations = epochs * epoch_length
    length = epochs if hook.by_epoch else iterations
    try:
        hook.check_length(epochs, iterations)
    except ValueError as error:
        shorter = CBNHook(length // 4, hook.by_epoch)
        raise UsageError(f"{error} For instance: {in_config(shorter)}") from error
    return length


def in_config(hook: CBNHook) -> str:
    """The line that puts the hook into a config."""
    count = "" if hook.by_epoch else ", by_epoch=False"
    return f"custom_hooks = [dict(type='CBNHook', burn_in={hook.burn_in}{count})]"


# Dumped configs: in a work dir, or in a checkpoint.


class Code(str):
    """The source text of a value that is not a literal."""


def parse_dump(text: str) -> dict:
    """Read a config as mmengine dumps it, without running it as code.

    Raises:
        SyntaxError: The text is not Python, as the dump of some values is not.
        ValueError: The text holds more than assignments.
    """
    cfg = {}
    for statement in ast.parse(text).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                cfg[name] = _value(value)
            case _:
                raise ValueError(f"line {statement.lineno} is no assignment")
    return cfg


def _value(node: ast.expr) -> object:
    """The value of a literal or ``dict(...)``, nested ones too; of anything else, its text."""
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[] | [ast.Dict()], keywords=keywords):
            given = [_value(each) for each in node.args]
            return dict(*given) | {each.arg: _value(each.value) for each in keywords}
        case ast.Dict(keys=keys, values=values):
            return dict(zip(map(_value, keys), map(_value, values), strict=True))
        case ast.List(elts=elements):
            return list(map(_value, elements))
        case ast.Tuple(elts=elements):
            return tuple(map(_value, elements))
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Code(ast.unparse(node))


def settings_that_differ(before: str, now: str) -> list[str]:
    """Compare two dumped configs in the settings that define a training.

    Returns:
        Each setting that differs, with both its values.
    """
    try:
        old, new = parse_dump(before), parse_dump(now)
    except (SyntaxError, ValueError):
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
        for path, was, is_now in differences(key, look_up(old, key), look_up(new, key))
        if not path.endswith(HARMLESS)
    ]


def differences(path: str, old: object, new: object) -> Iterator[tuple[str, str, str]]:
    """Yield path, old and new value of all that differs; absent, None and empty are the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        # mmengine notes the package that a base came from as _scope_.
        for key in dict.fromkeys(key for key in [*old, *new] if key != "_scope_"):
            yield from differences(f"{path}.{key}", old.get(key), new.get(key))
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        for index, pair in enumerate(zip_longest(old, new)):
            yield from differences(f"{path}.{index}", *pair)
    elif old != new and not (old in EMPTY and new in EMPTY):
        texts = ["not set" if each is None else repr(each) for each in (old, new)]
        # Long values, such as paths, may begin alike.
        start = max(len(osp.commonprefix(texts)) - 10, 0) if max(map(len, texts)) > 60 else 0
        yield path, *("..." * (start > 0) + textwrap.shorten(each[start:], 60) for each in texts)
