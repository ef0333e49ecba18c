# All levels share one head: the norm after each of its convolutions sees maps of four scales in one
# forward (bbox_head.type="RetinaSepBNHead" gives each level a norm of its own).
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "./_base_/digits_detection.py",
    "./_base_/schedule_4e.py",
    "./_base_/runtime.py",
]

norm_cfg = dict(type="BN", momentum=0.02, requires_grad=True)
model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(
        in_channels=[32, 64, 128, 256],
        start_level=0,
        out_channels=64,
        num_outs=4,
        add_extra_convs=False,
        norm_cfg=norm_cfg,
    ),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        norm_cfg=norm_cfg,
        anchor_generator=dict(scales_per_octave=1, strides=[4, 8, 16, 32]),
    ),
    test_cfg=dict(nms_pre=200, max_per_img=50),
)
# Half the rate of Faster R-CNN from scratch: the focal loss diverges with a higher one.
optim_wrapper = dict(optimizer=dict(lr=0.01))
