# Licensed under the Apache License, Version 2.0.
"""Measure ratios of times: clocks, rounds and medians."""

import argparse
import math
import os
import os.path as osp
import platform
import random
import re
import time
from collections.abc import Callable
from statistics import geometric_mean, median, quantiles

import torch
from printing import Bar
from torch import nn

from cbn_mmdet import CBN

MIN_ROUNDS, FEWEST_ROUNDS = 12, 3  # before a ratio counts as stable, and if the time is up
SAMPLE_SECONDS = 0.005  # shorter calls are repeated, to exceed the noise of the clock
FLOAT, MIB = 4, 2**20  # bytes
WARM_UP = 8  # iterations for a window that chooses its own size


class Clock:
    """Adds up the time spent in ``with`` blocks, which ``tell`` reads.

    On a GPU, this is the GPU's own time, read at the end: waiting for each block would idle it.
    """

    def __init__(self, device: str, tell: Callable[[], float] = time.perf_counter) -> None:
        self._gpu, self._tell, self._blocks = device == "cuda", tell, []

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


# A function that runs once what is timed: it prepares with the seed, then works within the clock.
Run = Callable[[int, Clock], None]
# A function of a module that builds a norm's run, warmed up, and its model.
Build = Callable[[str, argparse.Namespace], tuple[Run, nn.Module]]


def warm_up(model: nn.Module, run: Run, device: str) -> Run:
    """Run until the windows are full and all one-off work is done."""
    sizes = [module.window_size for module in model.modules() if isinstance(module, CBN)]
    for seed in range(max([WARM_UP if size == "auto" else size for size in sizes], default=1) + 1):
        run(seed, Clock(device))
    return run


def interleave(
    runs: dict[str, Run],
    args: argparse.Namespace,
    bar: Bar,
    label: str,
    tell: Callable[[], float] = time.perf_counter,
    sample: float = SAMPLE_SECONDS,
) -> dict[str, list[float]]:
    """Run in turns until each ratio to BN is stable or the time is up; returns seconds by round."""
    seconds = {name: [] for name in runs}
    order = random.Random(0)
    first = Clock(args.device, tell)
    runs["BN"](0, first)
    repeats = min(100, math.ceil(sample / first.seconds()))
    start, rounds, worst = time.monotonic(), 0, math.inf
    while rounds < MIN_ROUNDS or worst > args.stable_to:
        if rounds >= FEWEST_ROUNDS and time.monotonic() - start > args.max_seconds:
            args.notes.append(f"{label}: after {rounds} rounds stable to {100 * worst:.1f} % only.")
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


def measure(build: Build, args: argparse.Namespace, bar: Bar) -> tuple[list[dict], dict[str, Run]]:
    """Time each norm; returns the rows of a table, and the runs."""
    runs = {}
    for name in args.norms:
        bar.update(0, description=f"building and warming up {name}")
        runs[name], _ = build(name, args)
    seconds = interleave(runs, args, bar, args.command)
    rows = [{"norm": name, "time / BN's": compare(seconds[name], seconds["BN"])} for name in runs]
    return rows, runs


def compare(own: list[float], reference: list[float], unit: str = "ms") -> dict:
    """The median of the ratios of all rounds, and half of its 95 % interval.

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
