_base_ = "./faster-rcnn_r18_fpn_bn-all_1xb2_digits.py"

norm_cfg = dict(type="CBN")
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)),
)

custom_imports = dict(imports=["cbn_mmdet"], allow_failed_imports=False)
custom_hooks = [dict(type="CBNHook", burn_in=1), dict(type="DiagnoseHook", interval=50)]
