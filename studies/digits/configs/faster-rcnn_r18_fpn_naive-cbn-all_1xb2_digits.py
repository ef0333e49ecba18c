_base_ = "./faster-rcnn_r18_fpn_cbn-all_1xb2_digits.py"

norm_cfg = dict(window="sliding", window_size=8, compensate=False, backward="window")
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)),
)
