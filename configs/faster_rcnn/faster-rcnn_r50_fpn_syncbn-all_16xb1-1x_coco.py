_base_ = "./faster-rcnn_r50_fpn_syncbn-all_4xb4-1x_coco.py"

train_dataloader = dict(batch_size=1)
