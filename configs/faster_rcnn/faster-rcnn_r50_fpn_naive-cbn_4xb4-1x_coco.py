_base_ = ["./faster-rcnn_r50_fpn_4xb4-1x_coco.py", "../_base_/norms/naive-cbn.py"]

norm_cfg = _base_.norm_cfg
model = dict(neck=dict(norm_cfg=norm_cfg), roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)))
