# The paper's: a window of 4 iterations after 3 epochs, gradient through the current one alone,
# derivatives from all positions.
norm_cfg = dict(
    type="CBN",
    window="sliding",
    window_size=4,
    backward="current",
    derivative_stride=1,
    requires_grad=True,
)
custom_hooks = [dict(type="CBNHook", burn_in=3)]
