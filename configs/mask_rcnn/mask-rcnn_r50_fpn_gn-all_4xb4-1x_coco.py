_base_ = "./mask-rcnn_r50_fpn_gn_4xb4-1x_coco.py"

# The convolutions load the pretrained weights; so do scale and shift of the shortcuts' norms
# (downsample.1). The other norms start at 1 and 0: they are gn1, ... here, bn1, ... in the file.
model = dict(backbone=dict(norm_cfg=_base_.norm_cfg, norm_eval=False, frozen_stages=-1))
