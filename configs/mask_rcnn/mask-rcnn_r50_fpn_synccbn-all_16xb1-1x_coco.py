_base_ = "./mask-rcnn_r50_fpn_synccbn-all_8xb2-1x_coco.py"

train_dataloader = dict(batch_size=1)
