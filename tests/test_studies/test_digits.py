# Licensed under the Apache License, Version 2.0.
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from digits import build as digits
from digits.build import CLASSES, build_digits, split_glyphs
from pycocotools.coco import COCO

SMALL = {"num_train": 12, "num_val": 4, "progress": False}


@pytest.fixture(scope="module", params=["polygon", "rle"])
def built(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "digits"
    return build_digits(folder, num_train=60, num_val=20, masks=request.param, progress=False)


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def command(*arguments):
    return [sys.executable, digits.__file__, *map(str, arguments)]


@pytest.mark.parametrize(("split", "count"), [("train", 60), ("val", 20)])
def test_annotations_agree_with_pycocotools(built, split, count):
    coco = COCO(built / "annotations" / f"instances_{split}.json")
    assert len(coco.imgs) == count
    for image in coco.imgs.values():
        pixels = cv2.imread(str(built / split / image["file_name"]), cv2.IMREAD_UNCHANGED)
        assert pixels.shape == (image["height"], image["width"], 3) == (128, 128, 3)
        found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert 1 <= len(found) <= 6
        masks = [coco.annToMask(annotation) for annotation in found]
        assert np.sum(masks, axis=0).max() == 1
        for annotation, mask in zip(found, masks, strict=True):
            assert annotation["area"] == mask.sum() > 0
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, width, height = annotation["bbox"]
            assert (x, x + width) == (columns[0], columns[-1] + 1)
            assert (y, y + height) == (rows[0], rows[-1] + 1)
            assert 14 <= height <= 64


def test_categories_and_info(built):
    content = json.loads((built / "annotations" / "instances_train.json").read_text())
    assert set(content) == {"info", "licenses", "images", "annotations", "categories"}
    assert [(c["id"], c["name"]) for c in content["categories"]] == [
        (label + 1, str(label)) for label in range(10)
    ]
    assert CLASSES == tuple(str(label) for label in range(10))
    assert {a["category_id"] for a in content["annotations"]} == set(range(1, 11))
    assert {a["iscrowd"] for a in content["annotations"]} == {0}


def test_boxes_overlap_little(built):
    coco = COCO(built / "annotations" / "instances_train.json")
    for image_id in coco.imgs:
        boxes = [a["bbox"] for a in coco.loadAnns(coco.getAnnIds(imgIds=image_id))]
        for i, first in enumerate(boxes):
            assert all(digits._overlap(first, second) < 0.1 for second in boxes[:i])


def test_polygons_keep_holes_thin_parts_and_single_pixels():
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    ring = np.zeros((9, 9), dtype=bool)
    ring[1:8, 1:8] = True
    ring[3:6, 3] = ring[2:7, 6] = False
    for mask in [ring, *(rng.random((50, 9, 9)) > 0.4)]:
        polygons = digits._polygons(mask)
        assert all(len(polygon) >= 8 for polygon in polygons)
        decoded = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 9, 9)))
        np.testing.assert_array_equal(decoded, mask)


def test_splits_share_no_digit():
    split = split_glyphs()
    assert not set(split["train"]) & set(split["val"])
    assert sorted([*split["train"], *split["val"]]) == list(range(1797))
    glyphs, labels = digits._load_glyphs()
    pictures = {name: {glyphs[i].tobytes() for i in indices} for name, indices in split.items()}
    assert not pictures["train"] & pictures["val"]
    shares = np.bincount(labels[split["val"]]) / np.bincount(labels)
    assert np.all((shares > 0.19) & (shares < 0.22))


def test_images_differ_as_photographs_do(built):
    pixels = np.stack([cv2.imread(str(path)) for path in sorted((built / "train").iterdir())])
    spread = pixels.mean(axis=(1, 2)).std(axis=0)
    within = pixels.std(axis=(1, 2))
    # In an image set where each image is a fair sample, the spread of the means is near zero.
    assert np.all(spread > 1.2 * within.mean(axis=0))
    assert np.all(np.percentile(within, 90, axis=0) > 2 * np.percentile(within, 10, axis=0))


def test_digits_stand_out_from_their_ground():
    arguments = digits.Arguments(num_train=40, num_val=1, masks="rle", seed=3)
    for index in range(40):
        image, drawn = digits._draw_image("train", index, arguments)
        luma = image @ digits._LUMA
        free = ~np.any([mask for _, mask in drawn], axis=0)
        for _, mask in drawn:
            near = cv2.dilate(mask.astype(np.uint8), np.ones((11, 11))).astype(bool) & free
            assert abs(luma[mask].mean() - luma[near].mean()) > 20


def test_same_arguments_give_the_same_bytes(tmp_path):
    first = files(build_digits(tmp_path / "a", **SMALL))
    assert first == files(build_digits(tmp_path / "b", **SMALL))
    assert len(first) == 12 + 4 + 3
    other = files(build_digits(tmp_path / "c", seed=1, **SMALL))
    assert all(first[name] != other[name] for name in first)


def test_an_image_does_not_depend_on_the_number_of_images(tmp_path):
    few = build_digits(tmp_path / "few", num_train=3, num_val=2, progress=False)
    many = build_digits(tmp_path / "many", **SMALL)
    for split, count in (("train", 3), ("val", 2)):
        for path in sorted((few / split).iterdir()):
            assert path.read_bytes() == (many / split / path.name).read_bytes()
        a, b = (
            json.loads((root / "annotations" / f"instances_{split}.json").read_text())
            for root in (few, many)
        )
        assert a["images"] == b["images"][:count]
        assert a["annotations"] == b["annotations"][: len(a["annotations"])]


def test_options_shape_the_images(tmp_path):
    root = build_digits(tmp_path / "d", image_size=40, max_digits=2, digit_size=(8, 40), **SMALL)
    coco = COCO(root / "annotations" / "instances_train.json")
    assert cv2.imread(str(root / "train" / "000001.png")).shape == (40, 40, 3)
    assert all(1 <= len(coco.getAnnIds(imgIds=image_id)) <= 2 for image_id in coco.imgs)


def test_second_call_does_nothing(tmp_path, monkeypatch):
    root = build_digits(str(tmp_path / "parent" / "digits"), **SMALL)
    assert root == tmp_path / "parent" / "digits"
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    monkeypatch.setattr(digits, "_write_set", None)
    assert build_digits(root, **SMALL) == root
    assert before == {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


def test_an_empty_folder_is_filled(tmp_path):
    root = tmp_path / "digits"
    root.mkdir()
    assert (build_digits(root, **SMALL) / "digits.json").is_file()


def test_other_arguments_are_an_error(tmp_path):
    root = build_digits(tmp_path / "digits", **SMALL)
    before = files(root)
    with pytest.raises(FileExistsError, match=r"seed 0 there and 1 asked for.*delete it or name"):
        build_digits(root, seed=1, **SMALL)
    assert files(root) == before


def test_other_format_version_is_an_error(tmp_path, monkeypatch):
    root = build_digits(tmp_path / "digits", **SMALL)
    monkeypatch.setitem(digits._FORMAT, "version", 99)
    with pytest.raises(FileExistsError, match="version 1 there and 99 asked for"):
        build_digits(root, **SMALL)


@pytest.mark.parametrize("lost", ["val/000002.png", "annotations/instances_val.json"])
def test_a_set_that_lost_files_is_an_error(tmp_path, lost):
    root = build_digits(tmp_path / "digits", **SMALL)
    (root / lost).unlink()
    with pytest.raises(FileExistsError, match="has lost val files"):
        build_digits(root, **SMALL)


@pytest.mark.parametrize("content", ["notes", "{}", "[1]", '{"format": "cbn_mmdet digits"}'])
def test_a_folder_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "digits.json").write_text(content)
    with pytest.raises(FileExistsError, match="is not a digits data set; delete it or name"):
        build_digits(tmp_path, **SMALL)
    assert files(tmp_path) == {Path("digits.json"): content.encode()}


def test_a_file_is_left_alone(tmp_path):
    path = tmp_path / "precious"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="is not a digits data set"):
        build_digits(path, **SMALL)
    with pytest.raises(OSError, match="nothing can be written to .*make that a writable folder"):
        build_digits(path / "digits", **SMALL)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_nothing_remains_of_a_failed_build(tmp_path, monkeypatch, error):
    draw = digits._draw_image

    def fail(split, index, arguments):
        if (split, index) == ("val", 2):
            raise error
        return draw(split, index, arguments)

    monkeypatch.setattr(digits, "_draw_image", fail)
    with pytest.raises(error):
        build_digits(tmp_path / "digits", **SMALL)
    assert not any(tmp_path.iterdir())


def test_a_killed_build_leaves_no_set(tmp_path):
    root = tmp_path / "digits"
    process = subprocess.Popen(command(root, "--train", 100000))
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".digits.partial-*/*/train/*.png")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not root.exists()
    assert not list(tmp_path.rglob("digits.json"))
    # The files that the dead process left behind do not block the next build.
    assert (build_digits(root, **SMALL) / "digits.json").is_file()


def test_two_processes_build_the_same_set(tmp_path):
    root = tmp_path / "digits"
    arguments = command(root, "--train", 12, "--val", 4)
    processes = [subprocess.Popen(arguments, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    build_digits(root, **SMALL)


@pytest.mark.parametrize("winner_seed", [0, 1])
def test_the_slower_of_two_builders_yields(tmp_path, monkeypatch, winner_seed):
    root = tmp_path / "digits"
    write = digits._write_set

    def overtaken(*arguments):
        write(*arguments)
        monkeypatch.setattr(digits, "_write_set", write)
        build_digits(root, seed=winner_seed, **SMALL)

    monkeypatch.setattr(digits, "_write_set", overtaken)
    if winner_seed == 0:
        assert build_digits(root, **SMALL) == root
    else:
        with pytest.raises(FileExistsError, match="built with other arguments"):
            build_digits(root, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert build_digits(root, seed=winner_seed, **SMALL) == root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, "num_train is 0; give a whole number of at least 1"),
        ({"num_val": -1}, "num_val is -1; give a whole number of at least 1"),
        ({"num_val": 2.0}, "num_val is 2.0; give a whole number"),
        ({"image_size": True}, "image_size is True; give a whole number"),
        ({"max_digits": 0}, "max_digits is 0; give a whole number"),
        ({"seed": -1}, "seed is -1; give a whole number of at least 0"),
        ({"masks": "box"}, "masks is 'box'; give 'polygon' or 'rle'"),
        ({"digit_size": 16}, "digit_size is 16; give two whole numbers"),
        ({"digit_size": (16, 32, 64)}, "digit_size is .*; give two whole numbers"),
        ({"digit_size": (64, 16)}, "digit_size is .64, 16.*; give the smaller height first"),
        ({"digit_size": (2, 16)}, "digit_size is .2, 16.*; give .*at least 8"),
        ({"image_size": 60}, "digit_size is .* in images of 60 pixels; give .*at most the images'"),
    ],
)
def test_bad_arguments_say_how_to_mend(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_digits(tmp_path / "digits", **arguments)
    assert not any(tmp_path.iterdir())


def test_cli_writes_the_set(tmp_path):
    root = tmp_path / "digits"
    arguments = ["--train", "12", "--val", "4", "--masks", "rle", "--digit-size", "20", "30"]
    result = subprocess.run(
        command(root, *arguments), capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert result.stdout == f"Wrote 12 training and 4 validation images in {root}\n"
    assert "digits" not in result.stderr
    build_digits(root, masks="rle", digit_size=(20, 30), **SMALL)


def test_cli_finds_the_set(tmp_path, capsys):
    build_digits(tmp_path / "digits", **SMALL)
    digits.main([str(tmp_path / "digits"), "--train", "12", "--val", "4"])
    assert capsys.readouterr().out.startswith("Found 12 training")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "0"], "num_train is 0"),
        (["--train", "x"], "argument --train: invalid int value"),
        (["--masks", "box"], "masks is 'box'"),
        ([], "is not a digits data set"),
    ],
)
def test_cli_user_errors_end_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit) as stop:
        digits.main([str(tmp_path), *arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]


def test_cli_interruption(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "_draw_image", interrupt)
    with pytest.raises(SystemExit) as stop:
        digits.main([str(tmp_path / "digits")])
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
