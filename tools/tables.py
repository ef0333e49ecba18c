# Licensed under the Apache License, Version 2.0.
"""Print Markdown tables of what runs measured beside what was published.

Each detector and backbone has a table, each config a row; published figures come from the
metafiles. A row shows the mean of the config's finished runs, and each run. See docs/tables.md.
"""

import argparse
import json
import os.path as osp
import re
from glob import glob
from pathlib import Path
from statistics import mean, median

import yaml
from common.config import DEFINING, differences, look_up, read_config
from common.errors import UsageError, run_tool
from common.runs import Run, read_run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

CONFIGS = osp.join(osp.dirname(osp.dirname(osp.abspath(__file__))), "configs")
METRICS = {
    "box AP": "coco/bbox_mAP",
    "box AP50": "coco/bbox_mAP_50",
    "box AP75": "coco/bbox_mAP_75",
    "mask AP": "coco/segm_mAP",
    "mask AP50": "coco/segm_mAP_50",
    "mask AP75": "coco/segm_mAP_75",
    "top-1": "accuracy/top1",
    "mIoU": "mIoU",
}
PERCENT = ("top-1", "mIoU")  # logged in per cent; APs are logged from 0 to 1
DETECTORS = {"faster-rcnn": "Faster R-CNN", "mask-rcnn": "Mask R-CNN"}
# The batch of the paper's table: rows with it are shown even without a run.
PAPER = "_4xb4-"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dirs", nargs="+", metavar="WORK_DIR", help="of tools/train.py")
    parser.add_argument("--all", action="store_true", help="show every config beside the metafiles")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="plot the AP of each run over time, or top-1 over images per GPU",
    )
    parser.add_argument(
        "--configs",
        default=CONFIGS,
        metavar="DIR",
        help="where */metafile.yml with the published figures are (the configs beside this tool)",
    )
    return parser.parse_args()


def main() -> None:
    """Print the tables."""
    args = parse_args()
    runs = read_runs(args.work_dirs)
    models = read_models(args.configs)
    tables = make_tables(make_rows(runs, args.configs), models, args.all)
    if args.json:
        print(json.dumps({"tables": tables}, indent=2))
    else:
        print("\n\n".join(markdown(table) for table in tables))
    if args.plot:
        plot(runs, args.plot)


def read_runs(work_dirs: list[str]) -> list[Run]:
    """Read each run."""
    paths = [osp.realpath(work_dir) for work_dir in work_dirs]
    for path, work_dir in zip(paths, work_dirs, strict=True):
        if paths.count(path) > 1:
            raise UsageError(f"{work_dir} is given twice: name each work dir once")
    return [read_run(work_dir) for work_dir in work_dirs]


def split_name(work_dir: str) -> tuple[str, int]:
    """Split the name of a work dir into the run's name and its seed."""
    name = osp.basename(osp.abspath(work_dir))
    match = re.fullmatch(r"(.+)_seed(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 0)


def read_models(configs: str) -> dict[str, dict]:
    """Read the published figures of each config beside a metafile; returns them by config name.

    Configs listed in the metafile come first, in the order of their table; the others follow.
    """
    models = {}
    paths = sorted(glob(osp.join(configs, "*", "metafile.yml")))
    if not paths:
        raise UsageError(f"--configs {configs}: there is no */metafile.yml in it")
    for path in paths:
        try:
            with open(path) as file:
                listed = {
                    Path(model["Config"]).stem: dict(model.get("Published") or {})
                    for model in yaml.safe_load(file)["Models"]
                }
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is no metafile: it needs Models, each with Config") from error
        for other in sorted(glob(osp.join(osp.dirname(path), "*.py"))):
            listed.setdefault(Path(other).stem, {})
        for name, published in listed.items():
            unknown = sorted(published.keys() - {*METRICS, "Source"})
            if unknown:
                raise UsageError(
                    f"{path}: {name} has Published: {unknown[0]}; known are {', '.join(METRICS)}"
                )
            models[name] = published
    return models


# From here on, runs, rows and tables are plain dictionaries, as --json prints them.


def make_rows(runs: list[Run], configs: str) -> list[dict]:
    """Make a row from the runs of each config; runs with other settings get another row."""
    groups = []
    for run in runs:
        key = (run.config or split_name(run.work_dir)[0], run.settings)
        members = next((members for known, members in groups if known == key), None)
        if members is None:
            members = []
            groups.append((key, members))
        members.append(run)
    names = [name for (name, _), _ in groups]
    rows = []
    for (name, _), members in groups:
        members.sort(key=lambda run: split_name(run.work_dir)[1])
        rows.append(make_row(name, [describe(run) for run in members]))
        rows[-1]["changed"] = changed_settings(members[0], name, configs)
        if names.count(name) > 1:
            where = ", ".join(osp.basename(osp.abspath(run.work_dir)) for run in members)
            rows[-1]["label"] = f"{name} ({where})"
    return rows


def changed_settings(run: Run, config: str, configs: str) -> list[str]:
    """List the settings in which a run differs from the config file it is named after."""
    paths = glob(osp.join(configs, "*", f"{config}.py"))
    if not paths or not run.settings:
        return []
    wanted = read_config(paths[0], import_custom_modules=False).to_dict()
    return [
        key
        for key in (*DEFINING, "precise_stats")
        if any(differences(key, look_up(run.settings, key), look_up(wanted, key)))
    ]


def describe(run: Run) -> dict:
    """Collect what a run measured and how far it got."""
    last = run.evaluations[-1] if run.evaluations else {}
    logged = run.training[-1] if run.training else {}
    memory = [record["memory"] for record in run.training if "memory" in record]
    times = [record["time"] for record in run.training if "time" in record]
    return {
        "work_dir": run.work_dir,
        "state": state(run),
        "finished": run.finished,
        "unit": run.unit,
        "total": run.total,
        "evaluated": last.get("step"),
        "epoch": logged.get("epoch"),
        "iteration": logged.get("step"),
        "images": images_per_gpu(run),
        "measured": {metric: points(metric, last.get(key)) for metric, key in METRICS.items()},
        "seconds_per_iteration": median(times) if times else None,
        # mmengine resets its peak after each logged step: the run's peak is the largest of them
        "peak_memory_mib": max(memory, default=None),
    }


def state(run: Run) -> str:
    """Say how far a run got."""
    if not (run.training or run.evaluations):
        return "nothing logged" if run.folder else "no training run"
    evaluated = run.evaluations[-1]["step"] if run.evaluations else None
    if run.finished:
        return f"{evaluated} {run.unit}{'' if evaluated == 1 else 's'}"
    where, of = evaluated, f" of {run.total}" if run.total else ""
    if run.training:
        where = run.training[-1].get("epoch", run.training[-1]["step"])
    parts = [f"{run.unit} {where}{of}"]
    if run.training and run.unit == "epoch":
        parts.append(f"last logged iteration {run.training[-1]['step']}")
    if evaluated is None:
        return ", ".join([*parts, "never evaluated"])
    what = next((each for each in PERCENT if METRICS[each] in run.evaluations[-1]), "AP")
    parts.append(f"{what} of {run.unit} {evaluated}")
    return ", ".join(parts)


def images_per_gpu(run: Run) -> int | None:
    """The images per GPU of a run, if its config is known."""
    return look_up(run.settings, "train_dataloader.batch_size")


def points(metric: str, value: float | None) -> float | None:
    """Turn a logged value into per cent; -1 means that there were no such objects to measure."""
    if value is None or value < 0:
        return None
    return round(value if metric in PERCENT else 100 * value, 10)


def make_row(config: str, runs: list[dict]) -> dict:
    """Make the row of a config from its runs, even if there are none."""
    measured = {}
    for metric in METRICS:
        values = [run["measured"][metric] for run in runs if run["finished"]]
        # A mean over only the runs that have a value would favour them.
        measured[metric] = mean(values) if values and None not in values else None
    return {"config": config, "label": config, "changed": [], "runs": runs, "measured": measured}


def make_tables(rows: list[dict], models: dict[str, dict], everything: bool) -> list[dict]:
    """Make a table per detector and backbone, after one of configs that no metafile covers."""
    tables = []
    own = [beside(row, {}) for row in rows if row["config"] not in models]
    if own:
        tables.append({"title": "Measured", "compared": False, "rows": own})
    measured = {row["config"] for row in rows}
    for heading in dict.fromkeys(map(title, models)):  # each once, in the metafiles' order
        names = [name for name in models if title(name) == heading]
        if not (everything or measured.intersection(names)):
            continue
        table = {"title": heading, "compared": True, "rows": []}
        for name in names:
            mine = [row for row in rows if row["config"] == name]
            if not mine and (everything or models[name] or PAPER in name):
                mine = [make_row(name, [])]
            table["rows"] += [beside(row, models[name]) for row in mine]
        tables.append(table)
    return tables


def title(config: str) -> str:
    """Name the detector and backbone of ``mask-rcnn_r50_fpn_cbn_4xb4-1x_coco``, for example."""
    detector, *backbone = config.split("_")[:3]
    backbone = re.sub(r"^R(?=\d)", "R-", "-".join(backbone).upper())
    return f"{DETECTORS.get(detector, detector)} {backbone}".strip()


def beside(row: dict, published: dict) -> dict:
    """Add to a row the published figures, and the differences from them."""
    difference = {
        metric: None
        if value is None or published.get(metric) is None or row["changed"]
        else round(value - published[metric], 10)
        for metric, value in row["measured"].items()
    }
    return {
        **row,
        "published": {metric: published.get(metric) for metric in METRICS},
        "source": published.get("Source"),
        "difference": difference,
    }


# The same tables as Markdown.


def markdown(table: dict) -> str:
    """Write a table as Markdown that also reads well as plain text."""
    rows, compared = table["rows"], table["compared"]
    columns = {"config": [row["label"] for row in rows]}
    for metric in METRICS:
        columns[metric] = [cell(row, metric, compared) for row in rows]
    if columns["top-1"] != ["–"] * len(rows):
        columns["images per GPU"] = [
            listed([each["images"] for each in row["runs"][:1]], "d") for row in rows
        ]
    columns["trained for"] = [states(row["runs"]) for row in rows]
    columns["other than the config's"] = [", ".join(row["changed"]) or "–" for row in rows]
    columns["s/iteration"] = [
        listed([run["seconds_per_iteration"] for run in row["runs"]], ".3f") for row in rows
    ]
    columns["memory (MiB)"] = [
        listed([run["peak_memory_mib"] for run in row["runs"]], "d") for row in rows
    ]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    return "\n".join([f"## {table['title']}", "", *aligned(columns), *notes(table)])


def cell(row: dict, metric: str, compared: bool) -> str:
    """Format one metric: the mean of the finished runs, each run, and the published figure."""
    values = [run["measured"][metric] for run in row["runs"]]
    average, published = row["measured"][metric], row["published"][metric]
    if {*values, published} <= {None}:
        return "–"
    each = []
    for run, value in zip(row["runs"], values, strict=True):
        emphasis = "*" if value is not None and not run["finished"] else ""
        each.append(f"{emphasis}{shown(metric, value, compared)}{emphasis}")
    text = ", ".join(each) or "–"
    if average is not None and sum(run["finished"] for run in row["runs"]) > 1:
        text = f"**{shown(metric, average, compared)}** ({text})"
    if compared:
        text += f" / {shown(metric, published, compared)}"
    if row["difference"][metric] is not None:
        text += f" ({round(row['difference'][metric], 1) + 0.0:+.1f})"  # + 0.0 turns -0.0 into 0.0
    return text


def shown(metric: str, value: float | None, compared: bool) -> str:
    """Format a figure: an AP in COCO's points if it is compared, anything else as logged."""
    if value is None:
        return "–"
    if metric in PERCENT:
        return f"{value:.2f}"
    return f"{value:.1f}" if compared else f"{value / 100:.3f}"


def states(runs: list[dict]) -> str:
    """List how far each run got, just once if all got equally far."""
    each = [run["state"] for run in runs]
    return "; ".join(each if len(set(each)) > 1 else each[:1]) or "–"


def listed(values: list, form: str) -> str:
    """List one value of each run; a single dash if no run has one."""
    if set(values) <= {None}:
        return "–"
    return ", ".join("–" if value is None else format(value, form) for value in values)


def aligned(columns: dict[str, list[str]]) -> list[str]:
    """Write a Markdown table, its columns padded to one width."""
    padded = []
    for name, cells in columns.items():
        width = max(map(len, [name, *cells]))
        padded.append([name.ljust(width), "-" * width, *(text.ljust(width) for text in cells)])
    return [f"| {' | '.join(line)} |" for line in zip(*padded, strict=True)]


def notes(table: dict) -> list[str]:
    """Explain the cells of a table."""
    lines = []
    if table["compared"]:
        lines.append("Measured / published (measured − published), in COCO's points.")
        sources = dict.fromkeys(row["source"] for row in table["rows"] if row["source"])
        lines += [f"Published: {source}" for source in sources]
    runs = [run for row in table["rows"] for run in row["runs"]]
    if any(not run["finished"] and run["evaluated"] is not None for run in runs):
        lines.append("In italics: runs that did not finish. They enter no mean and no difference.")
    return ["", *lines] if lines else []


def plot(runs: list[Run], path: str) -> None:
    """Plot the runs: AP of detectors over epochs, or top-1 of classifiers over images per GPU."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    tops, boxes = (
        [run for run in runs if any(METRICS[metric] in each for each in run.evaluations)]
        for metric in ("top-1", "box AP")
    )
    if tops and boxes:
        raise UsageError(
            f"--plot: {tops[0].work_dir} is a classifier's and {boxes[0].work_dir} a detector's; "
            "plot them apart"
        )
    if tops:
        plot_top1(axes, tops)
    else:
        plot_ap(axes, runs)
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path}: {error}") from error


def plot_top1(axes: Axes, runs: list[Run]) -> None:
    """Plot top-1 of the finished runs over images per GPU, and the means as lines.

    A line belongs to one config and model; only the momentum may differ between batches.
    """
    lines = []
    for run in runs:
        value, images = run.evaluations[-1].get(METRICS["top-1"]), images_per_gpu(run)
        if not run.finished or None in (value, images):
            continue
        name = re.sub(r"_\d+xb\d+(?=_|$)", "", run.config or split_name(run.work_dir)[0])
        model = run.settings.get("model")
        key = name, without_momentum(model)
        for known, _, line in lines:
            if known == key and line.get(images, (model,))[0] == model:
                break
        else:
            line = {}
            lines.append((key, osp.normpath(run.work_dir), line))
        line.setdefault(images, (model, []))[1].append(value)
    if not lines:
        raise UsageError("--plot: none of the classifiers' runs has finished")
    names = [name for (name, _), *_ in lines]
    lines = [
        (
            name if names.count(name) == 1 else f"{name} ({work_dir})",
            {images: values for images, (_, values) in line.items()},
        )
        for (name, _), work_dir, line in lines
    ]
    for number, (label, line) in enumerate(sorted(lines, key=lambda each: each[0])):
        images = sorted(line)
        means = [mean(line[each]) for each in images]
        axes.plot(images, means, color=f"C{number}", label=label)
        for each in images:
            axes.plot([each] * len(line[each]), line[each], ".", color=f"C{number}")
    ticks = sorted({images for _, line in lines for images in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.set(xlabel="images per GPU", ylabel="top-1 accuracy (%)")
    axes.invert_xaxis()  # towards small batches, where norms differ
    axes.legend(fontsize="small")


def without_momentum(settings: object) -> object:
    """Copy the settings of a model without momentum, which depends on the batch."""
    if isinstance(settings, dict):
        return {
            key: without_momentum(value) for key, value in settings.items() if key != "momentum"
        }
    if isinstance(settings, (list, tuple)):
        return [without_momentum(value) for value in settings]
    return settings


def plot_ap(axes: Axes, runs: list[Run]) -> None:
    """Plot box AP (solid) and mask AP (dashed) of each run over its epochs."""
    styles = {"box AP": "-", "mask AP": "--"}
    logged = {run.work_dir: {key for each in run.evaluations for key in each} for run in runs}
    drawn = [run for run in runs if METRICS["box AP"] in logged[run.work_dir]]
    if not drawn:
        raise UsageError("--plot: none of the runs has a COCO evaluation yet")
    units = {run.unit: run.work_dir for run in drawn}
    if len(units) > 1:
        raise UsageError(
            f"--plot: {units['epoch']} counts epochs and {units['iteration']} iterations; "
            "plot them apart"
        )
    names = [osp.basename(osp.abspath(run.work_dir)) for run in drawn]
    if len(set(names)) < len(names):
        names = [osp.normpath(run.work_dir) for run in drawn]

    legend = []
    for number, (name, run) in enumerate(zip(names, drawn, strict=True)):
        legend.append(Line2D([], [], color=f"C{number}", label=name))
        steps = [record["step"] for record in run.evaluations]
        for metric, style in styles.items():
            values = [record.get(METRICS[metric]) for record in run.evaluations]
            axes.plot(steps, values, f".{style}", color=f"C{number}")
    masks = any(METRICS["mask AP"] in keys for keys in logged.values())
    if masks:
        legend += [Line2D([], [], color="grey", ls=styles[each], label=each) for each in styles]
    axes.legend(handles=legend, fontsize="small")
    axes.set(xlabel=next(iter(units)), ylabel="AP" if masks else "box AP", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)


if __name__ == "__main__":
    run_tool(main)
