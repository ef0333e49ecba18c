_base_ = "../_base_/resnet18_8xb32_in1k.py"

model = dict(backbone=dict(norm_cfg=dict(type="CBN", requires_grad=True)))
custom_hooks = [dict(type="CBNHook", burn_in=1)]
