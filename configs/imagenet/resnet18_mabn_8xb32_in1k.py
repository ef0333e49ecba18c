# MABN, with the centralised weights that it needs; the hook is that of ../_base_/norms/bn.py.
_base_ = "../_base_/resnet18_8xb32_in1k.py"

model = dict(
    backbone=dict(conv_cfg=dict(type="CenConv2d"), norm_cfg=dict(type="MABN", requires_grad=True))
)
custom_hooks = [dict(type="SyncBuffersHook")]
