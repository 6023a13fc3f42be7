"""Change the size of an extent in the text of a descriptor, in one write that a crash leaves done or undone.

A host disk writes whole sectors, so what changes must lie in one. A smaller number gets blanks behind it. A longer one
takes the bytes that it needs from a comment behind it in the same sector, or moves the rest of a short text. A text
that is embedded in an extent can be written elsewhere first, because one field of the header leads to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.rounding import round_down, round_up
from tapfs.formats.vmdk.descriptor import Descriptor
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.sparse_header import DESCRIPTOR_AT
from tapfs.patterns import pattern
from tapfs.plan import Grow, Plan, Shorten, Write, plan

_COMMENT = pattern(rb"^#[^\r\n]*", re.MULTILINE)
_NUMBER = pattern(rb"[A-Za-z]+[ \t]+([0-9]+)")


def size_plans(file: HostFile, descriptor: Descriptor, line_at: int, sectors: int, room: int | None) -> Iterator[Plan]:
    """The plans that give the extent of the line at `line_at` of the text so many sectors.

    `room`: bytes of an embedded text's space; None where the text has file 0 for itself. Raises
    ImageError(unsupported) before the first plan where no single write can do it.
    """
    text, base = descriptor.text, descriptor.base
    found = _NUMBER.match(text, line_at)
    if found is None:
        raise AssertionError("an extent line begins with its access and its size")
    start, end = found.span(1)
    digits = str(sectors).encode("ascii")
    changed = _in_place(text, start, end, digits, base)
    if changed is not None:
        return iter([plan([Write(0, base + start, changed)])])
    whole = text[:start] + digits + text[end:]
    if base % SECTOR + max(len(whole), len(text)) <= SECTOR:
        return iter([plan([Write(0, base + start, whole[start:])])])
    if room is not None and len(whole) <= room and base % SECTOR == 0:
        return _elsewhere_first(file, whole.ljust(room, b"\0"), base)
    raise ImageError(
        ErrorKind.UNSUPPORTED,
        "the line of the extent in the descriptor is too short for the new size, and no single write can change it",
        path=file.path,
        offset=base + line_at,
        op="resize",
        remedy="put a long comment (a line that begins with #) right behind the line of the extent",
    )


def _in_place(text: bytes, start: int, end: int, digits: bytes, base: int) -> bytes | None:
    """The bytes from `start` on that say the new number and are as long as what they replace; None for none."""
    more = len(digits) - (end - start)
    sector_end = round_down(base + start, SECTOR) + SECTOR - base
    if more <= 0:
        return digits.ljust(end - start) if end <= sector_end else None
    for comment in _COMMENT.finditer(text, end):
        if comment.end() > sector_end:
            return None
        if len(comment[0]) > more:
            return digits + text[end : comment.end() - more]
    return None


def _elsewhere_first(file: HostFile, text: bytes, base: int) -> Iterator[Plan]:
    """Write an embedded text at the end of the file, lead to it, write it in its own place, and lead back."""
    end = file.size()
    place = round_up(end, SECTOR)
    yield plan(
        [Grow(0, place + round_up(len(text), SECTOR))],
        [Write(0, place, text)],
        [Write(0, DESCRIPTOR_AT, (place // SECTOR).to_bytes(8, "little"))],
        [Write(0, base, text)],
        [Write(0, DESCRIPTOR_AT, (base // SECTOR).to_bytes(8, "little"))],
        [Shorten(0, end)],
    )
