# Licensed under the Apache License, Version 2.0.
"""Checks of a COCO data set: whether its annotation file and its images fit each other.

Each check returns what it found in a sentence, or raises a :class:`UsageError` that says what is
wrong and how to mend it.
"""

import json
import os
import os.path as osp
from collections.abc import Iterable, Sequence

import mmcv

from ..launch import UsageError


def read_annotations(path: str) -> dict:
    """Read an annotation file.

    Raises:
        UsageError: It is no JSON, or lists no images or categories.
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
    """Check the categories of an annotation file, and that its annotations refer to what it lists.

    Args:
        content: The annotation file's.
        classes: The names of the categories that are to be detected.
    """
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
    """Find the images that exist, among those of an annotation file.

    Folders are listed, since asking for each file is slow on a network's disk.

    Returns:
        The width and height that each should have, by its path.
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


def check_sizes(content: dict, folder: str, samples: int = 20) -> str:
    """Check that images can be read and are as large as the annotations say.

    Args:
        content: The annotation file's.
        folder: Where the images are.
        samples: About how many images to try.
    """
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


def some(names: Iterable) -> str:
    """The first of several names, to be read by a human."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:3]) + (", …" if len(texts) > 3 else "")


def _read_size(path: str) -> tuple[int, int] | None:
    """Width and height of an image as MMDetection reads it, turned as its EXIF data says."""
    try:
        return mmcv.imread(path).shape[1::-1]
    except Exception:  # OpenCV returns nothing or raises, depending on how a file is broken
        return None
