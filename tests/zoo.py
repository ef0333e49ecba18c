"""CBN in every model of MMDetection: a config of each folder of its `configs/`, and what came out.

    python tests/zoo.py              # all folders: prints the table of docs/zoo.md
    python tests/zoo.py dcn tood     # these
    python tests/zoo.py dcn --norm BN

Each norm of the model that trains is replaced from outside: by `norm_cfg`, by giving one to parts
whose default is BN or GN, and for norms that no `norm_cfg` reaches by `from_batchnorm`. Then come
three steps of random images, one each, with an open window, and a forward in evaluation mode. Each
config has a process of its own.
"""

import argparse
import collections
import inspect
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

CONFIGS = Path(find_spec("mmdet").origin).parent / ".mim/configs"
LIMIT = 150  # seconds, for a process
SIZE = 160  # of an image: the coarsest maps, at a stride of 128, have 2 x 2 positions


def give_ssd_its_loss(model):
    """MMDetection's prediction reads an attribute that its SSDHead does not have."""
    model.bbox_head.loss_cls = None


WITHOUT_MMPRETRAIN = (
    "needs mmpretrain, which is not installed (beside it reid, of four crops, and timm_example "
    "train, 53 layers each, and convnext has layer norms alone)"
)

# Per folder a config and what it needs: images of another size or count, options of the norm, a
# part of the model alone, a fix to the built model. For configs that cannot be tried here: what the
# failure says, and the reason in words.
ZOO = {
    "albu_example": dict(config="mask-rcnn_r50_fpn_albu-1x_coco"),
    "atss": dict(config="atss_r50_fpn_1x_coco"),
    "autoassign": dict(config="autoassign_r50-caffe_fpn_1x_coco"),
    "boxinst": dict(config="boxinst_r50_fpn_ms-90k_coco"),
    "bytetrack": dict(
        config="yolox_x_8xb4-amp-80e_crowdhuman-mot17halftrain_test-mot17halfval",
        note="its detector",
    ),
    "carafe": dict(
        config="faster-rcnn_r50_fpn-carafe_1x_coco",
        fails=("implementation for device cpu not found", "mmcv has no operator for a CPU"),
    ),
    "cascade_rcnn": dict(config="cascade-rcnn_r50_fpn_1x_coco"),
    "cascade_rpn": dict(config="cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco"),
    "centernet": dict(config="centernet_r18-dcnv2_8xb16-crop512-140e_coco"),
    "centripetalnet": dict(
        config="centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco", size=256
    ),
    "cityscapes": dict(config="mask-rcnn_r50_fpn_1x_cityscapes"),
    "clrnet": dict(config="clrnet"),
    "common": dict(
        config="lsj-100e_coco-detection", fails=("has no model", "schedules without a model")
    ),
    "condinst": dict(config="condinst_r50_fpn_ms-poly-90k_coco_instance"),
    "conditional_detr": dict(config="conditional-detr_r50_8xb2-50e_coco"),
    "convnext": dict(
        config="mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco",
        fails=("mmpretrain|PYTHONPATH", WITHOUT_MMPRETRAIN),
    ),
    "cornernet": dict(config="cornernet_hourglass104_8xb6-210e-mstest_coco", size=256),
    "crowddet": dict(config="crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman"),
    "dab_detr": dict(config="dab-detr_r50_8xb2-50e_coco"),
    "dcn": dict(config="faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco"),
    "dcnv2": dict(config="faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco"),
    "ddod": dict(config="ddod_r50_fpn_1x_coco", size=320),
    "ddq": dict(config="ddq-detr-4scale_r50_8xb2-12e_coco"),
    "deepfashion": dict(config="mask-rcnn_r50_fpn_15e_deepfashion"),
    "deepsort": dict(
        config="deepsort_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval",
        part="detector",
        note="its detector",
    ),
    "deformable_detr": dict(config="deformable-detr_r50_16xb2-50e_coco"),
    "detectors": dict(
        config="detectors_cascade-rcnn_r50_1x_coco",
        norm=dict(compensate="where_possible"),
        note="`compensate='where_possible'`: SAConv2d mixes its channels",
    ),
    "detr": dict(config="detr_r18_8xb2-500e_coco"),
    "dino": dict(config="dino-4scale_r50_8xb2-12e_coco", size=320),
    "double_heads": dict(config="dh-faster-rcnn_r50_fpn_1x_coco"),
    "dsdl": dict(config="coco"),
    "dyhead": dict(config="atss_r50_fpn_dyhead_1x_coco"),
    "dynamic_rcnn": dict(config="dynamic-rcnn_r50_fpn_1x_coco"),
    "efficientnet": dict(config="retinanet_effb3_fpn_8xb4-crop896-1x_coco"),
    "empirical_attention": dict(config="faster-rcnn_r50-attn0010-dcn_fpn_1x_coco"),
    "fast_rcnn": dict(config="fast-rcnn_r50_fpn_1x_coco"),
    "faster_rcnn": dict(config="faster-rcnn_r50-caffe_c4-1x_coco"),
    "fcos": dict(config="fcos_r50-caffe_fpn_gn-head_1x_coco"),
    "foveabox": dict(config="fovea_r50_fpn_gn-head-align_4xb4-2x_coco", size=320),
    "fpg": dict(config="faster-rcnn_r50_fpg-chn128_crop640-50e_coco"),
    "free_anchor": dict(config="freeanchor_r50_fpn_1x_coco"),
    "fsaf": dict(config="fsaf_r50_fpn_1x_coco"),
    "gcnet": dict(config="mask-rcnn_r50-syncbn-gcb-r4-c3-c5_fpn_1x_coco"),
    "gfl": dict(config="gfl_r50_fpn_1x_coco"),
    "ghm": dict(config="retinanet_r50_fpn_ghm-1x_coco"),
    "glip": dict(
        config="glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365",
        fails=("install (transformers|fairscale)", "needs transformers and the weights of BERT"),
    ),
    "gn": dict(config="mask-rcnn_r50_fpn_gn-all_2x_coco"),
    "gn+ws": dict(config="mask-rcnn_r50_fpn_gn-ws-all_2x_coco"),
    "grid_rcnn": dict(config="grid-rcnn_r50_fpn_gn-head_1x_coco"),
    "groie": dict(config="mask-rcnn_r50_fpn_syncbn-r4-gcb-c3-c5-groie_1x_coco"),
    "grounding_dino": dict(
        config="grounding_dino_r50_scratch_8xb2_1x_coco",
        fails=("install (transformers|fairscale)", "needs transformers and the weights of BERT"),
    ),
    "guided_anchoring": dict(
        config="ga-faster-rcnn_r50_fpn_1x_coco",
        no_prediction="implementation for device cpu not found",
        note="its prediction has no operator for a CPU",
    ),
    "hrnet": dict(config="faster-rcnn_hrnetv2p-w18-1x_coco"),
    "htc": dict(config="htc_r50_fpn_1x_coco"),
    "instaboost": dict(config="mask-rcnn_r50_fpn_instaboost-4x_coco"),
    "lad": dict(config="lad_r50-paa-r101_fpn_2xb8_coco_1x"),
    "ld": dict(config="ld_r18-gflv1-r101_fpn_1x_coco"),
    "legacy_1.x": dict(config="faster-rcnn_r50_fpn_1x_coco_v1"),
    "libra_rcnn": dict(config="libra-faster-rcnn_r50_fpn_1x_coco"),
    "lvis": dict(config="mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1"),
    "mask2former": dict(config="mask2former_r50_8xb2-lsj-50e_coco"),
    "mask2former_vis": dict(config="mask2former_r50_8xb2-8e_youtubevis2019"),
    "mask_rcnn": dict(config="mask-rcnn_r50_fpn_1x_coco"),
    "maskformer": dict(config="maskformer_r50_ms-16xb1-75e_coco"),
    "masktrack_rcnn": dict(config="masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019"),
    "misc": dict(
        config="d2_faster-rcnn_r50-caffe_fpn_ms-90k_coco",
        fails=("[Dd]etectron2", "wraps a model of detectron2, which is not installed"),
    ),
    "mm_grounding_dino": dict(
        config="grounding_dino_swin-t_pretrain_obj365",
        fails=("install (transformers|fairscale)", "needs transformers and the weights of BERT"),
    ),
    "ms_rcnn": dict(config="ms-rcnn_r50_fpn_1x_coco"),
    "nas_fcos": dict(
        config="nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco",
        size=320,
        norm=dict(compensate="where_possible"),
        note="`compensate='where_possible'`: norms before their convolution",
    ),
    "nas_fpn": dict(config="retinanet_r50_nasfpn_crop640-50e_coco", size=256),
    "objects365": dict(config="retinanet_r50-syncbn_fpn_1350k_objects365v1"),
    "ocsort": dict(
        config="ocsort_yolox_x_8xb4-amp-80e_crowdhuman-mot17halftrain_test-mot17halfval",
        part="detector",
        note="its detector",
    ),
    "openimages": dict(config="retinanet_r50_fpn_32xb2-1x_openimages"),
    "paa": dict(config="paa_r50_fpn_1x_coco"),
    "pafpn": dict(config="faster-rcnn_r50_pafpn_1x_coco"),
    "panoptic_fpn": dict(config="panoptic-fpn_r50_fpn_1x_coco"),
    "pascal_voc": dict(config="faster-rcnn_r50_fpn_1x_voc0712"),
    "pisa": dict(config="faster-rcnn_r50_fpn_pisa_1x_coco"),
    "point_rend": dict(config="point-rend_r50-caffe_fpn_ms-1x_coco"),
    "pvt": dict(config="retinanet_pvtv2-b0_fpn_1x_coco"),
    "qdtrack": dict(config="qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval"),
    "queryinst": dict(
        config="queryinst_r50_fpn_1x_coco",
        no_prediction="inconsistent with step sign",
        note="untrained, its prediction fails in pasting masks, with BN as well",
    ),
    "regnet": dict(config="faster-rcnn_regnetx-400MF_fpn_ms-3x_coco"),
    "reid": dict(
        config="reid_r50_8xb32-6e_mot17train80_test-mot17val20",
        fails=("mmpretrain|PYTHONPATH", WITHOUT_MMPRETRAIN),
    ),
    "reppoints": dict(config="reppoints-moment_r50_fpn-gn_head-gn_1x_coco"),
    "res2net": dict(config="faster-rcnn_res2net-101_fpn_2x_coco"),
    "resnest": dict(
        config="faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco",
        count=2,
        note="two images: its attention has one value per channel of each",
    ),
    "resnet_strikes_back": dict(config="faster-rcnn_r50-rsb-pre_fpn_1x_coco"),
    "retinanet": dict(config="retinanet_r18_fpn_1x_coco"),
    "rpn": dict(config="rpn_r50_fpn_1x_coco"),
    "rtmdet": dict(config="rtmdet-ins_tiny_8xb32-300e_coco"),
    "sabl": dict(config="sabl-faster-rcnn_r50_fpn_1x_coco"),
    "scnet": dict(config="scnet_r50_fpn_1x_coco"),
    "scratch": dict(config="faster-rcnn_r50-scratch_fpn_gn-all_6x_coco"),
    "seesaw_loss": dict(config="mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1"),
    "selfsup_pretrain": dict(config="mask-rcnn_r50-mocov2-pre_fpn_1x_coco"),
    "simple_copy_paste": dict(
        config="mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj-90k_coco"
    ),
    "soft_teacher": dict(config="soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco"),
    "solo": dict(config="solo_r50_fpn_1x_coco"),
    "solov2": dict(config="solov2-light_r18_fpn_ms-3x_coco"),
    "sort": dict(
        config="faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval", note="its detector"
    ),
    "sparse_rcnn": dict(config="sparse-rcnn_r50_fpn_1x_coco"),
    "ssd": dict(
        config="ssdlite_mobilenetv2-scratch_8xb24-600e_coco",
        size=640,
        mend=give_ssd_its_loss,
        note="prediction reads a `loss_cls` that MMDetection's `SSDHead` lacks; given",
    ),
    "strong_baselines": dict(
        config="mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-100e_coco"
    ),
    "strongsort": dict(
        config="yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval", note="its detector"
    ),
    "swin": dict(config="mask-rcnn_swin-t-p4-w7_fpn_1x_coco"),
    "timm_example": dict(
        config="retinanet_timm-tv-resnet50_fpn_1x_coco",
        fails=("mmpretrain|PYTHONPATH", WITHOUT_MMPRETRAIN),
    ),
    "tood": dict(
        config="tood_r50_fpn_1x_coco",
        norm=dict(compensate="where_possible"),
        note="`compensate='where_possible'`",
    ),
    "tridentnet": dict(config="tridentnet_r50-caffe_1x_coco"),
    "v3det": dict(config="faster_rcnn_r50_fpn_8x4_sample1e-3_mstrain_v3det_2x"),
    "vfnet": dict(config="vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco", size=320),
    "wider_face": dict(config="retinanet_r50_fpn_1x_widerface"),
    "yolact": dict(config="yolact_r50_1xb8-55e_coco"),
    "yolo": dict(config="yolov3_d53_8xb8-320-273e_coco"),
    "yolof": dict(config="yolof_r50-c5_8xb8-1x_coco"),
    "yolox": dict(config="yolox_tiny_8xb8-300e_coco"),
}

# The model.

NORM = dict(type="CBN")
REPLACED = ("BN", "SyncBN", "MMSyncBN", "GN")
KEPT = ("eps", "momentum")  # of a norm_cfg
FEW = dict(num=32, max_per_img=100)  # regions, where a config has them


def replaced(old, norm):
    """The norm in place of an old one, of which it keeps `eps` and `momentum` alone."""
    if isinstance(old, dict) and old.get("type") in REPLACED:
        return {**{key: old[key] for key in KEPT if old.get(key)}, **norm}  # torch takes no eps=0
    return old


def default_norm(kind):
    """The `norm_cfg` that a part has if its config names none."""
    from mmdet.registry import MODELS

    cls = MODELS.get(kind) if isinstance(kind, str) else None
    for each in getattr(cls, "__mro__", ()):
        init = vars(each).get("__init__")
        options = {} if init is None else inspect.signature(init).parameters
        if "norm_cfg" in options:
            default = options["norm_cfg"].default
            return default if isinstance(default, dict) else None
    return None


def with_norm(node, norm=NORM):
    """A config with the norm for every batch and group norm, and without pretrained weights."""
    if isinstance(node, list | tuple):
        return type(node)(with_norm(value, norm) for value in node)
    if not isinstance(node, dict):
        return node
    node = {
        key: replaced(value, norm) if key.endswith("norm_cfg") else with_norm(value, norm)
        for key, value in node.items()
    }
    if "norm_cfg" not in node and default_norm(node.get("type")):
        new = replaced(default_norm(node["type"]), norm)
        if new.get("type") == norm["type"]:
            node["norm_cfg"] = new
    for key, most in FEW.items():
        if isinstance(node.get(key), int):
            node[key] = min(node[key], most)
    if "frozen_stages" in node:
        node["frozen_stages"] = 0 if node["type"] == "EfficientNet" else -1
    if isinstance(node.get("init_cfg"), dict) and "checkpoint" in node["init_cfg"]:
        node["init_cfg"] = None
    if "pretrained" in node:
        node["pretrained"] = False if isinstance(node["pretrained"], bool) else None
    return node


def stock_model(name, parts=(), norm=NORM, change=None):
    """Builds a detector of mmdet's with the norm, also in ``parts`` that default to none.

    ``change`` may edit the config before that, say to make the model smaller.
    """
    from mmengine.config import Config

    return build(Config.fromfile(CONFIGS / name), parts, norm, change)


def build(cfg, parts=(), norm=NORM, change=None):
    """Builds the model of a config, as `stock_model` does."""
    import mmdet.datasets  # noqa: F401  registers CLRNet's preprocessor
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict
    from mmengine.registry import init_default_scope

    import cbn_mmdet  # noqa: F401  registers CBN

    init_default_scope("mmdet")
    cfg = with_norm(cfg.model.to_dict(), norm)
    for part in parts:
        cfg[part]["norm_cfg"] = norm
    if change is not None:
        change(cfg)
    cfg.get("data_preprocessor", {}).pop(
        "batch_augments", None
    )  # they resize to the full training size
    model = MODELS.build(ConfigDict(cfg))
    for module in model.modules():
        if hasattr(module, "norm_eval"):  # the default of some backbones
            module.norm_eval = False
    model.init_weights()
    return model


def loss_of(model, size=96):
    """One training forward of a detector on two random images with two objects each."""
    from mmdet.testing import demo_mm_inputs

    data = demo_mm_inputs(
        2, [[3, size, size]] * 2, num_items=[2, 2], num_classes=10, with_mask=model.with_mask
    )
    return model(**model.data_preprocessor(data, True), mode="loss")


def total(losses):
    return sum(
        term.mean()
        for name, value in losses.items()
        if "loss" in name
        for term in (value if isinstance(value, list) else [value])
    )


# The inputs.


def find(node, key):
    """All values of a key, in any dictionary of a config."""
    if isinstance(node, list | tuple):
        return [value for each in node for value in find(each, key)]
    if not isinstance(node, dict):
        return []
    own = [node[key]] if key in node else []
    return own + [value for each in node.values() for value in find(each, key)]


def images(cfg, size, count=1):
    """Images of three objects with masks, and whatever else the model's own pipeline loads."""
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals

    loads = find(cfg.get("train_dataloader", {}), "type")
    has_semantic = "LoadPanopticAnnotations" in loads or any(
        find(cfg.get("train_dataloader", {}), "with_seg")
    )
    data = demo_mm_inputs(
        count,
        [[3, size, size]] * count,
        num_items=[3] * count,
        num_classes=10,
        sem_seg_output_strides=8 if "HTC" in str(find(cfg.model, "type")) else 1,
        with_mask=True,
        with_semantic=has_semantic,
    )
    classes = [count for count in find(cfg.model, "num_classes") if isinstance(count, int)]
    for sample in data["data_samples"]:
        sample.gt_instances.labels %= min(classes, default=80)
        if "LoadProposals" in loads:
            (sample.proposals,) = demo_mm_proposals([[3, size, size]], 50)
    return data


def one_road():
    """An image of CLRNet's size with two straight lines, each by 72 points, and their classes."""
    import numpy as np
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.structures import PixelData

    lines = np.full((4, 78), -1e5, dtype="float32")
    lines[:, :2] = 1, 0
    for line, start in zip(lines[:2], (200, 500), strict=True):
        line[:6] = 0, 1, 0, start / 800, 0.4, 72
        line[6:] = np.linspace(start, start + 100, 72)
    sample = DetDataSample(gt_sem_seg=PixelData(sem_seg=torch.randint(0, 5, (1, 320, 800))))
    sample.set_metainfo(dict(img_shape=(320, 800), ori_shape=(320, 800), lines_array=lines))
    sample.set_metainfo(dict(org_width=800, org_height=320))
    return dict(inputs=[torch.zeros(3, 320, 800, dtype=torch.uint8)], data_samples=[sample])


def batch(cfg, trains, size=SIZE, count=1):
    """A batch in the form that the model's data preprocessor takes."""
    import numpy as np
    from mmdet.testing import demo_track_inputs

    kind = cfg.model.get("data_preprocessor", {}).get("type")
    if kind == "TrackDataPreprocessor":
        return demo_track_inputs(
            1,
            num_frames=2,
            key_frames_inds=[0],
            image_shapes=[(3, size, size)],
            num_items=[3],
            num_classes=1,
            with_mask=True,
        )
    if kind == "LineDetDataProcessor":
        return one_road()
    if kind == "MultiBranchDataPreprocessor" and trains:
        parts = {name: images(cfg, size) for name in ("sup", "unsup_teacher", "unsup_student")}
        for part in parts.values():
            part["data_samples"][0].set_metainfo(dict(homography_matrix=np.eye(3, dtype="float32")))
        return {key: {name: parts[name][key] for name in parts} for key in parts["sup"]}
    return images(cfg, size, count)


def images_of(data):
    """The tensors of the images, however they are nested."""
    if hasattr(data, "random_"):
        return [data]
    values = data.values() if isinstance(data, dict) else data
    return [image for each in values for image in images_of(each)]


# The trial.

WAYS = dict(closed="closed form", autograd="autograd", naive="not compensated", fixed="frozen")


class Layers:
    """The batch norms of a model to train, and how each one's statistics follow its weight.

    Args:
        model: With `BN`, or with `CBN` where a `norm_cfg` reaches; the others are converted here.
        norm: Its `norm_cfg`.
    """

    def __init__(self, model, norm):
        import torch

        import cbn_mmdet

        plain = torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm
        found = [each for each in model.modules() if type(each) in plain]
        self.is_cbn, self.ways = norm["type"] == "CBN", {}
        self.converted = len(found) if self.is_cbn else 0
        if self.is_cbn:
            if found:
                options = {key: value for key, value in norm.items() if key != "type"}
                cbn_mmdet.from_batchnorm(model, **options)
            found = [each for each in model.modules() if isinstance(each, cbn_mmdet.CBN)]
            assert len(found) == cbn_mmdet.link(model) if found else True
            for layer in found:
                layer.register_forward_pre_hook(self.enter)
        self.all, self.model = found, model

    def enter(self, layer, args):
        self.running = layer

    def watch(self):
        """Records in which way each layer's statistics follow the weight that feeds it."""
        from cbn_mmdet.norm import linking

        source_of = linking.source_of

        def watched(*args):
            module, source, why_not = source_of(*args)
            if source is None:
                way = "naive"
            elif source.weight is None:
                way = "fixed"
            else:
                way = "autograd" if source.input is None else "closed"
            self.ways[self.running] = way
            return module, source, why_not

        return mock.patch.object(linking, "source_of", watched)

    def check(self):
        """Checks that each layer that ran has a window, and that `links` agrees with `watch`."""
        import cbn_mmdet

        names = {module: name for name, module in self.model.named_modules()}
        windows, linked = cbn_mmdet.window_state(self.model), cbn_mmdet.links(self.model)
        for layer, way in self.ways.items():
            name = names[layer]
            held = windows[name][0]
            assert held["seen"] > 0, f"{name} has an empty window"
            assert ("h" in held) == (way in ("closed", "autograd")), f"{name} is {way}, not so held"
            assert (linked[name] == "(not compensated)") == (way == "naive"), f"{name} is {way}"


def trial(folder, kind):
    """Three steps and an evaluation with a norm; returns what was found."""
    import torch
    from mmengine.config import Config
    from mmengine.logging import MessageHub

    import cbn_mmdet

    entry, hub = ZOO[folder], MessageHub.get_current_instance()
    given = {key: entry[key] for key in ("size", "count") if key in entry}
    torch.manual_seed(0)
    for key, value in dict(epoch=0, iter=0, max_iters=100).items():  # as a runner tells it
        hub.update_info(key, value)
    cfg = Config.fromfile(CONFIGS / folder / f"{entry['config']}.py")
    if "model" not in cfg:
        return dict(reason="has no model")
    if "part" in entry:
        cfg.model = cfg.model[entry["part"]]
        cfg.model.data_preprocessor = dict(type="DetDataPreprocessor", pad_size_divisor=32)
    if "teacher_config" in cfg.model:  # a path in its repository
        cfg.model.teacher_config = str(CONFIGS.parent / cfg.model.teacher_config)
    cfg.model.pop("teacher_ckpt", None)
    norm = dict(type=kind, **(entry.get("norm", {}) if kind == "CBN" else {}))
    model = build(cfg, norm=norm)
    layers = Layers(model, norm)
    if not layers.all:
        return dict(reason="no batch norm, nor a group norm that norm_cfg reaches")
    entry.get("mend", lambda model: None)(model)
    model.train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    for _ in range(3):
        data = batch(cfg, True, **given)
        for image in images_of(data["inputs"]):
            image.random_(0, 256)
        with layers.watch():
            losses = model(**model.data_preprocessor(data, True), mode="loss")
        loss, _ = model.parse_losses(losses)
        assert loss.isfinite(), f"the loss is {loss}"
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 35)
        optimizer.step()
        if layers.is_cbn:
            cbn_mmdet.step(model)
    if layers.is_cbn:
        layers.check()
    found = collections.Counter(layers.ways.values())
    result = dict(layers=len(layers.all), converted=layers.converted, **found, reason="")
    model.eval()
    with torch.no_grad():
        try:
            model(**model.data_preprocessor(batch(cfg, False, **given), False), mode="predict")
        except RuntimeError as error:
            if entry.get("no_prediction", str(error) + " ") not in str(error):
                raise
            result["fails"] = "prediction"
    return result


def run(folder, norm="CBN"):
    """The trial in a process of its own."""
    fails, why = ZOO[folder].get("fails", (r"\Z.", ""))
    command = [sys.executable, __file__, folder, "--norm", norm, "--here"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, env=environment
        )
    except subprocess.TimeoutExpired:
        return dict(reason=f"took longer than {LIMIT} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        found = dict(reason=lines[-1])
    else:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    return dict(reason=why) if re.search(fails, found["reason"]) else found


def row(folder, found):
    """The table's row for a config that trains."""
    ways = [str(found.get(way, 0) or "") for way in ("closed", "autograd", "naive")]
    ran = sum(found.get(way, 0) for way in WAYS)
    notes = [f"{found['converted']} by `from_batchnorm`"] if found["converted"] else []
    notes += [f"{found['fixed']} of weights that do not train"] if "fixed" in found else []
    notes += [f"of {found['layers']} layers"] if ran < found["layers"] else []
    notes += [ZOO[folder]["note"]] if "note" in ZOO[folder] else []
    cells = folder, f"`{ZOO[folder]['config']}`", str(ran), *ways, ", ".join(notes)
    return f"| {' | '.join(cells)} |"


def table(results):
    """The results in Markdown: which folders train, and why the others do not."""
    trained = {folder: found for folder, found in results.items() if not found["reason"]}
    lines = ["| folder | config | CBN layers | closed form | autograd | not compensated | |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [row(folder, found) for folder, found in trained.items()]
    lines += ["", "| not tried | why |", "|---|---|"]
    for why in dict.fromkeys(found["reason"] for found in results.values() if found["reason"]):
        folders = [folder for folder, found in results.items() if found["reason"] == why]
        lines.append(f"| {', '.join(folders)} | {why} |")
    total = sum(found.get(way, 0) for found in trained.values() for way in WAYS)
    predict = sum("fails" not in found for found in trained.values())
    lines += [
        "",
        f"{len(trained)} of {len(results)} folders train, {predict} predict; {total} layers.",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", nargs="*", help="of MMDetection's configs (default: all)")
    parser.add_argument("--norm", default="CBN", choices=["CBN", "BN"])
    parser.add_argument("--results", type=Path, help="keeps what was found; what it has is not run")
    parser.add_argument("--here", action="store_true", help="in this process, one folder, as JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(trial(args.folders[0], args.norm)))
        return
    results = {}
    if args.results and args.results.exists():
        results = dict(json.loads(line) for line in args.results.read_text().splitlines())
    for folder in args.folders or ZOO:
        if folder not in results:
            results[folder] = run(folder, args.norm)
            print(folder, results[folder], file=sys.stderr, flush=True)
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps([folder, results[folder]]) + "\n")
    print(table({folder: results[folder] for folder in ZOO if folder in results}))


if __name__ == "__main__":
    main()
