# Licensed under the Apache License, Version 2.0.
"""Measure what CBN costs, relative to batch normalisation (BN) in the same run.

A time is a ratio to BN's. The norms take turns, in another order each round, so that other load on
the machine affects all of them. The ratio is the median over the rounds. They go on until half of
its 95 % interval, which is printed after it, is within --stable-to, or until the time is up.

Name a norm by its norm_cfg, such as BN, GN or CBN(derivative_stride=2, backward='window').
CBN(compensate=False) is the paper's naive CBN. Only layer and count have two further rows: 'BN +
weight gradient' computes one more gradient of the weight, the least that any derivative from all
positions can cost; 'CBN, by autograd' is CBN behind a layer that is not a plain convolution.
Each norm of host has a second row: its torch operations, run again one after another, without the
Python and the autograd that call them.
layer, host, growth and count need only torch. The others need MMDetection or, with --torchvision,
torchvision, whose Faster R-CNN then has the norm everywhere.
"""

import argparse
import io
import json
import os.path as osp
import re
from contextlib import redirect_stdout
from importlib import import_module

import paths
import torch
from benchmarks.layer import AUTOGRAD, FLOOR, SHAPES, Shape
from benchmarks.timing import machine
from common.errors import positive, run_tool
from norms import norm
from printing import print_table, progress

R50 = [
    osp.join(paths.CONFIGS, "faster_rcnn", f"faster-rcnn_r50_fpn_{each}_4xb4-1x_coco.py")
    for each in ("bn", "bn-all")
]
DIGITS = osp.join(paths.DIGITS, "faster-rcnn_r18_fpn_bn-all_1xb1_digits.py")
NAIVE = "CBN(compensate=False)"
CBNS = [NAIVE, "CBN", "CBN(backward='window')"]
STRIDES = [f"CBN(derivative_stride={stride})" for stride in (1, 2, 4)]
BFLOAT16 = "CBN(window_dtype='bfloat16')"
SLIDING = [  # the paper's, and one with a gradient through past iterations, too
    "CBN(window='sliding', window_size=4, backward='current')",
    "CBN(window='sliding', window_size=8, backward='window')",
]
ROWS = {
    "layer": ["GN", "SyncBN", "BRN", *CBNS, *STRIDES, BFLOAT16, *SLIDING, AUTOGRAD, FLOOR],
    "host": ["GN", "BRN", *CBNS, *STRIDES, BFLOAT16, *SLIDING],
    "count": ["GN", *CBNS, *STRIDES, BFLOAT16, *SLIDING],
    "step": ["GN", "SyncBN", "BRN", *CBNS, *STRIDES, BFLOAT16, *SLIDING],
    "inference": ["GN", "CBN"],
    "memory": ["GN", "SyncBN", "BRN", *CBNS, BFLOAT16, *SLIDING],
}


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
        if command in ("step", "memory"):
            text = "torchvision's Faster R-CNN"
            add("--torchvision", action="store_true", help=text)
        if placed not in parents:
            subparser.set_defaults(device="cpu", threads=1, dtype="float32")
        if command == "growth":
            add("--plot", metavar="FILE.png", help="plot cost against the window")
        else:
            add("--norms", nargs="+", type=row, metavar="NORM", help="to set beside BN")
        if command == "memory":
            add("--repeats", type=positive, default=3, metavar="N", help="of each norm (3)")
    args = parser.parse_args()
    mistake = complete(args)
    if mistake:
        parser.exit(2, f"{parser.prog}: error: {mistake}\n")
    return args


def complete(args: argparse.Namespace) -> str | None:
    """Fill in defaults that depend on several arguments; returns the user's mistake, if any."""
    gpu, asked = args.device == "cuda", getattr(args, "norms", None)
    if gpu and not torch.cuda.is_available():
        return "--device cuda: no GPU is available; leave it out to use the CPU"
    if not gpu and args.dtype != "float32":
        return f"--dtype {args.dtype} is measured on a GPU only: add --device cuda"
    if not gpu and "SyncBN" in (asked or ()):
        return "--norms SyncBN: it runs on a GPU only: add --device cuda"
    odd = {FLOOR, AUTOGRAD} & set(asked or ())
    if odd and args.command not in ("layer", "count"):
        return f"--norms '{min(odd)}': this row is layer's and count's alone"
    plot = getattr(args, "plot", None)
    if part_of(args) == "vision" and (args.config or args.digits or args.all_norms):
        return (
            "--torchvision: this detector has no config; take --config, --digits, --all-norms out"
        )
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


def shape(text: str) -> Shape:
    """Read a shape from the command line."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){4}", text):
        raise argparse.ArgumentTypeError(f"takes N,C_in,C_out,kernel,size, got {text}")
    return Shape(*map(int, text.split(",")))


def row(text: str) -> str:
    """Read the name of a norm, or of one of the two further rows."""
    return text if text in (FLOOR, AUTOGRAD) else norm(text)


def main() -> None:
    """Measure, and print the tables."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if part_of(args) == "detector":
        run_tool(lambda: report(args))
    else:
        report(args)


def part_of(args: argparse.Namespace) -> str:
    """The name of the module that measures the command."""
    if getattr(args, "torchvision", False):
        return "vision"
    return "detector" if "config" in args else "layer"


def report(args: argparse.Namespace) -> None:
    """Measure and print: tables are ``{title: rows}``, a row is ``{column: cell}``."""
    # Hides what mmengine and pycocotools print.
    with progress(args.command) as bar, redirect_stdout(io.StringIO()):
        part = import_module(f"benchmarks.{part_of(args)}")  # may need MMDetection
        tables = getattr(part, f"measure_{args.command}")(args, bar)
    about = {
        "machine": machine(args.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
    }
    if args.json:
        print(json.dumps({**about, "tables": tables, "notes": args.notes}, indent=2))
        return
    print(about.pop("machine"), *(f"{key} {value}" for key, value in about.items()), sep=", ")
    for title, rows in tables.items():
        print_table(title, [{key: cell(each) for key, each in row.items()} for row in rows])
    print("", *args.notes, sep="\n")


def cell(value: object) -> str:
    """Format a cell: a ratio with its error (BN's with what BN took), a number, or text."""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    if not isinstance(value, dict):
        return str(value)
    if value["error"]:
        return f"{value['ratio']:.3f} ± {value['error']:.3f}"
    own = [f" ({cell(value[unit])} {unit})" for unit in ("ms", "MiB") if unit in value]
    return "".join([cell(value["ratio"]), *own])


if __name__ == "__main__":
    main()
