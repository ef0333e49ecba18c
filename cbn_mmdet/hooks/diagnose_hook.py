# Licensed under the Apache License, Version 2.0.
"""The hook that logs figures of the layers' windows during a run."""

from __future__ import annotations

import math

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..norm import diagnose
from ..norm.diagnostics import LARGE_CLAMPED, LARGE_CORRECTION, Diagnosis
from ..norm.layer import check_count
from .cbn_hook import log_scalar
from .precise_stats_hook import unwrapped


@HOOKS.register_module()
class DiagnoseHook(Hook):
    """Logs the figures of :func:`cbn_mmdet.diagnose`; to be used beside ``CBNHook``.

    - ``cbn/correction`` and ``cbn/worst_correction``: by how many standard deviations the
      compensation moves past means, as the mean over the layers and in the worst layer, which the
      log names;
    - ``cbn/noise``: how many standard deviations the last batch's means were from the past's;
    - ``cbn/lag``: whether batches deviate in the same direction time after time, from -1 to 1, as
      the mean over the layers: well above 0, the past lags behind what earlier layers do.

    The log also names the layers with the narrowest and the widest window, if their sizes differ.
    One warning names the worst layer when more than 5 % of a layer's past variances are cut to
    zero, or its correction is above 0.3. In distributed training the figures are those of rank 0.

    Args:
        interval: Iterations between two diagnoses, each of which reads all windows once.

    Raises:
        ValueError: ``interval`` is not a whole number of at least 1.
    """

    # Runs after CBNHook, which ends the iteration.
    priority = "NORMAL"

    def __init__(self, interval: int = 50) -> None:
        check_count("DiagnoseHook", "interval", interval, "iterations")
        self.interval = interval
        self._has_warned = False

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Logs a diagnosis every ``interval`` iterations."""
        if self.every_n_train_iters(runner, self.interval):
            found = diagnose(unwrapped(runner.model))
            if found:
                self._warn(runner, found)
                _log(runner, found)

    def _warn(self, runner, found: dict[str, Diagnosis]) -> None:
        doubtful = [name for name in found if found[name].is_doubtful]
        if not doubtful or self._has_warned:
            return
        self._has_warned = True
        name = max(doubtful, key=lambda name: found[name].correction)
        runner.logger.warning(
            f"DiagnoseHook: the weights move too fast for the window: '{name}' is the worst of "
            f"{len(doubtful)} CBN layers (of {len(found)}) whose past means are moved by more than "
            f"{LARGE_CORRECTION} standard deviations (its: {found[name].correction:.2f}) or of "
            f"whose past variances more than {LARGE_CLAMPED:.0%} are cut to zero (its: "
            f"{found[name].clamped:.0%}). Lengthen burn_in, narrow window_size, or lower the "
            "learning rate."
        )


def _log(runner, found: dict[str, Diagnosis]) -> None:
    worst = max(found, key=lambda name: found[name].correction)
    correction = sum(each.correction for each in found.values()) / len(found)
    log_scalar("correction", correction)
    log_scalar("worst_correction", found[worst].correction)
    told = f"correction {correction:.4f}, worst {found[worst].correction:.4f} in '{worst}'"
    noises = [each.noise for each in found.values() if not math.isnan(each.noise)]
    if noises:
        noise = sum(noises) / len(noises)
        log_scalar("noise", noise)
        told += f"; noise {noise:.4f}"
    told += f"; {len(found)} layers, in standard deviations"
    lag = sum(each.lag for each in found.values()) / len(found)
    log_scalar("lag", lag)
    told += f"; lag {lag:.2f}"
    names = list(found)  # from the narrowest window to the widest
    narrowest, widest = names[0], names[-1]
    if found[narrowest].window_size < found[widest].window_size:
        told += (
            f"; windows from {found[narrowest].window_size:.1f} in '{narrowest}' to "
            f"{found[widest].window_size:.1f} in '{widest}'"
        )
    runner.logger.info(f"DiagnoseHook: {told}.")
