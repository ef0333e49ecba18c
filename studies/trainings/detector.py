# Licensed under the Apache License, Version 2.0.
"""Train and test a study's detector with ``tools/train.py`` and ``tools/test.py``."""

import os
import os.path as osp
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import partial

import paths
from common.checkpoint import latest_checkpoint
from common.errors import UsageError
from common.runs import read_run
from digits.build import build_digits
from mmengine.config import Config
from norms import norm_cfg, replace_norms

from .photos import photos_config
from .shared import POPULATION, SHARED, Job, accumulated, burn_in, with_defaults

DIGITS = osp.join(paths.DIGITS, "faster-rcnn_r18_fpn_cbn-all_1xb2_digits.py")
DETECTOR = dict(SHARED, train_images=1000, val_images=200, epochs=4, burn_in=1, lr_at_2=0.02)
ABLATION = dict(DETECTOR, train_images=400, epochs=6)  # long enough for a burn-in of 5
RETINA = osp.join(paths.DIGITS, "retinanet_r18_fpn_bn-all_1xb2_digits.py")
LEVELS = dict(DETECTOR, lr_at_2=0.01)
HEADS = {"shared": {}, "apart": dict(type="RetinaSepBNHead", num_ins=4)}


def train_detector(job: Job, options: dict, precise: Iterable[str] = ()) -> dict:
    """Train once; returns the box AP, for the norms in ``precise`` also with precise statistics."""
    cfg = detector_config(job, options)
    name = re.sub("[(=',) ]", "-", f"{job.norm}_{job.batch}_{job.burn_in}_{job.seed}")
    work_dir = osp.join(options["work_dir"], name)
    path = osp.join(work_dir, "config.py")
    if osp.isfile(path) and Config.fromfile(path).to_dict() != cfg.to_dict():
        shutil.rmtree(work_dir)  # of other settings: must not be resumed
    os.makedirs(work_dir, exist_ok=True)
    cfg.dump(path)
    run, call = osp.join(work_dir, "run"), partial(call_tool, options.get("device", "cpu"))
    call("train.py", path, "--resume", "--work-dir", run)
    if not read_run(run).evaluations:  # interrupted between the last checkpoint and its evaluation
        call("test.py", path, latest_checkpoint(run), "--work-dir", run)
    result = dict(ap=last_ap(run))
    if job.norm in precise:
        test = osp.join(work_dir, "precise")
        statistics = "--precise-stats", str(POPULATION)
        call("test.py", path, latest_checkpoint(run), "--work-dir", test, *statistics)
        result["precise"] = last_ap(test)
    return result


def last_ap(work_dir: str) -> float:
    """The box AP of the last evaluation that a training, or a test, left in its work dir."""
    return read_run(work_dir).evaluations[-1]["coco/bbox_mAP"]


def digits_config(options: dict) -> tuple[Config, int]:
    """The digits detector with its data, and the number of training images."""
    count, held_out = (
        round(options[split] * options["shorten"]) for split in ("train_images", "val_images")
    )
    folder = osp.join(options["data"], f"digits_{count}_{held_out}")
    root = f"{build_digits(folder, num_train=count, num_val=held_out, progress=False)}/"
    if "head" in options:
        cfg = Config.fromfile(RETINA)
        cfg.model.bbox_head.update(HEADS[options["head"]])
    else:
        cfg = Config.fromfile(DIGITS)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = root
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = f"{root}annotations/instances_val.json"
    return cfg, count


def detector_config(job: Job, options: dict) -> Config:
    """The config of the study's detector with the norm of the job."""
    cfg, count = (photos_config if "photos" in options else digits_config)(options)
    epochs = options["epochs"]
    settings = with_defaults(norm_cfg(job.norm), job.batch, epochs * count // job.batch)
    replace_norms(cfg.model, settings)
    cfg.train_dataloader.update(batch_size=job.batch)
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    cfg.param_scheduler[1].update(end=epochs, milestones=[options.get("decay", epochs - 1)])
    parts = accumulated(job)
    # auto_scale_lr counts only the images of one forward.
    cfg.optim_wrapper.optimizer.lr = options["lr_at_2"] * parts
    if parts > 1:
        cfg.optim_wrapper.accumulative_counts = parts
        cfg.param_scheduler[0].end *= parts  # counts forwards: keep the number of steps
    hook = dict(type="CBNHook", burn_in=burn_in(job, options["burn_in"]))
    cfg.custom_hooks = [hook] if settings["type"] in ("CBN", "CmBN") else []
    if "together" in options:
        cfg.custom_imports.imports.append("trainings.latest")
        together = dict(type="LatestBatchSampler", together=options["together"])
        cfg.train_dataloader.batch_sampler = together
        cfg.model.rpn_head.type, cfg.model.roi_head.type = "LatestRPNHead", "LatestRoIHead"
    cfg.default_hooks.checkpoint.update(max_keep_ckpts=1)
    cfg.randomness = dict(seed=job.seed)
    return cfg


def call_tool(device: str, tool: str, *args: str) -> None:
    """Run another tool; if it fails, show what it printed."""
    # Train on the CPU even if there is a GPU, so that all figures of a file are comparable.
    hide = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    # A config may import a module of trainings/.
    path = os.pathsep.join(filter(None, [paths.STUDIES, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, osp.join(paths.TOOLS, tool), *args],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **hide},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UsageError(f"{tool} {' '.join(args)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
