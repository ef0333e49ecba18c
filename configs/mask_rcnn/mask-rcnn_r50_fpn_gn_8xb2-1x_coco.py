_base_ = "./mask-rcnn_r50_fpn_gn_4xb4-1x_coco.py"

train_dataloader = dict(batch_size=2)
