# Licensed under the Apache License, Version 2.0.
"""Measure what CBN costs, beside batch normalisation in the same run.

A time is a ratio to BN's. The norms take turns, in another order each round, so that whatever else
the machine does meets them all. The ratio is the median over the rounds; they go on until half of
its 95 % interval, which is printed after it, is within --stable-to or the time is up.

A norm is named as its norm_cfg: BN, GN, or CBN(derivative_stride=2, backward='own'), say.
CBN(compensate=False) is the paper's naive CBN. A row of layer and count alone is 'BN + weight
gradient', which forms one gradient of the weight more: the least that any derivative from all
positions can cost. layer, host, growth and count need torch and rich alone, the others MMDetection.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import multiprocessing
import os
import os.path as osp
import platform
import random
import re
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from statistics import geometric_mean, median, quantiles
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cbn_mmdet import CBN, link, links, step
from cbn_mmdet.norm.names import NORMS, build_norm, norm_cfg, replace_norms

if TYPE_CHECKING:
    from mmengine.config import Config


class Shape(NamedTuple):
    """A convolution and its input."""

    images: int
    c_in: int
    c_out: int
    kernel: int
    size: int


# What is timed: does it once, the untimed preparations with the seed, the rest within the clock.
Run = Callable[[int, "Clock"], None]

CONFIGS = osp.join(osp.dirname(osp.dirname(osp.abspath(__file__))), "configs")
R50 = [
    osp.join(CONFIGS, "faster_rcnn", f"faster-rcnn_r50_fpn_{norm}_4xb4-1x_coco.py")
    for norm in ("bn", "bn-all")
]
DIGITS = osp.join(CONFIGS, "digits", "faster-rcnn_r18_fpn_bn-all_1xb1_digits.py")
FLOOR = "BN + weight gradient"
NAIVE = "CBN(compensate=False)"
CBNS = [NAIVE, "CBN", "CBN(backward='own')", "CBN(backward='window')"]
STRIDES = [f"CBN(derivative_stride={stride})" for stride in (1, 2, 4)]
BFLOAT16 = "CBN(window_dtype='bfloat16')"
SLIDING = [  # the paper's, and one of which past iterations have a gradient, too
    "CBN(window='sliding', window_size=4, backward='current')",
    "CBN(window='sliding', window_size=8, backward='window')",
]
ROWS = {
    "layer": ["GN", "SyncBN", "BRN", *CBNS, *STRIDES, BFLOAT16, *SLIDING, FLOOR],
    "host": ["GN", "BRN", *CBNS, *STRIDES, BFLOAT16, *SLIDING],
    "count": ["GN", *CBNS, *STRIDES, BFLOAT16, *SLIDING],
    "step": ["GN", "SyncBN", "BRN", *CBNS, *STRIDES, BFLOAT16, *SLIDING],
    "inference": ["GN", "CBN"],
    "memory": ["GN", "SyncBN", "BRN", *CBNS, BFLOAT16, *SLIDING],
}
# Of a detector with 2 images of about 800 x 1333 at a scale a CPU can bear: the box head's
# convolution on 64 regions, the FPN's, and three of the backbone's. And those of the digits.
SHAPES = [
    Shape(64, 256, 256, 3, 7),
    Shape(2, 256, 256, 3, 50),
    Shape(2, 64, 256, 1, 100),
    Shape(2, 256, 64, 1, 100),
    Shape(2, 64, 64, 3, 100),
]
SMALL = [
    Shape(1, 32, 32, 3, 32),
    Shape(1, 128, 128, 3, 8),
    Shape(1, 256, 256, 3, 4),
    Shape(32, 64, 64, 3, 7),
]
# Layers so small that what they compute takes no time, and how many of them in a row.
TINY, DEPTH = Shape(1, 8, 8, 3, 4), 20
WINDOWS = [1, 2, 4, 8, 16, 32]
IMAGES = [1, 2, 4, 8]
MIN_ROUNDS, FEWEST_ROUNDS = 12, 3  # to call it stable, and when the time is up
FLOAT, MIB = 4, 2**20  # bytes
COUNTED = 8  # layers side by side, which share what the norm does for all layers at once
SAMPLE_SECONDS = 0.005  # shorter calls are repeated, to be above the noise of the clock
HOST_SECONDS = 0.05  # and above what it takes the caches to turn to another norm
WARM_UP = 8  # iterations of a window that chooses its own size


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    common, placed, timed, shaped, detector = (
        argparse.ArgumentParser(add_help=False) for _ in range(5)
    )
    add = placed.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=positive, metavar="N", help="of torch on the CPU")
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="the half types by autocast, on a GPU",
    )
    text = "print JSON instead of Markdown"
    common.add_argument("--json", action="store_true", help=text)

    add, text = timed.add_argument, "a relative error (0.03)"
    add("--stable-to", type=float, default=0.03, metavar="ERROR", help=text)
    text = "for the rounds of each shape, or of the detector (120)"
    add("--max-seconds", type=float, default=120.0, metavar="S", help=text)

    add, text = shaped.add_argument, "N,C_in,C_out,kernel,size of each (five of a detector's)"
    add("--shapes", nargs="+", type=shape, default=SHAPES, metavar="SHAPE", help=text)
    text = "the shapes of the digits detector"
    add("--small", dest="shapes", action="store_const", const=SMALL, help=text)

    add, text = detector.add_mutually_exclusive_group().add_argument, "R-50's backbone, too"
    add("--all-norms", action="store_true", help=text)
    text = "the digits detector, on 1 image of data/digits if it was built"
    add("--digits", action="store_true", help=text)
    text = "of a detector; each norm_cfg in it that trains becomes the norm to be measured"
    add("--config", help=text)
    add = detector.add_argument
    add("--size", nargs=2, type=positive, metavar=("H", "W"), help="of images of noise (320 320)")
    add("--batch", type=positive, metavar="N", help="images per step (2)")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text, *parents in (
        ("layer", "convolution and norm, forward and backward", placed, timed, shaped),
        ("host", "CPU time of layer on maps so small that all is overhead", timed),
        ("growth", "layer for other sliding windows and other batches", placed, timed, shaped),
        ("count", "operations and bytes of a layer, which no noise touches", placed, shaped),
        ("step", "a whole training step of Faster R-CNN R-50-FPN", placed, timed, detector),
        ("inference", "the detector in evaluation mode", placed, timed, detector),
        ("memory", "peak memory of a training step, and the windows'", placed, detector),
    ):
        subparser = commands.add_parser(command, help=text, parents=[common, *parents])
        add = subparser.add_argument
        if placed not in parents:
            subparser.set_defaults(device="cpu", threads=1, dtype="float32")
        if command == "growth":
            add("--plot", metavar="FILE.png", help="plot cost against the window")
        else:
            add("--norms", nargs="+", type=norm, metavar="NORM", help="to set beside BN")
        if command == "memory":
            add("--repeats", type=positive, default=3, metavar="N", help="of each norm (3)")
    args = parser.parse_args()
    mistake = complete(args)
    if mistake:
        parser.exit(2, f"{parser.prog}: error: {mistake}\n")
    return args


def complete(args: argparse.Namespace) -> str | None:
    """Fill in what depends on several arguments; returns what is wrong with them, if anything."""
    gpu, asked = args.device == "cuda", getattr(args, "norms", None)
    if gpu and not torch.cuda.is_available():
        return "--device cuda: no GPU is available; leave it out to use the CPU"
    if not gpu and args.dtype != "float32":
        return f"--dtype {args.dtype} is measured on a GPU only: add --device cuda"
    if not gpu and "SyncBN" in (asked or ()):
        return "--norms SyncBN: it runs on a GPU only: add --device cuda"
    if FLOOR in (asked or ()) and args.command not in ("layer", "count"):
        return f"--norms '{FLOOR}': this row is layer's and count's alone"
    plot = getattr(args, "plot", None)
    if plot and not (plot.endswith(".png") and osp.isdir(osp.dirname(plot) or ".")):
        return f"--plot {plot}: takes a .png file in a folder that exists"
    rows, args.notes = asked or ROWS.get(args.command, []), []
    if "SyncBN" in rows:
        alone = "in one process communicates nothing: it calls BN's kernels"
        args.notes.append(f"SyncBN {alone if gpu else 'runs on a GPU only'}.")
    if gpu and args.command == "layer":
        args.notes.append("CBN's step() waits for the GPU: here for each layer, in a model once.")
    args.norms = [row for row in dict.fromkeys(["BN", *rows]) if gpu or row != "SyncBN"]
    if "digits" in args:
        args.size = args.size or ([128, 128] if args.digits else [320, 320])
        args.batch = args.batch or (1 if args.digits else 2)
        args.config = args.config or (DIGITS if args.digits else R50[args.all_norms])
    return None


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number of at least 1, got {text}")
    return int(text)


def shape(text: str) -> Shape:
    """Read a shape."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){4}", text):
        raise argparse.ArgumentTypeError(f"takes N,C_in,C_out,kernel,size, got {text}")
    return Shape(*map(int, text.split(",")))


def norm(text: str) -> str:
    """Check that a norm can be built; its name is all that is kept."""
    try:
        if text != FLOOR:
            build_norm(norm_cfg(text), 32)
    except (SyntaxError, AttributeError, KeyError) as error:
        raise argparse.ArgumentTypeError(
            f"takes {', '.join(NORMS)}, or CBN(derivative_stride=2), say, got {text}"
        ) from error
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot build {text}: {error}") from error
    return text


def main() -> None:
    """Measure, and print."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if "config" not in args:
        return report(args)
    from cbn_mmdet.launch import run_tool

    run_tool(lambda: report(args))


def report(args: argparse.Namespace) -> None:
    """Measure and print: tables are ``{title: rows}``, a row is ``{column: cell}``."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        redirect_stdout(io.StringIO()),  # mmengine's and pycocotools' chatter
    ):
        bar.add_task(args.command, total=None)
        tables, notes = MEASURES[args.command](args, bar)
    about = {
        "machine": machine(args.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
    }
    if args.json:
        print(json.dumps({**about, "tables": tables, "notes": notes}, indent=2))
        return
    print(about.pop("machine"), *(f"{key} {value}" for key, value in about.items()), sep=", ")
    console = Console(width=1000, highlight=False, markup=False)
    for title, rows in tables.items():
        table = Table(*rows[0], box=box.MARKDOWN)
        for row in rows:
            table.add_row(*map(cell, row.values()))
        with console.capture() as captured:
            console.print(table)
        print(f"\n## {title}\n\n{captured.get().strip()}")
    print("", *notes, sep="\n")


def cell(value: object) -> str:
    """Format a cell: a ratio and its error, or what BN took; a number; text."""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    if not isinstance(value, dict):
        return str(value)
    if value["error"]:
        return f"{value['ratio']:.3f} ± {value['error']:.3f}"
    own = [f" ({cell(value[unit])} {unit})" for unit in ("ms", "MiB") if unit in value]
    return "".join([cell(value["ratio"]), *own])


def machine(device: str) -> str:
    """Name the CPU and its cores, or the GPU."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    name = platform.processor() or platform.machine()
    if osp.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} cores"


# How a ratio is measured.


class Clock:
    """Adds up the time spent in ``with`` blocks.

    On a GPU it is the GPU's, read at the end: waiting for each block would leave the GPU idle.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        tell: Tells the time, on the CPU.
    """

    def __init__(self, device: str, tell: Callable[[], float] = time.perf_counter) -> None:
        self._gpu = device == "cuda"
        self._tell = tell
        self._blocks = []

    def _now(self) -> object:
        if not self._gpu:
            return self._tell()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        self._blocks.append((self._start, self._now()))

    def seconds(self) -> float:
        """Total of all blocks."""
        if not self._gpu:
            return sum(end - start for start, end in self._blocks)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._blocks) / 1000


def interleave(
    runs: dict[str, Run],
    args: argparse.Namespace,
    bar: Progress,
    notes: list[str],
    label: str,
    tell: Callable[[], float] = time.perf_counter,
    sample: float = SAMPLE_SECONDS,
) -> dict[str, list[float]]:
    """Take turns until each ratio to BN is stable, or the time is up; returns seconds by round."""
    seconds = {name: [] for name in runs}
    order = random.Random(0)
    first = Clock(args.device, tell)
    runs["BN"](0, first)
    repeats = min(100, math.ceil(sample / first.seconds()))
    start, rounds, worst = time.monotonic(), 0, math.inf
    while rounds < MIN_ROUNDS or worst > args.stable_to:
        if rounds >= FEWEST_ROUNDS and time.monotonic() - start > args.max_seconds:
            notes.append(f"{label}: after {rounds} rounds stable to {100 * worst:.1f} % only.")
            break
        for name in order.sample(list(runs), len(runs)):
            clock = Clock(args.device, tell)
            for each in range(repeats):
                runs[name](rounds * repeats + each, clock)
            seconds[name].append(clock.seconds() / repeats)
        rounds += 1
        if rounds >= FEWEST_ROUNDS:
            each = [compare(own, seconds["BN"]) for own in seconds.values()]
            worst = max(figure["error"] / figure["ratio"] for figure in each)
        bar.update(0, description=f"{label}: round {rounds}, to {100 * worst:.1f} %")
    bar.advance(0)
    return seconds


def compare(own: list[float], reference: list[float], unit: str = "ms") -> dict:
    """The median of the ratios of each round, and half of its 95 % interval.

    The standard error of the median is that of normally distributed ratios with the same
    interquartile range, which a few disturbed rounds do not widen.
    """
    ratios = [a / b for a, b in zip(own, reference, strict=True)]
    error = 0.0
    if len(ratios) > 1:
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        error = 1.96 * math.sqrt(math.pi / 2) * (high - low) / 1.349 / math.sqrt(len(ratios))
    scale = 1000 if unit == "ms" else 1
    return {"ratio": median(ratios), "error": error, unit: scale * median(own)}


def average(figures: list[dict]) -> dict:
    """Geometric mean of several ratios."""
    ratio = geometric_mean(figure["ratio"] for figure in figures)
    error = math.hypot(*(figure["error"] / figure["ratio"] for figure in figures)) / len(figures)
    return {"ratio": ratio, "error": ratio * error}


# A convolution and its norm.


class WeightGradientBN(nn.BatchNorm2d):
    """Batch normalisation that forms, and drops, the weight gradient of its own input.

    Args:
        conv: The convolution that feeds it, without bias.
    """

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


def build_layers(text: str, shape: Shape, depth: int = 1) -> nn.Sequential:
    """Build a convolution and its norm, linked; several such layers in a row."""
    torch.manual_seed(0)
    layers, padding = [], shape.kernel // 2
    for _ in range(depth):
        conv = nn.Conv2d(shape.c_in, shape.c_out, shape.kernel, padding=padding, bias=False)
        if text == FLOOR:
            layers += [conv, WeightGradientBN(conv)]
        else:
            layers += [conv, build_norm(norm_cfg(text), shape.c_out)]
    model = nn.Sequential(*layers)
    if has_cbn(model):
        link(model)
    return model


def has_cbn(model: nn.Module) -> bool:
    """Whether iterations have to be ended with ``step``."""
    return any(isinstance(module, CBN) for module in model.modules())


def warm_up(model: nn.Module, run: Run, device: str) -> Run:
    """Run until the windows are full and what is done only once has been done."""
    sizes = [module.window_size for module in model.modules() if isinstance(module, CBN)]
    for seed in range(max([WARM_UP if size == "auto" else size for size in sizes], default=1) + 1):
        run(seed, Clock(device))
    return run


def layer_run(model: nn.Sequential, shape: Shape, args: argparse.Namespace) -> Run:
    """Forward, backward and the end of the iteration; the weights move a little in between."""
    dtype, steps = getattr(torch, args.dtype), has_cbn(model)
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
    names: list[str], shape: Shape, args: argparse.Namespace, bar: Progress, notes: list[str]
) -> tuple[dict[str, list[float]], dict[str, nn.Module]]:
    """Time norms on a shape; returns the seconds, and the models with their windows."""
    models = {name: build_layers(name, shape) for name in names}
    runs = {name: layer_run(model, shape, args) for name, model in models.items()}
    return interleave(runs, args, bar, notes, label(shape)), models


def label(shape: Shape) -> str:
    """Name a shape in a table."""
    return (
        f"{shape.images}×{shape.c_in}→{shape.c_out}, {shape.kernel}×{shape.kernel}, {shape.size}²"
    )


def measure_layer(args: argparse.Namespace, bar: Progress) -> tuple[dict, list[str]]:
    """Time each norm on each shape."""
    rows, notes = {name: {"norm": name} for name in args.norms}, [*args.notes]
    bar.update(0, total=len(args.shapes))
    for shape in args.shapes:
        seconds, _ = time_layers(args.norms, shape, args, bar, notes)
        for name, row in rows.items():
            row[label(shape)] = compare(seconds[name], seconds["BN"])
    for row in rows.values():
        row["geometric mean"] = average(list(row.values())[1:])
    return {"Convolution + norm, forward + backward, time / BN's": [*rows.values()]}, notes


def measure_host(args: argparse.Namespace, bar: Progress) -> tuple[dict, list[str]]:
    """Time what the CPU does for convolutions and each norm, on maps of hardly anything."""
    notes = [*args.notes]
    runs = {name: layer_run(build_layers(name, TINY, DEPTH), TINY, args) for name in args.norms}
    seconds = interleave(runs, args, bar, notes, args.command, time.process_time, HOST_SECONDS)
    rows = []
    for name, own in seconds.items():
        figure = compare(own, seconds["BN"])
        each = 1000 * figure.pop("ms") / DEPTH
        rows.append({"norm": name, "time / BN's": figure, "µs per layer": each})
    return {f"CPU time of convolution + norm, {DEPTH} of {label(TINY)} in a row": rows}, notes


def measure_growth(args: argparse.Namespace, bar: Progress) -> tuple[dict, list[str]]:
    """Time CBN for several sliding windows, and the default for several batches."""
    sliding = "CBN(window='sliding', window_size={}, backward='window')"
    notes, windows = [], {k: sliding.format(k) for k in WINDOWS}
    timed, by_images = {k: [] for k in WINDOWS}, {images: [] for images in IMAGES}
    held, weights = dict.fromkeys(WINDOWS, 0), 0
    bar.update(0, total=len(args.shapes) * (1 + len(IMAGES)))
    for shape in args.shapes:
        seconds, models = time_layers(["BN", *windows.values()], shape, args, bar, notes)
        weights += FLOAT * models["BN"][0].weight.numel()
        for k, name in windows.items():
            held[k] += models[name][1].window_bytes
            timed[k].append([compare(seconds[name], seconds[each]) for each in ("BN", windows[4])])
        for images in IMAGES:
            # The shapes are those of two images, whether they are images or regions.
            scaled = shape._replace(images=max(1, shape.images * images // 2))
            seconds, _ = time_layers(["BN", "CBN"], scaled, args, bar, notes)
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
    }, notes


class Counter(TorchDispatchMode):
    """Counts operations that compute, and the bytes of what they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation, and count it unless it only looks at a tensor in another way."""
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if not any(each.alias_info and not each.alias_info.is_write for each in returns):
            self.operations += 1
            tensors = [
                each for each in tree_leaves((args, kwargs, result)) if torch.is_tensor(each)
            ]
            # A result that an operation changed in place is its argument, read and written.
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def measure_count(args: argparse.Namespace, bar: Progress) -> tuple[dict, list[str]]:
    """Count a layer's operations and bytes: forward, backward and the end of the iteration."""
    tables = {}
    bar.update(0, total=len(args.shapes))
    for shape in args.shapes:
        counted = {name: count_of(name, shape, args) for name in args.norms}
        weight = FLOAT * shape.c_in * shape.c_out * shape.kernel**2
        tables[f"Convolution + norm, {label(shape)}, a layer of {COUNTED}"] = [
            {
                "norm": name,
                **{part: each.operations / COUNTED for part, each in parts.items()},
                "MiB": (moved := sum(each.bytes for each in parts.values()) / COUNTED) / MIB,
                "of the weight": moved / weight,
            }
            for name, parts in counted.items()
        ]
        bar.advance(0)
    return tables, ["Bytes are those of all arguments and results, as if no cache held any."]


def count_of(name: str, shape: Shape, args: argparse.Namespace) -> dict[str, Counter]:
    """What layers side by side do in the parts of an iteration, with full windows."""
    layers = nn.ModuleList([build_layers(name, shape) for _ in range(COUNTED)]).to(args.device)
    model, steps = SideBySide(layers), has_cbn(layers)
    if steps:
        link(model)
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


class SideBySide(nn.Module):
    """Layers that all see the same input."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> list[Tensor]:
        """All outputs."""
        return [layer(x) for layer in self.layers]


def plot(rows: list[dict], path: str) -> None:
    """Plot time and window memory against k."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none has to be there
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
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


# A detector.


def read_detector(args: argparse.Namespace) -> Config:
    """Read the detector's config, and say in which library its parts are."""
    from mmengine.registry import init_default_scope

    from cbn_mmdet.launch import read_config

    cfg = read_config(args.config)
    init_default_scope(cfg.get("default_scope", "mmdet"))
    return cfg


def build_detector(cfg: Config, name: str, args: argparse.Namespace) -> nn.Module:
    """Build the detector with a norm, from the same random weights for all norms."""
    from mmdet.registry import MODELS

    from cbn_mmdet.launch import UsageError, explained_errors

    settings = copy.deepcopy(cfg.model)
    if not replace_norms(settings, norm_cfg(name)):
        raise UsageError(
            f"{args.config}: none of its norms trains: set a norm_cfg without requires_grad=False"
        )
    if settings.get("backbone", {}).get("init_cfg"):
        settings.backbone.init_cfg = None  # nothing to download
    torch.manual_seed(0)
    with explained_errors("unexpected keyword argument", "CBN: ", "BRN: ", "num_channels"):
        model = MODELS.build(settings)
    model.init_weights()
    return model.to(args.device)


def batches(cfg: Config, args: argparse.Namespace) -> tuple[Callable[[int], dict], str]:
    """What returns the data of a step, anew each time; and what they are."""
    from mmdet.registry import DATASETS
    from mmdet.testing import demo_mm_inputs
    from mmengine.dataset import pseudo_collate

    settings = cfg.train_dataloader.dataset
    if args.digits and osp.isfile(osp.join(settings.data_root, settings.ann_file)):
        data = DATASETS.build(settings)

        def read(seed: int) -> dict:
            first = seed * args.batch
            return pseudo_collate([data[i % len(data)] for i in range(first, first + args.batch)])

        return read, f"{args.batch} image(s) of {settings.data_root}"

    def invent(seed: int) -> dict:
        shapes, objects = [(3, *args.size)] * args.batch, [8] * args.batch
        masks = "mask_head" in cfg.model.get("roi_head", {})
        return demo_mm_inputs(args.batch, shapes, objects, num_classes=10, with_mask=masks)

    return invent, f"{args.batch} image(s) of {args.size[0]}×{args.size[1]}, noise"


def step_run(
    cfg: Config, name: str, batch: Callable[[int], dict], args: argparse.Namespace
) -> tuple[Run, nn.Module]:
    """A training step: losses, backward, clipping, optimiser, the end of the iteration."""
    import numpy as np
    from mmengine.optim import build_optim_wrapper

    from cbn_mmdet.launch import UsageError

    model = build_detector(cfg, name, args).train()
    settings = copy.deepcopy(cfg.optim_wrapper)
    settings.optimizer.lr *= 0.01  # no warm-up: train, but do not diverge
    if args.dtype != "float32":
        settings.update(type="AmpOptimWrapper", dtype=args.dtype)
    optim_wrapper, steps, loss = build_optim_wrapper(model, settings), has_cbn(model), []
    if steps:
        link(model)

    def run(seed: int, clock: Clock) -> None:
        data = batch(seed)
        torch.manual_seed(seed)  # for the sampling of regions
        np.random.seed(seed)
        with clock:
            loss[:] = [model.train_step(data, optim_wrapper)["loss"]]
            if steps:
                step(model)

    warm_up(model, run, args.device)
    if not loss[0].isfinite():
        raise UsageError(f"{args.config}: the loss is not finite: give a lower learning rate")
    return run, model


def inference_run(
    cfg: Config, name: str, batch: Callable[[int], dict], args: argparse.Namespace
) -> tuple[Run, nn.Module]:
    """From images to detections."""
    model, dtype = build_detector(cfg, name, args).eval(), getattr(torch, args.dtype)

    def run(seed: int, clock: Clock) -> None:
        data = batch(seed)
        half = torch.autocast(args.device, dtype, enabled=dtype != torch.float32)
        with clock, torch.no_grad(), half:
            model.test_step(data)

    return warm_up(model, run, args.device), model


def time_detectors(
    build: Callable, what: str, args: argparse.Namespace, bar: Progress
) -> tuple[dict, list[str], dict[str, Run]]:
    """Time a detector with each norm; returns the table, notes, and what was run."""
    cfg, runs, notes = read_detector(args), {}, [*args.notes]
    batch, data = batches(cfg, args)
    for name in args.norms:
        bar.update(0, description=f"building and warming up {name}")
        runs[name], _ = build(cfg, name, batch, args)
    seconds = interleave(runs, args, bar, notes, args.command)
    rows = [{"norm": name, "time / BN's": compare(seconds[name], seconds["BN"])} for name in runs]
    return {f"{what}, {title(args)}, {data}": rows}, notes, runs


def measure_step(args: argparse.Namespace, bar: Progress) -> tuple[dict, list[str]]:
    """Time a training step with each norm."""
    return time_detectors(step_run, "Training step", args, bar)[:2]


def measure_inference(args: argparse.Namespace, bar: Progress) -> tuple[dict, list[str]]:
    """Time evaluation with each norm, and compare its operations with BN's."""
    tables, notes, runs = time_detectors(inference_run, "Evaluation", args, bar)
    operations = {name: operations_of(run, args.device) for name, run in runs.items()}
    for row in next(iter(tables.values())):
        row["calls BN's operations"] = operations[row["norm"]] == operations["BN"]
    return tables, notes


def operations_of(run: Run, device: str) -> list[list[str]]:
    """The operations that are called, in their order; and a GPU's kernels, in theirs."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] + [kinds.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run(0, Clock(device))
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    called = [each.name for each in events if each.name.startswith("aten::")]
    return [called, [each.name for each in events if each.device_type.name == "CUDA"]]


def title(args: argparse.Namespace) -> str:
    """Name the detector."""
    return osp.splitext(osp.basename(args.config))[0]


def measure_memory(args: argparse.Namespace, bar: Progress) -> tuple[dict, list[str]]:
    """Measure each norm's peak memory, each time in a process of its own."""
    measured, order = {name: [] for name in args.norms}, random.Random(0)
    bar.update(0, total=args.repeats * len(measured))
    for _ in range(args.repeats):
        for name in order.sample(args.norms, len(args.norms)):
            bar.update(0, description=name)
            fresh = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=fresh) as process:
                measured[name].append(process.submit(memory_of, name, args).result())
            bar.advance(0)
    peaks = {name: [each["peak"] for each in measured[name]] for name in measured}
    rows = [
        {
            "norm": name,
            "peak / BN's": compare(peaks[name], peaks["BN"], "MiB"),
            "windows, MiB": measured[name][0]["windows"],
            "of the weights": measured[name][0]["of the weights"],
        }
        for name in measured
    ]
    whose = "the GPU allocator's in a step" if args.device == "cuda" else "the process's"
    _, data = batches(read_detector(args), args)
    return {f"Memory, {title(args)}, {data}": rows}, [f"The peak is {whose}.", *args.notes]


def memory_of(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a step with full windows; their size, in MiB and in sizes of the weights."""
    if args.threads:
        torch.set_num_threads(args.threads)
    with redirect_stdout(io.StringIO()):
        cfg = read_detector(args)
        run, model = step_run(cfg, name, batches(cfg, args)[0], args)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run(0, Clock(args.device))
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = sum(module.window_bytes for module in model.modules() if isinstance(module, CBN))
    convs = map(model.get_submodule, links(model).values())
    weights = FLOAT * sum(conv.weight.numel() for conv in convs)
    return {"peak": peak / MIB, "windows": held / MIB, "of the weights": held / max(weights, 1)}


MEASURES = {
    "layer": measure_layer,
    "host": measure_host,
    "growth": measure_growth,
    "count": measure_count,
    "step": measure_step,
    "inference": measure_inference,
    "memory": measure_memory,
}

if __name__ == "__main__":
    main()
