_base_ = "./resnet18_cbn-paper_8xb32_in1k.py"

model = dict(backbone=dict(depth=50), head=dict(in_channels=2048))
