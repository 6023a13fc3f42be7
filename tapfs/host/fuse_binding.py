"""pyfuse3, the binding of libfuse: the one that is installed, else the copy that a wheel carries.

The copy lies in `tapfs/bundled`, with the libfuse that it loads (scripts/bundled_fuse.py). A source tree has none, and
so the package of Debian has none. Whoever needs pyfuse3 takes it from here.
"""

import sys
from pathlib import Path

try:
    import pyfuse3
except ModuleNotFoundError:
    sys.path.append(str(Path(__file__).parents[1] / "bundled"))  # last: nothing there hides what is installed
    import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

__all__ = ["EntryAttributes", "FUSEError", "FileInfo", "pyfuse3"]
