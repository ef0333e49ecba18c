# Licensed under the Apache License, Version 2.0.
"""Measure how good the compensation is, in a real training.

At intervals the training keeps the inputs that some convolutions see in the last k - 1 iterations
(7 where windows set their own size). With today's weights they tell the true mean and variance that
a CBN layer estimates: with today's weight of that convolution alone, which is what the first-order
compensation aims at, and with today's weights of the whole network (the same images, normalised
with the windows of that time), which is what it stands for. Beside them are the compensated
statistics of each iteration and the naive ones, those of the time. It trains anew, in a work dir
of its own (work_dirs/CONFIG_NAME_compensation), and writes compensation.json and compensation.png
there.

The error of a variance is the sum over channels of |estimate - truth| over the sum of the truth;
the error of a mean is that of |estimate - truth| over the sum of the true standard deviations.
"""

from __future__ import annotations

import argparse
import copy
import json
import os.path as osp
from collections import defaultdict
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none has to be there

import matplotlib.pyplot as plt
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cbn_mmdet import CBN, link, links, load_window_state, set_window, window_state
from cbn_mmdet.hooks.precise_stats_hook import random_state_kept
from cbn_mmdet.launch import (
    BUILD_ERRORS,
    START_ERRORS,
    CarefulRunner,
    UsageError,
    add_launch_arguments,
    check_data,
    check_writable,
    explained_damage,
    explained_errors,
    load_config,
    run_tool,
)
from cbn_mmdet.norm.iteration import cbn_layers
from cbn_mmdet.norm.kernels import weight_products
from cbn_mmdet.norm.moments import Derivative, batch_derivative, batch_moments

NAIVE = "naive"
PROBES = 12
PAST = 7  # iterations to look back where windows set their own size

Products = tuple[Tensor, Tensor]


class Kept(NamedTuple):
    """What one iteration leaves of one convolution.

    Attributes:
        input: The convolution's input.
        mean: Of its output.
        var: Of its output, biased.
        bias: The convolution's, or None.
        products: By variant, the derivatives, and their products with the weight of the time.
        is_of_paper: Whether the window expands the second moment, and not the variance.
    """

    input: Tensor
    mean: Tensor
    var: Tensor
    bias: Tensor | None
    products: dict[str, tuple[Derivative, Products]]
    is_of_paper: bool

    def compensated(self, variant: str, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Mean and variance at the convolution's weight and bias of today, as a window has them."""
        derivative, then = self.products[variant]
        now = products_of(derivative, conv)
        moved, var = now[0] - then[0], self.var + (now[1] - then[1])
        if self.is_of_paper:
            var = var - moved.square()
        mean = self.mean + moved
        return mean if conv.bias is None else mean + conv.bias - self.bias, var.clamp_min(0)


def products_of(derivative: Derivative, conv: nn.Conv2d) -> Products:
    """``m . w`` and ``h . w``."""
    mean, var = derivative.mean, derivative.var
    return weight_products([mean], [var], [conv.weight], mean.dtype)[0]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="the config file, of a model with CBN")
    add_launch_arguments(parser)
    add = parser.add_argument
    add("--every", type=int, metavar="N", help=f"iterations between two looks (run / {PROBES})")
    text = "CBN layers to look at, by name, or how many of them (8)"
    add("--layers", nargs="+", default=["8"], metavar="LAYER", help=text)
    text = "values of derivative_stride to compare (the layers' own)"
    add("--strides", nargs="+", type=int, default=[], metavar="N", help=text)
    add("--bfloat16", action="store_true", help="compare window_dtype='bfloat16', too")
    text = "leave out the whole network, which takes k - 1 copies of all windows and k - 1 forwards"
    add("--no-network", dest="network", action="store_false", help=text)
    return parser.parse_args()


def main() -> None:
    """Train and measure."""
    args = parse_args()
    cfg = load_config(args)
    if args.every is not None and args.every < 1:
        raise UsageError(f"--every {args.every}: takes at least 1 iteration")
    if min(args.strides, default=1) < 1:
        raise UsageError(f"--strides {min(args.strides)}: takes whole numbers of at least 1")
    if args.launcher != "none":
        raise UsageError("--launcher: runs in one process, as each has statistics of its own")
    if args.work_dir is None:
        cfg.work_dir += "_compensation"  # the training of this config may be in the other
    check_data(cfg, "train")
    check_writable(cfg.work_dir, "--work-dir")
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    with explained_errors(*BUILD_ERRORS):
        runner = CarefulRunner.from_cfg(cfg)
    observer = Observer(args, runner)
    runner.register_hook(observer)
    with explained_damage(cfg), explained_errors(*START_ERRORS):
        runner.train()
    if not observer.rows:
        raise UsageError(
            f"the run of {runner.max_iters} iterations ended before the first look, "
            f"at {observer.every}"
        )
    report(observer, cfg.work_dir)


class Observer(Hook):
    """Keeps and compares."""

    priority = "VERY_LOW"

    def __init__(self, args: argparse.Namespace, runner: Runner) -> None:
        layers = cbn_layers(runner.model)
        if not layers:
            raise UsageError(f"{args.config}: the model has no CBN layer")
        self.past = max(map(past_iterations, layers.values()))
        if self.past < 1:
            raise UsageError(f"{args.config}: window_size is 1, which compensates nothing")
        self.names = self._choose(args.layers, layers)
        self.strides, self.bfloat16 = args.strides, args.bfloat16
        # What two looks keep must not overlap.
        self.every = max(args.every or runner.max_iters // PROBES, self.past + 1)
        self.rows: list[dict] = []
        # One for each of the batches, None where the convolution did not run or got no region.
        self.kept: dict[str, list[Kept | None]] = defaultdict(list)
        self.network = args.network
        self.batches: list[tuple] = []  # data, windows, the limit in force, random state
        self._handles: list = []

    def _choose(self, asked: list[str], layers: dict[str, CBN]) -> list[str]:
        if len(asked) == 1 and asked[0].isdecimal() and int(asked[0]) > 0:
            names, count = list(layers), min(int(asked[0]), len(layers))
            return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]
        unknown = [name for name in asked if name not in layers]
        if unknown:
            raise UsageError(
                f"--layers: the model has no CBN layer {unknown[0]}; the first of its "
                f"{len(layers)} is {next(iter(layers))}"
            )
        return asked

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Looks back, or keeps what a later look will need."""
        phase = runner.iter % self.every
        if phase == 0 and self.batches:
            self._stop_keeping()
            self._look_back(runner)
            self.kept.clear()
            self.batches.clear()
        if phase >= self.every - self.past:
            if not self._handles:
                self._start_keeping(runner.model)
            model = runner.model
            limit = next(iter(cbn_layers(model).values())).window_limit  # CBNHook's, for all
            state = on_cpu(window_state(model)) if self.network else None
            random = torch.get_rng_state()
            self.batches.append((copy.deepcopy(data_batch), state, limit, random))

    def _start_keeping(self, model: nn.Module) -> None:
        for name, conv in self._convolutions(model).items():
            layer = model.get_submodule(name)

            def keep(conv, args, output, name=name, layer=layer) -> None:
                kept = self.kept[name]
                kept += [None] * (len(self.batches) - 1 - len(kept))
                if len(kept) < len(self.batches):  # of several calls in one forward, the first
                    has_values = output.numel() > 0
                    kept.append(self._keep(layer, conv, args[0], output) if has_values else None)

            self._handles.append(conv.register_forward_hook(keep))

    def _convolutions(self, model: nn.Module) -> dict[str, nn.Conv2d]:
        """By layer, without those that have not run, or follow something else uncompensated."""
        fed_by = links(model)
        convs = {name: model.get_submodule(fed_by[name]) for name in self.names if name in fed_by}
        return {name: conv for name, conv in convs.items() if isinstance(conv, nn.Conv2d)}

    def _stop_keeping(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _keep(self, layer: CBN, conv: nn.Conv2d, x: Tensor, y: Tensor) -> Kept:
        x, y = x.detach().clone(), y.detach()
        moments, bias = batch_moments(y), conv.bias
        strides = {f"stride {stride}": stride for stride in self.strides}
        derivatives = {}
        for name, stride in (strides or {"compensated": layer.derivative_stride}).items():
            derivatives[name] = of = batch_derivative(conv, x, y, moments, stride)
            if self.bfloat16:
                derivatives[f"{name}, bfloat16"] = of._replace(var=of.var.bfloat16())
        products = {name: (of, products_of(of, conv)) for name, of in derivatives.items()}
        bias = None if bias is None else bias.detach().clone()
        return Kept(x, *moments[:2], bias, products, layer.window == "sliding")

    @torch.no_grad()
    def _look_back(self, runner) -> None:
        whole = self._whole_network(runner.model) if self.network else None
        rate = next(iter(runner.optim_wrapper.get_lr().values()))[0]
        convs = self._convolutions(runner.model)
        for name, all_kept in self.kept.items():
            conv = convs[name]
            all_kept += [None] * (len(self.batches) - len(all_kept))
            for back, kept in enumerate(reversed(all_kept), 1):
                if kept is None:
                    continue
                truths = {"layer": batch_moments(conv(kept.input.to(conv.weight.dtype)))[:2]}
                if whole is not None and name in whole[-back]:
                    truths["network"] = whole[-back][name]
                estimates = {NAIVE: (kept.mean, kept.var)}
                for variant in kept.products:
                    estimates[variant] = kept.compensated(variant, conv)
                self.rows += [
                    dict(
                        iteration=runner.iter,
                        lr=rate,
                        layer=name,
                        back=back,
                        truth=truth,
                        estimate=variant,
                        mean_error=distance(mean, true_mean) / true_var.sqrt().sum().item(),
                        var_error=distance(var, true_var) / true_var.sum().item(),
                    )
                    for truth, (true_mean, true_var) in truths.items()
                    for variant, (mean, var) in estimates.items()
                ]

    def _whole_network(self, model: nn.Module) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """The moments of each past batch, and its windows, with all weights as they are now."""
        twin = copy.deepcopy(model)
        link(twin)
        names = {conv: name for name, conv in self._convolutions(model).items()}
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        for conv_name, conv in model.named_modules():
            if conv in names:

                def note(conv, args, output, name=names[conv]) -> None:
                    if name not in moments and output.numel() > 0:
                        moments[name] = batch_moments(output)[:2]

                twin.get_submodule(conv_name).register_forward_hook(note)
        seen = []
        # Detectors sample regions at random: the same ones again, and then the training's own.
        with random_state_kept():
            for batch, state, limit, random in self.batches:
                torch.set_rng_state(random)
                set_window(twin, limit)
                load_window_state(twin, state)
                data = twin.data_preprocessor(copy.deepcopy(batch), training=True)
                twin(**data, mode="loss")
                seen.append(dict(moments))
                moments.clear()
        return seen


def past_iterations(layer: CBN) -> int:
    """How many a window of the layer stands for."""
    return PAST if layer.window_size == "auto" else layer.window_size - 1


def on_cpu(state: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """A state of windows on the CPU: a GPU would hold its windows many times."""
    return {
        name: [
            {
                key: value.cpu() if isinstance(value, Tensor) else value
                for key, value in window.items()
            }
            for window in windows
        ]
        for name, windows in state.items()
    }


def distance(one: Tensor, other: Tensor) -> float:
    """The sum of the absolute differences."""
    return (one - other).abs().sum().item()


def report(observer: Observer, work_dir: str) -> None:
    """Print a table, and write all figures and a plot."""
    rows = observer.rows
    with open(osp.join(work_dir, "compensation.json"), "w") as file:
        json.dump(dict(rows=rows, layers=observer.names, every=observer.every), file, indent=1)
    variants = list(dict.fromkeys(row["estimate"] for row in rows))
    looks = len({row["iteration"] for row in rows})
    title = (
        f"Relative errors, mean over {len({row['layer'] for row in rows})} layers and {looks} looks"
    )
    for truth, of in (("layer", "the layer's weight"), ("network", "all weights")):
        chosen = [row for row in rows if row["truth"] == truth]
        if not chosen:
            continue
        table = Table(
            "iterations back",
            *(f"{what}, {variant}" for what in ("variance", "mean") for variant in variants),
            title=f"{title}, with {of} of today",
            box=box.MARKDOWN,
        )
        for back in sorted({row["back"] for row in chosen}):
            cells = [
                average(chosen, key, back=back, estimate=variant)
                for key in ("var_error", "mean_error")
                for variant in variants
            ]
            table.add_row(str(back), *(f"{cell:.2%}" for cell in cells))
        # Whole rows: in a log or a file a table must not be cut to the width of a terminal.
        Console(width=250).print(table)
    plot(rows, variants, observer.past, osp.join(work_dir, "compensation.png"))
    print(f"figures: {osp.join(work_dir, 'compensation.json')}")
    print(f"plot: {osp.join(work_dir, 'compensation.png')}")


def average(rows: list[dict], key: str, **where: object) -> float:
    """The mean of ``key`` over the rows that have the given values."""
    values = [row[key] for row in rows if all(row[name] == it for name, it in where.items())]
    return sum(values) / len(values)


def plot(rows: list[dict], variants: list[str], past: int, path: str) -> None:
    """Plot the error of the variance over iterations back, and over the training."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    backs = sorted({row["back"] for row in rows})
    times = sorted({row["iteration"] for row in rows})
    for column, truth, title in (
        (axes[0], "layer", "today's weight of the layer"),
        (axes[1], "network", "today's weights of the network"),
    ):
        chosen = [row for row in rows if row["truth"] == truth]
        for variant in variants if chosen else ():
            errors = [average(chosen, "var_error", back=back, estimate=variant) for back in backs]
            column.plot(backs, errors, ".-", label=variant)
        column.set(xlabel="iterations back", ylabel="relative error of the variance", title=title)
        if chosen:
            column.legend()
    chosen = [row for row in rows if row["truth"] == "layer" and row["back"] == past]
    for variant in variants:
        errors = [average(chosen, "var_error", iteration=time, estimate=variant) for time in times]
        axes[2].semilogy(times, errors, ".-", label=variant)
    axes[2].set(xlabel="iteration", title=f"{past} iterations back, today's weight of the layer")
    rates = axes[2].twinx()
    rate = {row["iteration"]: row["lr"] for row in rows}
    rates.plot(times, [rate[time] for time in times], color="grey", ls=":", label="learning rate")
    rates.set(ylabel="learning rate (dotted)", ylim=(0, None))
    for each in axes:
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    run_tool(main)
