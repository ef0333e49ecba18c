# The paper's CBN over all GPUs: 16 images per iteration, as many as SyncBN has.
_base_ = "./cbn.py"

norm_cfg = dict(type="SyncCBN")
