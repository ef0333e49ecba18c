norm_cfg = dict(type="SyncBN", requires_grad=True)
