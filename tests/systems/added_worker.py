"""Runs `xdscale.train` with packages that are installed in a folder of their own; run by test_added_system."""

import importlib
import sys

sys.path.insert(0, sys.argv.pop(1))
importlib.invalidate_caches()
from xdscale import train  # noqa: E402

code = train.main()
if code:
    sys.exit(code)
