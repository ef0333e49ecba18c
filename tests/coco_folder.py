"""A folder laid out like COCO's, with a handful of images of coloured shapes on noise."""

import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

# COCO's 80 category ids lie between 1 and 90; these ids were given up.
GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CATEGORY_IDS = [number for number in range(1, 91) if number not in GAPS]

# Width, height, and the objects: `polygon` and `rle` (compressed) are one shape, `parts` is a
# polygon of two parts, `crowd` and `rle_crowd` are regions of several shapes, as uncompressed and
# compressed RLE. `grey` is no object: the image has one channel.
IMAGES = {
    "train2017": [
        (161, 97, "polygon parts rle"),
        (97, 161, "polygon polygon crowd"),
        (199, 61, "polygon parts"),
        (61, 199, "rle polygon"),
        (131, 103, "grey polygon parts"),
        (127, 127, ""),
        (113, 89, "crowd"),
        (149, 111, "polygon rle rle_crowd"),
        (89, 121, "polygon"),
        (200, 151, "polygon polygon parts rle polygon crowd"),
    ],
    "val2017": [
        (163, 107, "polygon parts crowd"),
        (71, 193, "rle polygon"),
        (191, 67, "polygon rle_crowd"),
        (119, 91, "grey polygon rle"),
        (101, 101, ""),
        (83, 109, "crowd"),
    ],
}


def build_coco(root, seed=0) -> Path:
    """Writes the folder to ``root``; equal seeds write equal files."""
    from mmdet.datasets import CocoDataset

    root = Path(root)
    names = CocoDataset.METAINFO["classes"]
    categories = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, names, strict=True)]
    colours = np.random.default_rng(seed).integers(0, 256, (91, 3))
    (root / "annotations").mkdir(parents=True)
    for number, (split, layouts) in enumerate(IMAGES.items()):
        rng = np.random.default_rng([seed, number])
        (root / split).mkdir()
        images, annotations = [], []
        # COCO's ids are neither consecutive nor sorted in any split.
        image_ids = rng.choice(600_000, len(layouts), replace=False).tolist()
        object_ids = iter(rng.choice(10**9, 100, replace=False).tolist())
        kinds = iter(rng.permutation(CATEGORY_IDS).tolist())
        for image_id, (width, height, content) in zip(image_ids, layouts, strict=True):
            pixels = rng.normal(rng.uniform(60, 190), 20, (height, width, 3))
            for kind in content.replace("grey", "").split():
                segmentation, rle = draw_object(rng, kind, width, height)
                category = next(kinds)
                pixels[coco_mask.decode(rle) > 0] = colours[category]
                annotations.append(
                    {
                        "id": next(object_ids),
                        "image_id": image_id,
                        "category_id": category,
                        "iscrowd": int("crowd" in kind),
                        "segmentation": segmentation,
                        "area": float(coco_mask.area(rle)),
                        "bbox": coco_mask.toBbox(rle).tolist(),
                    }
                )
            name = f"{image_id:012d}.jpg"
            pixels = np.clip(pixels, 0, 255).astype(np.uint8)
            cv2.imwrite(str(root / split / name), pixels[..., 0] if "grey" in content else pixels)
            images.append(
                {
                    "id": image_id,
                    "file_name": name,
                    "width": width,
                    "height": height,
                    "license": 1,
                    "date_captured": "2013-11-14 17:02:52",
                }
            )
        content = {
            "info": {"description": "Shapes in COCO's format", "version": "1.0", "year": 2017},
            "licenses": [{"id": 1, "name": "None"}],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def draw_object(rng, kind, width, height):
    """The segmentation in the annotation file's form, and its mask as a compressed RLE."""
    size = min(width, height)
    if kind in ("polygon", "rle"):
        outlines = [draw_outline(rng, width, height, size / 4)]
    elif kind == "parts":
        outlines = [draw_outline(rng, width, height, size / 6) for _ in range(2)]
    else:
        outlines = [draw_outline(rng, width, height, size / 8) for _ in range(5)]
    rle = coco_mask.merge(coco_mask.frPyObjects(outlines, height, width))
    if kind in ("polygon", "parts"):
        return outlines, rle
    if kind == "crowd":
        return {"size": [height, width], "counts": count_runs(coco_mask.decode(rle))}, rle
    return {"size": [height, width], "counts": rle["counts"].decode()}, rle


def draw_outline(rng, width, height, radius):
    """A polygon around a random place, cut at the edges of the image, as x1, y1, x2, y2, ..."""
    centre = rng.uniform([radius / 2] * 2, [width - radius / 2, height - radius / 2])
    angles = np.sort(rng.uniform(0, 2 * np.pi / 7, 7) + 2 * np.pi * np.arange(7) / 7)
    spokes = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.7, 1, (7, 1))
    points = np.clip(centre + radius * spokes, 0, [width, height])
    return points.round(2).ravel().tolist()


def count_runs(mask):
    """The run lengths of a mask, column by column, starting with the run of zeros."""
    pixels = np.concatenate([[0], mask.ravel(order="F"), [-1]])
    changes = np.flatnonzero(np.diff(pixels))
    return np.diff(changes, prepend=0).tolist()
