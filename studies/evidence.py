# Licensed under the Apache License, Version 2.0.
"""Compare norms at small batches: what CBN gains, and which of its settings matter.

photos, cells           configs/photos: a pretrained backbone, varied or uniform photographs; the
                        norm is in FPN and box head
photos-all, cells-all   the same, and the backbone's norm trains, too
detector                the Faster R-CNN of digits/configs, at 1, 2 and 4 images per step
detector-exactly        the same, with BN over the last 8 images, which run anew in each step
ablation                the same, with other windows and burn-ins
levels, levels-apart    a RetinaNet whose head runs on four levels, with one norm or one for each
classifier              a plain CNN on handwritten digits of varied tone, at 1 to 32 images per step
even                    the same, on digits that are alike in tone and contrast
frames                  the same, with each digit eight times in a row
centred                 the same, with MABN's convolutions for all norms
exactly                 the same, with BN over the last 8 images, which run anew in each step
momentum                the same, with other momenta of CBN's running statistics
continued               a ResNet-18 that BN has trained goes on at one image per step: its mean
                        loss, and the accuracies on the way
continued-clipped       the same, with the norm of the gradients clipped at 10
continued-slowly        the same, at a quarter of the learning rate
continued-exactly       the same, with BN over the last 8 images, which run anew in each step

Each study adds its results to FOLDER/NAME.json, prints them as a table and plots them (except for
frames, centred, continued, levels and those that run images anew) to FOLDER/NAME.png. Results in
the file are not run again: an interrupted command goes on where it stopped, and one with more
--seeds adds to what is there.

Name a norm by its norm_cfg, such as BN, GN or CBN(window_size=4, backward='window').
CBN(window='sliding', window_size=8, compensate=False, backward='window') is the paper's naive CBN.
All norms see the same images, and learning rates follow the images per optimiser step. A step of
CmBN has 8 forwards, so CmBN takes an eighth of the steps of the others.
"""

import argparse
import json
import multiprocessing
import os
import os.path as osp
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial

import paths  # noqa: F401  makes common importable
import torch
from common.checkpoint import check_writable
from common.errors import UsageError, positive, run_tool
from filelock import FileLock, Timeout  # a dependency of torch
from norms import norm, norm_cfg
from tqdm import tqdm
from trainings.classifier import CLASSIFIER, train_classifier
from trainings.continued import CONTINUED, train_continued
from trainings.detector import ABLATION, DETECTOR, LEVELS, train_detector
from trainings.photos import CELLS, PHOTOS
from trainings.results import plot_ablation, plot_batches, report
from trainings.shared import CURRENT, NAIVE, SLIDING, SMALL_GN, Job, Study, sliding

# The results that docs/evidence.md shows, and their runs, which an interrupted command resumes.
KEPT, RUNS = "docs/evidence", "work_dirs/evidence"
ALL = ["BN", "BRN", "MABN", "CmBN", NAIVE, CURRENT, SLIDING, "CBN", SMALL_GN]
BY_RUNNING = ["BN", "BRN", NAIVE, CURRENT, "CBN"]  # norms of photographs with running statistics
PHOTO_NORMS = [*BY_RUNNING, SMALL_GN]
ANEW = {"BN": "BN, the last 8 anew"}
FIXED = "CBN(window_size=8)"  # the default gradient, but the batch's share stays fixed
WINDOWS, BURN_INS = (1, 2, 4, 8, 16), (0, 1, 3, 5)
MOMENTA = {
    f"{SLIDING[:-1]}, momentum={momentum})": f"CBN, sliding, momentum={momentum}"
    for momentum in (0.005, 0.02, 0.1, 0.5)
}
classified = partial(Study, train=train_classifier, figure="accuracy")
continued = partial(Study, train=train_continued, figure="loss")
detected = partial(Study, train=train_detector, figure="ap")
STUDIES = {
    "classifier": classified(ALL, [1, 2, 4, 8, 16, 32], {1: 5}, CLASSIFIER, draw=plot_batches),
    "momentum": classified(
        [*MOMENTA], [1, 2], {1: 3}, CLASSIFIER, draw=plot_batches, labels=MOMENTA
    ),
    "even": classified(ALL, [1, 2], {1: 5}, dict(CLASSIFIER, even=True), draw=plot_batches),
    "frames": classified(
        ["BN", "BRN", "MABN", SLIDING, "CBN", FIXED, SMALL_GN],
        [1, 2],
        {1: 5},
        dict(CLASSIFIER, frames=8),
    ),
    "centred": classified(
        ["BN", "MABN", "CmBN", SLIDING, "CBN", SMALL_GN],
        [1],
        {1: 5},
        dict(CLASSIFIER, centred=True),
    ),
    "continued": continued(["BN", SLIDING, "CBN"], [1], {1: 3}, CONTINUED),
    "continued-clipped": continued(["BN", "CBN"], [1], {1: 3}, dict(CONTINUED, clip=10.0)),
    "continued-slowly": continued(
        ["BN", "CBN"], [1], {1: 3}, dict(CONTINUED, lr_at_1=CONTINUED["lr_at_1"] / 4)
    ),
    "exactly": classified(["BN"], [1], {1: 5}, dict(CLASSIFIER, together=8), labels=ANEW),
    "continued-exactly": continued(["BN"], [1], {1: 3}, dict(CONTINUED, together=8), labels=ANEW),
    "detector-exactly": detected(
        ["BN"],
        [1],
        {1: 3},
        dict(DETECTOR, together=8),
        train=partial(train_detector, precise=("BN",)),
        labels=ANEW,
    ),
    "detector": detected(
        ALL,
        [1, 2, 4],
        {1: 3, 2: 2, 4: 1},
        DETECTOR,
        train=partial(train_detector, precise=("BN", "MABN", "CmBN", SLIDING, "CBN")),
        draw=plot_batches,
    ),
    **{
        name + end: detected(
            ["none", *PHOTO_NORMS] if norm_in == "head" else PHOTO_NORMS,
            [1, 2],
            {1: 3},
            dict(settings, norm_in=norm_in),
            train=partial(train_detector, precise=BY_RUNNING),
            draw=plot_batches,
        )
        for name, settings in (("photos", PHOTOS), ("cells", CELLS))
        for end, norm_in in (("", "head"), ("-all", "all"))
    },
    **{
        name: detected(["BN", "CBN", SMALL_GN], [1], {1: 3}, dict(LEVELS, head=head))
        for name, head in (("levels", "shared"), ("levels-apart", "apart"))
    },
    "ablation": detected(
        [],
        [1, 2],
        {1: 3},
        ABLATION,
        draw=plot_ablation,
        labels={sliding(k): f"CBN, sliding, window_size={k}" for k in WINDOWS},
    ),
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=list(STUDIES))
    add = parser.add_argument
    text = f"of results, plots and, but for the default ({KEPT}), of the detector's runs"
    add("--folder", default=KEPT, help=text)
    add("--norms", nargs="+", type=norm, metavar="NORM", help="the norms to compare")
    add("--batches", nargs="+", type=positive, metavar="N", help="images per step")
    text = (
        "seeds of each (3; with the classifier but for momentum 5; detector at 2 images 2, at 4 1)"
    )
    add("--seeds", type=positive, metavar="N", help=text)
    add("--print", action="store_true", help="print what FOLDER has, and train nothing")
    text = "epochs before windows open, of the classifier's studies eighths of the run (1)"
    add("--burn-in", type=int, metavar="N", help=text)
    text = "share of the images that are seen, to see a study run; needs a --folder of its own"
    add("--shorten", type=float, default=1.0, metavar="SHARE", help=text)
    add("--jobs", type=positive, metavar="N", help="trainings at a time (the number of cores)")
    text = "where detectors train; a file has figures of one kind (cpu)"
    add("--device", choices=["cpu", "cuda"], default="cpu", help=text)
    text = "where digits are built, and photographs are (data)"
    add("--data", default="data", metavar="DIR", help=text)
    return parser.parse_args()


def main() -> None:
    """Run the trainings that are missing, and report all results."""
    args = parse_args()
    if not 0 < args.shorten <= 1:
        raise UsageError(f"--shorten {args.shorten:g}: takes a share above 0, up to 1")
    if (args.burn_in or 0) < 0:
        raise UsageError(f"--burn-in {args.burn_in}: takes a whole number of at least 0")
    study = STUDIES[args.study]
    if args.study.startswith("continued"):
        check_continued(args)
    if args.device == "cuda" and study.figure != "ap":
        raise UsageError(f"--device cuda: {args.study} trains a small network, on the CPU alone")
    if args.device == "cuda" and osp.normpath(args.folder) == KEPT:
        raise UsageError(
            "--device cuda: needs a --folder of its own, as that has the CPU's figures"
        )
    path = osp.join(args.folder, f"{args.study}.json")
    settings = dict(study.settings, shorten=args.shorten)
    if args.device != "cpu":
        settings["device"] = args.device
    if args.print:  # which needs neither the folder to itself nor a right to write there
        results = read_results(path, settings)
        if not results:
            raise UsageError(f"--print: there is no {path} yet; without --print it is made")
    else:
        check_writable(args.folder, "--folder")
        with alone_with(path):
            results = read_results(path, settings)
            run_missing(args, study, plan(args, study), results, path, settings)
    rows = list(results.values())
    report(args.study, study, rows)
    print(f"figures: {path}")
    if study.draw and not args.print:
        plot = osp.join(args.folder, f"{args.study}.png")
        study.draw(rows, study, plot)
        print(f"plot: {plot}")


def check_continued(args: argparse.Namespace) -> None:
    """Refuse options that the continued studies have no use for."""
    if args.burn_in is not None:
        raise UsageError("--burn-in: continued has none")
    for name in args.norms or []:
        if norm_cfg(name)["type"] not in ("BN", "CBN"):
            raise UsageError(f"--norms {name}: continued goes on with BN or CBN")


@contextmanager
def alone_with(path: str) -> Iterator[None]:
    """Keep other commands from these trainings and results until this one ends or is killed."""
    try:
        with FileLock(f"{path}.lock", timeout=0):
            yield
    except Timeout as error:
        raise UsageError(
            f"another command adds to {path}: wait for it, or take another --folder"
        ) from error


def plan(args: argparse.Namespace, study: Study) -> list[Job]:
    """List the trainings asked for, seed by seed, so that early results compare all norms."""
    batches = args.batches or study.batches
    most = args.seeds or max(study.seeds.values())
    default = ABLATION["burn_in"] if args.study == "ablation" else None
    variants = [(name, default) for name in args.norms or study.norms]
    if not variants:  # the ablation's own; its two sliding series share the window of 8
        variants = [(sliding(k), default) for k in WINDOWS]
        variants += [(SLIDING, other) for other in BURN_INS if other != default]
        variants += [("CBN", each) for each in (0, 1)]
    if args.burn_in is not None:
        variants = [(name, args.burn_in) for name in dict.fromkeys(name for name, _ in variants)]
    jobs = []
    for seed in range(most):
        for batch in batches:
            if seed >= (args.seeds or study.seeds.get(batch, min(study.seeds.values()))):
                continue
            jobs += [
                Job(name, batch, seed, burn_in if "CBN" in name else None)
                for name, burn_in in variants
            ]
    return jobs


def read_results(path: str, settings: dict) -> dict[Job, dict]:
    """Read earlier results, which must be of the same settings."""
    if not osp.isfile(path):
        return {}
    try:
        with open(path) as file:
            saved = json.load(file)
        rows = {Job(*(row[key] for key in Job._fields)): row for row in saved["runs"]}
        measured = saved["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: delete it, or take another --folder") from error
    if measured != settings:
        raise UsageError(
            f"{path} has results of other settings, {measured}, than these, {settings}: "
            "take another --folder"
        )
    return rows


def run_missing(args, study: Study, jobs: list[Job], results: dict, path: str, settings) -> None:
    """Run the trainings that ``results`` lacks, and write each result at once."""
    missing = [job for job in jobs if job not in results]
    if results:
        kept = len(jobs) - len(missing)
        print(f"{kept} of {len(jobs)} trainings are in {path}; --folder NEW measures all anew")
    if missing and args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: torch {torch.__version__} sees no GPU to train on")
    is_kept = f"{osp.normpath(args.folder)}{os.sep}".startswith(f"{KEPT}{os.sep}")
    runs = RUNS if is_kept else osp.join(args.folder, "runs")
    device = "" if args.device == "cpu" else f"-{args.device}"
    work_dir = osp.join(runs, args.study + device, f"{args.shorten:g}")
    options = dict(settings, work_dir=work_dir, data=args.data)
    workers = args.jobs or os.cpu_count()
    with tqdm(desc=args.study, total=len(jobs), initial=len(jobs) - len(missing)) as bar:
        for job, found in run_each(study.train, missing, options, workers):
            results[job] = {**job._asdict(), **found}
            write_results(path, settings, results)
            bar.update()


def run_each(
    train: Callable[[Job, dict], dict], jobs: list[Job], options: dict, workers: int
) -> Iterator[tuple[Job, dict]]:
    """Run trainings, some at a time; yield each with its result as it ends.

    Each has one thread: two cores train two small models faster side by side than in turn.
    """
    if workers == 1:  # another process would only import everything once more
        torch.set_num_threads(1)
        yield from ((job, train(job, options)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running = {pool.submit(train, job, options): job for job in jobs}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_results(path: str, settings: dict, results: dict[Job, dict]) -> None:
    """Write all results to a new file first: a process killed while writing loses none."""
    rows = [results[job] for job in sorted(results, key=lambda job: tuple(map(str, job)))]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    with open(path + ".part", "w") as file:
        file.write(f'{{"settings": {json.dumps(settings)},\n "runs": [\n{lines}\n]}}\n')
    os.replace(path + ".part", path)


if __name__ == "__main__":
    run_tool(main)
