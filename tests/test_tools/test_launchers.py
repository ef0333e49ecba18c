"""How processes start without a GPU and with some, and what the runner loads."""

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
