"""The signatures of VMDK files: all that a probe of a file needs, so that a probe loads no more than this."""

from __future__ import annotations

import re

from tapfs.patterns import pattern

#: Extents: hosted ones, hosted ones that are being made, those of ESX.
SPARSE, UNFINISHED_SPARSE = b"KDMV", b"kdmv"
COWD = b"COWD"
SESPARSE = 0xCAFEBABE.to_bytes(8, "little")

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FIRST_LINE = pattern(rb"#[ \t]*disk[ \t]*descriptor[ \t]*file", re.IGNORECASE)


def is_descriptor(head: bytes) -> bool:
    """Whether a text that begins with `head` is a descriptor: its first line that is not blank says so."""
    return _FIRST_LINE.match(head.removeprefix(BYTE_ORDER_MARK).lstrip()) is not None
