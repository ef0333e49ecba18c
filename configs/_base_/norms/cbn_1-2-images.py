# Recommended at 1 or 2 images per GPU: 7 of 8 shares of the statistics are then the past's, and the
# gradient has to flow through them as well (README, "Does it help?"). The momentum is that of 1
# image; in a run this long it serves 2 as well (docs/evidence.md, "Momentum").
_base_ = "./cbn.py"

norm_cfg = dict(window_size=8, backward="window", derivative_stride=None, momentum=0.02)
