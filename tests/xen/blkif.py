"""The layout of a block ring (Xen's public io/blkif.h and io/ring.h): bytes of requests, responses, indices.

The three ABIs differ where the 64-bit fields stand: x86_32 aligns them to 4 bytes, the others to 8. A message is
any sequence of fields here, right or wrong; nothing is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

PAGE = 4096
SECTOR = 512
SECTORS_PER_PAGE = PAGE // SECTOR
#: Segments in a request, pages of segments in an indirect one, segments in such a page.
SEGMENTS_MAX = 11
INDIRECT_PAGES_MAX = 8
SEGMENTS_PER_PAGE = PAGE // 8

#: Bytes of the shared ring before its slots, and where the indices stand, in words of 32 bits.
RING_HEADER = 64
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = range(4)
WORD = 1 << 32


class Abi(IntEnum):
    """The frontend's layout of the ring."""

    NATIVE = 0
    X86_32 = 1
    X86_64 = 2

    @property
    def key(self) -> str | None:
        """What the frontend writes as `protocol`; nothing for the native one."""
        return {Abi.X86_32: "x86_32-abi", Abi.X86_64: "x86_64-abi"}.get(self)


class Operation(IntEnum):
    READ = 0
    WRITE = 1
    BARRIER = 2
    FLUSH = 3
    DISCARD = 5
    INDIRECT = 6


OKAY, ERROR, NOT_SUPPORTED = 0, -1, -2

#: Flag of a discard.
SECURE = 1


class _Layout(NamedTuple):
    request: Struct  # operation, segments, handle, id, sector
    discard: Struct  # operation, flag, handle, id, sector, sectors
    indirect: Struct  # operation, inner operation, segments, id, sector, handle, references
    response: Struct  # id, operation, status
    slot: int


_WIDE = _Layout(Struct("<BBH4xQQ"), Struct("<BBH4xQQQ"), Struct("<BBH4xQQH2x8I"), Struct("<QBxh4x"), 112)
_NARROW = _Layout(Struct("<BBHQQ"), Struct("<BBHQQQ"), Struct("<BBHQQH2x8I"), Struct("<QBxh"), 108)
_SEGMENT = Struct("<IBBxx")


def _layout(abi: Abi) -> _Layout:
    return _NARROW if abi == Abi.X86_32 else _WIDE


def slot_bytes(abi: Abi) -> int:
    """The size of a slot: that of the greatest request."""
    return _layout(abi).slot


def slots(abi: Abi, pages: int) -> int:
    """The number of slots in a ring of so many pages, a power of two."""
    return 1 << ((pages * PAGE - RING_HEADER) // slot_bytes(abi)).bit_length() - 1


class Segment(NamedTuple):
    """Sectors `first` to `last`, both included, of the page that `reference` grants."""

    reference: int
    first: int = 0
    last: int = SECTORS_PER_PAGE - 1


def pack_segments(segments: Sequence[Segment]) -> bytes:
    """As they stand in a request, and in the pages of an indirect one."""
    return b"".join(_SEGMENT.pack(*segment) for segment in segments)


@dataclass(slots=True)
class Request:
    """A read, write, flush or barrier. `count`, if given, is the number of segments that the request claims."""

    operation: int
    sector: int = 0
    segments: Sequence[Segment] = ()
    id: int = 0
    handle: int = 0
    count: int | None = None

    @property
    def answered_as(self) -> int:
        return self.operation

    def encode(self, abi: Abi) -> bytes:
        count = len(self.segments) if self.count is None else self.count
        fixed = _layout(abi).request.pack(self.operation, count, self.handle, self.id, self.sector)
        return fixed + pack_segments(self.segments[:SEGMENTS_MAX])


@dataclass(slots=True)
class Discard:
    """Forget `sectors` sectors from `sector` on."""

    sector: int
    sectors: int
    flag: int = 0
    id: int = 0
    handle: int = 0

    @property
    def answered_as(self) -> int:
        return Operation.DISCARD

    def encode(self, abi: Abi) -> bytes:
        values = (Operation.DISCARD, self.flag, self.handle, self.id, self.sector, self.sectors)
        return _layout(abi).discard.pack(*values)


@dataclass(slots=True)
class Indirect:
    """A request whose `count` segments stand in the pages that `references` grant."""

    operation: int
    sector: int
    count: int
    references: Sequence[int] = field(default=())
    id: int = 0
    handle: int = 0

    @property
    def answered_as(self) -> int:
        return self.operation

    def encode(self, abi: Abi) -> bytes:
        references = [*self.references, *[0] * INDIRECT_PAGES_MAX][:INDIRECT_PAGES_MAX]
        values = (Operation.INDIRECT, self.operation, self.count, self.id, self.sector, self.handle)
        return _layout(abi).indirect.pack(*values, *references)


Message = Request | Discard | Indirect


class Response(NamedTuple):
    id: int
    operation: int
    status: int


def decode_response(abi: Abi, raw: bytes) -> Response:
    return Response._make(_layout(abi).response.unpack_from(raw))


def cut(first_sector: int, sectors: int, most: int) -> Iterator[tuple[int, int]]:
    """(sector, count) of pieces of at most `most` sectors."""
    for sector in range(first_sector, first_sector + sectors, most):
        yield sector, min(most, first_sector + sectors - sector)
