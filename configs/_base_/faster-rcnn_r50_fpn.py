# Faster R-CNN as in the published runs. The settings here are those that differ in MMDetection 3,
# taken from configs/cbn of https://github.com/Howal/Cross-iterationBatchNorm.
_base_ = "mmdet::_base_/models/faster-rcnn_r50_fpn.py"

model = dict(
    # The backbone's norm is frozen as a whole. The authors' code freezes its statistics; scale and
    # shift learn in stages 2 to 4: --cfg-options model.backbone.norm_cfg.requires_grad=True
    backbone=dict(norm_cfg=dict(requires_grad=False)),
    rpn_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9)),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(
            type="Shared4Conv1FCBBoxHead",
            conv_out_channels=256,
            loss_bbox=dict(type="SmoothL1Loss", beta=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(allowed_border=0),
        rpn_proposal=dict(max_per_img=2000),
        rcnn=dict(assigner=dict(match_low_quality=True)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=2000, max_per_img=2000)),
)
