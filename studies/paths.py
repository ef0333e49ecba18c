# Licensed under the Apache License, Version 2.0.
"""Paths within the clone. Importing this module makes ``common``, in ``tools/``, importable.

It also puts the clone on Python's path, in case the package is not installed.
"""

import os.path as osp
import sys

STUDIES = osp.dirname(osp.abspath(__file__))
ROOT = osp.dirname(STUDIES)
CONFIGS = osp.join(ROOT, "configs")
DIGITS = osp.join(STUDIES, "digits", "configs")
TOOLS = osp.join(ROOT, "tools")

FAKE_CUDA = osp.join(ROOT, "tests", "test_norm")  # has fake_cuda, which the tests use, too

sys.path += [each for each in (TOOLS, ROOT, FAKE_CUDA) if each not in sys.path]
