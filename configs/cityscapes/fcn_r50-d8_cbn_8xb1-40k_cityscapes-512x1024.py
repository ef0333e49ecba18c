# MMSegmentation's FCN at half its images per GPU, with CBN in place of SyncBN. The base is a path:
# the maintained MMEngine does not find "mmseg::" under the name of the maintained MMSegmentation.
_base_ = (
    __import__("mmseg").__path__[0] + "/.mim/configs/fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py"
)

custom_imports = dict(imports=["cbn_mmdet"], allow_failed_imports=False)
norm_cfg = dict(type="CBN", momentum=0.02)  # for one image: docs/evidence.md, "What to set"
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(
    clip_grad=dict(_delete_=True, max_norm=35)
)  # one image has large gradients in a network that BN has trained
# The learning rate, 0.01, is for 8 images per step in total; other totals scale it.
auto_scale_lr = dict(enable=True, base_batch_size=8)
custom_hooks = [dict(type="CBNHook", burn_in=1000, by_epoch=False)]
