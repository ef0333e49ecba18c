# Licensed under the Apache License, Version 2.0.
"""What a training run left behind in its work dir: scalars, evaluations, config, checkpoints."""

import json
import os.path as osp
import re
import sys
from dataclasses import dataclass
from glob import glob

from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from .launch import UsageError, check_checkpoint

# mmdet evaluates no result that holds not a single detection, and logs none of its keys.
NOTHING_DETECTED = {"coco/bbox_mAP": 0.0, "coco/bbox_mAP_50": 0.0, "coco/bbox_mAP_75": 0.0}

# Settings that runs may differ in of which one repeats the other.
INCIDENTAL = ("work_dir", "randomness", "resume", "load_from", "launcher")
# A test with estimated statistics may have dumped the config of the training last.
UNTESTED = {"precise_stats": None}


@dataclass(frozen=True)
class Run:
    """A training, as far as it got.

    Attributes:
        work_dir (str): The work dir, as it was given.
        started (bool): Whether anything was ever started there.
        config (str | None): The name of the config; None where none lies in the work dir.
        settings (dict): What the config says, but for what repetitions of a run differ in.
        training (list[dict]): The logged training steps.
        evaluations (list[dict]): The evaluations; ``step`` is the epoch, or iteration, of each.
    """

    work_dir: str
    started: bool
    config: str | None
    settings: dict
    training: list[dict]
    evaluations: list[dict]

    @property
    def unit(self) -> str:
        """What its length is counted in: ``'epoch'`` or ``'iteration'``."""
        if self.training:
            return time_unit(self.training)
        return "iteration" if "max_iters" in self._train_cfg else "epoch"

    @property
    def total(self) -> int | None:
        """The length it was meant to have; None if there is no config to tell."""
        return self._train_cfg.get({"epoch": "max_epochs", "iteration": "max_iters"}[self.unit])

    @property
    def finished(self) -> bool:
        """Whether it was evaluated at its end, or at all where the end is not known."""
        return bool(self.evaluations) and self.evaluations[-1]["step"] >= (self.total or 0)

    @property
    def _train_cfg(self) -> dict:
        return self.settings.get("train_cfg") or {}


def read_run(work_dir: str) -> Run:
    """Read whatever was left behind in ``work_dir``, be it nothing.

    Args:
        work_dir (str): A work dir of ``tools/train.py``, or of ``tools/test.py``.

    Returns:
        Run: What there is.

    Raises:
        UsageError: If there is no such folder, or a file in it is damaged.
    """
    check_work_dir(work_dir)
    times = sorted(osp.dirname(path) for path in glob("*/vis_data", root_dir=work_dir))
    folders = [osp.join(work_dir, time) for time in times]
    trained = [folder for folder in folders if read_folder(folder)[0]]
    config, settings = find_config(work_dir, (trained or folders or [None])[-1])
    return Run(work_dir, bool(folders), config, settings, *merge(folders))


def find_config(work_dir: str, folder: str | None) -> tuple[str | None, dict]:
    """Tell the name and the settings of the config of the run in ``folder``.

    mmengine writes the settings to the folder of the run and, under the name of the config, to
    the work dir, where those of other configs may lie as well.
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
    """Read a config that mmengine dumped, without importing what it wants to be imported."""
    try:
        return Config.fromfile(path, import_custom_modules=False).to_dict()
    except Exception as error:  # what is no config can fail in any way
        raise UsageError(f"cannot read {path}, which mmengine wrote: {error}") from error


def repeatable(settings: dict) -> dict:
    """Leave out of ``settings`` what repetitions of a run differ in."""
    return {key: value for key, value in settings.items() if key not in INCIDENTAL}


def find_last_run(work_dir: str) -> str:
    """Find the folder, named after its time, that the last training left in ``work_dir``."""
    return osp.dirname(osp.dirname(find_scalars(work_dir)[-1]))


def find_scalars(work_dir: str) -> list[str]:
    """Find the file of scalars of each training in ``work_dir``, in the order of their times."""
    check_work_dir(work_dir)
    paths = sorted(glob(osp.join(work_dir, "*", "vis_data", "scalars.json")))
    if not paths:
        raise UsageError(f"{work_dir} holds no training run: train first")
    return paths


def check_work_dir(work_dir: str) -> None:
    """Check that ``work_dir`` exists."""
    if not osp.isdir(work_dir):
        raise UsageError(f"there is no work dir {work_dir}: train first")


def read_scalars(work_dir: str) -> tuple[list[dict], list[dict]]:
    """Read what all the runs in ``work_dir`` logged: training steps, and evaluations."""
    training, evaluations = merge(
        [osp.dirname(osp.dirname(path)) for path in find_scalars(work_dir)]
    )
    if not training:
        raise UsageError(f"{work_dir} holds no logged training step: train longer")
    return training, evaluations


def merge(folders: list[str]) -> tuple[list[dict], list[dict]]:
    """Join what the runs in ``folders``, one after the other, logged.

    A run that resumed, or started anew, replaces what earlier runs logged from there on. A test of
    one of its checkpoints counts where the training was not evaluated; where nothing was trained,
    the last test of each does.
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
    """Read what the run in ``folder`` logged while it trained: steps, and evaluations."""
    path = osp.join(folder, "vis_data", "scalars.json")
    if not osp.isfile(path):
        return [], []
    records = []
    with open(path, errors="replace") as file:
        lines = file.readlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(read_record(line))
        except ValueError as error:
            if number == len(lines):
                break  # a run that is killed may leave half a line
            raise UsageError(f"{path}: line {number} is damaged; delete that line") from error
    steps = [record for record in records if "loss" in record]
    return steps, [complete(record) for record in records if "loss" not in record]


def read_record(line: str) -> dict:
    """Read a line of what mmengine logged; a ValueError if it is none."""
    record = json.loads(line)
    if not isinstance(record, dict) or "step" not in record:
        raise ValueError("a record has a step")
    return record


def read_test(folder: str, trained: bool) -> dict | None:
    """Read the evaluation that ``tools/test.py`` left in ``folder``, as one of the training.

    That of a checkpoint whose name does not tell its epoch or iteration is none of the training.
    If there was one (``trained``), nor is that of a checkpoint from elsewhere, or with other
    running statistics than the checkpoint's.
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
        now = osp.dirname(folder)
        work_dirs = now, settings.get("work_dir") or now
        if settings.get("precise_stats") or not is_from(loaded, work_dirs):
            return None
    with open(path, errors="replace") as file:
        try:
            return {**complete(json.load(file)), "step": int(checkpoint[1])}
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is damaged: test again, or delete it") from error


def is_from(checkpoint: str, work_dirs: tuple[str, ...]) -> bool:
    """Whether a checkpoint is of one of these work dirs, by the name of its folder.

    A work dir may have been moved since, and ``CheckpointHook(out_dir=...)`` makes a folder of the
    same name elsewhere.
    """
    folder = osp.basename(osp.dirname(checkpoint))
    return not folder or folder in {osp.basename(osp.abspath(each)) for each in work_dirs}


def complete(evaluation: dict) -> dict:
    """Add what mmdet does not log of an evaluation without a single detection."""
    # The names of metrics start with their evaluator's, as in "coco/"; the rest is timing.
    measured = any("/" in key for key in evaluation)
    return evaluation if measured else {**NOTHING_DETECTED, **evaluation}


def before(records: list[dict], step: int) -> list[dict]:
    """Keep the records of earlier steps."""
    return [record for record in records if record["step"] < step]


def find_checkpoint(work_dir: str) -> str:
    """Find the last checkpoint that can be read, which has to be there."""
    checkpoint = latest_checkpoint(work_dir)
    if checkpoint is None:
        raise UsageError(f"{work_dir} holds no checkpoint: train for an epoch first")
    return checkpoint


def latest_checkpoint(work_dir: str) -> str | None:
    """Find the last checkpoint that can be read, None if the first was never finished.

    mmengine notes its path as of the training; its file is looked for where the work dir is now.
    A run that is killed while it writes may leave half of a file, or no note. Then the newest file
    that is whole is the last checkpoint.

    Raises:
        UsageError: mmengine noted a checkpoint, and none is whole.
    """
    # Not what tools/publish.py puts beside them.
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


def time_unit(training: list[dict]) -> str:
    """Tell what mmengine numbered the evaluations by."""
    return "epoch" if "epoch" in training[-1] else "iteration"
