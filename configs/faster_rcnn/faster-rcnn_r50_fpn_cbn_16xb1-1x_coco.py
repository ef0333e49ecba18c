_base_ = "./faster-rcnn_r50_fpn_cbn_8xb2-1x_coco.py"

train_dataloader = dict(batch_size=1)
