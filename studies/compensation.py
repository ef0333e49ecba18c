# Licensed under the Apache License, Version 2.0.
"""Measure how accurate the compensation is in a real training.

At intervals, the training keeps the inputs of some convolutions over the last k - 1 iterations (7
if windows set their own size). From them it computes the true mean and variance that a CBN layer
estimates: first with today's weight of that convolution alone, which the first-order compensation
aims at, then with today's weights of the whole network, which it stands for (the same images,
normalised with the windows of that time). It compares both with the compensated statistics of each
iteration, and with the naive ones, which are those of that time. The tool trains anew, in a work
dir of its own (work_dirs/CONFIG_NAME_compensation). There it writes compensation.json,
compensation.png and window_sizes.png, the window sizes of all layers over the training.

The error of a variance is the sum over channels of |estimate - truth|, divided by the sum of the
truth; for the error of a mean, the divisor is the sum of the true standard deviations.
"""

import argparse
import copy
import json
import os.path as osp
from collections import defaultdict
from statistics import mean
from typing import NamedTuple

import paths  # noqa: F401  makes common importable
import torch
from common.checkpoint import check_writable
from common.coco import check_data, explained_damage
from common.config import add_cfg_options, load_config
from common.errors import UsageError, positive, run_tool
from common.launchers import CarefulRunner
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.utils import apply_to
from printing import print_table
from torch import Tensor, nn

from cbn_mmdet import CBN, link, links, load_window_state, set_window, window_state
from cbn_mmdet.hooks.precise_stats_hook import random_state_kept
from cbn_mmdet.norm.iteration import cbn_layers
from cbn_mmdet.norm.kernels import weight_products
from cbn_mmdet.norm.moments import Derivative, Source, batch_derivative, batch_moments

NAIVE = "naive"
PROBES = 12
SIZES = 100  # times that window sizes are read
PAST = 7  # iterations to look back if windows set their own size

Products = tuple[Tensor, Tensor]


class Kept(NamedTuple):
    """What is kept of one convolution in one iteration."""

    input: Tensor
    mean: Tensor  # of its output
    var: Tensor  # of its output, biased
    bias: Tensor | None
    # By variant, the derivatives, and their products with the weight of that time.
    products: dict[str, tuple[Derivative, Products]]
    is_of_paper: bool  # whether the window expands the second moment, not the variance

    def compensated(self, variant: str, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Mean and variance at today's weight and bias, as a window computes them."""
        derivative, then = self.products[variant]
        now = products_of(derivative, conv)
        moved, var = now[0] - then[0], self.var + (now[1] - then[1])
        if self.is_of_paper:
            var = var - moved.square()
        mean = self.mean + moved
        return mean if conv.bias is None else mean + conv.bias - self.bias, var.clamp_min(0)


def products_of(derivative: Derivative, conv: nn.Conv2d) -> Products:
    """The derivatives times the convolution's weight: ``m . w`` and ``h . w``."""
    mean, var = derivative.mean, derivative.var
    return weight_products([mean], [var], [conv.weight], mean.dtype)[0]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="the config file, of a model with CBN")
    add_cfg_options(parser)
    parser.set_defaults(launcher="none", local_rank=0)  # each process has statistics of its own
    add = parser.add_argument
    add("--work-dir", help="where logs and results go (work_dirs/CONFIG_NAME_compensation)")
    text = f"iterations between two looks (run / {PROBES})"
    add("--every", type=positive, metavar="N", help=text)
    text = "CBN layers to look at, by name, or how many of them (8)"
    add("--layers", nargs="+", default=["8"], metavar="LAYER", help=text)
    text = "values of derivative_stride to compare (the layers' own)"
    add("--strides", nargs="+", type=positive, default=[], metavar="N", help=text)
    add("--bfloat16", action="store_true", help="compare window_dtype='bfloat16', too")
    text = "leave out the whole network, which takes k - 1 copies of all windows and k - 1 forwards"
    add("--no-network", dest="network", action="store_false", help=text)
    return parser.parse_args()


def main() -> None:
    """Train, measure and report."""
    args = parse_args()
    cfg = load_config(args)
    if args.work_dir is None:
        cfg.work_dir += "_compensation"  # the default one may hold this config's training
    check_data(cfg, "train")
    check_writable(cfg.work_dir, "--work-dir")
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    runner = CarefulRunner.from_cfg(cfg)
    observer = Observer(args, runner)
    runner.register_hook(observer)
    with explained_damage(cfg):
        runner.train()
    if not observer.rows:
        raise UsageError(
            f"the run of {runner.max_iters} iterations ended before the first look, "
            f"at {observer.every}"
        )
    report(observer, cfg.work_dir)


class Observer(Hook):
    """Keeps inputs while the model trains, and compares estimates with the truth."""

    priority = "VERY_LOW"

    def __init__(self, args: argparse.Namespace, runner: Runner) -> None:
        layers = cbn_layers(runner.model)
        if not layers:
            raise UsageError(f"{args.config}: the model has no CBN layer")
        sizes = [layer.window_size for layer in layers.values()]
        self.past = max(PAST if size == "auto" else size - 1 for size in sizes)
        if self.past < 1:
            raise UsageError(f"{args.config}: window_size is 1, which compensates nothing")
        self.names = self._choose(args.layers, layers)
        self.strides, self.bfloat16 = args.strides, args.bfloat16
        # The iterations that two looks keep must not overlap.
        self.every = max(args.every or runner.max_iters // PROBES, self.past + 1)
        self.rows: list[dict] = []
        self.sizes: list[dict] = []  # of all layers' windows, at an iteration
        # By layer and batch; none where the convolution did not run or got no region.
        self.kept: dict[str, dict[int, Kept]] = defaultdict(dict)
        self.network = args.network
        self.batches: list[tuple] = []  # data, windows, window limit, random state
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
        if runner.iter % max(1, runner.max_iters // SIZES) == 0:
            layers = cbn_layers(runner.model)
            sizes = {name: round(layer.mean_window_size, 3) for name, layer in layers.items()}
            self.sizes.append(dict(iteration=runner.iter, sizes=sizes))
        phase = runner.iter % self.every
        if phase == 0 and self.batches:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._look_back(runner)
            self.kept.clear()
            self.batches.clear()
        if phase >= self.every - self.past:
            if not self._handles:
                self._start_keeping(runner.model)
            model = runner.model
            limit = max(each.window_in_force for each in cbn_layers(model).values())
            state = None
            if self.network:  # on the CPU: a GPU would hold its windows many times
                state = apply_to(window_state(model), torch.is_tensor, Tensor.cpu)
            random = torch.get_rng_state()
            self.batches.append((copy.deepcopy(data_batch), state, limit, random))

    def _start_keeping(self, model: nn.Module) -> None:
        for name, conv in self._convolutions(model).items():
            layer = model.get_submodule(name)

            def keep(conv, args, output, name=name, layer=layer) -> None:
                kept, batch = self.kept[name], len(self.batches) - 1
                if batch not in kept and output.numel() > 0:  # only a forward's first call
                    kept[batch] = self._keep(layer, conv, args[0], output)

            self._handles.append(conv.register_forward_hook(keep))

    def _convolutions(self, model: nn.Module) -> dict[str, nn.Conv2d]:
        """The ``nn.Conv2d`` that feeds each chosen layer, if it has run and trains."""
        fed_by = links(model)
        convs = {name: model.get_submodule(fed_by[name]) for name in self.names if name in fed_by}
        return {
            name: conv
            for name, conv in convs.items()
            if isinstance(conv, nn.Conv2d) and conv.weight.requires_grad
        }

    @torch.no_grad()
    def _keep(self, layer: CBN, conv: nn.Conv2d, x: Tensor, y: Tensor) -> Kept:
        x, y = x.detach().clone(), y.detach()
        moments, bias = batch_moments(y), conv.bias
        strides = {f"stride {stride}": stride for stride in self.strides}
        derivatives = {}
        for name, stride in (strides or {"compensated": layer.derivative_stride}).items():
            derivatives[name] = of = batch_derivative(Source.of(conv, x), y, moments, stride)
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
            for batch, kept in reversed(all_kept.items()):
                truths = {"layer": batch_moments(conv(kept.input.to(conv.weight.dtype)))[:2]}
                if whole is not None and name in whole[batch]:
                    truths["network"] = whole[batch][name]
                estimates = {NAIVE: (kept.mean, kept.var)}
                for variant in kept.products:
                    estimates[variant] = kept.compensated(variant, conv)
                self.rows += [
                    dict(
                        iteration=runner.iter,
                        lr=rate,
                        layer=name,
                        back=len(self.batches) - batch,
                        truth=truth,
                        estimate=variant,
                        mean_error=distance(mean, true_mean) / true_var.sqrt().sum().item(),
                        var_error=distance(var, true_var) / true_var.sum().item(),
                    )
                    for truth, (true_mean, true_var) in truths.items()
                    for variant, (mean, var) in estimates.items()
                ]

    def _whole_network(self, model: nn.Module) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """The moments of each past batch, with its windows but all of today's weights."""
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
        # Detectors sample regions at random: repeat the past draws, then restore the random state.
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


def distance(one: Tensor, other: Tensor) -> float:
    """The sum of the absolute differences."""
    return (one - other).abs().sum().item()


def report(observer: Observer, work_dir: str) -> None:
    """Print a table, and write all figures and two plots."""
    rows, layers, sizes = observer.rows, observer.names, observer.sizes
    figures, picture = (osp.join(work_dir, f"compensation.{each}") for each in ("json", "png"))
    with open(figures, "w") as file:
        found = dict(rows=rows, layers=layers, every=observer.every, window_sizes=sizes)
        json.dump(found, file, indent=1)
    variants = list(dict.fromkeys(row["estimate"] for row in rows))
    seen, looks = (len({row[key] for row in rows}) for key in ("layer", "iteration"))
    for truth, of in (("layer", "the layer's weight"), ("network", "all weights")):
        chosen = [row for row in rows if row["truth"] == truth]
        table = [
            {
                "iterations back": back,
                **{
                    f"{what}, {variant}": f"{average(chosen, key, back=back, estimate=variant):.2%}"
                    for what, key in (("variance", "var_error"), ("mean", "mean_error"))
                    for variant in variants
                },
            }
            for back in sorted({row["back"] for row in chosen})
        ]
        if table:
            title = f"Relative errors, mean over {seen} layers and {looks} looks"
            print_table(f"{title}, with {of} of today", table)
    plot(rows, variants, observer.past, picture)
    of_sizes = osp.join(work_dir, "window_sizes.png")
    plot_sizes(sizes, of_sizes)
    print(f"figures: {figures}\nplots: {picture}, {of_sizes}")


def average(rows: list[dict], key: str, **where: object) -> float:
    """The mean of ``key`` over the rows that have the given values."""
    return mean(row[key] for row in rows if where.items() <= row.items())


def plot(rows: list[dict], variants: list[str], past: int, path: str) -> None:
    """Plot the error of the variance over iterations back, and over the training."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    *columns, over_time = figure.subplots(1, 3)
    backs = sorted({row["back"] for row in rows})
    times = sorted({row["iteration"] for row in rows})
    by_truth = {of: [row for row in rows if row["truth"] == of] for of in ("layer", "network")}
    for column, (of, chosen) in zip(columns, by_truth.items(), strict=True):
        for variant in variants if chosen else ():
            errors = [average(chosen, "var_error", back=back, estimate=variant) for back in backs]
            column.plot(backs, errors, ".-", label=variant)
        title = f"today's weight{'s' * (of == 'network')} of the {of}"
        column.set(xlabel="iterations back", ylabel="relative error of the variance", title=title)
        if chosen:
            column.legend()
    chosen = [row for row in by_truth["layer"] if row["back"] == past]
    for variant in variants:
        errors = [average(chosen, "var_error", iteration=time, estimate=variant) for time in times]
        over_time.semilogy(times, errors, ".-", label=variant)
    over_time.set(xlabel="iteration", title=f"{past} iterations back, today's weight of the layer")
    rates = over_time.twinx()
    rate = {row["iteration"]: row["lr"] for row in rows}
    rates.plot(times, [rate[time] for time in times], color="grey", ls=":", label="learning rate")
    rates.set(ylabel="learning rate (dotted)", ylim=(0, None))
    for each in (*columns, over_time):
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def plot_sizes(sizes: list[dict], path: str) -> None:
    """Plot the window size of each layer over the training, and the mean over layers."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    times = [each["iteration"] for each in sizes]
    names = list(sizes[0]["sizes"])
    colors = colormaps["viridis"]
    for number, name in enumerate(names):
        color = colors(number / max(len(names) - 1, 1))
        axes.plot(times, [each["sizes"][name] for each in sizes], color=color, lw=0.6, alpha=0.7)
    means = [mean(each["sizes"].values()) for each in sizes]
    axes.plot(times, means, color="black", lw=2, label="mean over layers")
    scale = ScalarMappable(Normalize(1, len(names)), colors)
    figure.colorbar(scale, ax=axes, label="layer, in the order of the network")
    axes.set(xlabel="iteration", ylabel="window size", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    run_tool(main)
