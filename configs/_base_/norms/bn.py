norm_cfg = dict(type="BN", requires_grad=True)
# Each GPU keeps running statistics of its own batches; for evaluation, the hook averages them.
custom_hooks = [dict(type="SyncBuffersHook")]
