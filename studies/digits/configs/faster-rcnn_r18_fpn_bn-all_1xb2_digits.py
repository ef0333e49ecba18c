_base_ = [
    "./_base_/faster-rcnn_r18_fpn.py",
    "./_base_/digits_detection.py",
    "./_base_/schedule_4e.py",
    "./_base_/runtime.py",
]
