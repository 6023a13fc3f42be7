"""The signature of qcow images: all that a probe of a file needs, so that a probe loads no more than this."""

from __future__ import annotations

MAGIC = b"QFI\xfb"
VERSION = 1
