# Recommended at 1 or 2 images per GPU: the layer's defaults (README, "Does it help?"). The momentum
# is that of 1 image; in a run this long it serves 2 as well (docs/evidence.md, "Momentum").
_base_ = "./cbn.py"

norm_cfg = dict(_delete_=True, type="CBN", momentum=0.02, requires_grad=True)
