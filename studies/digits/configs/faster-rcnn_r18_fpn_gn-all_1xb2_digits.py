_base_ = "./faster-rcnn_r18_fpn_bn-all_1xb2_digits.py"

norm_cfg = dict(_delete_=True, type="GN", num_groups=8)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)),
)
