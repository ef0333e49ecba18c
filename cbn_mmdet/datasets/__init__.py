# Licensed under the Apache License, Version 2.0.
"""Data sets for experiments with Cross-Iteration Batch Normalization."""

__all__ = ["CLASSES", "build_digits", "split_glyphs"]


def __getattr__(name):
    # Imported on first use, so that `import cbn_mmdet` does not need scikit-learn and
    # `python -m cbn_mmdet.datasets.digits` does not find its module already imported.
    if name in __all__:
        from cbn_mmdet.datasets import digits

        return getattr(digits, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
