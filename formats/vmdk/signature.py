"""The signatures of VMDK files: all that a probe of a file needs, so that a probe loads no more than this."""

from __future__ import annotations

import re

from tapfs.patterns import pattern

#: Extents: hosted ones, hosted ones that are being made, those of ESX.
SPARSE, UNFINISHED_SPARSE = b"KDMV", b"kdmv"
COWD = b"COWD"
SESPARSE = 0xCAFEBABE.to_bytes(8, "little")

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
#: Blank lines and comments, and then the first line that VMware and VirtualBox write. A comment of any other text may
#: begin like that line, so nothing stands behind its words.
_FIRST_LINE = pattern(
    rb"(?:[ \t]*(?:#[^\r\n]*)?[\r\n])*?[ \t]*#[ \t]*disk[ \t]*descriptor[ \t]*file[ \t]*(?:[\r\n]|\Z)", re.IGNORECASE
)
#: A text without that line is one for VMware and QEMU if its first key is the version. Many texts begin so, thus
#: another key of every descriptor has to follow.
_FIRST_KEY = pattern(rb"(?:[ \t]*(?:#[^\r\n]*)?[\r\n])*[ \t]*version[ \t]*=[ \t]*\"?[0-9]", re.IGNORECASE)
_ANOTHER_KEY = pattern(rb"[\r\n][ \t]*(?:cid|parentcid|createtype)[ \t]*=", re.IGNORECASE)


def is_descriptor(head: bytes) -> bool:
    """Whether a text that begins with `head` is a descriptor: by its first line, or by its first keys."""
    if is_utf16(head):
        return is_descriptor(head.decode("utf-16", "ignore").encode("utf-8", "ignore"))
    text = head.removeprefix(BYTE_ORDER_MARK)
    if _FIRST_LINE.match(text) is not None:
        return True
    return _FIRST_KEY.match(text) is not None and _ANOTHER_KEY.search(text) is not None


def is_utf16(head: bytes) -> bool:
    """Whether a text is in UTF-16, as some editors of Windows write it."""
    return head.startswith(_UTF16_MARKS)
