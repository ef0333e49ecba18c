# Licensed under the Apache License, Version 2.0.
"""The hook that runs Cross-Iteration Batch Normalization in mmengine."""

from __future__ import annotations

import torch
from mmengine.dist import all_reduce_params, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.logging import MessageHub
from mmengine.optim import BaseOptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.utils import apply_to
from torch.nn.modules.batchnorm import _BatchNorm

from ..norm import CBN, link, links, load_window_state, set_window, window_state
from ..norm.diagnostics import LARGE_APART, LARGE_CLAMPED, diagnose
from ..norm.iteration import cbn_layers, end_iteration
from ..norm.layer import NormLayer, check_count
from .precise_stats_hook import PreciseStatsHook, images_per_step, unwrapped

_KEY = "cbn_windows"  # of the windows in a checkpoint
MOMENTUM, LARGEST_MOMENTUM = 0.02, 0.1  # for each image of a step, and at most


@HOOKS.register_module()
class CBNHook(Hook):
    """Links every CBN to its convolution, holds the burn-in, and ends each iteration.

    Early in training the weights move too fast for a first-order compensation. So the hook first
    holds the window at 1, which is batch normalisation: for 3 epochs on COCO in the paper.

    In distributed training, each process keeps its own windows. Running statistics are averaged
    over the processes before they are read: before an evaluation or a checkpoint, and with
    ``EMAHook`` in each iteration. So every process evaluates with the same statistics. (Which
    layers train must not differ between processes.)

    Checkpoints contain the windows, and a resumed run continues with them: on one process as if it
    had not been interrupted; on several, all take those of rank 0, which writes checkpoints. A run
    resumed with another ``window``, ``window_size`` or ``compensate``, or from a checkpoint without
    windows, starts with empty windows and says so.

    The hook logs, beside the losses,

    - ``cbn/window_size``: the mean window size of the layers: 1 in a burn-in, else the size in
      force, or the sizes found by windows that set their own;
    - ``cbn/clamped``: the fraction of compensated past variances in this iteration that came out
      negative and were cut to zero. Much above 0 means that the weights move too fast for the
      window: lengthen the burn-in or narrow the window. The hook warns of this once.

    In distributed training these figures are those of rank 0, but each process reports its own NaN
    or infinite values. At the start of training the hook warns of a ``momentum`` that is for larger
    batches. A loss scaler is found where mmengine's ``AmpOptimWrapper`` has it.

    Args:
        burn_in: Length of the burn-in, at least 0 and shorter than the run.
        by_epoch: Whether ``burn_in`` counts epochs (True) or iterations (False). An iteration is a
            forward: with ``accumulative_counts``, several make one update.
        save_window: Whether checkpoints contain the windows. A moving window has the size of the
            weight that it follows, a sliding one ``window_size - 1`` times that.

    Raises:
        ValueError: An argument has a wrong type or value, or (at the start of training)
            ``burn_in`` is not shorter than the run, or there is a second CBNHook.
    """

    # Runs before hooks that read the running statistics after an iteration, such as EMAHook.
    priority = "ABOVE_NORMAL"

    def __init__(self, burn_in: int = 3, by_epoch: bool = True, save_window: bool = True) -> None:
        meaning = "epochs (or iterations with by_epoch=False)"
        check_count("CBNHook", "burn_in", burn_in, meaning, least=0)
        for name, value in (("by_epoch", by_epoch), ("save_window", save_window)):
            if not isinstance(value, bool):
                raise ValueError(f"CBNHook: {name} must be True or False, got {value!r}.")
        self.burn_in = burn_in
        self.by_epoch = by_epoch
        self.save_window = save_window
        self._loaded: dict | None = None  # windows from a checkpoint
        self._has_checked_modes = False
        self._has_checked_calls = False
        self._has_told_links = False
        self._has_warned = False
        self._is_read_each_time = False
        self._differs = False  # whether running statistics differ between the processes

    # Link.

    def before_train(self, runner) -> None:
        """Links the model and checks the burn-in against the length of the run."""
        model = unwrapped(runner.model)
        linked = link(model) if cbn_layers(model) else 0
        if linked == 0:
            runner.logger.warning(
                "CBNHook: the model contains no CBN layer, so the hook does nothing. Set "
                "norm_cfg=dict(type='CBN') where the model should use it, or remove the hook. "
                "(A config with sync_bn turns every CBN into SyncBN.)"
            )
            return
        if sum(isinstance(hook, CBNHook) for hook in runner.hooks) > 1:
            raise ValueError(
                "CBNHook: custom_hooks has more than one, each with a burn-in of its own: keep one."
            )
        self.check_length(runner.max_epochs, runner.max_iters)
        self._hold(runner)
        # Ends an empty iteration, so that the run's first one knows the scale of its gradients.
        end_iteration(model, _loss_scaler(runner))
        unit = "epochs" if self.by_epoch else "iterations"
        sizes = sorted({str(layer.window_size) for layer in cbn_layers(model).values()})
        runner.logger.info(
            f"CBNHook: {linked} CBN layers, whose window (window_size={', '.join(sizes)}) "
            + (f"opens after {self.burn_in} {unit}." if self.burn_in else "is open from the start.")
        )
        self._is_read_each_time = any(isinstance(hook, EMAHook) for hook in runner.hooks)
        windows, self._loaded = self._loaded, None
        if runner.iter > 0:
            self._fill(runner, windows)

    def check_length(self, epochs: int, iterations: int | None) -> None:
        """Checks that the window opens within a run of this length (None: unknown, no check).

        Raises:
            ValueError: ``burn_in`` is not shorter than the run.
        """
        unit, length = ("epochs", epochs) if self.by_epoch else ("iterations", iterations)
        if length is not None and self.burn_in >= length:
            raise ValueError(
                f"CBNHook: burn_in={self.burn_in} {unit} is not shorter than the run of {length} "
                f"{unit}, so the window would never open. Set a shorter burn_in"
                + (", or count iterations with by_epoch=False." if self.by_epoch else ".")
            )

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Warns of layers that the model keeps in evaluation mode, as detectors do by default."""
        if not self.by_epoch:
            self._hold(runner)
        if self._has_checked_modes:
            return
        self._has_checked_modes = True
        model = unwrapped(runner.model)
        layers = cbn_layers(model)
        idle = [name for name, layer in layers.items() if not layer.training]
        plain = plain_batch_norms(model)
        if plain and layers:
            runner.logger.warning(
                f"CBNHook: {len(plain)} batch norms that are no CBN train beside {len(layers)} CBN "
                "layers. Some models build norms that no norm_cfg reaches: "
                f"cbn_mmdet.from_batchnorm turns them into CBN. They are {', '.join(plain)}."
            )
        if idle:
            runner.logger.warning(
                f"CBNHook: {len(idle)} of {len(layers)} CBN layers are in evaluation mode while "
                f"the model trains, '{idle[0]}' first: they normalise with frozen running "
                "statistics. To train them, set norm_eval=False and frozen_stages=-1 in the "
                "backbone; to keep them frozen, leave their norm at BN."
            )

        self._tell_momentum(runner, layers)

    def _tell_momentum(self, runner, layers: dict[str, CBN]) -> None:
        """Warns of running statistics over so few images that evaluation suffers."""
        images = images_per_step(runner.train_loop.dataloader)
        if images is None or any(isinstance(hook, PreciseStatsHook) for hook in runner.hooks):
            return
        images *= get_world_size()  # before an evaluation the processes' averages are averaged
        right = momentum_for(images)
        for name, layer in layers.items():
            is_default = layer.backward != "current" and layer.window != "step"  # the others' own
            if not (is_default and layer.training and layer.tracks and layer.own_window_size > 1):
                continue
            if layer.momentum and layer.momentum >= 2 * right:
                runner.logger.warning(
                    f"CBNHook: '{name}' has momentum={layer.momentum:g}: its running statistics, "
                    f"which evaluation uses, average over {images / layer.momentum:.0f} images. "
                    f"Set momentum={right:g} in its norm_cfg ({MOMENTUM:g} for each image of a "
                    f"forward, at most {LARGEST_MOMENTUM:g})."
                )
                return

    # Burn-in.

    def before_train_epoch(self, runner) -> None:
        """Opens the window after a burn-in that counts epochs."""
        if self.by_epoch:
            self._hold(runner)

    def _hold(self, runner) -> None:
        size, model = 1 if self._done(runner) < self.burn_in else None, unwrapped(runner.model)
        if cbn_layers(model):
            set_window(model, size)

    def _done(self, runner) -> int:
        return runner.epoch if self.by_epoch else runner.iter

    # Step, and log.

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Ends the iteration and logs its figures."""
        model = unwrapped(runner.model)
        updated = _has_updated(runner.optim_wrapper)
        ended = end_iteration(model, _loss_scaler(runner), updated)
        if ended.dropped:
            # mmengine logs nothing below an error for processes other than rank 0.
            log = runner.logger.warning if get_rank() == 0 else runner.logger.error
            log(f"CBNHook: {ended.dropped}")
        if ended.narrow:
            runner.logger.warning(f"CBNHook: {ended.narrow}")
        self._differs = get_world_size() > 1
        if self._is_read_each_time or _is_saved(self, runner):
            self._average(runner)
        fraction = 0.0 if ended.clamped is None else ended.clamped.item()
        if not self._has_told_links:
            self._tell_links(runner, model)
        layers = cbn_layers(model).values()
        if layers:
            log_scalar("window_size", sum(each.mean_window_size for each in layers) / len(layers))
        log_scalar("clamped", fraction)
        if fraction > LARGE_CLAMPED and not self._has_warned:
            self._has_warned = True
            runner.logger.warning(
                "CBNHook: the weights move too fast for the window: of past variances "
                f"{fraction:.0%} are cut to zero. Lengthen burn_in, narrow window_size, or lower "
                "the learning rate. dict(type='DiagnoseHook') names the layers."
            )

    def _tell_links(self, runner, model) -> None:
        """Warns of layers that compensate='where_possible' left out in the first iteration."""
        self._has_told_links = True
        left_out = [f"'{name}'" for name, by in links(model).items() if by == "(not compensated)"]
        if left_out:
            runner.logger.warning(
                f"CBNHook: {len(left_out)} CBN layers are not compensated, as "
                f"compensate='where_possible' allows: {', '.join(left_out)}."
            )

    def after_train_epoch(self, runner) -> None:
        """Averages running statistics over processes for hooks that read them after an epoch."""
        self._average(runner)

    def before_val_epoch(self, runner) -> None:
        """Averages running statistics over processes for an evaluation during training."""
        self._average(runner)
        if not self._has_checked_calls:
            self._check_calls(runner)

    def _check_calls(self, runner) -> None:
        """Warns of a layer whose calls differ in their means: evaluation averages them."""
        found = diagnose(unwrapped(runner.model))
        self._has_checked_calls = bool(found)
        worst = max(found, key=lambda name: found[name].apart, default=None)
        if worst is not None and found[worst].apart > LARGE_APART:
            runner.logger.warning(
                f"CBNHook: '{worst}' is called several times in a forward, on maps whose means are "
                f"{found[worst].apart:.2f} standard deviations apart. Training normalises each "
                "call with a window of its own, evaluation all with one running average, as BN "
                "does: give each call its own layer (as RetinaSepBNHead does), or use GN there."
            )

    def _average(self, runner) -> None:
        """Averages running statistics over processes, if they changed since the last average.

        (Averaging equal numbers may change their last bit.) When and how often this is done does
        not change the final average, since running statistics are linear in what they average. A
        process whose batch was empty counts as one that did not change them.
        """
        if not self._differs:
            return
        self._differs = False
        buffers = [
            buffer
            for layer in cbn_layers(unwrapped(runner.model)).values()
            if layer.training and layer.tracks
            for buffer in (layer.running_mean, layer.running_var)
        ]
        if buffers:
            all_reduce_params(buffers, op="mean")

    # Windows in checkpoints.

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Adds the windows to the checkpoint. Only the process of rank 0 gets here."""
        if self.save_window:
            state = window_state(unwrapped(runner.model))
            checkpoint[_KEY] = apply_to(state, torch.is_tensor, torch.Tensor.cpu)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keeps the checkpoint's windows until the model is linked."""
        self._loaded = checkpoint.get(_KEY)

    def _fill(self, runner, windows: dict | None) -> None:
        """Fills the windows of a resumed run, or warns why they start empty."""
        try:
            if windows is None:
                if self._done(runner) <= self.burn_in:
                    return  # in a burn-in, they would have been empty
                raise ValueError("the checkpoint has none (save_window=False, or another norm).")
            load_window_state(unwrapped(runner.model), windows)
        except ValueError as error:
            runner.logger.warning(f"CBNHook: the windows start empty, and fill anew: {error}")


def _has_updated(wrapper: BaseOptimWrapper) -> bool:
    """Whether all optimisers stepped in this iteration; assumed for wrappers that cannot tell."""
    each = _each_of(wrapper)
    return all(one.should_update() for one in each if hasattr(one, "should_update"))


def _loss_scaler(runner) -> object:
    """The loss scaler of mmengine's mixed precision; with several optimisers, the first one's.

    Their scalers start alike and see the same overflows, if one loss goes into all of them.
    """
    each = _each_of(runner.optim_wrapper)
    return next((one.loss_scaler for one in each if hasattr(one, "loss_scaler")), None)


def _each_of(wrapper: BaseOptimWrapper) -> list[BaseOptimWrapper]:
    """The wrapper of each optimiser, if ``wrapper`` holds several; else ``wrapper`` alone."""
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def _is_saved(hook: CBNHook, runner) -> bool:
    """Whether a checkpoint follows this iteration, in a loop that counts iterations."""
    return any(
        isinstance(each, CheckpointHook)
        and not each.by_epoch
        and (
            hook.every_n_train_iters(runner, each.interval, each.save_begin)
            or hook.is_last_train_iter(runner)
        )
        for each in runner.hooks
    )


def log_scalar(name: str, value: float) -> None:
    """Logs one of CBN's figures beside the losses."""
    MessageHub.get_current_instance().update_scalar(f"train/cbn/{name}", value)


def momentum_for(images: int) -> float:
    """The momentum with which running statistics average over some 50 images, or BN's usual one."""
    return min(LARGEST_MOMENTUM, round(MOMENTUM * images, 4))


def plain_batch_norms(model) -> list[str]:
    """The names of a model's batch norms that train and are not layers of this package."""
    return [
        f"'{name}' ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and not isinstance(module, NormLayer)
    ]
