"""The checks of the data that a config names, each made to fail once."""

import copy
import json
import shutil

import cv2
import pytest
from common import coco as checks
from common.errors import UsageError
from mmdet.datasets import CocoDataset
from mmengine.config import Config

CLASSES = CocoDataset.METAINFO["classes"]


@pytest.fixture
def folder(coco, tmp_path):
    """A copy of the images, to be spoilt."""
    return shutil.copytree(coco / "val2017", tmp_path / "val2017")


@pytest.fixture
def content(coco):
    return checks.read_annotations(str(coco / "annotations/instances_val2017.json"))


def test_good(content, folder):
    assert checks.check_annotations(content, CLASSES) == (
        "6 images (1 without objects), 10 annotations (3 crowds), 80 categories for 80 classes"
    )
    assert checks.check_annotations(content, CLASSES[3:5]).endswith("80 categories for 2 classes")
    assert checks.check_images(content, str(folder)) == f"all 6 are in {folder}"
    assert checks.check_sizes(content, f"{folder}/").startswith("6 tried")
    assert checks.check_sizes(content, str(folder), samples=3).startswith("3 tried")


def test_images_in_folders_of_their_own(content, folder):
    """The file names in the annotations may include a folder."""
    (folder / "part").mkdir()
    first = content["images"][0]
    shutil.move(folder / first["file_name"], folder / "part")
    assert len(checks.find_images(content, str(folder))) == 5
    first["file_name"] = f"part/{first['file_name']}"
    assert len(checks.find_images(content, str(folder))) == 6
    checks.check_sizes(content, str(folder))


def test_broken_file(coco, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes((coco / "annotations/instances_val2017.json").read_bytes()[:-100])
    with pytest.raises(
        UsageError, match=r"a.json is no JSON, or was cut short \(.*\): get it anew"
    ):
        checks.read_annotations(str(path))
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UsageError, match="a.json is no JSON"):
        checks.read_annotations(str(path))
    for other in ({"annotations": []}, []):
        path.write_text(json.dumps(other))
        with pytest.raises(UsageError, match="a.json has no images and no categories"):
            checks.read_annotations(str(path))


def test_other_categories(content):
    with pytest.raises(
        UsageError, match="1 of 3 classes are no categories .*: zebu; its 80 .*person"
    ):
        checks.check_annotations(content, ("person", "zebu", "zebra"))


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_reference_to_nothing(content, key):
    astray = copy.deepcopy(content)
    astray["annotations"][3][key] = 600_001
    identity = astray["annotations"][3]["id"]
    with pytest.raises(UsageError, match=f"1 annotations are of an image .*, ids {identity}: get"):
        checks.check_annotations(astray, CLASSES)


def test_missing_images(content, folder):
    name = content["images"][4]["file_name"]
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"1 of 6 images are not in .*: {name}; put them there"):
        checks.check_images(content, str(folder))
    assert checks.check_sizes(content, str(folder)).startswith("5 tried")
    for other in (folder.parent, folder / "none"):
        with pytest.raises(UsageError, match=f"6 of 6 images are not in {other}: .*, …; put"):
            checks.check_images(content, str(other))


def test_resized_image(content, folder):
    image = content["images"][2]
    path = folder / image["file_name"]
    cv2.imwrite(str(path), cv2.imread(str(path))[:, :50])
    expected = f"{path} is 50x{image['height']}, not {image['width']}x{image['height']}; get"
    with pytest.raises(UsageError, match=f"1 of 6 images tried are not .*: {expected}"):
        checks.check_sizes(content, str(folder))


@pytest.mark.parametrize("size", [0, 100])
def test_unreadable_image(content, folder, size):
    path = folder / content["images"][2]["file_name"]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UsageError, match=f"1 of 6 .*: {path} cannot be read"):
        checks.check_sizes(content, str(folder))


def dataset(**kwargs):
    return Config(dict(train_dataloader=dict(dataset=kwargs), train_evaluator=None))


def test_missing_data(tmp_path):
    digits = dict(data_root=f"{tmp_path}/", ann_file="a.json", data_prefix=dict(img="train/"))
    with pytest.raises(UsageError, match=r"no .*a.json. Set data_root"):
        checks.check_data(dataset(**digits), "train")
    with pytest.raises(UsageError, match=f"python studies/digits/build.py {tmp_path}"):
        checks.check_data(dataset(**digits, metainfo=dict(classes=tuple("0123456789"))), "train")
    with pytest.raises(UsageError, match="a.json"):
        checks.check_data(dataset(type="RepeatDataset", dataset=digits), "train")
    with pytest.raises(UsageError, match="a.json"):
        several = dataset(type="ConcatDataset", datasets=[dict(ann_file="."), digits])
        checks.check_data(several, "train")
    (tmp_path / "a.json").touch()
    (tmp_path / "train").mkdir()
    checks.check_data(dataset(**digits), "train")
    checks.check_data(dataset(ann_file="elsewhere", backend_args=dict(backend="petrel")), "train")


def test_how_often_an_epoch_repeats_a_data_set():
    a, b, c = (dict(ann_file=name) for name in "abc")
    several = dict(datasets=[dict(times=3, dataset=a), b, dict(oversample_thr=0.1, dataset=c)])
    cfg = dataset(type="RepeatDataset", times=2, dataset=several)
    found = [(each["ann_file"], times) for each, times in checks.innermost_datasets(cfg, "train")]
    assert found == [("a", 6), ("b", 2), ("c", None)]
    assert list(checks.innermost_datasets(cfg, "val")) == []
