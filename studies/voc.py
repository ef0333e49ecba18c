# Licensed under the Apache License, Version 2.0.
"""Turn a folder of Pascal VOC annotations into the COCO files that MMDetection's configs read.

The tool writes OUT/instances_train.json and OUT/instances_val.json; the images stay where they are.
Lists of names, as in VOC's ImageSets/Main, decide the split, or else a random seed does. The tool
reports and leaves out what cannot be right: images that are missing or differ in size from their
annotation, and boxes that are empty or reach beyond the image. An object marked as difficult
becomes a crowd, which neither trains nor counts.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import paths  # noqa: F401  makes common importable
from common.checkpoint import check_writable
from common.errors import UsageError, run_tool, some
from PIL import Image, ImageOps

SHARE, SEED = 0.25, 0  # share of the images for validation, and seed of the split


class Photo(NamedTuple):
    """The content of one annotation file."""

    file_name: str
    size: tuple[int, int]
    objects: list[tuple[str, list[float], bool]]  # name, left, top, width, height; is difficult


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("annotations", help="folder of the .xml files")
    add("images", help="folder of the images")
    add("out", help="folder for the .json files")
    text = "files with the names of the images of each split (default: split by --seed)"
    add("--lists", nargs=2, metavar=("TRAIN", "VAL"), help=text)
    add("--share", type=float, default=SHARE, help=f"of the images, for validation ({SHARE})")
    add("--seed", type=int, default=SEED, help=f"of the split ({SEED})")
    return parser.parse_args()


def main() -> None:
    """Convert, and print what was left out and what was written."""
    args = parse_args()
    check_writable(args.out, "out")
    for line in convert(args.annotations, args.images, args.out, args.lists, args.share, args.seed):
        print(line)


def convert(
    annotations: str,
    images: str,
    out: str,
    lists: tuple[str, str] | None = None,
    share: float = SHARE,
    seed: int = SEED,
) -> list[str]:
    """Write the COCO files; returns a line for everything left out and everything written."""
    names = sorted(path.stem for path in Path(annotations).glob("*.xml"))
    if not names:
        raise UsageError(f"annotations {annotations}: there is no .xml file; name their folder")
    splits = split_by_lists(names, lists) if lists else split_by_seed(names, share, seed)
    report, photos = [], {}
    for name in names:
        photo = read_photo(Path(annotations, f"{name}.xml"), Path(images), report)
        if photo:
            photos[name] = photo
    if not photos:
        raise UsageError(f"images {images}: {report[0]}, and so for all: name the images' folder")
    classes = sorted({name for photo in photos.values() for name, *_ in photo.objects})
    for split, members in splits.items():
        content = to_coco([photos[name] for name in members if name in photos], classes)
        path = Path(out, f"instances_{split}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")  # other processes may read or write it, too
        part.write_text(json.dumps(content))
        part.replace(path)
        report.append(
            f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes of "
            f"{', '.join(classes)}"
        )
    return report


def split_by_seed(names: list[str], share: float, seed: int) -> dict[str, list[str]]:
    """Draw the share of the images for validation."""
    count = round(share * len(names))
    if not 0 < count < len(names):
        raise UsageError(
            f"--share {share:g}: leaves one of the splits of {len(names)} images empty; give more "
            "than 0 and less than 1"
        )
    held_out = set(random.Random(seed).sample(names, count))
    return {
        "train": [name for name in names if name not in held_out],
        "val": [name for name in names if name in held_out],
    }


def split_by_lists(names: list[str], lists: tuple[str, str]) -> dict[str, list[str]]:
    """Read the lists of names; a name is the first word of its line."""
    splits = {}
    for split, path in zip(("train", "val"), lists, strict=True):
        if not os.path.isfile(path):
            raise UsageError(f"--lists: there is no file {path}")
        lines = Path(path).read_text().splitlines()
        splits[split] = [line.split()[0] for line in lines if line.strip()]
        unknown = sorted(set(splits[split]).difference(names))
        if unknown or not splits[split]:
            what = f"names {some(unknown)}, without an .xml file" if unknown else "names no image"
            raise UsageError(f"--lists: {path} {what}; give the list of this data set")
    both = sorted(set(splits["train"]).intersection(splits["val"]))
    if both:
        raise UsageError(f"--lists: {some(both)} would be both trained on and validated with")
    return splits


def read_photo(path: Path, images: Path, report: list[str]) -> Photo | None:
    """Read an annotation, or return None to leave it out; adds all omissions to ``report``."""
    try:
        root = ElementTree.parse(path).getroot()
        file_name = root.findtext("filename", "").strip()
        said = tuple(int(float(root.findtext(f"size/{side}", ""))) for side in ("width", "height"))
        found = [read_object(each) for each in root.iter("object")]
    except (ElementTree.ParseError, ValueError) as error:
        raise UsageError(
            f"{path} is no Pascal VOC annotation ({error}): mend or delete it"
        ) from error
    try:
        with Image.open(images / file_name) as image:
            ImageOps.exif_transpose(image, in_place=True)  # as MMDetection turns it
            size = image.size
    except OSError as error:
        report.append(f"{path.name}: left out, {images / file_name} cannot be read ({error})")
        return None
    if size != said:
        report.append(f"{path.name}: left out, its size is {said}, and the image's is {size}")
        return None
    objects = []
    for name, corners, is_difficult in found:
        left, top, right, bottom = corners
        if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
            report.append(f"{path.name}: a box of {name} left out, its corners are {corners}")
            continue
        # VOC counts pixels from 1, though some tools from 0, and a box includes its last pixel.
        left, top = max(left - 1, 0), max(top - 1, 0)
        objects.append((name, [left, top, right - left, bottom - top], is_difficult))
    return Photo(file_name, size, objects)


def read_object(element: ElementTree.Element) -> tuple[str, tuple[float, ...], bool]:
    """Read the name and the corners of an object, and whether it is difficult."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    box = tuple(float(element.findtext(f"bndbox/{corner}", "")) for corner in corners)
    return element.findtext("name", "").strip(), box, element.findtext("difficult") == "1"


def to_coco(photos: list[Photo], classes: list[str]) -> dict:
    """Make the content of a COCO file."""
    images, annotations = [], []
    for number, (file_name, (width, height), objects) in enumerate(photos, 1):
        images.append(dict(id=number, file_name=file_name, width=width, height=height))
        for name, box, is_difficult in objects:
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=classes.index(name) + 1,
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=int(is_difficult),
                )
            )
    categories = [dict(id=number, name=name) for number, name in enumerate(classes, 1)]
    return dict(images=images, annotations=annotations, categories=categories)


if __name__ == "__main__":
    run_tool(main)
