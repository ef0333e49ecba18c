# Licensed under the Apache License, Version 2.0.
"""Measure what a norm costs behind one convolution. Needs only torch."""

import argparse
import time
from typing import NamedTuple

import torch
from norms import build_norm, link_cbn, norm_cfg
from printing import Bar
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cbn_mmdet import step

from .timing import FLOAT, MIB, Clock, Run, average, compare, interleave, warm_up

FLOOR, AUTOGRAD = "BN + weight gradient", "CBN, by autograd"
ALONE = ", operations alone"
WINDOWS = [1, 2, 4, 8, 16, 32]
IMAGES = [1, 2, 4, 8]
COUNTED = 8  # layers side by side; they share what the norm does for all layers at once
HOST_SECONDS = 0.05  # longer than the caches take to turn to another norm


class Shape(NamedTuple):
    """A convolution and its input."""

    images: int
    c_in: int
    c_out: int
    kernel: int
    size: int

    def __str__(self) -> str:
        """The name of the shape in tables."""
        kernel = f"{self.kernel}×{self.kernel}"
        return f"{self.images}×{self.c_in}→{self.c_out}, {kernel}, {self.size}²"


# Shapes of a detector with 2 images of about 800 x 1333, scaled down for a CPU: the box head's
# convolution on 64 regions, the FPN's, and three of the backbone's.
SHAPES = [Shape(64, 256, 256, 3, 7), Shape(2, 256, 256, 3, 50), Shape(2, 64, 256, 1, 100)]
SHAPES += [Shape(2, 256, 64, 1, 100), Shape(2, 64, 64, 3, 100)]
# A layer so small that its arithmetic takes no time, and how many of them stand in a row.
TINY, DEPTH = Shape(1, 8, 8, 3, 4), 20


class WeightGradientBN(nn.BatchNorm2d):
    """BN that also computes, and drops, the weight gradient of its own convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.out_channels)
        self.conv = conv
        conv.register_forward_hook(self._keep)

    def _keep(self, conv: nn.Conv2d, args: tuple, output: Tensor) -> None:
        self.seen = args[0]

    def forward(self, y: Tensor) -> Tensor:
        """Normalises ``y``, ``(N, C, H, W)``."""
        with torch.no_grad():
            size, padding = self.conv.weight.shape, self.conv.padding
            nn.grad.conv2d_weight(self.seen, size, y, padding=padding)
        return super().forward(y)


class UnknownConv2d(nn.Conv2d):
    """A convolution known only to autograd, as a deformable one is, but without its sampling."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolves ``x``, ``(N, C, H, W)``."""
        y = super().forward(x)
        return y.view(y.shape)


def build_layers(text: str, shape: Shape, depth: int = 1) -> nn.Sequential:
    """Build ``depth`` convolutions in a row, each linked to the norm behind it."""
    torch.manual_seed(0)
    layers, padding = [], shape.kernel // 2
    kind, name = (UnknownConv2d, "CBN") if text == AUTOGRAD else (nn.Conv2d, text)
    for _ in range(depth):
        conv = kind(shape.c_in, shape.c_out, shape.kernel, padding=padding, bias=False)
        if text == FLOOR:
            layers += [conv, WeightGradientBN(conv)]
        else:
            layers += [conv, build_norm(norm_cfg(name), shape.c_out)]
    model = nn.Sequential(*layers)
    link_cbn(model)
    return model


def layer_run(model: nn.Sequential, shape: Shape, args: argparse.Namespace) -> Run:
    """Build a run: forward, backward, end of the iteration; between runs, weights move a little."""
    dtype, steps = getattr(torch, args.dtype), link_cbn(model)
    model.to(args.device)
    size = shape.images, shape.c_in, shape.size, shape.size
    x = torch.randn(size, dtype=dtype, device=args.device)
    with torch.no_grad():
        gradient = torch.randn_like(model[0](x.float()), dtype=dtype)
    x.requires_grad_()
    weights = [each.weight for each in model if isinstance(each, nn.Conv2d)]
    moves = [1e-4 * torch.randn_like(weight) for weight in weights]

    def run(seed: int, clock: Clock) -> None:
        with torch.no_grad():
            torch._foreach_add_(weights, moves, alpha=1 if seed % 2 else -1)
        model.zero_grad()
        x.grad = None
        with clock:
            with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
                y = model(x)
            y.backward(gradient.to(y.dtype))
            if steps:
                step(model)

    return warm_up(model, run, args.device)


def time_layers(
    names: list[str], shape: Shape, args: argparse.Namespace, bar: Bar
) -> tuple[dict[str, list[float]], dict[str, nn.Module]]:
    """Time norms on a shape; returns the seconds, and the models with their windows."""
    models = {name: build_layers(name, shape) for name in names}
    runs = {name: layer_run(model, shape, args) for name, model in models.items()}
    return interleave(runs, args, bar, str(shape)), models


def measure_layer(args: argparse.Namespace, bar: Bar) -> dict:
    """Time each norm on each shape."""
    rows = {name: {"norm": name} for name in args.norms}
    bar.update(0, total=len(args.shapes))
    for shape in args.shapes:
        seconds, _ = time_layers(args.norms, shape, args, bar)
        for name, row in rows.items():
            row[str(shape)] = compare(seconds[name], seconds["BN"])
    for row in rows.values():
        row["geometric mean"] = average(list(row.values())[1:])
    return {"Convolution + norm, forward + backward, time / BN's": [*rows.values()]}


class Recorder(TorchDispatchMode):
    """Keeps operations with their arguments, to run them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation, and keep it."""
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def operations_run(run: Run) -> Run:
    """Build a run of the operations of another run, one after another, with nothing in between."""
    recorder = Recorder()
    run(0, recorder)  # in the clock's place, which leaves out what is not timed

    @torch.no_grad()
    def again(seed: int, clock: Clock) -> None:
        with clock:
            for func, given, named in recorder.calls:
                func(*given, **named)

    return again


def measure_host(args: argparse.Namespace, bar: Bar) -> dict:
    """Time the CPU's work for convolutions and each norm on tiny maps, and its operations alone."""

    def whole(name: str) -> Run:
        return layer_run(build_layers(name, TINY, DEPTH), TINY, args)

    runs = {name: whole(name) for name in args.norms}
    # Operations change tensors in place: those of a model of their own.
    runs.update({f"{name}{ALONE}": operations_run(whole(name)) for name in args.norms})
    seconds = interleave(runs, args, bar, args.command, time.process_time, HOST_SECONDS)
    rows = []
    for name, own in seconds.items():
        figure = compare(own, seconds["BN"])
        each = 1000 * figure.pop("ms") / DEPTH
        rows.append({"norm": name, "time / BN's": figure, "µs per layer": each})
    return {f"CPU time of convolution + norm, {DEPTH} of {TINY} in a row": rows}


def measure_growth(args: argparse.Namespace, bar: Bar) -> dict:
    """Time CBN for several sliding windows, and the default for several batches."""
    sliding = "CBN(window='sliding', window_size={}, backward='window')"
    windows = {k: sliding.format(k) for k in WINDOWS}
    timed, by_images = {k: [] for k in WINDOWS}, {images: [] for images in IMAGES}
    held, weights = dict.fromkeys(WINDOWS, 0), 0
    bar.update(0, total=len(args.shapes) * (1 + len(IMAGES)))
    for shape in args.shapes:
        seconds, models = time_layers(["BN", *windows.values()], shape, args, bar)
        weights += FLOAT * models["BN"][0].weight.numel()
        for k, name in windows.items():
            held[k] += models[name][1].window_bytes
            timed[k].append([compare(seconds[name], seconds[each]) for each in ("BN", windows[4])])
        for images in IMAGES:
            # Every shape is that of two images, even where it counts regions.
            scaled = shape._replace(images=max(1, shape.images * images // 2))
            seconds, _ = time_layers(["BN", "CBN"], scaled, args, bar)
            by_images[images].append(compare(seconds["CBN"], seconds["BN"]))
    rows = [
        {
            "k": k,
            "time / BN's": average([of_bn for of_bn, _ in timed[k]]),
            "time / that of k = 4": average([of_four for _, of_four in timed[k]]),
            "windows, MiB": held[k] / MIB,
            "per past iteration, of the weights": held[k] / weights / max(k - 1, 1),
        }
        for k in WINDOWS
    ]
    if args.plot:
        plot(rows, args.plot)
    over = f"geometric mean over {len(args.shapes)} shape(s)"
    return {
        f"Convolution + CBN by the sliding window k, {over}": rows,
        f"Convolution + the default CBN by images, {over}": [
            {"images": images, "time / BN's": average(each)} for images, each in by_images.items()
        ],
    }


class Counter(TorchDispatchMode):
    """Counts operations that compute, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation, and count it unless it only makes a view of a tensor."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        returns = func._schema.returns
        if not any(each.alias_info and not each.alias_info.is_write for each in returns):
            self.operations += 1
            # An argument that an operation changes in place is read and written; out is only
            # written.
            read = [args, *(each for name, each in kwargs.items() if name != "out")]
            tensors = filter(torch.is_tensor, tree_flatten((read, result))[0])
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def measure_count(args: argparse.Namespace, bar: Bar) -> dict:
    """Count a layer's operations and bytes: forward, backward and the end of the iteration."""
    tables = {}
    bar.update(0, total=len(args.shapes))
    for shape in args.shapes:
        counted = {name: count_of(name, shape, args) for name in args.norms}
        weight = FLOAT * shape.c_in * shape.c_out * shape.kernel**2
        tables[f"Convolution + norm, {shape}, a layer of {COUNTED}"] = [
            {
                "norm": name,
                **{part: each.operations / COUNTED for part, each in parts.items()},
                "MiB": (moved := sum(each.bytes for each in parts.values()) / COUNTED) / MIB,
                "of the weight": moved / weight,
            }
            for name, parts in counted.items()
        ]
        bar.advance(0)
    args.notes.append("Bytes are those of all arguments and results, as if no cache held any.")
    return tables


def count_of(name: str, shape: Shape, args: argparse.Namespace) -> dict[str, Counter]:
    """Count what layers side by side do in each part of an iteration, with full windows."""
    model = SideBySide([build_layers(name, shape) for _ in range(COUNTED)]).to(args.device)
    steps = link_cbn(model)
    size = shape.images, shape.c_in, shape.size, shape.size
    x = torch.randn(size, device=args.device, requires_grad=True)
    gradients = [torch.ones_like(y) for y in model(x)]

    def run(seed: int, clock: Clock) -> None:
        parts.update({part: Counter() for part in ("forward", "backward", "step")})
        model.zero_grad()
        with parts["forward"]:
            outputs = model(x)
        with parts["backward"]:
            torch.autograd.backward(outputs, gradients)
        with parts["step"]:
            if steps:
                step(model)

    parts: dict[str, Counter] = {}
    warm_up(model, run, args.device)
    return parts


class SideBySide(nn.ModuleList):
    """Layers that all see the same input."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of all layers."""
        return [layer(x) for layer in self]


def plot(rows: list[dict], path: str) -> None:
    """Plot time and window memory against k."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    ks, times = [row["k"] for row in rows], [row["time / BN's"] for row in rows]
    errors = [each["error"] for each in times]
    left.errorbar(ks, [each["ratio"] for each in times], errors, fmt=".-", capsize=3)
    left.set(ylabel="time of convolution + norm / BN's", ylim=(0, None))
    left.axhline(1, color="grey", lw=0.8)
    right.plot(ks, [row["windows, MiB"] for row in rows], ".-")
    right.set(ylabel="memory of the window, MiB", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel="window k")
        axes.set_xticks(ks[2:])
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
