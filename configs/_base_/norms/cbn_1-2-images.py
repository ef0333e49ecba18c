# Recommended for 1 or 2 images per GPU: CBN's defaults (README, "Does it help?"). The momentum is
# the one for 1 image; in a run this long it suits 2 as well (docs/evidence.md, "Momentum").
_base_ = "./cbn.py"

norm_cfg = dict(_delete_=True, type="CBN", momentum=0.02, requires_grad=True)
