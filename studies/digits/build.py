# Licensed under the Apache License, Version 2.0.
"""A small COCO data set of real handwritten digits on varied, photograph-like grounds.

The digits are the 1,797 8x8 glyphs of :func:`sklearn.datasets.load_digits`, so the set is built
offline in seconds. Images differ strongly from one another in tone, tint, light, texture, noise
and sharpness: the statistics of one image are a bad estimate of the population's, which is the
condition under which Batch Normalization suffers from small batches.

The set is laid out as ``ROOT/{train,val}/NNNNNN.png``,
``ROOT/annotations/instances_{train,val}.json`` and ``ROOT/digits.json``, the manifest of the
arguments it was built with.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

CLASSES = tuple("0123456789")

_SPLITS = ("train", "val")
_MANIFEST = "digits.json"
_FORMAT = {"format": "cbn_mmdet digits", "version": 1}

# Below 8 pixels a glyph would be smaller than its source and no longer readable.
_SMALLEST_DIGIT = 8
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# Glyph intensity (0 to 1) at which a pixel starts to show ink and at which it is all ink.
_INK = (0.38, 0.68)
_MASK_ALPHA = 0.5
# Share of the smaller of two digit boxes that may be covered by the other. It bounds their IoU,
# and unlike an IoU bound it also keeps a small digit out of a large one's box.
_MAX_OVERLAP = 0.1
_PLACEMENT_TRIES = 30
# Difference in luma (0 to 1) between a digit and its ground, on an even ground; the standard
# deviations of an uneven ground come on top of it.
_MIN_CONTRAST = 0.18
_CONTRAST_PER_STD = 1.5


@dataclass(frozen=True)
class Arguments:
    """The arguments that decide what the set contains."""

    num_train: int = 1000  # images for training
    num_val: int = 200  # for validation, of digits that no training image shows
    image_size: int = 128  # height and width in pixels
    max_digits: int = 6  # in an image, drawn from 1 to this; digits without room are left out
    digit_size: tuple[int, int] = (16, 64)  # least and greatest height, in pixels
    masks: str = "polygon"  # or 'rle' (compressed); both decode to the same pixels
    seed: int = 0  # of everything but the split of the digits

    def __post_init__(self):
        for name in ("num_train", "num_val", "image_size", "max_digits", "seed"):
            value, least = getattr(self, name), int(name != "seed")
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}")
        if self.masks not in ("polygon", "rle"):
            raise ValueError(f"masks is {self.masks!r}; give 'polygon' or 'rle'")
        sizes = self.digit_size if isinstance(self.digit_size, (tuple, list)) else ()
        if [type(size) for size in sizes] != [int, int]:
            raise ValueError(
                f"digit_size is {self.digit_size!r}; give two whole numbers, "
                "the smallest and the largest digit height in pixels"
            )
        if not _SMALLEST_DIGIT <= sizes[0] <= sizes[1] <= self.image_size:
            raise ValueError(
                f"digit_size is {tuple(sizes)} in images of {self.image_size} pixels; give the "
                f"smaller height first, at least {_SMALLEST_DIGIT}, and at most the images'"
            )

    def counts(self):
        """The splits, each with its number of images."""
        return (("train", self.num_train), ("val", self.num_val))

    def manifest(self):
        """The content of the set's manifest file."""
        return {**_FORMAT, "arguments": {**asdict(self), "digit_size": [*self.digit_size]}}


def build_digits(root, progress=True, **arguments):
    """Builds the digits data set in a folder, unless it already is there.

    The same arguments give byte-identical files (with the same versions of NumPy, OpenCV and
    scikit-learn), and an image does not depend on how many images are built. The set appears at
    ``root`` complete or not at all; files that are already there are never changed or deleted.
    Several processes may build the same set at once.

    Args:
        root (str or os.PathLike): Folder to build; missing parents are made. It must not exist,
            be empty, or hold the set built with the same arguments.
        progress (bool): Whether to show a progress bar where there is a terminal.
        arguments: Those of :class:`Arguments`.

    Returns:
        pathlib.Path: The absolute path of the set.

    Raises:
        ValueError: If an argument is out of its range.
        FileExistsError: If ``root`` holds anything but the set built with these arguments.
        OSError: If ``root`` cannot be written.
    """
    arguments = Arguments(**arguments)
    root = Path(root).expanduser().resolve()
    if _holds_set(root, arguments):
        return root
    with _scratch_folder(root) as scratch:
        # One level down, so that the set gets the user's default permissions rather than the
        # private ones of a temporary folder.
        staged = Path(scratch) / root.name
        try:
            _write_set(staged, arguments, progress)
        except OSError as error:
            raise OSError(
                f"root {root} cannot be built, for not all of it can be written "
                f"({error.strerror}); make room on that disk or name a root on another"
            ) from error
        try:
            os.replace(staged, root)
        except OSError:
            # Another process may have finished the same set first.
            if not _holds_set(root, arguments):
                raise
    return root


@lru_cache(maxsize=1)
def split_glyphs():
    """Splits the handwritten digits into those for training and those for validation.

    The split is the same for every seed of :func:`build_digits`, so that no training set shares
    a digit with any validation set. Four fifths of each class are for training.

    Returns:
        dict[str, numpy.ndarray]: For ``'train'`` and ``'val'``, the sorted indices into
        :func:`sklearn.datasets.load_digits`.
    """
    labels = _load_glyphs()[1]
    rng = np.random.default_rng(0)
    train = []
    for label in range(len(CLASSES)):
        members = rng.permutation(np.flatnonzero(labels == label))
        train.append(members[: len(members) * 4 // 5])
    train = np.sort(np.concatenate(train))
    return {"train": train, "val": np.setdiff1d(np.arange(len(labels)), train)}


def main(argv=None):
    """Builds the data set from the command line."""
    parser = argparse.ArgumentParser(
        description="Build a COCO data set of handwritten digits on varied grounds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("root", help="folder to build")
    for option, name, text in (
        ("--train", "num_train", "number of training images"),
        ("--val", "num_val", "number of validation images"),
        ("--image-size", "image_size", "image side in pixels"),
        ("--max-digits", "max_digits", "most digits in an image"),
        ("--seed", "seed", "seed of the images"),
    ):
        default = getattr(Arguments, name)
        add(option, dest=name, type=int, default=default, metavar="N", help=text)
    sizes, text = Arguments.digit_size, "digit height in pixels"
    add("--digit-size", type=int, nargs=2, default=sizes, metavar=("MIN", "MAX"), help=text)
    add("--masks", default=Arguments.masks, help="'polygon' or 'rle'")
    arguments = vars(parser.parse_args(argv))
    root = Path(arguments.pop("root")).expanduser()
    verb = "Found" if (root / _MANIFEST).exists() else "Wrote"
    try:
        root = build_digits(root, **arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted, nothing was written\n")
    train, val = arguments["num_train"], arguments["num_val"]
    print(f"{verb} {train} training and {val} validation images in {root}")


def _holds_set(root, arguments):
    """Whether root is the complete set; False if it is free, an error if it is anything else."""
    mend = "delete it or name another folder"
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    asked = {"version": _FORMAT["version"], **arguments.manifest()["arguments"]}
    try:
        there = json.loads((root / _MANIFEST).read_text(encoding="utf-8"))
        ours = there["format"] == _FORMAT["format"]
        found = {"version": there["version"], **there["arguments"]}
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    if not ours:
        raise FileExistsError(f"root {root} exists and is not a digits data set; {mend}")
    if found != asked:
        differences = ", ".join(
            f"{name} {found.get(name)} there and {asked.get(name)} asked for"
            for name in {**asked, **found}
            if found.get(name) != asked.get(name)
        )
        raise FileExistsError(
            f"root {root} holds a digits data set built with other arguments "
            f"({differences}); {mend}"
        )
    for split, count in arguments.counts():
        images = root / split
        names = set(os.listdir(images)) if images.is_dir() else set()
        complete = names.issuperset(_file_name(index) for index in range(count))
        if not complete or not _annotation_file(root, split).is_file():
            raise FileExistsError(
                f"root {root} holds a digits data set that has lost {split} files; {mend}"
            )
    return True


def _scratch_folder(root):
    """A temporary folder next to root, on the same file system so that a rename moves it."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{root.name}.partial-", dir=root.parent)
    except OSError as error:
        raise OSError(
            f"root {root} cannot be built, for nothing can be written to {root.parent} "
            f"({error.strerror}); make that a writable folder or name another root"
        ) from error


def _write_set(folder, arguments, progress):
    folder.mkdir()
    (folder / "annotations").mkdir()
    for split, count in arguments.counts():
        # None shows the bar only on a terminal.
        hidden = None if progress else True
        steps = tqdm(range(count), f"digits, {split}", leave=False, disable=hidden)
        _write_split(folder, split, steps, arguments)
    manifest = json.dumps(arguments.manifest(), indent=2) + "\n"
    (folder / _MANIFEST).write_text(manifest, encoding="utf-8")


def _write_split(folder, split, indices, arguments):
    (folder / split).mkdir()
    size, segment = arguments.image_size, _polygons if arguments.masks == "polygon" else _rle
    images, annotations = [], []
    for index in indices:
        pixels, digits = _draw_image(split, index, arguments)
        # OpenCV encodes BGR. Writing the bytes here turns a full disk into an OSError, where
        # cv2.imwrite would only return False.
        png = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
        (folder / split / _file_name(index)).write_bytes(png)
        image_id = index + 1
        images.append(
            {"id": image_id, "file_name": _file_name(index), "width": size, "height": size}
        )
        for label, mask in digits:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [float(value) for value in _box(mask)],
                    "area": float(mask.sum()),
                    "segmentation": segment(mask),
                    "iscrowd": 0,
                }
            )
    coco = {
        "info": {
            "description": f"Handwritten digits on varied grounds, {split}",
            "version": str(_FORMAT["version"]),
        },
        "licenses": [
            dict(
                id=1,
                name="CC BY 4.0 (Optical Recognition of Handwritten Digits, UCI)",
                url="https://creativecommons.org/licenses/by/4.0/",
            )
        ],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": label + 1, "name": name, "supercategory": "digit"}
            for label, name in enumerate(CLASSES)
        ],
    }
    _annotation_file(folder, split).write_text(json.dumps(coco), encoding="utf-8")


def _file_name(index):
    return f"{index + 1:06d}.png"


def _annotation_file(root, split):
    return root / "annotations" / f"instances_{split}.json"


def _draw_image(split, index, arguments):
    """Draws one image.

    Returns:
        tuple: The image, uint8 RGB of shape (size, size, 3), and a list of (label, mask) with
        disjoint boolean masks of shape (size, size).
    """
    # Seeded by its own place in the set, so that no image depends on those before it.
    rng = np.random.default_rng(
        np.random.SeedSequence([arguments.seed, _SPLITS.index(split), index])
    )
    size = arguments.image_size
    ground = _draw_ground(rng, size)
    image = ground.copy()
    contrast_range = rng.uniform(0.05, 0.5)
    digits, boxes = [], []
    for label, alpha in _choose_digits(rng, split, arguments):
        placed = _place(rng, alpha, digits, boxes, size)
        if placed is None:
            continue
        window, mask = placed
        colour = _choose_colour(rng, ground[window], contrast_range)
        image[window] += alpha[..., None] * (colour - image[window])
        digits.append((label, mask))
        boxes.append(_box(mask))
    return _photograph(rng, image), digits


def _draw_ground(rng, size):
    """Draws a textured, unevenly lit and tinted ground, float32 of shape (size, size, 3)."""
    tone = rng.uniform(0.08, 0.92)
    texture = rng.uniform(0, 1) * _cloud(rng, size, 3) + _cloud(rng, size, 1)
    ground = tone + np.exp(rng.uniform(np.log(0.01), np.log(0.12))) * texture

    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    light = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    ground = ground + strength * light[..., None]

    gamma = np.exp(rng.uniform(np.log(0.6), np.log(1.6)))
    tint = np.exp(rng.normal(0, 0.18, size=3))
    return np.clip(np.clip(ground, 0, 1) ** gamma * tint, 0, 1).astype(np.float32)


def _cloud(rng, size, channels):
    """Smooth noise of two octaves with a random, direction-dependent scale."""
    cell = np.exp(rng.uniform(np.log(3), np.log(max(size / 2, 4)), size=2))
    total = np.zeros((size, size, channels), dtype=np.float32)
    for octave in (1, 2):
        rows, columns = np.ceil(size * octave / cell).astype(int) + 1
        grid = rng.normal(0, 1 / octave, size=(rows, columns, channels)).astype(np.float32)
        fine = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
        total += fine.reshape(size, size, channels)
    return total


def _choose_digits(rng, split, arguments):
    """Draws the digits of an image, large ones first since these are harder to place."""
    glyphs, labels = _load_glyphs()
    count = rng.integers(1, arguments.max_digits, endpoint=True)
    chosen = rng.choice(split_glyphs()[split], size=count)
    low, high = np.log(arguments.digit_size)
    # Digits within an image are of more similar size than digits at large.
    heights = rng.uniform(low, high) + rng.uniform(-0.4, 0.4, size=count)
    heights = np.rint(np.exp(np.clip(heights, low, high))).astype(int)
    order = np.argsort(-heights, kind="stable")
    return [
        (int(labels[glyph]), _draw_alpha(rng, glyphs[glyph], int(height)))
        for glyph, height in zip(chosen[order], heights[order], strict=True)
    ]


def _draw_alpha(rng, glyph, height):
    """Scales a glyph up, slightly turned and slanted.

    Returns:
        numpy.ndarray: Opacity from 0 to 1, float32, ``height`` rows and at most as many columns.
    """
    turn, slant = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
    stretch = rng.uniform(0.85, 1.1)
    scale = height / 6
    linear = scale * np.array([[np.cos(turn), slant - np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    # A margin of 3 glyph pixels on each side holds the corners of the turned glyph.
    side = int(np.ceil(14 * scale))
    shift = side / 2 - linear @ (3.5, 3.5)
    ink = cv2.warpAffine(
        glyph, np.column_stack([linear, shift]), (side, side), flags=cv2.INTER_CUBIC
    )
    alpha = np.clip((ink - _INK[0]) / (_INK[1] - _INK[0]), 0, 1)
    x, y, w, h = _box(alpha > _MASK_ALPHA)
    width = int(np.clip(round(stretch * w * height / h), 1, height))
    return cv2.resize(alpha[y : y + h, x : x + w], (width, height), interpolation=cv2.INTER_AREA)


def _place(rng, alpha, digits, boxes, size):
    """Finds a free place: a pair of slices and the boolean mask there, or None."""
    height, width = alpha.shape
    for _ in range(_PLACEMENT_TRIES):
        y = int(rng.integers(0, size - height, endpoint=True))
        x = int(rng.integers(0, size - width, endpoint=True))
        window = (slice(y, y + height), slice(x, x + width))
        mask = np.zeros((size, size), dtype=bool)
        mask[window] = alpha > _MASK_ALPHA
        box = _box(mask)
        if any(_overlap(box, other) >= _MAX_OVERLAP for other in boxes):
            continue
        if any((mask & other).any() for _, other in digits):
            continue
        return window, mask
    return None


def _choose_colour(rng, ground, contrast_range):
    """Draws a colour lighter or darker than a patch of ground by enough to stand out."""
    luma = ground @ _LUMA
    middle = float(luma.mean())
    needed = _MIN_CONTRAST + _CONTRAST_PER_STD * float(luma.std())
    rooms = {1: 1 - middle, -1: middle}
    fitting = [sign for sign, room in rooms.items() if room >= needed]
    sign = rng.choice(fitting) if fitting else max(rooms, key=rooms.get)
    contrast = min(rng.uniform(needed, needed + contrast_range), rooms[sign])
    grey = middle + sign * contrast
    hue = rng.uniform(-1, 1, size=3)
    # Without luma, and small enough to stay in gamut: the hue leaves the contrast as it is.
    hue -= hue @ _LUMA
    hue *= rng.uniform(0, 1) * min(grey, 1 - grey) / np.abs(hue).max()
    return (grey + hue).astype(np.float32)


def _photograph(rng, image):
    """Blurs the image, adds sensor noise and rounds it to uint8."""
    blur = rng.uniform(0, 0.9)
    noise = np.exp(rng.uniform(np.log(0.004), np.log(0.05)))
    if blur > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    image = image + noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _box(mask):
    """The tight box of a mask as x, y, width, height."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _overlap(first, second):
    """Intersection of two boxes over the area of the smaller one."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = first, second
    width = min(ax + aw, bx + bw) - max(ax, bx)
    height = min(ay + ah, by + bh) - max(ay, by)
    return max(width, 0) * max(height, 0) / min(aw * ah, bw * bh)


def _rle(mask):
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(value) for value in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _polygons(mask):
    """Traces a mask along the edges of its pixels, one polygon per connected part.

    A contour of OpenCV runs through pixel centres, half a pixel inside the part's edge, and is
    degenerate for thin parts. Traced at twice the size it has a point on each side of every
    pixel, which rounds to the pixel's corners; so a part of one pixel gives a square, and
    pycocotools decodes the polygons to exactly the mask.
    """
    double = np.kron(mask, np.ones((2, 2))).astype(np.uint8)
    contours, hierarchy = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [_to_corners(contour) for contour in contours]
    parents = np.asarray(hierarchy).reshape(-1, 4)[:, 3]
    polygons = []
    for part in np.flatnonzero(parents < 0):
        polygon = rings[part]
        for hole in np.flatnonzero(parents == part):
            polygon = _cut_hole(polygon, rings[hole])
        polygons.append(polygon.astype(float).ravel().tolist())
    return polygons


def _to_corners(contour):
    corners = (contour.reshape(-1, 2) + 1) // 2
    repeats = (corners == np.roll(corners, 1, axis=0)).all(axis=1)
    return corners[~repeats]


def _cut_hole(outline, hole):
    """Joins a hole to an outline by a slit of no width, since COCO polygons have no holes."""
    distance = ((outline[:, None] - hole[None]) ** 2).sum(axis=-1)
    start, end = np.unravel_index(distance.argmin(), distance.shape)
    around = np.roll(hole, -end, axis=0)
    return np.concatenate([outline[: start + 1], around, around[:1], outline[start:]])


@lru_cache(maxsize=1)
def _load_glyphs():
    """The glyphs, float32 from 0 to 1 of shape (1797, 8, 8), and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.float32) / 16, digits.target


if __name__ == "__main__":
    main()
