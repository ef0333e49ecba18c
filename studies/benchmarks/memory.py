# Licensed under the Apache License, Version 2.0.
"""Measure peak memory. Needs only torch."""

import argparse
import gc
import io
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout

import torch
from common.memory import peak_memory
from printing import Bar

from cbn_mmdet import CBN, links

from .timing import FLOAT, MIB, Build, Clock, compare


def measure(build: Build, args: argparse.Namespace, bar: Bar) -> list[dict]:
    """Measure each norm's peak memory; on the CPU, each time in a process of its own."""
    measured, order = {name: [] for name in args.norms}, random.Random(0)
    bar.update(0, total=args.repeats * len(measured))
    for _ in range(args.repeats):
        for name in order.sample(args.norms, len(args.norms)):
            bar.update(0, description=name)
            measured[name].append(_alone(build, name, args))
            bar.advance(0)
    peaks = {name: [each["peak"] for each in measured[name]] for name in measured}
    whose = "the GPU allocator's in a step" if args.device == "cuda" else "the process's"
    args.notes.insert(0, f"The peak is {whose}.")
    return [
        {
            "norm": name,
            "peak / BN's": compare(peaks[name], peaks["BN"], "MiB"),
            "windows, MiB": measured[name][0]["windows"],
            "of the weights": measured[name][0]["of the weights"],
        }
        for name in measured
    ]


def _alone(build: Build, name: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure while nothing else takes memory."""
    if args.device == "cuda":  # the allocator counts what is held, and now nothing is
        gc.collect()
        return _memory_of(build, name, args)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        return process.submit(_memory_of, build, name, args).result()


def _memory_of(build: Build, name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a step with full windows; their size in MiB, and relative to the weights."""
    if args.threads:
        torch.set_num_threads(args.threads)
    with redirect_stdout(io.StringIO()):
        run, model = build(name, args)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run(0, Clock(args.device))
    peak = peak_memory(args.device)
    held = sum(module.window_bytes for module in model.modules() if isinstance(module, CBN))
    convs = map(model.get_submodule, links(model).values())
    weights = FLOAT * sum(conv.weight.numel() for conv in convs)
    return {"peak": peak / MIB, "windows": held / MIB, "of the weights": held / max(weights, 1)}
