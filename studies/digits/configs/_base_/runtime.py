_base_ = "mmdet::_base_/default_runtime.py"

default_hooks = dict(
    logger=dict(interval=50), checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2)
)
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(vis_backends=vis_backends)
randomness = dict(seed=0)
