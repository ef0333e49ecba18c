# Licensed under the Apache License, Version 2.0.
"""Kill trainings again and again, resume each, and compare what comes out.

A small detector trains on a few digits. A third of the kills comes at a random moment, a third
while a checkpoint is being written, and a third just after ``last_checkpoint`` names it, which is
when most can go wrong.
A training that reaches its end must hold the weights and windows of an undisturbed training, equal
to the last bit; then the next training begins.

Run it as ``python tests/kill_and_resume.py``. Its status is 1 if a training failed or differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "studies"))

from digits.build import build_digits  # noqa: E402  studies/ is in no package

# The files whose change triggers a kill, in turn; None kills at a random moment.
AIMS = (None, "epoch_*.pth", "last_checkpoint")
# SeedIterations: what torch draws in an iteration must not depend on the draws before a resume.
CONFIG = """
_base_ = "{root}/studies/digits/configs/faster-rcnn_r18_fpn_cbn-all_1xb2_digits.py"
custom_imports = dict(imports=["cbn_mmdet", "distributed_hooks"], allow_failed_imports=False)
custom_hooks = [
    dict(type="CBNHook", burn_in=1),
    dict(type="SeedIterations"),
]
data_root = "{data}/"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs={epochs})
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=20, help="how many kills (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their moments (0)")
    parser.add_argument("--epochs", type=int, default=6, help="length of a training (6)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(Path(folder), args.times, random.Random(args.seed), args.epochs)


def kill_and_resume(folder, times, moments, epochs):
    """Kills trainings `times` times in all, and lets each come to its end."""
    began = time.monotonic()
    data = build_digits(folder / "digits", num_train=12, num_val=4, progress=False)
    config = folder / "config.py"
    config.write_text(CONFIG.format(root=ROOT, data=data, epochs=epochs))
    start = time.monotonic()
    expected = finish(train(config, folder / "undisturbed"), folder / "undisturbed", epochs)
    length = time.monotonic() - start

    kills = halves = trainings = 0
    while kills < times:
        work_dir = folder / f"training{trainings}"
        process = train(config, work_dir)
        while kills < times and kill(
            process, work_dir, moments.random(), length, AIMS[kills % len(AIMS)]
        ):
            kills += 1
            written = work_dir.glob("epoch_*.pth")
            half = [path.name for path in written if not zipfile.is_zipfile(path)]
            halves += len(half)
            print(f"kill {kills}" + "".join(f", which left half of {name}" for name in half))
            process = train(config, work_dir)
        found = finish(process, work_dir, epochs)
        assert found.keys() == expected.keys()
        differing = [name for name in expected if not torch.equal(expected[name], found[name])]
        if differing:
            sys.exit(f"training {trainings} differs, in {differing[0]} first")
        trainings += 1
        print(f"training {trainings}: ended as the undisturbed one", flush=True)
    print(
        f"{kills} kills, {halves} of which left half a checkpoint; {trainings} trainings ended, "
        f"all equal to the undisturbed one to the last bit; {time.monotonic() - began:.0f} s"
    )


def train(config, work_dir):
    """Starts or resumes the training; its output goes to a file in the work dir."""
    work_dir.mkdir(exist_ok=True)
    command = [sys.executable, "tools/train.py", config, "--work-dir", work_dir, "--resume"]
    paths = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    with open(work_dir / "output.txt", "a") as output:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a kill also ends the data loader's workers
        )


def kill(process, work_dir, moment, length, aim):
    """Kills a training unless it ends first; returns whether it was killed.

    Args:
        process: The training.
        work_dir: Its work dir.
        moment: When to kill, from 0 to 1.
        length: The seconds from the start that a moment of 1 stands for.
        aim: A pattern of files, or None. The kill then comes within 50 ms of one being written.
    """
    before, start = aim and changed(work_dir, aim), time.monotonic()
    while aim or time.monotonic() - start < moment * length:
        if process.poll() is not None:
            return False
        if aim and changed(work_dir, aim) != before:
            time.sleep(0.05 * moment)
            break
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def changed(work_dir, pattern):
    """The time of the last change to any file that matches a pattern; None without a match."""
    try:
        return max((path.stat().st_mtime_ns for path in work_dir.glob(pattern)), default=None)
    except FileNotFoundError:
        return None  # mmengine deletes the oldest checkpoint before it writes another


def finish(process, work_dir, epochs):
    """Waits for a training to end, and reads its weights and the contents of its windows."""
    if process.wait() != 0:
        output = (work_dir / "output.txt").read_text()
        sys.exit(f"a training failed:\n{output[-3000:]}")
    path = work_dir / f"epoch_{epochs}.pth"
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    held = {
        f"window {call} of {name}, {key}": torch.as_tensor(value)
        for name, windows in checkpoint["cbn_windows"].items()
        for call, window in enumerate(windows)
        for key, value in window.items()
        if not isinstance(value, str)
    }
    assert held
    return {**checkpoint["state_dict"], **held}


if __name__ == "__main__":
    main()
