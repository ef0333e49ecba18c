# MMDetection's 12 epochs of SGD, with the published runs' warm-up and gradient clipping.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
# The learning rate, 0.02, is for 16 images per step in total, which every config has on the number
# of GPUs in its name. For other totals it scales by itself, as that would be easy to forget.
auto_scale_lr = dict(enable=True, base_batch_size=16)
