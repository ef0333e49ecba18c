"""The generated COCO folder has the peculiarities of real COCO, so that tests on it count."""

import cv2
import numpy as np
import pytest
from coco_folder import IMAGES, build_coco, count_runs
from mmdet.datasets import CocoDataset
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO


@pytest.fixture(params=IMAGES)
def split(request):
    return request.param


def test_variety(coco, split):
    api = COCO(coco / "annotations" / f"instances_{split}.json")
    objects = list(api.anns.values())
    segmentations = [each["segmentation"] for each in objects]
    assert any(isinstance(each, list) and len(each) > 1 for each in segmentations)
    for crowd, counts in [(0, str), (1, str), (1, list)]:
        assert any(
            each["iscrowd"] == crowd
            and isinstance(each["segmentation"], dict)
            and isinstance(each["segmentation"]["counts"], counts)
            for each in objects
        )
    by_image = [api.imgToAnns[image_id] for image_id in api.imgs]
    assert [] in by_image
    assert any(each and all(one["iscrowd"] for one in each) for each in by_image)
    channels = {
        cv2.imread(str(path), cv2.IMREAD_UNCHANGED).ndim for path in (coco / split).glob("*.jpg")
    }
    assert channels == {2, 3}


def test_masks(coco, split):
    api = COCO(coco / "annotations" / f"instances_{split}.json")
    for each in api.anns.values():
        image = api.imgs[each["image_id"]]
        assert cv2.imread(str(coco / split / image["file_name"])).shape[:2] == (
            image["height"],
            image["width"],
        )
        rle = api.annToRLE(each)
        assert rle["size"] == [image["height"], image["width"]]
        assert coco_mask.area(rle) == each["area"] > 30
        assert coco_mask.toBbox(rle).tolist() == each["bbox"]


def test_runs():
    mask = np.random.default_rng(0).integers(0, 2, (7, 9)).astype(np.uint8)
    for each in (mask, 1 - mask, np.ones_like(mask), np.zeros_like(mask)):
        rle = coco_mask.frPyObjects({"size": [7, 9], "counts": count_runs(each)}, 7, 9)
        assert np.array_equal(coco_mask.decode(rle), each)


def test_categories(coco, split):
    dataset = CocoDataset(
        ann_file=f"annotations/instances_{split}.json",
        data_root=str(coco),
        data_prefix=dict(img=f"{split}/"),
        pipeline=[],
    )
    assert len(dataset) == len(IMAGES[split])
    assert dataset.cat_ids == sorted(dataset.cat_ids) and len(dataset.cat_ids) == 80
    assert dataset.cat_ids[-1] == 90


def test_deterministic(coco, tmp_path):
    again = build_coco(tmp_path / "coco")
    names = [path.relative_to(coco) for path in coco.rglob("*") if path.is_file()]
    assert len(names) == 2 + sum(map(len, IMAGES.values()))
    for name in names:
        assert (coco / name).read_bytes() == (again / name).read_bytes()
