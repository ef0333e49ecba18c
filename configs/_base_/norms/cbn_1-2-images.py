# Recommended at 1 or 2 images per GPU: the past then outweighs the current batch in the statistics,
# so the gradient has to flow through it (README, "Does it help?").
_base_ = "./cbn.py"

norm_cfg = dict(window_size=8, backward="window", momentum=0.02)
