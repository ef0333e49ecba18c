_base_ = "./cbn.py"

norm_cfg = dict(compensate=False)
