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
from cbn_mmdet.runs import read_scalars

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
        rows[name][seed] = last_result(work_dir)
    metrics = [
        metric
        for metric in METRICS
        if any(metric in result for seeds in rows.values() for result in seeds.values())
    ]
    if not metrics:
        raise UsageError("none of the runs has a COCO evaluation yet")
    print("| run | " + " | ".join(metrics) + " | epochs |")
    print("|---|" + "---|" * (len(metrics) + 1))
    for name, seeds in rows.items():
        results = [seeds[seed] for seed in sorted(seeds)]
        cells = [cell([result.get(metric) for result in results]) for metric in metrics]
        epochs = sorted({result["step"] for result in results if "step" in result})
        print(f"| {name} | " + " | ".join(cells) + f" | {'/'.join(map(str, epochs))} |")


def split_name(work_dir: str) -> tuple[str, int]:
    """Tell a run's name and its seed from its work dir."""
    name = osp.basename(osp.normpath(work_dir))
    match = re.fullmatch(r"(.+)_seed(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 0)


def last_result(work_dir: str) -> dict:
    """Read the last evaluation of a run, empty if there was none."""
    if not osp.isdir(work_dir):
        raise UsageError(f"there is no work dir {work_dir}: train first")
    _, evaluations = read_scalars(work_dir)
    return evaluations[-1] if evaluations else {}


def cell(values: list) -> str:
    """Format the values of all seeds: their mean, then each; empty where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if len(values) == 1:
        return f"{known[0]:.3f}"
    each = ", ".join("–" if value is None else f"{value:.3f}" for value in values)
    return f"**{mean(known):.3f}** ({each})"


if __name__ == "__main__":
    run_tool(main)
