# The paper's CBN: a window of 4 iterations that opens after 3 epochs, gradient only through the
# current iteration, derivatives from all positions.
norm_cfg = dict(
    type="CBN",
    window="sliding",
    window_size=4,
    backward="current",
    derivative_stride=1,
    requires_grad=True,
)
custom_hooks = [dict(type="CBNHook", burn_in=3)]
