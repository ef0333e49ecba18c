# As CBN at 1 or 2 images per GPU, so that the two differ in the compensation alone.
_base_ = "./cbn_1-2-images.py"

norm_cfg = dict(compensate=False)
