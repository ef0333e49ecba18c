_base_ = "./faster-rcnn_r50_fpn_syncbn_4xb4-1x_coco.py"

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg, norm_eval=False, frozen_stages=-1))
