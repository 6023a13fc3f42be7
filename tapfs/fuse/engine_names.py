"""Names of the engines that serve a mount, as ``tapfs mount --engine`` takes them.

The names stand apart from `tapfs.fuse.engines`, because the parser needs them without pyfuse3.
"""

from __future__ import annotations

AUTO, NATIVE, PASSTHROUGH, PYFUSE3 = "auto", "native", "passthrough", "pyfuse3"

#: The values of `--engine`; the first is the default.
ENGINES = (AUTO, NATIVE, PASSTHROUGH, PYFUSE3)
