# Licensed under the Apache License, Version 2.0.
"""Turn a training checkpoint into one to deploy: weights only, with BN in place of CBN."""

import argparse
import inspect
import os
import os.path as osp

import torch
from common.checkpoint import check_checkpoint, read_checkpoint
from common.config import OUR_HOOKS, OUR_NORMS, Code, kind_of, parse_dump, walk
from common.errors import UsageError, run_tool
from mmengine.config import Config
from torch import nn

from cbn_mmdet import MABN

# Keys that a norm_cfg of BN may have: BN's own arguments, and those mmengine and mmcv read.
BN_KEYS = {*inspect.signature(nn.BatchNorm2d).parameters, "type", "requires_grad", "_scope_"}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint of a training")
    parser.add_argument("out", metavar="OUT", nargs="?", help="the file to write (CKPT_bn.pth)")
    return parser.parse_args()


def main() -> None:
    """Write the checkpoint to deploy."""
    args = parse_args()
    out = args.out or osp.splitext(args.checkpoint)[0] + "_bn.pth"
    if osp.exists(out):
        raise UsageError(f"{out} exists already: name another OUT, or remove it")
    check_checkpoint(args.checkpoint)
    checkpoint = read_checkpoint(args.checkpoint)
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict):
        raise UsageError(f"{args.checkpoint} holds no state_dict: give a checkpoint of a training")
    state = {key: state[key] for key in state if key.rpartition(".")[2] not in MABN.more_buffers}
    meta = dict(checkpoint.get("meta") or {})
    notes = []
    if "cfg" in meta:
        try:
            cfg = with_batchnorm(parse_dump(meta["cfg"]))
            meta["cfg"] = Config(cfg).pretty_text
            modules = (cfg.get("custom_imports") or {}).get("imports", [])
            if modules:
                notes.append(f"it needs {', '.join(modules)}, which its config imports")
        except (SyntaxError, ValueError):
            del meta["cfg"]
            notes.append("its config is left out, as it is not plain data: give yours, with BN")
    if "ema_state_dict" in checkpoint:
        notes.append("its weights are the averaged ones of EMAHook, which evaluation uses")
    write(dict(meta=meta, state_dict=state), out)
    print(f"{out}: {len(state)} tensors, {osp.getsize(out) / 2**20:.1f} MiB, for type='BN'")
    for note in notes:
        print(f"note: {note}")


def with_batchnorm(cfg: dict) -> dict:
    """Replace this package's norms in a config by BN, and remove its hooks and import.

    The import stays for CenConv2d, MABN's convolution: checkpoints hold its weight as learnt.

    Raises:
        ValueError: The config is not all plain data.
    """
    for path, value in walk(cfg):
        if isinstance(value, Code):
            raise ValueError(f"{path}: {value}")
        if kind_of(value) in OUR_NORMS:
            for key in value.keys() - BN_KEYS:
                del value[key]
            value["type"] = "BN"
    if cfg.get("custom_hooks"):
        cfg["custom_hooks"] = [
            each for each in cfg["custom_hooks"] if kind_of(each) not in OUR_HOOKS
        ]
    imports = (cfg.get("custom_imports") or {}).get("imports") or []
    imports = [imports] if isinstance(imports, str) else imports
    if not any(kind_of(value) == "CenConv2d" for _, value in walk(cfg)):
        imports = [name for name in imports if name.partition(".")[0] != "cbn_mmdet"]
    if imports:
        cfg["custom_imports"]["imports"] = imports
    else:
        cfg.pop("custom_imports", None)
    return cfg


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
