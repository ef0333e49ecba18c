"""The hook in real runs: what it logs and when, whom it names, and that it warns once."""

import re

import pytest
import torch
from mmengine.hooks import Hook
from test_hooks.test_cbn_hook import LENGTH, log_of, rows_of, runner
from torch import nn

from cbn_mmdet import CBN, DiagnoseHook, diagnose

FIGURES = ("cbn/correction", "cbn/worst_correction", "cbn/noise", "cbn/lag")


def train(folder, norm, interval=1, burn_in=0, epochs=1, *hooks):
    """Runs with DiagnoseHook, and logs one row for each iteration."""
    run, _ = runner(
        folder,
        dict(type="CBNHook", burn_in=burn_in),
        norm,
        epochs=epochs,
        more_hooks=[dict(type="DiagnoseHook", interval=interval)],
        log_processor=dict(window_size=1),
    )
    for hook in hooks:
        run.register_hook(hook)
    run.train()
    return run


def logged(folder):
    """The figures that each row of the log has."""
    return [[name in row for name in FIGURES] for row in rows_of(folder)]


@pytest.mark.parametrize("norm", [CBN(4), CBN(4, window="sliding", window_size=4)])
def test_what_is_logged(tmp_path, norm):
    """The hook logs every other iteration, mmengine repeats it; an empty window logs nothing."""
    run = train(tmp_path, norm, interval=2, burn_in=1, epochs=2)
    no, yes = [False] * 4, [True] * 4
    assert logged(tmp_path) == [no] * (LENGTH + 1) + [yes] * (LENGTH - 1)
    found = diagnose(run.model)["body.1"]  # the last iteration's
    assert found.correction > 0 and found.noise > 0 and found.lag != 0
    assert [rows_of(tmp_path)[-1][name] for name in FIGURES] == pytest.approx(
        [found.correction, found.correction, found.noise, found.lag], rel=1e-3
    )
    told = r"DiagnoseHook: correction 0\.\d+, worst 0\.\d+ in 'body.1'; noise \d\.\d+; 1 layers, "
    log = log_of(tmp_path)
    assert (
        len(re.findall(told + r"in standard deviations; lag -?0\.\d\d\.$", log, re.MULTILINE)) == 2
    )
    assert "move too fast" not in log and "windows from" not in log


def test_nothing_is_told_of_a_window_of_1(tmp_path):
    train(tmp_path, CBN(4, window_size=1))
    assert logged(tmp_path) == [[False] * 4] * LENGTH
    assert "DiagnoseHook: " not in log_of(tmp_path)


def test_noise_takes_two_past_iterations(tmp_path):
    train(tmp_path, CBN(4, window="sliding", window_size=2))
    no, yes = [True, True, False, True], [True] * 4
    assert logged(tmp_path) == [no] + [yes] * (LENGTH - 1)
    told = re.findall(
        r"DiagnoseHook: correction 0\.\d+, worst 0\.\d+ in 'body.1'(.*)", log_of(tmp_path)
    )
    assert told[0] == "; 1 layers, in standard deviations; lag 0.00."
    assert all(line.startswith("; noise ") for line in told[1:])


def test_means_over_layers_and_the_narrowest_and_widest(tmp_path):
    """Whatever the layers' order; a window that still fills counts with its current size."""
    norm = nn.Sequential(
        CBN(4, window_size=3), nn.Conv2d(4, 4, 1), CBN(4, window_size=2), nn.Conv2d(4, 4, 1), CBN(4)
    )
    norm[4].set_window(1)  # the hook opens it
    run = train(tmp_path, norm)
    found = diagnose(run.model)
    assert len(found) == 3
    sizes = {name: each.window_size for name, each in found.items()}
    narrowest, widest = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
    assert (narrowest, widest) == ("body.1.2", "body.1.4")
    corrections = {name: each.correction for name, each in found.items()}
    worst = max(corrections, key=corrections.get)
    row = rows_of(tmp_path)[-1]
    assert row["cbn/correction"] == pytest.approx(sum(corrections.values()) / 3, rel=1e-3)
    assert row["cbn/worst_correction"] == pytest.approx(corrections[worst], rel=1e-3)
    assert row["cbn/noise"] == pytest.approx(
        sum(each.noise for each in found.values()) / 3, rel=1e-3
    )
    lag = sum(each.lag for each in found.values()) / 3
    assert row["cbn/lag"] == pytest.approx(lag, rel=1e-3)
    *_, last = re.findall("DiagnoseHook: correction .*", log_of(tmp_path))
    assert f"worst {corrections[worst]:.4f} in '{worst}'" in last
    assert last.endswith(
        f"; 3 layers, in standard deviations; lag {lag:.2f}; windows from "
        f"2.0 in 'body.1.2' to {sizes[widest]:.1f} in 'body.1.4'."
    )


def test_weights_that_move_too_fast_are_warned_of_once(tmp_path):
    """Names the layer of two whose convolution leaps: its sliding window has no variance left."""

    class Flip(Hook):
        def after_train_iter(self, runner, **kwargs):
            with torch.no_grad():
                runner.model.body[1][1].weight.mul_(-3)

    norm = nn.Sequential(
        CBN(4, window_size=3), nn.Conv2d(4, 4, 1), CBN(4, window="sliding", window_size=3)
    )
    flip = Flip()
    flip.priority = "ABOVE_NORMAL"
    train(tmp_path, norm, 1, 0, 2, flip)
    warned = [line for line in log_of(tmp_path).splitlines() if "WARNING - DiagnoseHook" in line]
    (warning,) = warned
    assert "the weights move too fast for the window: 'body.1.2' is the worst of 1 CBN" in warning
    assert re.search(r"layers \(of 2\) whose past means are moved by more than 0\.3 stan", warning)
    assert re.search(r"\(its: \d+\.\d\d\) or of whose past variances more than 5% are cut", warning)
    assert re.search(r"\(its: \d+%\)\. Lengthen burn_in, narrow window_size, or lower", warning)


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True])
def test_bad_interval(value):
    with pytest.raises(
        ValueError, match="^DiagnoseHook: interval must be a whole number of at least 1, .*: iter"
    ):
        DiagnoseHook(interval=value)
