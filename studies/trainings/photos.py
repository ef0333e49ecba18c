# Licensed under the Apache License, Version 2.0.
"""The detectors of ``configs/photos``; their photographs come from repositories to be cloned."""

import json
import os.path as osp
from typing import NamedTuple

import paths
from common.errors import UsageError
from mmengine.config import Config
from voc import convert

from .shared import AVERAGES


class Source(NamedTuple):
    """A repository of photographs, and the places of its files."""

    url: str
    annotations: str
    images: str
    lists: tuple[str, ...] = ()  # of training and validation; else a quarter is drawn at random


SOURCES = {
    "raccoon": Source("https://github.com/datitran/raccoon_dataset", "annotations", "images"),
    "bccd": Source(
        "https://github.com/Shenggan/BCCD_Dataset",
        "BCCD/Annotations",
        "BCCD/JPEGImages",
        ("BCCD/ImageSets/Main/trainval.txt", "BCCD/ImageSets/Main/test.txt"),
    ),
}
SHARED = dict(AVERAGES, norm_in="head", lr_at_2=0.01)
# The epochs and the burn-in are those of the paper's COCO runs.
PHOTOS = dict(SHARED, photos="raccoon", epochs=12, burn_in=3, decay=9)
CELLS = dict(SHARED, photos="bccd", epochs=4, burn_in=1, decay=3)


def photos_config(options: dict) -> tuple[Config, int]:
    """The config for the photographs in ``data``, and the number of training images."""
    name, data = options["photos"], osp.abspath(options["data"])
    out = convert_clone(name, data)
    norm_in = "" if options["norm_in"] == "head" else f"-{options['norm_in']}"
    file = f"faster-rcnn_efficientnet-lite0_fpn_cbn{norm_in}_1xb1_{name}.py"
    cfg = Config.fromfile(osp.join(paths.CONFIGS, "photos", file))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = f"{data}/"
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = osp.join(out, "instances_val.json")
    with open(osp.join(out, "instances_train.json")) as file:
        count = round(len(json.load(file)["images"]) * options["shorten"])
    cfg.train_dataloader.dataset.indices = count
    return cfg, count


def convert_clone(name: str, data: str) -> str:
    """Write the COCO files of a clone beside it; returns their folder."""
    source, clone = SOURCES[name], osp.join(data, name)
    if not osp.isdir(clone):
        raise UsageError(f"--data: there is no {clone}: git clone {source.url} {clone}")
    annotations, images, *lists = (
        osp.join(clone, part) for part in (source.annotations, source.images, *source.lists)
    )
    out = f"{clone}_coco"
    convert(annotations, images, out, lists or None)
    return out
