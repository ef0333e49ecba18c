_base_ = "./faster-rcnn_r18_fpn_bn-all_1xb2_digits.py"

train_dataloader = dict(batch_size=1)
