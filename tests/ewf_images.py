"""EWF images by bytes: a second, small writer of docs/specs/ewf.md, for kinds that no tool here writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

SIGNATURE = b"EVF\x09\x0d\x0a\xff\x00"
CHUNK = 64 * 512


def section(kind: bytes, at: int, content: bytes, *, last: bool = False, length: int | None = None) -> bytes:
    """A section that stands at `at`, with its descriptor."""
    size = 76 + len(content)
    head = struct.pack("<16sQQ40x", kind, at if last else at + size, size if length is None else length)
    return head + struct.pack("<I", zlib.adler32(head)) + content


def volume(sectors: int, per_chunk: int = 64) -> bytes:
    """The content of a volume section."""
    raw = struct.pack("<B3xIIIQ", 1, -(-sectors // per_chunk), per_chunk, 512, sectors).ljust(1048, b"\0")
    return raw + struct.pack("<I", zlib.adler32(raw))


def table(entries: Sequence[int], base: int = 0) -> bytes:
    """The content of a table section."""
    head = struct.pack("<I4xQ4x", len(entries), base)
    words = struct.pack(f"<{len(entries)}I", *entries)
    return head + struct.pack("<I", zlib.adler32(head)) + words + struct.pack("<I", zlib.adler32(words))


@dataclass
class Segment:
    """One segment file in the making."""

    number: int = 1
    data: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.data += struct.pack("<8sBHH", SIGNATURE, 1, self.number, 0)

    def add(self, kind: bytes, content: bytes = b"", *, last: bool = False, length: int | None = None) -> int:
        """Add a section; the offset of its content."""
        at = len(self.data)
        self.data += section(kind, at, content, last=last, length=length)
        return at + 76

    def add_chunks(self, disk: bytes, *, pack: Sequence[bool], base: int = 0) -> list[int]:
        """Add a `sectors` section with the chunks of `disk`; the entries for them."""
        start = len(self.data) + 76
        body = bytearray()
        entries: list[int] = []
        for i, at in enumerate(range(0, len(disk), CHUNK)):
            chunk = disk[at : at + CHUNK]
            packed = pack[i % len(pack)]
            entries.append((start + len(body) - base) | (1 << 31 if packed else 0))
            body += zlib.compress(chunk) if packed else chunk + struct.pack("<I", zlib.adler32(chunk))
        assert self.add(b"sectors", bytes(body)) == start
        return entries


def single(disk: bytes, *, pack: Sequence[bool] = (True, False), base: int = 0) -> Segment:
    """An image of one segment, without its last section."""
    made = Segment()
    made.add(b"volume", volume(len(disk) // 512))
    content = table(made.add_chunks(disk, pack=pack, base=base), base)
    made.add(b"table", content)
    made.add(b"table2", content)
    return made


def finished(disk: bytes, *, pack: Sequence[bool] = (True, False), base: int = 0) -> bytes:
    """A whole image of one segment."""
    made = single(disk, pack=pack, base=base)
    made.add(b"done", last=True, length=0)
    return bytes(made.data)
