_base_ = ["../_base_/resnet18_8xb32_in1k.py", "../_base_/norms/gn.py"]

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg))
