# Batch Renormalization; its clamps widen with the number of steps, as in its paper.
_base_ = "./bn.py"

norm_cfg = dict(type="BRN")
