"""Every config is what its name says, builds, trains, evaluates, and is listed in its README.

These tests read and compare all COCO configs, and others made from them by the README's options.
Part of them, with each norm, also trains. `-m sweep` trains them all, in three minutes of one core;
with `-k faster-rcnn` and `-k mask-rcnn` two processes share the sweep.
"""

import argparse
import copy
import functools
import re
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from conftest import ROOT
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.fileio import load
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from cbn_mmdet import CBN, link, links, set_window, step

DIGITS = sorted((ROOT / "studies/digits/configs").glob("*.py"))
FOLDERS = [ROOT / "configs/faster_rcnn", ROOT / "configs/mask_rcnn"]
COCO = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))

# The README's options, which turn an existing config into any other.
BATCH = "train_dataloader.batch_size="
R101 = "model.backbone.depth=101 model.backbone.init_cfg.checkpoint=torchvision://resnet101"
TRAINED = "model.backbone.norm_eval=False model.backbone.frozen_stages=-1"
NORM = "model.backbone.norm_cfg."
OF_FEW = f"{NORM}requires_grad=True {NORM}type=CBN {NORM}momentum=0.02"
SYNC = f"{NORM}requires_grad=True {NORM}type=SyncCBN {NORM}window=sliding {NORM}window_size=4 "
SYNC += f"{NORM}backward=current {NORM}derivative_stride=1"
OTHERS = {
    "faster-rcnn_r50_fpn_brn-all_4xb4": (
        "faster-rcnn_r50_fpn_brn_4xb4",
        f"{TRAINED} {NORM}requires_grad=True {NORM}type=BRN",
    ),
    "faster-rcnn_r50_fpn_gn-all_8xb2": ("faster-rcnn_r50_fpn_gn-all_4xb4", f"{BATCH}2"),
    "mask-rcnn_r50_fpn_cbn-all_16xb1": ("mask-rcnn_r50_fpn_cbn_16xb1", f"{TRAINED} {OF_FEW}"),
    "mask-rcnn_r50_fpn_naive-cbn-all_8xb2": (
        "mask-rcnn_r50_fpn_naive-cbn_8xb2",
        f"{TRAINED} {OF_FEW} {NORM}compensate=False",
    ),
    "faster-rcnn_r50_fpn_synccbn-all_16xb1": (
        "faster-rcnn_r50_fpn_synccbn_8xb2",
        f"{TRAINED} {SYNC} {BATCH}1",
    ),
    "mask-rcnn_r101_fpn_bn-all_16xb1": ("mask-rcnn_r50_fpn_bn-all_4xb4", f"{R101} {BATCH}1"),
}
MADE = [ROOT / f"configs/{name.split('-')[0]}_rcnn/{name}-1x_coco.py" for name in OTHERS]

PAPER = {
    "type": "CBN",
    "window": "sliding",
    "window_size": 4,
    "backward": "current",
    "derivative_stride": 1,
}
RECOMMENDED = {"type": "CBN", "momentum": 0.02}  # else the layer's defaults
# By the norm in the name: the setting at 4 images per GPU, then the one below 4 if it differs.
NORMS = {
    "bn": [{"type": "BN"}],
    "syncbn": [{"type": "SyncBN"}],
    "gn": [{"type": "GN", "num_groups": 32}],
    "brn": [{"type": "BRN"}],
    "naive-cbn": [{**PAPER, "compensate": False}, {**RECOMMENDED, "compensate": False}],
    "cbn": [PAPER, RECOMMENDED],
    "synccbn": [{**PAPER, "type": "SyncCBN"}],
}
LAYERS = {"BN": "BatchNorm2d", "SyncBN": "SyncBatchNorm", "GN": "GroupNorm"}  # else the type
HOOKS = {
    "bn": {"type": "SyncBuffersHook"},
    "brn": {"type": "SyncBuffersHook"},
    "naive-cbn": {"type": "CBNHook", "burn_in": 3},
    "cbn": {"type": "CBNHook", "burn_in": 3},
    "synccbn": {"type": "CBNHook", "burn_in": 3},
}
NAME = re.compile(
    r"(?P<detector>faster|mask)-rcnn_r(?P<depth>50|101)_fpn_"
    r"((?P<norm>[a-z-]+?)(?P<everywhere>-all)?_)?(?P<gpus>\d+)xb(?P<images>\d+)-1x_coco"
)

# What the published setting changes in MMDetection's own configs of both detectors.
PUBLISHED_SETTING = {
    "model.backbone.norm_cfg.requires_grad": False,
    "model.rpn_head.loss_bbox.type": "SmoothL1Loss",
    "model.rpn_head.loss_bbox.beta": 1 / 9,
    "model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": 2,
    "model.roi_head.bbox_head.type": "Shared4Conv1FCBBoxHead",
    "model.roi_head.bbox_head.conv_out_channels": 256,
    "model.roi_head.bbox_head.loss_bbox.type": "SmoothL1Loss",
    "model.roi_head.bbox_head.loss_bbox.beta": 1.0,
    "model.train_cfg.rpn.allowed_border": 0,
    "model.train_cfg.rpn_proposal.max_per_img": 2000,
    "model.test_cfg.rpn.nms_pre": 2000,
    "model.test_cfg.rpn.max_per_img": 2000,
    "train_dataloader.batch_size": 4,
    "optim_wrapper.clip_grad.max_norm": 35,
    "optim_wrapper.clip_grad.norm_type": 2,
    "param_scheduler.0.start_factor": 1 / 3,
    "auto_scale_lr.enable": True,
    "custom_imports.imports.0": "cbn_mmdet",
    "custom_imports.allow_failed_imports": False,
}
# What the published setting and MMDetection's configs have in common.
COMMON_SETTING = {
    "model.data_preprocessor.mean": [123.675, 116.28, 103.53],
    "model.data_preprocessor.std": [58.395, 57.12, 57.375],
    "model.data_preprocessor.bgr_to_rgb": True,
    "model.data_preprocessor.pad_size_divisor": 32,
    "model.backbone.depth": 50,
    "model.backbone.frozen_stages": 1,
    "model.backbone.norm_eval": True,
    "model.backbone.norm_cfg.type": "BN",
    "model.backbone.init_cfg.checkpoint": "torchvision://resnet50",
    "model.train_cfg.rpn_proposal.nms_pre": 2000,
    "model.train_cfg.rcnn.assigner.match_low_quality": True,
    "model.test_cfg.rcnn.score_thr": 0.05,
    "model.test_cfg.rcnn.max_per_img": 100,
    "train_dataloader.dataset.pipeline.2.scale": (1333, 800),
    "train_dataloader.dataset.pipeline.3.prob": 0.5,
    "train_cfg.max_epochs": 12,
    "optim_wrapper.optimizer.type": "SGD",
    "optim_wrapper.optimizer.lr": 0.02,
    "optim_wrapper.optimizer.momentum": 0.9,
    "optim_wrapper.optimizer.weight_decay": 0.0001,
    "param_scheduler.0.end": 500,
    "param_scheduler.1.milestones": [8, 11],
    "param_scheduler.1.gamma": 0.1,
    "auto_scale_lr.base_batch_size": 16,
}


@pytest.fixture(scope="module", autouse=True)
def metafiles():
    """Caches the metafiles of all models, which mmengine reads again for each `mmdet::` base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmengine.config.utils.load", functools.cache(load))
        yield


def read(path):
    """A copy of the config, which the caller may change."""
    return copy.deepcopy(read_once(path))


@functools.cache
def read_once(path):
    if path not in MADE:
        return Config.fromfile(path)
    base, options = OTHERS[path.stem.removesuffix("-1x_coco")]
    cfg = read(path.with_name(f"{base}-1x_coco.py"))
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    cfg.merge_from_dict(parser.parse_args(["--cfg-options", *options.split()]).cfg_options)
    return cfg


def facts(path):
    """What the name of a COCO config says."""
    said = NAME.fullmatch(path.stem).groupdict()
    for number in ("depth", "gpus", "images"):
        said[number] = int(said[number])
    said["everywhere"] = bool(said["everywhere"])
    settings = NORMS.get(said["norm"])
    said["norm_cfg"] = settings and settings[0 if said["images"] == 4 else -1]
    return said


def names(paths):
    return dict(argvalues=paths, ids=lambda path: path.stem)


def test_which_there_are():
    """There is each norm at each batch, on the paper's whole networks, and at another depth."""
    parts = ["", *(f"{norm}_" for norm in NORMS)]
    rows = {f"r50_fpn_{part}{batch}" for part in parts for batch in ("4xb4", "8xb2", "16xb1")}
    rows -= {"r50_fpn_synccbn_4xb4"}
    rows |= {f"r50_fpn_{norm}-all_4xb4" for norm in ("bn", "syncbn", "gn", "cbn")}
    rows |= {"r101_fpn_4xb4", "r101_fpn_cbn_4xb4"}
    stems = {f"{detector}-rcnn_{row}-1x_coco" for detector in ("faster", "mask") for row in rows}
    assert {path.stem for path in COCO} == stems
    for page in ("README.md", "docs/tables.md"):
        assert f"{len(COCO)} configs" in (ROOT / page).read_text()
    assert len(DIGITS) >= 8


@pytest.mark.parametrize("options", [f"{BATCH}1", R101, TRAINED, OF_FEW])
def test_how_to_make_others(options):
    """The README has the options that make the other configs compared and trained here."""
    assert f"`{options}`" in (FOLDERS[0] / "README.md").read_text()


@pytest.mark.parametrize("detector", ["faster", "mask"])
def test_published_setting(detector):
    name = f"{detector}-rcnn_r50_fpn"
    ours = read(ROOT / f"configs/{detector}_rcnn/{name}_4xb4-1x_coco.py")
    stock = flat(get_config(f"mmdet::{detector}_rcnn/{name}_1x_coco.py").to_dict())
    expected = dict(PUBLISHED_SETTING)
    if detector == "faster":
        expected["model.train_cfg.rcnn.assigner.match_low_quality"] = True
    else:
        expected["model.roi_head.mask_roi_extractor.roi_layer.sampling_ratio"] = 2
    changed = {
        key: value
        for key, value in flat(ours.to_dict()).items()
        if key not in stock or stock[key] != value
    }
    assert changed == expected
    assert set(stock) <= set(flat(ours.to_dict()))
    for key, value in COMMON_SETTING.items():
        found = ours
        for part in key.split("."):
            found = found[int(part)] if part.isdigit() else found[part]
        assert found == value, key


def flat(settings, prefix=""):
    """Nested settings as one dict, with keys as `--cfg-options` has them.

    It drops `_scope_`, in which mmengine notes the package that a base came from.
    """
    if isinstance(settings, dict):
        items = settings.items()
    elif isinstance(settings, list | tuple):
        items = enumerate(settings)
    else:
        return {prefix[:-1]: settings}
    return {
        k: v
        for key, value in items
        if key != "_scope_"
        for k, v in flat(value, f"{prefix}{key}.").items()
    }


@pytest.mark.parametrize("path", **names(COCO + MADE))
def test_name_says_what_differs(path):
    """A config differs from that without norm at 4 images per GPU only in what its name says."""
    said = facts(path)
    assert said["gpus"] * said["images"] == 16
    cfg = read(path).to_dict()
    expected = read(path.with_name(f"{said['detector']}-rcnn_r50_fpn_4xb4-1x_coco.py")).to_dict()
    expected["train_dataloader"]["batch_size"] = said["images"]
    backbone = expected["model"]["backbone"]
    backbone["depth"] = said["depth"]
    backbone["init_cfg"]["checkpoint"] = f"torchvision://resnet{said['depth']}"
    if said["norm"]:
        norm_cfg = {**said["norm_cfg"], "requires_grad": True}
        heads = [expected["model"]["neck"], expected["model"]["roi_head"]["bbox_head"]]
        if said["detector"] == "mask":
            heads.append(expected["model"]["roi_head"]["mask_head"])
        for part in heads:
            part["norm_cfg"] = norm_cfg
        if said["everywhere"]:
            backbone.update(norm_cfg=norm_cfg, norm_eval=False, frozen_stages=-1)
        if said["norm"] in HOOKS:
            expected["custom_hooks"] = [HOOKS[said["norm"]]]
        assert cfg.pop("norm_cfg") == norm_cfg
    assert cfg == expected


@pytest.mark.parametrize("path", **names(DIGITS + COCO))
def test_listed(path):
    assert f"({path.name})" in (path.parent / "README.md").read_text()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_commands(folder):
    """Each row of the paper's table has the command that trains it."""
    rows = re.findall(
        r"^\|.*\((\S+\.py)\).*`(tools/.*)` \|$", (folder / "README.md").read_text(), re.M
    )
    assert {name for name, _ in rows} == {path.name for path in folder.glob("*_4xb4-*.py")}
    for name, command in rows:
        gpus = facts(Path(name))["gpus"]
        assert command == f"tools/dist_train.sh configs/{folder.name}/{name} {gpus}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_metafile(folder):
    """The model zoo's index lists what was published, and the README shows the same."""
    index = yaml.safe_load((folder / "metafile.yml").read_text())
    (collection,) = (each["Name"] for each in index["Collections"])
    readme = (folder / "README.md").read_text().splitlines()
    boxes, masks = (
        [f"{kind} {name}" for name in ("AP", "AP50", "AP75")] for kind in ("box", "mask")
    )
    assert len(index["Models"]) == {"faster_rcnn": 4, "mask_rcnn": 5}[folder.name]
    for model in index["Models"]:
        said = facts(Path(model["Config"]))
        assert ROOT / model["Config"] in COCO
        assert model["Name"] == Path(model["Config"]).stem
        assert model["In Collection"] == collection
        assert model["Metadata"]["Epochs"] == 12
        assert model["Metadata"]["Training Resources"] == f"{said['gpus']} GPUs"
        assert "Results" not in model
        row = next(line for line in readme if f"({model['Name']}.py)" in line)
        figures = {k: v for k, v in model["Published"].items() if k != "Source"}
        assert "https://" in model["Published"]["Source"]
        assert list(figures) in (boxes, boxes + masks)
        assert re.findall(r"\d\d\.\d(?= \|)", row) == [str(each) for each in figures.values()]


@pytest.mark.parametrize("norm", NORMS)
def test_pretrained_weights_fit(norm):
    """The weights of an R-50 with BN fit a backbone with any norm, but for the names of GN."""
    cfg = read(ROOT / "configs/faster_rcnn/faster-rcnn_r50_fpn_bn-all_4xb4-1x_coco.py")
    init_default_scope("mmdet")
    with torch.device("meta"):
        backbone = MODELS.build({**cfg.model.backbone, "norm_cfg": NORMS[norm][0]})
        weights = torchvision.models.resnet50().state_dict()
    keys = backbone.load_state_dict(weights, strict=False, assign=True)
    lost = [key for key in keys.unexpected_keys if not key.startswith("fc.")]
    if norm == "gn":
        # A shortcut's norm has no name of its own: it is the second of two modules.
        assert all(re.search(r"(^|\.)gn[123]\.(weight|bias)$", key) for key in keys.missing_keys)
        assert len(keys.missing_keys) == 2 * (53 - 4)
        assert all(".bn" in f".{key}" or ".downsample.1." in key for key in lost)
    else:
        assert keys.missing_keys == lost == []


def reduced(path, data):
    """The config with settings that a CPU can afford, on the test images."""
    cfg = read(path)
    # An untrained detector detects nothing with confidence.
    test_cfg = cfg.model.test_cfg
    test_cfg.get("rcnn", test_cfg).update(score_thr=0, max_per_img=5)
    if path in DIGITS:
        ann_file = "annotations/instances_val.json"
    else:
        ann_file = "annotations/instances_val2017.json"
        cfg.model.backbone.init_cfg = None
        cfg.model.train_cfg.rpn_proposal.max_per_img = 20
        cfg.model.train_cfg.rcnn.sampler.num = 8
        cfg.model.test_cfg.rpn.max_per_img = 10
        cfg.train_dataloader.batch_size = min(cfg.train_dataloader.batch_size, 2)
        cfg.val_dataloader.batch_size = 3
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=f"{data}/", serialize_data=False)
        for transform in loader.dataset.pipeline:
            if transform.type == "Resize" and path not in DIGITS:
                transform.scale = (96, 64)
    cfg.val_evaluator.ann_file = f"{data}/{ann_file}"
    return cfg


def training_batches(loader):
    """Two batches, and one without objects (crowds do not count) if the data has such images."""
    samples = [loader.dataset[index] for index in range(len(loader.dataset))]
    full = [batch for batch in loader if all(map(has_objects, batch["data_samples"]))]
    empty = [sample for sample in samples if not has_objects(sample["data_samples"])]
    return full[:2] + [pseudo_collate([sample]) for sample in empty[:1]]


def has_objects(sample):
    return len(sample.gt_instances) > 0


def train_and_evaluate(path, data):
    """Trains a few iterations with an open window, and evaluates."""
    init_default_scope("mmdet")
    cfg = reduced(path, data)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    if path not in DIGITS:
        check_placement(model, facts(path))

    layers = {name: module for name, module in model.named_modules() if isinstance(module, CBN)}
    assert bool(layers) == bool(re.search("_(naive-|sync)?cbn", path.stem))
    assert any(hook["type"] == "CBNHook" for hook in cfg.get("custom_hooks", [])) == bool(layers)
    if layers:
        assert link(model) == len(layers)
        set_window(model, None)
    batches = training_batches(Runner.build_dataloader(cfg.train_dataloader, seed=0))
    assert len(batches) == (2 if path in DIGITS else 3)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for batch in batches:
        losses = model.train_step(batch, optim_wrapper)
        assert all(loss.isfinite() for loss in losses.values())
        if layers:
            step(model)
    assert set(links(model)) == set(layers)
    assert all(layer.window_bytes > 0 for layer in layers.values())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())

    model.eval()
    loader = Runner.build_dataloader(cfg.val_dataloader)
    evaluator = Runner.build_evaluator(None, cfg.val_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    with torch.no_grad():
        evaluator.process([result for batch in loader for result in model.val_step(batch)])
    scores = evaluator.evaluate(len(loader.dataset))
    assert all(-1 <= score <= 1 for score in scores.values())
    kinds = ["bbox", "segm"] if path.stem.startswith("mask") else ["bbox"]
    assert {f"coco/{kind}_mAP" for kind in kinds} <= set(scores)


def check_placement(model, said):
    """The norm follows each convolution of FPN and heads; the backbone has it or a frozen BN."""
    layer = said["norm"] and LAYERS.get(said["norm_cfg"]["type"], said["norm_cfg"]["type"])
    heads = [(model.neck, 8), (model.roi_head.bbox_head, 4)]
    if said["detector"] == "mask":
        heads.append((model.roi_head.mask_head, 4))
    for part, count in heads:
        blocks = [module for module in part.modules() if isinstance(module, ConvModule)]
        assert len(blocks) == count
        assert [type(block.norm).__name__ for block in blocks] == [layer or "NoneType"] * count
        assert all(block.norm.training for block in blocks if layer)
    assert not any(is_norm(module) for module in model.rpn_head.modules())
    norms = [module for module in model.backbone.modules() if is_norm(module)]
    convolutions = [module for module in model.backbone.modules() if isinstance(module, nn.Conv2d)]
    assert len(norms) == len(convolutions) == {50: 53, 101: 104}[said["depth"]]
    expected = layer if said["everywhere"] else "BatchNorm2d"
    for module in norms:
        assert type(module).__name__ == expected
        assert module.training == said["everywhere"]
        assert all(p.requires_grad == said["everywhere"] for p in module.parameters())
    learns = [conv.weight.requires_grad for conv in convolutions]
    # The stem and the first stage, of three blocks and a shortcut.
    assert learns[:11] == [said["everywhere"]] * 11
    assert all(learns[11:])


def is_norm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)


@pytest.mark.slow
@pytest.mark.parametrize("path", **names(DIGITS))
def test_digits_train_and_evaluate(path, digits):
    train_and_evaluate(path, digits)


def in_part(path):
    """Picks each norm in each place, and one config for each other value of an axis.

    Mask R-CNN has all the layers of Faster R-CNN, which comes at 4 images with no norm and CBN.
    """
    said = facts(path)
    if path in MADE:  # stand in for norms without a whole-network config at this batch
        return said["depth"] == 50 and said["norm"] != "gn"
    if said["depth"] == 50 and said["images"] == 4:
        return said["detector"] == "mask" or said["norm"] in (None, "cbn")
    return path.stem in {
        "faster-rcnn_r50_fpn_cbn_8xb2-1x_coco",
        "mask-rcnn_r50_fpn_synccbn_8xb2-1x_coco",
        "mask-rcnn_r101_fpn_cbn_4xb4-1x_coco",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", **names(list(filter(in_part, COCO + MADE))))
def test_coco_trains_and_evaluates(path, coco):
    train_and_evaluate(path, coco)


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("path", **names(COCO))
def test_all_of_coco_trains_and_evaluates(path, coco):
    train_and_evaluate(path, coco)
