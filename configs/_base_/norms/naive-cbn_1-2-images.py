# Set like CBN for 1 or 2 images per GPU, so that the two differ only in the compensation.
_base_ = "./cbn_1-2-images.py"

norm_cfg = dict(compensate=False)
