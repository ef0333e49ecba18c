# Licensed under the Apache License, Version 2.0.
"""Where things are. Importing this puts ``tools/`` on Python's path, where ``common`` is.

And the clone, for where the package was not installed.
"""

import os.path as osp
import sys

STUDIES = osp.dirname(osp.abspath(__file__))
ROOT = osp.dirname(STUDIES)
CONFIGS = osp.join(ROOT, "configs")
DIGITS = osp.join(STUDIES, "digits", "configs")
TOOLS = osp.join(ROOT, "tools")

FAKE_CUDA = osp.join(ROOT, "tests", "test_norm")  # the device that the tests count on, too

sys.path += [each for each in (TOOLS, ROOT, FAKE_CUDA) if each not in sys.path]
