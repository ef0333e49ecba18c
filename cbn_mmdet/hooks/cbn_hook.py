# Licensed under the Apache License, Version 2.0.
"""Cross-Iteration Batch Normalization in an mmengine run."""

from __future__ import annotations

import math
import os
import os.path as osp
from glob import glob

import torch
from mmengine.dist import all_gather_object, all_reduce_params, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ..norm import diagnose, link, load_window_state, set_window, window_state
from ..norm.diagnostics import LARGE_CLAMPED, LARGE_CORRECTION, Diagnosis
from ..norm.iteration import cbn_layers, end_iteration
from ..norm.layer import check_count


@HOOKS.register_module()
class CBNHook(Hook):
    """Links every CBN to its convolution, holds the burn-in, and ends each iteration.

    Early in training the weights move too fast for a first-order compensation, so the window is
    held at 1 first, which is batch normalisation: 3 epochs on COCO in the paper.

    In distributed training the running statistics are averaged over the processes at the end of
    each iteration, so that every process evaluates with the same ones, and a checkpoint has them.
    (Which layers train must not differ between processes.) Windows stay with their process.

    After a resume the window starts empty and fills again within ``window_size - 1`` iterations,
    unless ``save_window`` is set.

    It logs, beside the losses,

    - ``cbn/window_size``: the window size in force;
    - ``cbn/clamped``: the fraction of compensated past variances in this iteration that came out
      negative and were cut to zero. Much above 0 means that the weights move too fast for the
      window: lengthen the burn-in or narrow the window.

    and every ``diagnose_every`` iterations, of what :func:`cbn_mmdet.diagnose` tells of each layer,

    - ``cbn/correction`` and ``cbn/worst_correction``: by how many standard deviations the
      compensation moves past means, in the mean over the layers and in the worst of them, whose
      name the log has;
    - ``cbn/noise``: how many standard deviations the last batch's means are from the window's.

    It warns once, by the name of the worst layer, when a diagnosis finds more than 5 % of a layer's
    past variances cut to zero, or its correction above 0.3; without ``diagnose_every`` it makes one
    when more than 5 % of all layers' are cut. In distributed training these figures are those of
    rank 0; of NaN or infinite values each process tells by itself.

    Args:
        burn_in: Length of the burn-in, at least 0, less than the run.
        by_epoch: Whether ``burn_in`` counts epochs (True) or iterations (False).
        save_window: Whether each process writes its windows to the work dir with every checkpoint,
            as ``cbn_window_iter_{iteration}_rank{rank}.pth``, for a resume from it to start with.
            The last two stay, each of ``window_size - 1`` times the size of the weights that CBN
            follows.
        diagnose_every: Iterations from one diagnosis to the next, 0 for none. Each reads all
            windows once. The noise takes a ``window_size`` of 3 or more.

    Raises:
        ValueError: An argument is not of its kind, or (at the start of training) ``burn_in`` is
            not shorter than the run.
    """

    # Before whatever reads the running statistics after an iteration, EMAHook for one.
    priority = "ABOVE_NORMAL"

    def __init__(
        self,
        burn_in: int = 3,
        by_epoch: bool = True,
        save_window: bool = False,
        diagnose_every: int = 0,
    ) -> None:
        for name, value, meaning in (
            ("burn_in", burn_in, "epochs (or iterations with by_epoch=False)"),
            ("diagnose_every", diagnose_every, "iterations (0 for no diagnosis)"),
        ):
            check_count("CBNHook", name, value, meaning, least=0)
        for name, value in (("by_epoch", by_epoch), ("save_window", save_window)):
            if not isinstance(value, bool):
                raise ValueError(f"CBNHook: {name} must be True or False, got {value!r}.")
        self.burn_in = burn_in
        self.by_epoch = by_epoch
        self.save_window = save_window
        self.diagnose_every = diagnose_every
        self._full_window = 1
        self._saves = False  # once training has begun
        self._checkpoint: str | None = None
        self._checked_modes = False
        self._warned_of_doubt = False

    def before_train(self, runner) -> None:
        """Links the model and checks the burn-in against the length of the run."""
        model = unwrapped(runner.model)
        linked = link(model)
        if linked == 0:
            runner.logger.warning(
                "CBNHook: the model contains no CBN layer, so the hook does nothing. Set "
                "norm_cfg=dict(type='CBN') where the model should use it, or remove the hook. "
                "(A config with sync_bn turns every CBN into SyncBN.)"
            )
            return
        unit, length = (
            ("epochs", runner.max_epochs) if self.by_epoch else ("iterations", runner.max_iters)
        )
        if self.burn_in >= length:
            raise ValueError(
                f"CBNHook: burn_in={self.burn_in} {unit} is not shorter than the run of {length} "
                f"{unit}, so the window would never open. Set a shorter burn_in"
                + (", or count iterations with by_epoch=False." if self.by_epoch else ".")
            )
        self._full_window = max(layer.window_size for layer in cbn_layers(model).values())
        self._hold(runner)
        if self.diagnose_every > 0 and self._full_window < 3:
            what = "nothing" if self._full_window == 1 else "no noise"
            runner.logger.warning(
                f"CBNHook: diagnose_every={self.diagnose_every} can tell {what} of a window_size "
                f"of {self._full_window}: it takes 3 or more."
            )
        runner.logger.info(
            f"CBNHook: {linked} CBN layers, whose window of {self._full_window} "
            + (f"opens after {self.burn_in} {unit}." if self.burn_in else "is open from the start.")
        )
        self._saves, self._checkpoint = self.save_window, _last_checkpoint()
        if self._saves and runner.iter > 0:
            self._load_window(runner)

    def before_train_epoch(self, runner) -> None:
        """Opens the window after a burn-in that counts epochs."""
        self._save_window(runner)
        if self.by_epoch:
            self._hold(runner)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Opens the window after a burn-in that counts iterations."""
        self._save_window(runner)
        if not self.by_epoch:
            self._hold(runner)
        if not self._checked_modes:
            self._checked_modes = True
            self._warn_of_idle_layers(runner)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Ends the iteration and logs it."""
        model = unwrapped(runner.model)
        clamped, warning = end_iteration(model)
        if warning:
            # mmengine keeps what is no error of the other processes to itself.
            log = runner.logger.warning if get_rank() == 0 else runner.logger.error
            log(f"CBNHook: {warning}")
        if get_world_size() > 1:
            _average_running_statistics(model)
        fraction = 0.0 if clamped is None else clamped.item()
        _log("window_size", self._in_force(runner))
        _log("clamped", fraction)
        is_time = self.diagnose_every > 0 and (runner.iter + 1) % self.diagnose_every == 0
        is_suspicious = fraction > LARGE_CLAMPED and not self._warned_of_doubt
        if is_time or is_suspicious:
            found = diagnose(model)
            if found:
                self._warn_of_doubt(runner, found)
            if found and is_time:
                _log_diagnosis(runner, found)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Writes the windows before the checkpoint, so that a death between the two spoils none.

        Only the process of rank 0 gets here; the others write theirs when they go on.
        """
        self._save_window(runner, checkpoint["meta"]["iter"])

    def before_val_epoch(self, runner) -> None:
        """Writes the windows if a checkpoint was just written."""
        self._save_window(runner)

    def after_train(self, runner) -> None:
        """Writes the windows if a checkpoint was just written."""
        self._save_window(runner)

    def _save_window(self, runner, iteration: int | None = None) -> None:
        """Writes the windows if a checkpoint was written, or begun, since the last call.

        Only the process of rank 0 writes checkpoints, but all of them learn of it.
        """
        checkpoint = _last_checkpoint()
        if not self._saves or checkpoint == self._checkpoint:
            return
        self._checkpoint = checkpoint
        saved = dict(
            checkpoint=checkpoint,
            world_size=get_world_size(),
            windows=window_state(unwrapped(runner.model)),
        )
        path = _window_path(runner, runner.iter if iteration is None else iteration)
        try:
            # An interrupted write must not leave a file that a resume would stumble over.
            torch.save(saved, path + ".part")
            os.replace(path + ".part", path)
        except (OSError, RuntimeError) as error:
            runner.logger.warning(f"CBNHook: the windows were not saved, as {error}.")
        # The one before stays: rank 0 may not have finished the checkpoint that this one is for.
        written = sorted(_window_files(runner), key=osp.getmtime)
        for useless in [*written[:-2], *_window_files(runner, ".part")]:
            os.remove(useless)

    def _load_window(self, runner) -> None:
        """Fills the windows of a resumed run, or tells why they start empty.

        They do on all processes or on none: an interruption can fall between two of their files,
        and with ``sync`` the windows hold the same statistics everywhere.
        """
        reasons = [why for why in all_gather_object(self._fill_window(runner)) if why]
        if not reasons:
            return
        set_window(unwrapped(runner.model), 1)  # a change forgets what some have loaded
        self._hold(runner)
        runner.logger.warning(
            f"CBNHook: the windows start empty, as {reasons[0]}. They fill within "
            f"{self._full_window - 1} iterations."
        )

    def _fill_window(self, runner) -> str | None:
        """Fills the windows of this process, or returns why that cannot be."""
        path = _window_path(runner, runner.iter)
        if not osp.isfile(path):
            return f"there is no {path}"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way
            return f"{path} cannot be read ({type(error).__name__})"
        # The name that the checkpoint was written under, which it keeps wherever it is moved.
        for name, now in (("checkpoint", _last_checkpoint()), ("world_size", get_world_size())):
            if saved[name] != now:
                return f"{path} is of {name} {saved[name]}, the run of {name} {now}"
        try:
            load_window_state(unwrapped(runner.model), saved["windows"])
        except ValueError as error:
            return str(error)
        return None

    def _warn_of_idle_layers(self, runner) -> None:
        """Tells of layers that the model keeps in evaluation mode, as detectors do by default."""
        layers = cbn_layers(unwrapped(runner.model))
        idle = [name for name, layer in layers.items() if not layer.training]
        if idle:
            runner.logger.warning(
                f"CBNHook: {len(idle)} of {len(layers)} CBN layers are in evaluation mode while "
                f"the model trains, '{idle[0]}' first: they normalise with frozen running "
                "statistics. To train them, set norm_eval=False and frozen_stages=-1 in the "
                "backbone; to keep them frozen, leave their norm at BN."
            )

    def _warn_of_doubt(self, runner, found: dict[str, Diagnosis]) -> None:
        doubtful = [name for name in found if found[name].is_doubtful]
        if not doubtful or self._warned_of_doubt:
            return
        self._warned_of_doubt = True
        name = max(doubtful, key=lambda name: found[name].correction)
        runner.logger.warning(
            f"CBNHook: the weights move too fast for the window: '{name}' is the worst of "
            f"{len(doubtful)} CBN layers (of {len(found)}) whose past means are moved by more than "
            f"{LARGE_CORRECTION} standard deviations (its: {found[name].correction:.2f}) or of "
            f"whose past variances more than {LARGE_CLAMPED:.0%} are cut to zero (its: "
            f"{found[name].clamped:.0%}). Lengthen burn_in, narrow window_size, or lower the "
            "learning rate."
        )

    def _hold(self, runner) -> None:
        set_window(unwrapped(runner.model), self._in_force(runner))

    def _in_force(self, runner) -> int:
        done = runner.epoch if self.by_epoch else runner.iter
        return 1 if done < self.burn_in else self._full_window


def _log(name: str, value: float) -> None:
    MessageHub.get_current_instance().update_scalar(f"train/cbn/{name}", value)


def _log_diagnosis(runner, found: dict[str, Diagnosis]) -> None:
    corrections = {name: each.correction for name, each in found.items()}
    worst = max(corrections, key=corrections.__getitem__)
    correction = sum(corrections.values()) / len(found)
    noises = [each.noise for each in found.values() if not math.isnan(each.noise)]
    _log("correction", correction)
    _log("worst_correction", corrections[worst])
    told = f"correction {correction:.4f}, worst {corrections[worst]:.4f} in '{worst}'"
    if noises:
        noise = sum(noises) / len(noises)
        _log("noise", noise)
        told += f"; noise {noise:.4f}"
    runner.logger.info(f"CBNHook: {told}; {len(found)} layers, in standard deviations.")


def _average_running_statistics(model) -> None:
    """Averages what the layers learnt of their own process's images over the processes.

    Doing so after each iteration leaves the same average as doing it once, since running
    statistics are linear in what they average. A process whose batch was empty counts as one that
    did not change them.
    """
    buffers = [
        buffer
        for layer in cbn_layers(model).values()
        if layer.training and layer.track_running_stats
        for buffer in (layer.running_mean, layer.running_var)
    ]
    if buffers:
        all_reduce_params(buffers, op="mean")


def _last_checkpoint() -> str | None:
    return MessageHub.get_current_instance().get_info("last_ckpt")


def _window_path(runner, iteration: int | str) -> str:
    return osp.join(runner.work_dir, f"cbn_window_iter_{iteration}_rank{get_rank()}.pth")


def _window_files(runner, ending: str = "") -> list[str]:
    names = glob(osp.basename(_window_path(runner, "*")) + ending, root_dir=runner.work_dir)
    return [osp.join(runner.work_dir, name) for name in names]


def unwrapped(model):
    """The model inside of any wrapper, DDP's say."""
    while is_model_wrapper(model):
        model = model.module
    return model
