# Licensed under the Apache License, Version 2.0.
"""Run on a GPU what a CPU cannot, and write one report to paste into an issue.

The parts are the tests that a CPU skips, two COCO configs on images of noise, and the benchmarks at
800x1333. Each runs in its own process, with a time limit. The work dir keeps finished parts: after
an interruption, the same command goes on, and it repeats parts that failed or found no time.
"""

import argparse
import json
import os
import os.path as osp
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import paths
import torch
from benchmarks.timing import machine
from norms import PAPERS
from printing import markdown

NAIVE = "CBN(compensate=False)"
NORMS = ["SyncBN", "GN", "BRN", "MABN", NAIVE, PAPERS, "CBN"]
# Layers: one of nothing but overhead, the stem's, the FPN's, two of the backbone's, the head's.
SHAPES = "{0},8,8,3,4 {0},64,64,3,258 {0},256,256,3,129 {0},1024,256,1,65 {0},512,512,3,32"
SHAPES += " {1},256,256,3,7"
CONFIGS = {  # CBN everywhere; CBN in FPN and heads, in mixed precision
    "faster_rcnn/faster-rcnn_r50_fpn_cbn-all_4xb4-1x_coco.py": [],
    "mask_rcnn/mask-rcnn_r50_fpn_cbn_8xb2-1x_coco.py": ["--amp"],
}
DRAW = """
import shutil, sys
sys.path.append("tests")
from coco_folder import build_coco
shutil.rmtree(sys.argv[1], ignore_errors=True)
build_coco(sys.argv[1])
"""
PACKAGES = {"torch", "torchvision", "triton", "numpy", "mmengine", "mmcv", "mmdetection", "mmdet"}
TESTS = "tests/test_norm/test_devices.py"
LIMITS = {"step": "12", "layer": "2", "host": "8"}  # seconds for a detector's rounds, or a shape's
NO_HALF, TAIL = "half precision needs a GPU", 30  # lines shown of a failed part's output


class Part(NamedTuple):
    """What runs in a process, how long it should take, and what it lacks if it cannot run."""

    name: str
    seconds: int
    command: list[str]
    lacks: str = ""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--torch-only", action="store_true", help="torchvision's detector, without MMDetection")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: with --toy")
    add("--toy", action="store_true", help="at a size that says nothing: does this tool work?")
    add("--minutes", type=float, default=10.0, metavar="M", help="for all parts (10)")
    add("--work-dir", type=Path, default=Path("work_dirs/gpu"), help="(work_dirs/gpu)")
    args, mistake = parser.parse_args(), ""
    if args.device == "cpu" and not args.toy:
        mistake = "--device cpu would take hours: add --toy, or leave it out"
    elif args.device == "cuda" and torch.version.cuda is None:
        mistake = f"torch {torch.__version__} was built without CUDA: install one that was not"
    elif args.device == "cuda" and not torch.cuda.is_available():
        mistake = (
            f"torch {torch.__version__} sees no GPU: does nvidia-smi, is its driver new enough for "
            f"CUDA {torch.version.cuda}, does CUDA_VISIBLE_DEVICES hide it?"
        )
    if mistake:
        parser.exit(2, f"{parser.prog}: error: {mistake}\n")
    args.work_dir = args.work_dir.resolve()
    return args


def plan(args: argparse.Namespace) -> list[Part]:
    """List all parts, the most informative first."""
    gpu, toy, python, coco = args.device == "cuda", args.toy, sys.executable, args.work_dir / "coco"
    norms, counts = (["CBN"], [1]) if toy else (NORMS, [1, 2])
    needed = ["torchvision"] if args.torch_only else ["mmcv", "mmdet"]
    absent = " and ".join(f"there is no {each}" for each in needed if not find_spec(each))
    detector = ["--torchvision" if args.torch_only else "--digits" if toy else "--all-norms"]
    detector += ["--size", *(["64", "64"] if toy else ["800", "1333"]), "--batch"]
    parts, later, benchmark = [], [], [python, "studies/benchmark.py"]
    seconds = {what: ["--max-seconds", "0" if toy else most] for what, most in LIMITS.items()}

    tests = [python, "-m", "pytest", "-q", TESTS, "-k", "cuda" if gpu else "cpu and naive"]
    parts.append(Part("tests", 60, tests, "" if find_spec("pytest") else "there is no pytest"))
    if not args.torch_only:
        parts.append(Part("images", 15, [python, "-c", DRAW, str(coco)], absent))
        for config, options in CONFIGS.items():
            run, name = [python, "tools/train.py", f"configs/{config}"], Path(config).stem
            run += ["--work-dir", str(args.work_dir / name), *options]
            lacks = NO_HALF if options and not gpu else absent
            parts.append(Part(name, 45, [*run, "--cfg-options", *settings(coco, toy)], lacks))
    for dtype, n in ((dtype, n) for dtype in ("float32", "float16") for n in counts):
        no_half = "" if gpu or dtype == "float32" else NO_HALF
        shapes = SHAPES.format(n, 512 * n).split()[: 1 if toy else None]
        for what, expected, options in (
            ("step", 40, [*detector, str(n), *seconds["step"]]),
            ("layer", 25, ["--shapes", *shapes, *seconds["layer"]]),
            ("memory", 35, [*detector, str(n), "--repeats", "1"]),
        ):
            command = [*benchmark, what, "--device", args.device, "--dtype", dtype, *options]
            lacks = no_half or (what != "layer" and absent) or ""
            part = Part(
                f"{what}, {dtype}, {n} image(s)", expected, [*command, "--norms", *norms], lacks
            )
            (parts if what == "step" else later).append(part)
    rows = [each for each in norms if each != "SyncBN"]  # the CPU has no SyncBN
    host = Part("host", 20, [*benchmark, "host", *seconds["host"], "--norms", *rows])
    return [*parts, host, *later]


def settings(coco: Path, toy: bool) -> list[str]:
    """Options of a run of 10 epochs, the first 3 burn-in, each of 5 steps with 2 images."""
    values = {
        **{f"{split}_dataloader.dataset.data_root": f"{coco}/" for split in ("train", "val")},
        "val_evaluator.ann_file": f"{coco}/annotations/instances_val2017.json",
        "model.backbone.init_cfg": None,  # nothing to download
        "train_dataloader.batch_size": 2,
        "default_hooks.logger.interval": 1,
        "default_hooks.checkpoint.interval": 10,
        **{"train_cfg.max_epochs": 10, "train_cfg.val_interval": 10},
    }
    if toy:
        values.update({"train_cfg.max_epochs": 2, "train_cfg.val_begin": 3})
        values.update({"custom_hooks.0.burn_in": 1, "model.train_cfg.rcnn.sampler.num": 8})
        values.update({"train_dataloader.dataset.pipeline.2.scale": "(96,64)"})
    return [f"{key}={value}" for key, value in values.items()]


def about(args: argparse.Namespace) -> dict[str, str]:
    """The machine and the versions; a finished part is kept only while these stay the same."""
    # If a package is installed twice, Python imports the first.
    found = {each.name: each.version for each in reversed(list(distributions()))}
    ours = [each for each in sorted(found) if each.lower().removeprefix("onedl-") in PACKAGES]
    query = "--query-gpu=name,driver_version,memory.total"
    # Not in this process, which would hold the GPU: some GPUs serve only one process.
    gpu = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return {
        "machine": say(*gpu) if args.device == "cuda" else "no GPU",
        "nvidia-smi": say("nvidia-smi", query, "--format=csv,noheader"),
        "CPU": machine("cpu"),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{each} {found[each]}" for each in ours),
        "CUDA": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        "commit": say("git", "describe", "--always", "--dirty"),
        "form": f"{'torch only' if args.torch_only else 'whole'}{', toy size' if args.toy else ''}",
    }


def say(*command: str) -> str:
    """The first line that a program prints, or ``unknown`` if it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        options = dict(capture_output=True, text=True, timeout=20, check=True, cwd=paths.ROOT)
        return subprocess.run(command, **options).stdout.partition("\n")[0].strip()
    return "unknown"


def run(part: Part, limit: float, log: Path) -> dict[str, object]:
    """Run a part until it ends or its time is up."""
    start, folder = time.monotonic(), log.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)  # of a training that was interrupted with this tool
    with log.open("w") as file:
        streams = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        process = subprocess.Popen(part.command, cwd=paths.ROOT, start_new_session=True, **streams)
        result = f"stopped after {limit:.0f} s"
        try:
            with suppress(subprocess.TimeoutExpired):
                result = "failed" if process.wait(limit) else "done"
        finally:  # ends its workers too, even if this tool is interrupted
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    text = "\n".join(lines if result == "done" else lines[-TAIL:])
    if folder.is_dir():  # the part was a training
        text = describe(folder) if result == "done" else text
        shutil.rmtree(folder)  # checkpoints of noise
    text = text.replace(paths.ROOT, ".").replace(osp.expanduser("~"), "~")
    return {"result": result, "seconds": round(time.monotonic() - start), "text": text}


def describe(folder: Path) -> str:
    """Summarise what a training logged."""
    (log,) = folder.glob("*/vis_data/scalars.json")
    steps = [each for each in map(json.loads, log.read_text().splitlines()) if "loss" in each]
    told = [f"{len(steps)} steps of {median(each['time'] for each in steps):.3g} s"]
    told.append(f"loss {steps[0]['loss']:.4g} to {steps[-1]['loss']:.4g}")
    names = [name for name in ("memory", "cbn/window_size", "cbn/clamped") if name in steps[-1]]
    return ", ".join([*told, *(f"{name} {steps[-1][name]:.4g}" for name in names)])


def report(told: dict[str, str], parts: list[Part], found: dict[str, dict]) -> str:
    """Write the report, in Markdown."""
    rows, sections = [], []
    for part in parts:
        each = found.get(part.name, {"result": "no time was left", "seconds": "", "text": ""})
        rows.append({"part": part.name, "result": each["result"], "s": each["seconds"]})
        text = each["text"].replace("\n## ", "\n#### ")
        if each["result"] != "done":
            text = f"```\n{text}\n```" if text else ""
        sections += [f"### {part.name}\n\n{text}"] if text and part.name != "images" else []
    lines = "\n".join(f"- {name}: {value}" for name, value in told.items())
    return "\n\n".join([f"## cbn_mmdet on {told['machine']}", lines, markdown(rows), *sections, ""])


def main() -> None:
    """Run the parts, keep their results, and report."""
    args = parse_args()
    end, told, parts, found = time.monotonic() + 60 * args.minutes, about(args), plan(args), {}
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts, 1):
        kept, left = args.work_dir / f"{part.name}.json", end - time.monotonic()
        if kept.is_file():
            before = json.loads(kept.read_text())
            if before.pop("about") == told and before["result"] == "done":
                found[part.name] = before
        if part.lacks:
            found[part.name] = {"result": f"left out: {part.lacks}", "seconds": "", "text": ""}
        elif part.name not in found and left > 0:
            print(f"[{number}/{len(parts)}] {part.name}", end=": ", flush=True)
            limit = min(left, part.seconds * (10 if args.toy else 2))
            found[part.name] = run(part, limit, kept.with_suffix(".log"))
            kept.write_text(json.dumps({"about": told, **found[part.name]}, indent=1))
            print(f"{found[part.name]['result']}, {found[part.name]['seconds']} s", flush=True)
        (args.work_dir / "report.md").write_text(report(told, parts, found))
    print(f"report: {args.work_dir / 'report.md'}")
    results = [found[each.name]["result"] if each.name in found else "no time" for each in parts]
    unfinished = sum(not each.startswith(("done", "left out")) for each in results)
    if unfinished:
        print(f"{unfinished} of {len(parts)} parts failed or had no time: the same command goes on")
    sys.exit(unfinished > 0)


if __name__ == "__main__":
    main()
