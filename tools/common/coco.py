# Licensed under the Apache License, Version 2.0.
"""Check the data sets of a config: do their annotation files and their images fit each other?

Each check returns a sentence on what it found, or raises a :class:`UsageError` that says what is
wrong and how to fix it.
"""

import copy
import json
import os
import os.path as osp
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import mmcv
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config

from .errors import UsageError, some

# The files that a config names.


def check_data(cfg: Config, split: str) -> None:
    """Check that the files of ``split`` (train, val or test) exist, before anything is built."""
    datasets = [dataset for dataset, _ in innermost_datasets(cfg, split)]
    if any(dataset.get("backend_args") for dataset in datasets):
        return  # not on this machine
    needed = [(path, dataset) for dataset in datasets for path in _files(dataset)]
    evaluators = cfg.get(f"{split}_evaluator") or []
    for each in [evaluators] if isinstance(evaluators, dict) else evaluators:
        if each.get("ann_file"):
            needed.append((each["ann_file"], next(iter(datasets), {})))
    for path, dataset in needed:
        if not osp.exists(path):
            raise UsageError(f"the {split} data has no {path}. {_how_to_get_data(dataset)}")


def _files(dataset: dict) -> list[str]:
    """The annotation file and the image folders of a data set."""
    prefix = dataset.get("data_prefix") or {}
    if not prefix and dataset.get("type") == "ImageNet":
        prefix = dataset.get("split") or {}
    prefixes = [prefix] if isinstance(prefix, str) else prefix.values()
    paths = [path for path in (dataset.get("ann_file"), *prefixes) if path]
    return [osp.join(dataset.get("data_root") or "", path) for path in paths]


def _how_to_get_data(dataset: dict) -> str:
    if tuple((dataset.get("metainfo") or {}).get("classes", ())) == tuple("0123456789"):
        root = dataset["data_root"].rstrip("/")
        return f"Build the digits with: python studies/digits/build.py {root}"
    files = ", and the ann_file of dataset and evaluator," if dataset.get("ann_file") else ""
    return f"Set data_root{files} to where the data is."


def innermost_datasets(cfg: Config, split: str) -> Iterator[tuple[dict, int | None]]:
    """Find the data sets of ``split`` within RepeatDataset, ConcatDataset and other wrappers.

    Yields:
        The settings of each, and how often an epoch repeats it; None if that depends on the image.
    """
    dataset = (cfg.get(f"{split}_dataloader") or {}).get("dataset")
    if dataset:
        yield from _unwrapped(dataset, 1)


def _unwrapped(dataset: dict, times: int | None) -> Iterator[tuple[dict, int | None]]:
    if "dataset" in dataset:
        # ClassBalancedDataset repeats images of rare classes.
        if times is not None:
            times = None if "oversample_thr" in dataset else times * dataset.get("times", 1)
        yield from _unwrapped(dataset["dataset"], times)
    elif "datasets" in dataset:
        for each in dataset["datasets"]:
            yield from _unwrapped(each, times)
    else:
        yield dataset, times


def build_coco(settings: dict) -> CocoDataset | None:
    """Build a data set without reading its files; None if it is not a local COCO data set."""
    dataset = DATASETS.build(dict(copy.deepcopy(settings), lazy_init=True, pipeline=[]))
    reads = getattr(type(dataset), "load_data_list", None)
    return None if reads is not CocoDataset.load_data_list or dataset.backend_args else dataset


@contextmanager
def explained_damage(cfg: Config) -> Iterator[None]:
    """If a run fails, check whether files that the config names are missing or damaged.

    To check before the run would take minutes: COCO has long annotations and many images.
    """
    try:
        yield
    except (AssertionError, OSError, ValueError):
        for split in ("train", "val", "test"):
            for settings, _ in innermost_datasets(cfg, split):
                with suppress(Exception):  # an error here is what failed the run
                    dataset = None
                    dataset = build_coco(settings)
                if dataset is not None:
                    content = read_annotations(dataset.ann_file)
                    check_images(content, dataset.data_prefix["img"])
        raise


# The content of these files.


def read_annotations(path: str) -> dict:
    """Read an annotation file.

    Raises:
        UsageError: The file is not JSON, or lists no images or categories.
    """
    try:
        with open(path) as file:
            content = json.load(file)
    except ValueError as error:
        raise UsageError(f"{path} is no JSON, or was cut short ({error}): get it anew") from error
    absent = [key for key in ("images", "categories") if key not in content]
    if absent:
        raise UsageError(f"{path} has no {' and no '.join(absent)}: give instances_*.json instead")
    return content


def check_annotations(content: dict, classes: Sequence[str]) -> str:
    """Check that a file has the categories ``classes`` and all that its annotations refer to."""
    categories = {each["id"]: each["name"] for each in content["categories"]}
    unknown = [each for each in classes if each not in categories.values()]
    if unknown:
        raise UsageError(
            f"{len(unknown)} of {len(classes)} classes are no categories of the annotation file: "
            f"{some(unknown)}; its {len(categories)} categories are {some(categories.values())}: "
            "set the dataset's metainfo=dict(classes=(...)) to those to be detected"
        )
    annotations = content.get("annotations", [])
    images = {each["id"] for each in content["images"]}
    astray = [
        each["id"]
        for each in annotations
        if each["image_id"] not in images or each["category_id"] not in categories
    ]
    if astray:
        raise UsageError(
            f"{len(astray)} annotations are of an image or a category that the file does not list, "
            f"ids {some(astray)}: get it anew, or mend what wrote it"
        )
    crowds = sum(bool(each.get("iscrowd")) for each in annotations)
    empty = len(images - {each["image_id"] for each in annotations})
    return (
        f"{len(images)} images ({empty} without objects), {len(annotations)} annotations "
        f"({crowds} crowds), {len(categories)} categories for {len(classes)} classes"
    )


def find_images(content: dict, folder: str) -> dict[str, tuple[int, int]]:
    """Find the images that exist, and the width and height that each should have.

    This lists folders, since asking for each file is slow on a network disk.
    """
    sizes = {
        osp.join(folder, each["file_name"]): (each["width"], each["height"])
        for each in content["images"]
    }
    folders = {osp.dirname(path) for path in sizes}
    listed = {each: set(os.listdir(each)) for each in folders if osp.isdir(each)}
    return {
        path: size
        for path, size in sizes.items()
        if osp.basename(path) in listed.get(osp.dirname(path), ())
    }


def check_images(content: dict, folder: str) -> str:
    """Check that every image of an annotation file is in ``folder``."""
    found = find_images(content, folder)
    names = [each["file_name"] for each in content["images"]]
    missing = [name for name in names if osp.join(folder, name) not in found]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(names)} images are not in {folder}: {some(missing)}; put them "
            "there, or set the dataset's data_prefix.img to their folder"
        )
    return f"all {len(names)} are in {folder}"


def check_listed(settings: dict, samples: int = 20) -> tuple[str, int]:
    """Check a data set of another format by building it; also returns the number of images."""
    dataset = DATASETS.build(dict(copy.deepcopy(settings), pipeline=[]))
    count = len(dataset)
    tried = [dataset.get_data_info(i) for i in range(0, count, max(1, count // samples))]
    files = [each[key] for each in tried for key in ("img_path", "seg_map_path") if key in each]
    broken = [path for path in files if _read_size(path) is None]
    if broken:
        raise UsageError(
            f"{len(broken)} of {len(files)} images tried cannot be read: {some(broken)}; get them "
            "anew, or set the dataset's data_root to where they are"
        )
    classes = len(dataset.metainfo.get("classes") or ())
    return f"{count} images, {classes} classes; {len(files)} tried, which can be read", count


def check_sizes(content: dict, folder: str, samples: int = 20) -> str:
    """Check that about ``samples`` images can be read and are as large as annotated."""
    sizes = find_images(content, folder)
    tried = list(sizes)[:: max(1, len(sizes) // samples)]
    wrong = [(path, found) for path in tried if (found := _read_size(path)) != sizes[path]]
    if wrong:
        path, found = wrong[0]
        what = "cannot be read" if found is None else "is {}x{}".format(*found)
        raise UsageError(
            f"{len(wrong)} of {len(tried)} images tried are not as the annotations say: {path} "
            "{}, not {}x{}; get the images anew, in their original size".format(what, *sizes[path])
        )
    return f"{len(tried)} tried, which can be read and are as large as the annotations say"


def _read_size(path: str) -> tuple[int, int] | None:
    """Width and height of an image as MMDetection reads it, turned as its EXIF data says."""
    try:
        return mmcv.imread(path).shape[1::-1]
    except Exception:  # OpenCV returns nothing or raises, depending on how a file is broken
        return None
