"""The signature of Parallels images: all that a probe of a file needs, so that a probe loads no more than this."""

from __future__ import annotations

OLD_MAGIC, MAGIC = b"WithoutFreeSpace", b"WithouFreSpacExt"
