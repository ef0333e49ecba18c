# The backbone's norm trains as well.
_base_ = "./faster-rcnn_efficientnet-lite0_fpn_cbn_1xb1_bccd.py"

model = dict(
    backbone=dict(frozen_stages=0, norm_cfg=dict(_base_.norm_cfg, eps=1e-3), norm_eval=False)
)
