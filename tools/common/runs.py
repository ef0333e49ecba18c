# Licensed under the Apache License, Version 2.0.
"""What a training run left behind in its work dir: scalars, evaluations, config."""

import json
import os.path as osp
import re
from dataclasses import dataclass
from glob import glob

from .config import parse_dump
from .errors import UsageError

# Without a single detection, mmdet evaluates nothing and logs none of these keys.
NOTHING_DETECTED = {"coco/bbox_mAP": 0.0, "coco/bbox_mAP_50": 0.0, "coco/bbox_mAP_75": 0.0}

# Settings that may differ between two runs that repeat each other.
INCIDENTAL = ("work_dir", "randomness", "resume", "load_from", "launcher")
# The last dump of the training's config may come from a test with estimated statistics.
UNTESTED = {"precise_stats": None}


@dataclass(frozen=True)
class Run:
    """A training run, as far as it got."""

    work_dir: str
    folder: str | None  # in the work dir: of the last training, or else of the last test
    config: str | None  # its name, if the work dir has the config
    settings: dict  # without those that differ between repetitions
    training: list[dict]  # the logged steps
    evaluations: list[dict]  # the ``step`` of each is its epoch or iteration

    @property
    def unit(self) -> str:
        """The unit in which mmengine numbers evaluations: ``'epoch'`` or ``'iteration'``."""
        if self.training:
            return "epoch" if "epoch" in self.training[-1] else "iteration"
        return "iteration" if "max_iters" in self._train_cfg else "epoch"

    @property
    def total(self) -> int | None:
        """The planned length of the run; None if its config is unknown."""
        return self._train_cfg.get("max_epochs" if self.unit == "epoch" else "max_iters")

    @property
    def finished(self) -> bool:
        """Whether the run was evaluated at its end; at all, if its planned length is unknown."""
        return bool(self.evaluations) and self.evaluations[-1]["step"] >= (self.total or 0)

    @property
    def _train_cfg(self) -> dict:
        return self.settings.get("train_cfg") or {}


def read_run(work_dir: str) -> Run:
    """Read what ``tools/train.py`` or ``tools/test.py`` left in a work dir, even if nothing."""
    if not osp.isdir(work_dir):
        raise UsageError(f"there is no work dir {work_dir}: train first")
    times = sorted(osp.dirname(path) for path in glob("*/vis_data", root_dir=work_dir))
    folders = [osp.join(work_dir, time) for time in times]
    last = ([folder for folder in folders if read_folder(folder)[0]] or folders or [None])[-1]
    return Run(work_dir, last, *find_config(work_dir, last), *merge(folders))


def find_config(work_dir: str, folder: str | None) -> tuple[str | None, dict]:
    """Find the name and the settings of the config of the run in ``folder``.

    mmengine writes the settings to the folder of the run and, under the name of the config, to
    the work dir, which may also hold those of other configs.
    """
    ran = folder and osp.join(folder, "vis_data", "config.py")
    settings = repeatable(read_settings(ran)) if ran and osp.isfile(ran) else None
    names = sorted(glob("*.py", root_dir=work_dir))
    for name in names:
        dumped = repeatable(read_settings(osp.join(work_dir, name)))
        if len(names) == 1 or {**dumped, **UNTESTED} == {**(settings or {}), **UNTESTED}:
            return osp.splitext(name)[0], settings or dumped
    return None, settings or {}


def read_settings(path: str) -> dict:
    """Read a config that mmengine dumped."""
    try:
        with open(path) as file:
            return parse_dump(file.read())
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"cannot read {path}, which mmengine wrote: {error}") from error


def repeatable(settings: dict) -> dict:
    """Copy ``settings`` without those that may differ between repetitions of a run."""
    return {key: value for key, value in settings.items() if key not in INCIDENTAL}


def merge(folders: list[str]) -> tuple[list[dict], list[dict]]:
    """Join the logs of the runs in ``folders``, which ran one after the other.

    A run that resumed, or started anew, replaces what earlier runs logged from its first step on.
    A test of a checkpoint counts if the training was not evaluated there. If nothing was trained,
    the last test of each checkpoint counts.
    """
    training, evaluations = [], []
    for folder in folders:
        steps, results = read_folder(folder)
        if steps:
            # Evaluations are numbered by epoch where the loop has epochs, else by iteration.
            start = steps[0]
            training = before(training, start["step"]) + steps
            evaluations = before(evaluations, start.get("epoch", start["step"])) + results
        tested = read_test(folder, bool(training))
        if tested and not training:
            evaluations = [each for each in evaluations if each["step"] != tested["step"]]
        if tested and tested["step"] not in {record["step"] for record in evaluations}:
            evaluations.append(tested)
    return training, sorted(evaluations, key=lambda record: record["step"])


def read_folder(folder: str) -> tuple[list[dict], list[dict]]:
    """Read the steps and evaluations that the run in ``folder`` logged while it trained."""
    path = osp.join(folder, "vis_data", "scalars.json")
    if not osp.isfile(path):
        return [], []
    records = []
    with open(path, errors="replace") as file:
        lines = file.readlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"]
            records.append(record)
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break  # a run that is killed may leave half a line
            raise UsageError(f"{path}: line {number} is damaged; delete that line") from error
    steps = [record for record in records if "loss" in record]
    return steps, [complete(record) for record in records if "loss" not in record]


def read_test(folder: str, trained: bool) -> dict | None:
    """Read the evaluation that ``tools/test.py`` left in ``folder``, if it is the training's.

    It is not if the name of the checkpoint tells no epoch or iteration. If there was a training
    (``trained``), the checkpoint must also come from it, and the test must have used the
    checkpoint's own running statistics.
    """
    path = osp.join(folder, f"{osp.basename(folder)}.json")
    config = osp.join(folder, "vis_data", "config.py")
    if not (osp.isfile(path) and osp.isfile(config)):
        return None
    settings = read_settings(config)
    loaded = settings.get("load_from") or ""
    checkpoint = re.search(r"(?:epoch|iter)_(\d+)\.pth$", loaded)
    if not checkpoint:
        return None
    if trained:
        # Compare names of folders: a work dir may have been moved since, and CheckpointHook with
        # out_dir makes a folder of the same name elsewhere.
        now, own = osp.dirname(folder), osp.basename(osp.dirname(loaded))
        names = {osp.basename(osp.abspath(each)) for each in (now, settings.get("work_dir") or now)}
        if settings.get("precise_stats") or (own and own not in names):
            return None
    with open(path, errors="replace") as file:
        try:
            return {**complete(json.load(file)), "step": int(checkpoint[1])}
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged: test again, or delete it") from error


def complete(evaluation: dict) -> dict:
    """Add the zeros that mmdet does not log if there is not a single detection."""
    measured = evaluation.keys() - {"step", "data_time", "time", "memory"}
    return evaluation if measured else {**NOTHING_DETECTED, **evaluation}


def before(records: list[dict], step: int) -> list[dict]:
    """Keep the records of steps before ``step``."""
    return [record for record in records if record["step"] < step]
