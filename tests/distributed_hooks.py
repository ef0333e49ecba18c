"""mmengine hooks for the configs of test_distributed.py: they observe a training or harm it."""

import os
import signal
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SaveStates(Hook):
    """Saves each rank's state when the training ends; a checkpoint holds rank 0's alone."""

    def after_train(self, runner):
        path = os.path.join(runner.work_dir, f"state_rank{get_rank()}.pth")
        torch.save(runner.model.module.state_dict(), path)


@HOOKS.register_module()
class SeedIterations(Hook):
    """Makes an iteration sample the same regions whether or not the run was resumed before it.

    A detector samples with torch's random generator, whose state mmengine does not save.
    """

    def before_train_iter(self, runner, **kwargs):
        torch.manual_seed(2 * runner.iter + get_rank())


@HOOKS.register_module()
class KillRank1(Hook):
    """Kills rank 1 after iteration `after`, as the kernel does if memory runs out; 0: never."""

    def __init__(self, after=0):
        self.after = after

    def after_train_iter(self, runner, **kwargs):
        if runner.iter + 1 == self.after and get_rank() == 1:
            Path(runner.work_dir, "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
