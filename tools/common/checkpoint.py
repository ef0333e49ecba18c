# Licensed under the Apache License, Version 2.0.
"""Find, check and read checkpoints, and check that folders can be written to."""

import os
import os.path as osp
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob

import torch
from mmengine.runner import checkpoint as loading
from mmengine.runner import find_latest_checkpoint
from torch import nn

from .errors import UsageError, explain, some


def check_writable(folder: str, setting: str) -> None:
    """Make ``folder`` and check that it can be written to, before hours are spent on a run.

    Args:
        folder: The folder.
        setting: What the user calls the folder, for the message: the option, say.
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
    """Check that the checkpoint ``path`` exists and is whole."""
    if "://" in path:
        return  # mmengine downloads it
    if not osp.isfile(path):
        raise UsageError(f"the checkpoint {path} does not exist")
    if not zipfile.is_zipfile(path):  # of torch before 1.6: only reading checks such a file
        read_checkpoint(path)
        return
    # torch.save writes a zip file with its index at the end: a file cut short has lost it. A file
    # that lost its middle would load as other weights, as torch.load compares no checksums.
    with explained_reading(path), zipfile.ZipFile(path) as file:
        damaged = file.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"its {damaged} is damaged")


def read_checkpoint(path: str) -> dict:
    """Read a checkpoint to the CPU, downloading it if need be."""
    with explained_reading(path):
        found = loading.CheckpointLoader.load_checkpoint(path, "cpu", logger="silent")
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no state_dict: give a checkpoint of a training")
    return found


@contextmanager
def explained_reading(path: str) -> Iterator[None]:
    """Turn whatever prevents a checkpoint from being read into a UsageError."""
    try:
        yield
    except Exception as error:  # a damaged file, or a download, can fail in any way
        why, code = explain(error), refused_code(path)
        if code:
            why = (
                f"{path} holds more than weights, {some(code)}, and could run any code; if you "
                "trust those who wrote it, set TORCH_FORCE_WEIGHTS_ONLY_LOAD=0"
            )
        elif "://" in path:
            why = f"cannot load {path}: {why}"
        else:
            why = f"{path} is not a checkpoint, or was cut short ({why})"
        raise UsageError(why) from error


def refused_code(path: str) -> list[str]:
    """Name the code that torch refused to unpickle, if it was told to refuse code."""
    if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") != "1":
        return []
    try:
        with torch.serialization.safe_globals(loading.get_torch_safe_globals()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # an unreadable file, or a version that cannot tell
        return []


def weights_of(checkpoint: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights whose names start with ``prefix``; drops it and a wrapper's ``module.``."""
    weights = checkpoint.get("state_dict", checkpoint)
    start = rf"^(module\.)?{re.escape(prefix)}"
    return {re.sub(start, "", key): weights[key] for key in weights if re.match(start, key)}


def misfits(model: nn.Module, weights: dict) -> tuple[list[str], list[str], list[str]]:
    """Load what fits; returns the names of weights missing, unknown, and of another shape."""
    own = model.state_dict()
    shapes = [key for key in own if key in weights and weights[key].shape != own[key].shape]
    fitting = {key: weights[key] for key in weights if key not in shapes}
    missing, unknown = model.load_state_dict(fitting, strict=False)
    absent = {key for key in missing if not key.endswith("num_batches_tracked")}  # not in old files
    return [key for key in own if key in absent.difference(shapes)], unknown, shapes


def check_fit(model: nn.Module, weights: dict, path: str) -> None:
    """Refuse a checkpoint if weights are missing, unknown, or of another shape."""
    found = zip(
        misfits(model, weights),
        ("of its weights are missing", "of its weights are unknown", "have another shape"),
        strict=True,
    )
    parts = [f"{len(keys)} {what} ({keys[0]} first)" for keys, what in found if keys]
    if parts:
        raise UsageError(
            f"{path} is of another model: {', '.join(parts)}; give the config that it was trained "
            "with"
        )


def find_checkpoint(work_dir: str) -> str:
    """Find the last checkpoint that can be read; it is an error if there is none."""
    checkpoint = latest_checkpoint(work_dir)
    if checkpoint is None:
        raise UsageError(f"{work_dir} holds no checkpoint: train for an epoch first")
    return checkpoint


def latest_checkpoint(work_dir: str) -> str | None:
    """Find the last checkpoint that can be read; None if the first was never finished.

    mmengine notes its path at the time of the training, so its file is sought where the work dir is
    now. A run that is killed while it writes may leave half a file, or no note: then the newest
    whole file is the last checkpoint.

    Raises:
        UsageError: mmengine noted a checkpoint, but none is whole.
    """
    # Not the files that tools/publish.py writes beside them.
    names = [
        name
        for name in glob("*.pth", root_dir=work_dir)
        if re.fullmatch(r"(epoch|iter)_\d+\.pth", name)
    ]
    paths = sorted((osp.join(work_dir, name) for name in names), key=osp.getmtime, reverse=True)
    noted = find_latest_checkpoint(work_dir)
    if noted:
        here = osp.join(work_dir, osp.basename(noted))
        # CheckpointHook(out_dir=...) writes elsewhere.
        paths.insert(0, noted if osp.isfile(noted) and not osp.isfile(here) else here)
    broken = []
    for path in paths:
        try:
            check_checkpoint(path)
        except UsageError as error:
            broken.append(error)
            continue
        if broken:
            print(f"{broken[0]}; taking {path} instead", file=sys.stderr)
        return path
    if noted:
        raise UsageError(
            f"{broken[0]}, and {work_dir} holds no other: restore it, or train anew in another "
            "work dir"
        )
    return None
