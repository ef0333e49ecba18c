# The paper's CBN, over all GPUs: 16 images per iteration, as many as for SyncBN.
_base_ = "./cbn.py"

norm_cfg = dict(type="SyncCBN")
