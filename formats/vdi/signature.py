"""The signature of VDI images: all that a probe of a file needs, so that a probe loads no more than this."""

from __future__ import annotations

#: Its place in the file, behind 64 bytes of free text.
SIGNATURE_AT = 64
SIGNATURE = b"\x7f\x10\xda\xbe"
