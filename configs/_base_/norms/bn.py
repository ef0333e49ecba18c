norm_cfg = dict(type="BN", requires_grad=True)
# Each GPU keeps running statistics of its own batches: all evaluate with their average.
custom_hooks = [dict(type="SyncBuffersHook")]
