"""How processes start without a GPU and with some, and what the runner loads."""

import os
import subprocess
import sys
import time

import pytest
import torch
from common.errors import UsageError
from common.launchers import CarefulRunner, start_processes
from mmengine.config import Config
from mmengine.hooks import Hook
from torch import nn


def test_processes_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    start_processes(Config(dict(launcher="none")))
    with pytest.raises(UsageError, match="start the tool with torchrun"):
        start_processes(Config(dict(launcher="pytorch")))
    with pytest.raises(UsageError, match="--launcher slurm needs GPUs"):
        start_processes(Config(dict(launcher="slurm")))


def test_a_cache_of_yapf_that_another_process_is_writing(root, tmp_path):
    """Its first import writes a cache, which is in place while it is still empty."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(root / "tools")}
    subprocess.run([sys.executable, "-c", "import yapf"], env=env, check=True)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*.pickle")}
    assert whole
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2])
    failing = subprocess.run([sys.executable, "-c", "import yapf"], env=env, capture_output=True)
    assert failing.returncode == 1
    code = "from common.launchers import import_yapf; print(flush=True); import_yapf(); import yapf"
    waiting = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    waiting.stdout.readline()
    time.sleep(0.5)
    for path, content in whole.items():
        path.write_bytes(content)
    assert waiting.wait(60) == 0


def test_processes_with_gpus(monkeypatch):
    """Each process needs a GPU, and the launcher must have started the processes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(UsageError, match="--launcher slurm: start the tool with srun"):
        start_processes(Config(dict(launcher="slurm")))
    monkeypatch.setenv("RANK", "0")
    for processes in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        start_processes(Config(dict(launcher="pytorch")))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"3 processes were started on a machine with 2 GPU"):
        start_processes(Config(dict(launcher="pytorch")))


@pytest.mark.parametrize(
    "error", [AttributeError("no attribute"), torch.cuda.OutOfMemoryError("out of memory")]
)
def test_a_good_checkpoint_is_not_blamed(error, tmp_path):
    """A hook that fails after the read, or a GPU that is too small, is to blame."""

    class Mistaken(Hook):
        def after_load_checkpoint(self, runner, checkpoint):
            raise error

    path, model = tmp_path / "good.pth", nn.Linear(2, 2)
    torch.save(dict(state_dict=model.state_dict()), path)
    runner = CarefulRunner(model, str(tmp_path), custom_hooks=[Mistaken()])
    with pytest.raises(type(error), match=str(error)):
        runner.load_checkpoint(str(path))
