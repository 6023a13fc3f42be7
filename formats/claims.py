"""Overlaps and gaps among the ranges of the host file that the metadata claims, in bounded memory.

The claims are sorted as a file larger than memory is: runs of `MAX_HELD` are sorted in memory and put on scratch space,
then all runs are merged. So the metadata is read once, however many claims there are and wherever they point.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

from tapfs.driver import Scratch
from tapfs.records import NamedTuple

#: Claims held at a time, each packed into a bytes object of about 60 bytes.
MAX_HELD = 1 << 18
#: Bytes of all buffers that sorted runs are read back through.
_MERGE_BYTES = 16 << 20

#: start, length, claimant, table, entry: big-endian, so that packed claims sort like their starts.
_PACKED = struct.Struct(">QQBII")


class Claim(NamedTuple):
    """``[start, start + length)`` is claimed.

    A format numbers its claimants from 0 to 255, and says what `table` and `entry` mean for each.
    """

    start: int
    length: int
    claimant: int
    table: int = 0
    entry: int = 0

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.start + self.length

    def pack(self) -> bytes:
        """The claim as bytes that sort by start."""
        return _PACKED.pack(*self)


def unpack(packed: bytes) -> Claim:
    """The inverse of :meth:`Claim.pack`."""
    return Claim(*_PACKED.unpack(packed))


class MemoryScratch:
    """Scratch space in memory, where a check has no other."""

    def __init__(self) -> None:
        self._data = bytearray()

    def append(self, data: bytes) -> None:
        """Add to the end."""
        self._data += data

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end."""
        return bytes(self._data[offset : offset + length])

    def close(self) -> None:
        """Give the space back."""
        self._data.clear()


def gaps(
    claims: Iterable[Claim],
    end: int,
    overlap: Callable[[Claim, Claim], None],
    scratch: Callable[[], Scratch] | None = None,
) -> Iterator[tuple[int, int]]:
    """The ``(offset, length)`` gaps before `end` that no claim covers, ascending.

    `overlap` is told of each claim that starts inside an earlier one. `scratch` makes the space for claims beyond
    `MAX_HELD`; without it they stay in memory.
    """
    widest: Claim | None = None
    covered = 0
    with closing((scratch or MemoryScratch)()) as space:
        for packed in _ascending(claims, space):
            claim = unpack(packed)
            if widest is not None and claim.start < covered:
                overlap(widest, claim)
            elif claim.start > covered:
                yield covered, min(claim.start, end) - covered
            if widest is None or claim.end > covered:
                widest, covered = claim, claim.end
    if covered < end:
        yield covered, end - covered


def _ascending(claims: Iterable[Claim], space: Scratch) -> Iterator[bytes]:
    held: list[bytes] = []
    runs = 0
    for claim in claims:
        held.append(claim.pack())
        if len(held) == MAX_HELD:
            held.sort()
            space.append(b"".join(held))
            held.clear()
            runs += 1
    held.sort()
    buffer_claims = max(1, _MERGE_BYTES // max(1, runs) // _PACKED.size)
    return heapq.merge(*(_run(space, number, buffer_claims) for number in range(runs)), held)


def _run(space: Scratch, number: int, buffer_claims: int) -> Iterator[bytes]:
    """One of the sorted runs on scratch space, read back a buffer at a time."""
    at, stop = number * MAX_HELD, (number + 1) * MAX_HELD
    while at < stop:
        count = min(buffer_claims, stop - at)
        piece = space.read(at * _PACKED.size, count * _PACKED.size)
        yield from (piece[start : start + _PACKED.size] for start in range(0, len(piece), _PACKED.size))
        at += count
