# Faster R-CNN small enough for a CPU: ResNet-18 at half width, trained from scratch, with a
# trainable norm after every convolution of the backbone, the FPN and the box head.
_base_ = "mmdet::_base_/models/faster-rcnn_r50_fpn.py"

# Batches of one or two images are noisy: average the running statistics over more of them.
norm_cfg = dict(type="BN", momentum=0.02, requires_grad=True)
strides = [4, 8, 16, 32]
model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # anchors of 16, 32, 64 and 128 pixels
        anchor_generator=dict(scales=[4], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=64,
            roi_layer=dict(sampling_ratio=2),
            featmap_strides=strides,
            # digits smaller than 56 pixels are read from the finest level
            finest_scale=28,
        ),
        bbox_head=dict(
            type="Shared4Conv1FCBBoxHead",
            in_channels=64,
            conv_out_channels=64,
            fc_out_channels=256,
            num_classes=10,
            norm_cfg=norm_cfg,
        ),
    ),
    # an image holds a handful of digits: fewer proposals than COCO needs
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=50)),
)
