# Licensed under the Apache License, Version 2.0.
"""Show the results of trainings in tables and plots."""

import re
from collections import defaultdict
from collections.abc import Iterable
from statistics import mean, stdev

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from printing import print_table

from .detector import ABLATION
from .shared import SLIDING, Study

# Names of the other figures of a row, in tables.
KINDS = {"precise": "precise statistics", "worst": "worst accuracy"}
AXES = {"accuracy": "test accuracy, %", "ap": "box AP"}


def report(name: str, study: Study, rows: list[dict]) -> None:
    """Print the mean and the standard deviation over the seeds, and their number."""
    batches = sorted({row["batch"] for row in rows})
    table = [
        {
            "norm": title(*group),
            **{f"{n} per step": summary(values.get(n, []), study.figure) for n in batches},
        }
        for group, values in grouped(rows, study).items()
    ]
    print_table(f"{name}: {study.figure}, mean ± standard deviation (seeds)", table)
    table = on_the_way(rows, study)
    if table:
        print_table(f"{name}: accuracy on the way", table)


def on_the_way(rows: list[dict], study: Study) -> list[dict]:
    """Make a row of the accuracies on the way, over all seeds, for each norm that has them."""
    ways = defaultdict(list)
    for row in rows:
        if "ways" in row:
            label = study.labels.get(row["norm"], row["norm"])
            label += f", {row['batch']} per step" if row["batch"] > 1 else ""
            ways[label].append(row["ways"])
    return [
        {"norm": norm, **{at: summary([each[at] for each in runs], "way") for at in runs[0]}}
        for norm, runs in ways.items()
    ]


def grouped(rows: list[dict], study: Study) -> dict[tuple, dict[int, list[float]]]:
    """Group the values of all seeds by norm, burn-in and kind of figure, and then by batch."""
    groups = defaultdict(lambda: defaultdict(list))
    order = {name: number for number, name in enumerate(["BN", "BRN", *study.labels])}
    for row in sorted(rows, key=lambda row: (order.get(row["norm"], 9), natural(row))):
        label = study.labels.get(row["norm"], row["norm"])
        for key in (study.figure, *KINDS):
            if key in row:
                groups[label, row["burn_in"], key][row["batch"]].append(row[key])
    return groups


def title(label: str, burn_in: int | None, key: str) -> str:
    """The title of a group of :func:`grouped`, in tables and plots."""
    parts = [label, *([] if burn_in is None else [f"burn-in {burn_in}"])]
    return ", ".join([*parts, KINDS[key]] if key in KINDS else parts)


def natural(row: dict) -> tuple:
    """Sort key: window_size=4 before window_size=16, momentum=0.02 before 0.1, then burn-ins."""
    numbers = re.findall(r"\d+(?:\.\d+)?", row["norm"])
    return tuple(map(float, numbers)), row["norm"], row["burn_in"] or 0


def summary(values: list[float], figure: str) -> str:
    """Format the mean, spread and number of ``values``."""
    if not values:
        return ""
    digits = 1 if figure == "accuracy" else 3
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread} ({len(values)})"


def plot_batches(rows: list[dict], study: Study, path: str) -> None:
    """Plot the results over the batch; beside lines, what has one batch is left to the table."""
    canvas = Figure(figsize=(7.2, 4), layout="constrained")
    axes = canvas.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)  # more than the usual ten
    found = grouped(rows, study).items()
    lines = {group: values for group, values in found if group[-1] == study.figure}
    fewest = min(2, max(map(len, lines.values())))
    for group, values in lines.items():
        if len(values) >= fewest:
            draw(axes, values, title(*group))
    axes.set(xscale="log", xlabel="images per step", ylabel=AXES[study.figure])
    ticks = sorted({row["batch"] for row in rows})
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    finish(canvas, [axes], path)


def plot_ablation(rows: list[dict], study: Study, path: str) -> None:
    """Plot the results over the sliding window, and over the burn-in."""
    canvas = Figure(figsize=(9, 3.8), layout="constrained")
    panels = canvas.subplots(1, 2, sharey=True)
    default, figure = ABLATION["burn_in"], study.figure
    windows, burn_ins = (defaultdict(lambda: defaultdict(list)) for _ in panels)
    for row in sorted(rows, key=lambda row: (row["norm"] == "CBN", row["batch"])):
        found = re.fullmatch(re.escape(SLIDING).replace("8", r"(\d+)"), row["norm"])
        label = f"{'sliding' if found else 'CBN'}, {row['batch']} per step"
        if found and row["burn_in"] == default:
            windows[label][int(found[1])].append(row[figure])
        if row["norm"] in (SLIDING, "CBN"):
            burn_ins[label][row["burn_in"]].append(row[figure])
    for axes, lines in zip(panels, (windows, burn_ins), strict=True):
        for label, values in lines.items():
            draw(axes, values, label)
    panels[0].set(xscale="log", xlabel=f"window_size (burn-in {default})", ylabel=AXES[figure])
    ticks = sorted({size for values in windows.values() for size in values})
    panels[0].set_xticks(ticks, ticks)
    panels[0].minorticks_off()
    panels[1].set(xlabel=f"burn-in, of {ABLATION['epochs']} epochs (sliding: window_size 8)")
    finish(canvas, panels, path)


def draw(axes: Axes, groups: dict[int, list[float]], label: str) -> None:
    """Draw means with the spread of the seeds."""
    places = sorted(groups)
    means = [mean(groups[place]) for place in places]
    spreads = [stdev(groups[place]) if len(groups[place]) > 1 else 0 for place in places]
    axes.errorbar(places, means, spreads, marker=".", capsize=3, label=label)


def finish(canvas: Figure, panels: Iterable[Axes], path: str) -> None:
    """Add a legend, and write the file."""
    for axes in panels:
        axes.grid(alpha=0.3)
    # Beside the panels, where it hides no point; the last panel has all lines.
    if axes.has_data():
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    canvas.savefig(path, dpi=100)
