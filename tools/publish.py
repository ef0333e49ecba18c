# Licensed under the Apache License, Version 2.0.
"""Make of a training's checkpoint one to deploy: weights only, with BN where CBN was."""

import argparse
import ast
import inspect
import os
import os.path as osp

import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from cbn_mmdet.launch import UsageError, check_checkpoint, explained_loading, run_tool

LAYERS = ("CBN", "SyncCBN", "BRN")
HOOKS = ("CBNHook", "DiagnoseHook", "PreciseStatsHook")
# What a norm_cfg of BN can have: BN's own arguments, and what mmengine and mmcv read.
BN_KEYS = {*inspect.signature(nn.BatchNorm2d).parameters, "type", "requires_grad", "_scope_"}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint of a training")
    parser.add_argument("out", metavar="OUT", nargs="?", help="the file to write (CKPT_bn.pth)")
    return parser.parse_args()


def main() -> None:
    """Publish."""
    args = parse_args()
    out = args.out or osp.splitext(args.checkpoint)[0] + "_bn.pth"
    if osp.exists(out):
        raise UsageError(f"{out} exists already: name another OUT, or remove it")
    check_checkpoint(args.checkpoint)
    with explained_loading(args.checkpoint):
        checkpoint = CheckpointLoader.load_checkpoint(args.checkpoint, "cpu", logger="silent")
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise UsageError(f"{args.checkpoint} holds no state_dict: give a checkpoint of a training")
    meta = dict(checkpoint.get("meta") or {})
    notes = []
    if "cfg" in meta:
        try:
            cfg = read_plain_config(meta["cfg"])
        except (SyntaxError, ValueError):
            del meta["cfg"]
            notes.append("its config is left out, as it is not plain data: give yours, with BN")
        else:
            meta["cfg"] = Config(with_batchnorm(cfg)).pretty_text
    if "ema_state_dict" in checkpoint:
        notes.append("its weights are the averaged ones of EMAHook, which evaluation uses")
    write(dict(meta=meta, state_dict=state), out)
    print(f"{out}: {len(state)} tensors, {osp.getsize(out) / 2**20:.1f} MiB, for type='BN'")
    for note in notes:
        print(f"note: {note}")


class DictAsLiteral(ast.NodeTransformer):
    """Turns ``dict(a=1)`` and ``dict({'a': 1})`` into ``{'a': 1}``."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Turn the arguments of a call first, then the call."""
        self.generic_visit(node)
        match node:
            case ast.Call(ast.Name("dict"), [], keywords):
                keys = [ast.Constant(keyword.arg) for keyword in keywords]
                return ast.Dict(keys, [keyword.value for keyword in keywords])
            case ast.Call(ast.Name("dict"), [ast.Dict() as literal], []):
                return literal
        return node


def read_plain_config(text: str) -> dict:
    """Read a config as mmengine writes it into checkpoints, without running it as code.

    Raises:
        SyntaxError: The text is no Python.
        ValueError: It is more than assignments of plain data.
    """
    cfg = {}
    for statement in ast.parse(text).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                cfg[name] = ast.literal_eval(DictAsLiteral().visit(value))
            case _:
                raise ValueError(f"line {statement.lineno} is no assignment")
    return cfg


def with_batchnorm(cfg: dict) -> dict:
    """The same config with BN for the layers of this package, and without its hooks and import."""
    cfg = _with_batchnorm(cfg)
    if cfg.get("custom_hooks"):
        cfg["custom_hooks"] = [each for each in cfg["custom_hooks"] if _kind(each) not in HOOKS]
    imports = (cfg.get("custom_imports") or {}).get("imports") or []
    imports = [imports] if isinstance(imports, str) else imports
    rest = [name for name in imports if name.partition(".")[0] != "cbn_mmdet"]
    if rest:
        cfg["custom_imports"]["imports"] = rest
    else:
        cfg.pop("custom_imports", None)
    return cfg


def _with_batchnorm(value: object) -> object:
    if isinstance(value, list | tuple):
        return type(value)(_with_batchnorm(each) for each in value)
    if not isinstance(value, dict):
        return value
    if _kind(value) in LAYERS:
        return {key: value[key] for key in value if key in BN_KEYS} | {"type": "BN"}
    return {key: _with_batchnorm(each) for key, each in value.items()}


def _kind(value: object) -> str:
    """What a config builds, without the scope or module that it may be written with."""
    kind = value.get("type", "") if isinstance(value, dict) else ""
    return str(kind).rpartition(".")[2]


def write(checkpoint: dict, out: str) -> None:
    """Write the file whole or not at all."""
    part = out + ".part"
    try:
        torch.save(checkpoint, part)
        os.replace(part, out)
    except (OSError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise UsageError(
            f"{out} cannot be written ({why}): name another OUT, or see to room and rights there"
        ) from error
    finally:
        if osp.exists(part):
            os.remove(part)


if __name__ == "__main__":
    run_tool(main)
