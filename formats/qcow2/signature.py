"""The signature of qcow2 images: all that a probe of a file needs, so that a probe loads no more than this."""

from __future__ import annotations

MAGIC = b"QFI\xfb"
VERSIONS = (2, 3)
