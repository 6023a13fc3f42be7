"""The units of VHDX: everything is placed by whole MiB, and logged by pages of 4 KiB (docs/specs/vhdx.md)."""

from __future__ import annotations

#: Every region, log and block begins at a multiple of this; the first MiB has the headers.
MIB = 1 << 20
#: The unit of the log: what is logged is whole aligned pages of the file.
PAGE = 4096
#: The end of the identifier, the headers and the region tables.
HEADER_SECTION = MIB
#: No image file is longer than this; a larger number in an image is damage.
MAX_FILE_BYTES = 1 << 48
