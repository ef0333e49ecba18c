# Licensed under the Apache License, Version 2.0.
"""Set the last COCO evaluations of several runs side by side, as a Markdown table.

Runs whose work dirs differ only in a trailing ``_seedN`` are one row: their mean, and each seed.
"""

import argparse
import os.path as osp
import re
from collections import defaultdict
from statistics import mean

from cbn_mmdet.launch import UsageError, run_tool
from cbn_mmdet.runs import read_scalars, time_unit

METRICS = ("coco/bbox_mAP", "coco/bbox_mAP_50", "coco/bbox_mAP_75", "coco/segm_mAP")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dirs", nargs="+", metavar="WORK_DIR", help="of tools/train.py")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    rows = defaultdict(dict)
    for work_dir in parse_args().work_dirs:
        name, seed = split_name(work_dir)
        if seed in rows[name]:
            raise UsageError(f"{work_dir}: another work dir is run {name}, seed {seed}, as well")
        rows[name][seed] = last_result(work_dir)
    metrics = [
        metric
        for metric in METRICS
        if any(metric in result for seeds in rows.values() for result in seeds.values())
    ]
    if not metrics:
        raise UsageError("none of the runs has a COCO evaluation yet")
    print("| run | " + " | ".join(metrics) + " | trained for |")
    print("|---|" + "---|" * (len(metrics) + 1))
    for name, seeds in rows.items():
        results = [seeds[seed] for seed in sorted(seeds)]
        cells = [cell([result.get(metric) for result in results]) for metric in metrics]
        lengths = sorted({result["length"] for result in results if result})
        print(f"| {name} | " + " | ".join(cells) + f" | {', '.join(lengths)} |")


def split_name(work_dir: str) -> tuple[str, int]:
    """Tell a run's name and its seed from its work dir."""
    name = osp.basename(osp.normpath(work_dir))
    match = re.fullmatch(r"(.+)_seed(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 0)


def last_result(work_dir: str) -> dict:
    """Read the last evaluation of a run, empty if there was none."""
    training, evaluations = read_scalars(work_dir)
    if not evaluations:
        return {}
    last = evaluations[-1]
    return {**last, "length": f"{last['step']} {time_unit(training)}s"}


def cell(values: list) -> str:
    """Format the values of all seeds: their mean, then each; a dash where none was measured."""
    each = ", ".join("–" if value is None else f"{value:.3f}" for value in values)
    if None in values or len(values) == 1:  # no mean over the seeds that happened to end
        return each
    return f"**{mean(values):.3f}** ({each})"


if __name__ == "__main__":
    run_tool(main)
