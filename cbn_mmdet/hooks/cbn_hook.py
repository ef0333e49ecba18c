# Licensed under the Apache License, Version 2.0.
"""Cross-Iteration Batch Normalization in an mmengine run."""

from __future__ import annotations

import numbers

from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ..norm import link, set_window, step
from ..norm.iteration import cbn_layers


@HOOKS.register_module()
class CBNHook(Hook):
    """Links every CBN to its convolution, holds the burn-in, and ends each iteration.

    Early in training the weights move too fast for a first-order compensation, so the window is
    held at 1 first, which is batch normalisation: 3 epochs on COCO in the paper. After a
    resume the window starts empty and fills again within ``window_size - 1`` iterations.

    It logs, beside the losses,

    - ``cbn/window_size``: the window size in force;
    - ``cbn/clamped``: the fraction of compensated past variances in this iteration that came out
      negative and were cut to zero. Much above 0 means that the weights move too fast for the
      window: lengthen the burn-in or narrow the window.

    Args:
        burn_in: Length of the burn-in, at least 0, less than the run.
        by_epoch: Whether ``burn_in`` counts epochs (True) or iterations (False).

    Raises:
        ValueError: ``burn_in`` or ``by_epoch`` is not of its kind, or (at the start of training)
            ``burn_in`` is not shorter than the run.
    """

    def __init__(self, burn_in: int = 3, by_epoch: bool = True) -> None:
        if not isinstance(burn_in, numbers.Integral) or isinstance(burn_in, bool) or burn_in < 0:
            raise ValueError(
                "CBNHook: burn_in must be a whole number of epochs (or of iterations with "
                f"by_epoch=False), at least 0, got {burn_in!r}."
            )
        if not isinstance(by_epoch, bool):
            raise ValueError(f"CBNHook: by_epoch must be True or False, got {by_epoch!r}.")
        self.burn_in = burn_in
        self.by_epoch = by_epoch
        self._full_window = 1
        self._checked_modes = False

    def before_train(self, runner) -> None:
        """Links the model and checks the burn-in against the length of the run."""
        model = _unwrapped(runner.model)
        if link(model) == 0:
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

    def before_train_epoch(self, runner) -> None:
        """Opens the window after a burn-in that counts epochs."""
        if self.by_epoch:
            self._hold(runner)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Opens the window after a burn-in that counts iterations."""
        if not self.by_epoch:
            self._hold(runner)
        if not self._checked_modes:
            self._checked_modes = True
            self._warn_of_idle_layers(runner)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Ends the iteration and logs it."""
        clamped = step(_unwrapped(runner.model))
        hub = MessageHub.get_current_instance()
        hub.update_scalar("train/cbn/window_size", self._in_force(runner))
        hub.update_scalar("train/cbn/clamped", 0.0 if clamped is None else clamped.item())

    def _warn_of_idle_layers(self, runner) -> None:
        """Tells of layers that the model keeps in evaluation mode, as detectors do by default."""
        layers = cbn_layers(_unwrapped(runner.model))
        idle = [name for name, layer in layers.items() if not layer.training]
        if idle:
            runner.logger.warning(
                f"CBNHook: {len(idle)} of {len(layers)} CBN layers are in evaluation mode while "
                f"the model trains, '{idle[0]}' first: they normalise with frozen running "
                "statistics. To train them, set norm_eval=False and frozen_stages=-1 in the "
                "backbone; to keep them frozen, leave their norm at BN."
            )

    def _hold(self, runner) -> None:
        set_window(_unwrapped(runner.model), self._in_force(runner))

    def _in_force(self, runner) -> int:
        done = runner.epoch if self.by_epoch else runner.iter
        return 1 if done < self.burn_in else self._full_window


def _unwrapped(model):
    while is_model_wrapper(model):
        model = model.module
    return model
