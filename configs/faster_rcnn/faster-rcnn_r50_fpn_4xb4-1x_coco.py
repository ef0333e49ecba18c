_base_ = [
    "../_base_/faster-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]

train_dataloader = dict(batch_size=4)
