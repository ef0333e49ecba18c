# Photographs that are all alike: blood under a microscope.
_base_ = "./faster-rcnn_efficientnet-lite0_fpn_cbn_1xb1_raccoon.py"

model = dict(roi_head=dict(bbox_head=dict(num_classes=3)))
dataset = dict(
    metainfo=dict(classes=("Platelets", "RBC", "WBC")),
    data_prefix=dict(img="bccd/BCCD/JPEGImages/"),
)
train_dataloader = dict(dataset=dict(**dataset, ann_file="bccd_coco/instances_train.json"))
val_dataloader = dict(dataset=dict(**dataset, ann_file="bccd_coco/instances_val.json"))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="data/bccd_coco/instances_val.json")
test_evaluator = val_evaluator
