# Licensed under the Apache License, Version 2.0.
"""What a training run left behind in its work dir: scalars, evaluations, checkpoints."""

import json
import os.path as osp
from glob import glob

from mmengine.runner import find_latest_checkpoint

from .launch import UsageError, check_checkpoint

# mmdet evaluates no result that holds not a single detection, and logs none of its keys.
NOTHING_DETECTED = {"coco/bbox_mAP": 0.0}


def find_last_run(work_dir: str) -> str:
    """Find the folder, named after its time, that the last training left in ``work_dir``."""
    return osp.dirname(osp.dirname(find_scalars(work_dir)[-1]))


def find_scalars(work_dir: str) -> list[str]:
    """Find the file of scalars of each training in ``work_dir``, in the order of their times."""
    if not osp.isdir(work_dir):
        raise UsageError(f"there is no work dir {work_dir}: train first")
    paths = sorted(glob(osp.join(work_dir, "*", "vis_data", "scalars.json")))
    if not paths:
        raise UsageError(f"{work_dir} holds no training run: train first")
    return paths


def read_scalars(work_dir: str) -> tuple[list[dict], list[dict]]:
    """Read what all the runs in ``work_dir`` logged: training steps, and evaluations.

    A run that resumed, or started anew, replaces what earlier runs logged from there on.
    """
    training, evaluations = [], []
    for path in find_scalars(work_dir):
        with open(path) as file:
            records = [json.loads(line) for line in file]
        steps = [record for record in records if "loss" in record]
        if not steps:
            continue
        # Evaluations are numbered by epoch where the loop has epochs, else by iteration.
        start = steps[0]
        training = before(training, start["step"]) + steps
        evaluations = before(evaluations, start.get("epoch", start["step"]))
        evaluations += [
            record if is_coco(record) else {**NOTHING_DETECTED, **record}
            for record in records
            if "loss" not in record
        ]
    if not training:
        raise UsageError(f"{work_dir} holds no logged training step: train longer")
    return training, evaluations


def before(records: list[dict], step: int) -> list[dict]:
    """Keep the records of earlier steps."""
    return [record for record in records if record["step"] < step]


def is_coco(record: dict) -> bool:
    """Tell whether a logged record holds the result of a COCO evaluation."""
    return any(key.startswith("coco/") for key in record)


def find_checkpoint(work_dir: str) -> str:
    """Find the last checkpoint, which has to be there and readable."""
    checkpoint = latest_checkpoint(work_dir)
    if checkpoint is None:
        raise UsageError(f"{work_dir} holds no checkpoint: train for an epoch first")
    check_checkpoint(checkpoint)
    return checkpoint


def latest_checkpoint(work_dir: str) -> str | None:
    """Find the last checkpoint, None if there is none.

    mmengine notes its path as of the training; its file is looked for where the work dir is now.
    """
    checkpoint = find_latest_checkpoint(work_dir)
    return None if checkpoint is None else osp.join(work_dir, osp.basename(checkpoint))


def time_unit(training: list[dict]) -> str:
    """Tell what mmengine numbered the evaluations by."""
    return "epoch" if "epoch" in training[-1] else "iteration"
