# For photographs on a CPU: the backbone is pretrained on ImageNet, with its norm frozen as in the
# paper's setting; the norm under test is in the FPN and the box head. README.md in this folder says
# how to get the photographs and the weights.
_base_ = ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]

custom_imports = dict(imports=["cbn_mmdet", "common.efficientnet_lite"], allow_failed_imports=False)
norm_cfg = dict(type="CBN", momentum=0.02, requires_grad=True)
strides = [8, 16, 32, 64]
model = dict(
    data_preprocessor=dict(mean=[127, 127, 127], std=[128, 128, 128]),
    backbone=dict(
        _delete_=True,
        type="EfficientNetLite",
        out_indices=(3, 4, 5),
        frozen_stages=3,  # up to a stride of 4
        norm_cfg=dict(type="BN", eps=1e-3, requires_grad=False),
        norm_eval=True,
    ),
    neck=dict(in_channels=[40, 112, 320], out_channels=64, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # anchors of 32, 64, 128 and 256 pixels
        anchor_generator=dict(scales=[4], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=64,
            roi_layer=dict(sampling_ratio=2),
            featmap_strides=strides[:3],
        ),
        bbox_head=dict(
            type="Shared4Conv1FCBBoxHead",
            in_channels=64,
            conv_out_channels=64,
            fc_out_channels=256,
            num_classes=1,
            norm_cfg=norm_cfg,
        ),
    ),
    # A photograph holds one object or a dozen: fewer proposals than COCO needs.
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=64))
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)

data_root = "data/"
dataset = dict(
    type="CocoDataset",
    data_root=data_root,
    metainfo=dict(classes=("raccoon",)),
    data_prefix=dict(img="raccoon/images/"),
)
scale = (384, 240)  # largest size of an image
train_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=dict(
        **dataset,
        ann_file="raccoon_coco/instances_train.json",
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="Resize", scale=scale, keep_ratio=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        ann_file="raccoon_coco/instances_val.json",
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=scale, keep_ratio=True),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
            ),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=data_root + "raccoon_coco/instances_val.json", metric="bbox"
)
test_evaluator = val_evaluator

max_epochs = 12
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0001),
    # without a norm in FPN and head, training needs both this rate and this clipping
    clip_grad=dict(max_norm=10, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[9], gamma=0.1),
]
# The learning rate above is for 2 images per step in total; other totals scale it linearly.
auto_scale_lr = dict(enable=True, base_batch_size=2)
custom_hooks = [dict(type="CBNHook")]
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=2),
    # Draws every tenth image of a validation below WORK_DIR/TIMESTAMP/vis_data/vis_image.
    visualization=dict(draw=True, interval=10),
)
randomness = dict(seed=0)
