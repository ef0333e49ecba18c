# MMPretrain's config: 100 epochs of SGD, steps at 30, 60 and 90, on 8 GPUs with 32 images each.
_base_ = "mmpretrain::resnet/resnet18_8xb32_in1k.py"

custom_imports = dict(imports=["cbn_mmdet"], allow_failed_imports=False)
# The learning rate, 0.1, is for 256 images per step in total; other totals scale it.
auto_scale_lr = dict(enable=True)
