# Batch Renormalization; its clamps open with the number of steps, as in its paper.
_base_ = "./bn.py"

norm_cfg = dict(type="BRN")
