"""The sections of a segment file (docs/specs/ewf.md, "Segment files").

A segment file is a header of 13 bytes and a chain of sections. Each section begins with a descriptor that names its
kind and the offset of the next one. The chain ends with a section "next" or "done", which points at itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError

_HEADER = struct.Struct("<8sBHH")
_DESCRIPTOR = struct.Struct("<16sQQ40xI")
DESCRIPTOR_BYTES = _DESCRIPTOR.size

#: A segment has a section for each 16375 chunks at the least; one with more sections than this is hostile.
_MAX_SECTIONS = 1 << 20

#: The kinds that end the chain of a segment.
NEXT, DONE = "next", "done"


class Section(NamedTuple):
    """A section: its kind, the offset of its descriptor and the offset behind its last byte.

    `checksum_right`: the descriptor's checksum fits.
    """

    kind: str
    offset: int
    end: int
    checksum_right: bool

    @property
    def content(self) -> int:
        """The offset of the bytes behind the descriptor."""
        return self.offset + DESCRIPTOR_BYTES


def segment_number(file: HostFile, signature: bytes) -> int:
    """The number of a segment, from 1. Raises ImageError(invalid_format) for a file that is no segment."""
    head = file.read(0, _HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(signature):
        raise ImageError(ErrorKind.INVALID_FORMAT, "is no segment of an EWF image", path=file.path, offset=0, op="open")
    return int(_HEADER.unpack(head)[2])


def sections(file: HostFile, *, cut: bool = False) -> Iterator[Section]:
    """The sections of a segment, in their order; of one that was `cut` those that are whole.

    Else raises ImageError(corrupt) where the chain leaves the file, comes back or does not end.
    """
    at, size = _HEADER.size, file.size()
    for _ in range(_MAX_SECTIONS):
        raw = file.read(at, DESCRIPTOR_BYTES)
        if len(raw) < DESCRIPTOR_BYTES:
            if cut and at > _HEADER.size:
                return
            raise _broken(file, at, f"the section at {at:#x} lies past the end of the file ({size:#x})")
        name, following, length, checksum = _DESCRIPTOR.unpack(raw)
        kind = name.split(b"\0", 1)[0].decode("ascii", "replace")
        right = checksum == zlib.adler32(raw[:-4])
        last = kind in (NEXT, DONE)
        # Some writers leave the length out, and those of the last section is 0 or that of a descriptor.
        end = at + length if length >= DESCRIPTOR_BYTES else at + DESCRIPTOR_BYTES if last else following
        if cut and at > _HEADER.size and end > size:
            return
        if cut and not last and end <= size <= following:
            yield Section(kind, at, end, right)
            return
        if end > size or (not last and not at + DESCRIPTOR_BYTES <= following < size):
            raise _broken(file, at, f"the section {kind!r} at {at:#x} leads out of the file ({size:#x})")
        yield Section(kind, at, end, right)
        if last:
            return
        at = following
    raise _broken(file, at, f"has more than {_MAX_SECTIONS} sections")


def _broken(file: HostFile, at: int, message: str) -> ImageError:
    return ImageError(
        ErrorKind.CORRUPT, message, path=file.path, offset=at, op="open", remedy="the file may have been cut off"
    )


def next_name(name: str, number: int) -> str:
    """The name of segment `number` of an image whose first segment is called `name`.

    The suffixes are E01 to E99, then EAA to EZZ, FAA and on to ZZZ; their case is that of the first one.
    Raises ImageError(unsupported) behind the last suffix.
    """
    stem, first = name[:-3], name[-3:-2]
    if number < 100:
        return f"{stem}{first}{number:02}"
    high, rest = divmod(number - 100, 26 * 26)
    letter = ord(first.upper()) + high
    if letter > ord("Z"):
        raise ImageError(ErrorKind.UNSUPPORTED, f"has more segments than there are suffixes ({number})", op="open")
    suffix = "".join(map(chr, (letter, ord("A") + rest // 26, ord("A") + rest % 26)))
    return stem + (suffix.lower() if first.islower() else suffix)
