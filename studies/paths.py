# Licensed under the Apache License, Version 2.0.
"""Where things are. Importing this puts ``tools/`` on Python's path, where ``common`` is."""

import os.path as osp
import sys

STUDIES = osp.dirname(osp.abspath(__file__))
CONFIGS = osp.join(osp.dirname(STUDIES), "configs")
DIGITS = osp.join(STUDIES, "digits", "configs")
TOOLS = osp.join(osp.dirname(STUDIES), "tools")

if TOOLS not in sys.path:
    sys.path.append(TOOLS)
