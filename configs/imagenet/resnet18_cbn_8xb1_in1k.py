# One image per GPU, the batch that CBN is for. The running statistics average over 50 images.
_base_ = "./resnet18_cbn_8xb32_in1k.py"

model = dict(backbone=dict(norm_cfg=dict(momentum=0.02)))
train_dataloader = dict(batch_size=1)
