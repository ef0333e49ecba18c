_base_ = "./mask-rcnn_r50_fpn_gn_8xb2-1x_coco.py"

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint="torchvision://resnet101")))
