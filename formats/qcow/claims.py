"""Who claims which bytes of the host file: overlaps and gaps, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

#: Claims held at a time, each an integer of about 50 bytes; more take more passes over the metadata.
MAX_HELD = 1 << 19


class Claimant(IntEnum):
    """What a range of the host file is claimed for."""

    HEADER = 0
    NAME = 1
    L1 = 2
    TABLE = 3
    CLUSTER = 4


class Claim(NamedTuple):
    """``[start, start + length)`` is claimed by `claimant`.

    For TABLE it is that of L1 entry `table`, for CLUSTER what this one maps from its `entry` on.
    """

    start: int
    length: int
    claimant: Claimant
    table: int = 0
    entry: int = 0

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.start + self.length

    def __str__(self) -> str:
        match self.claimant:
            case Claimant.HEADER:
                return "the header"
            case Claimant.NAME:
                return "the backing file's name"
            case Claimant.L1:
                return "the L1 table"
            case Claimant.TABLE:
                return f"L2 table {self.table}"
            case Claimant.CLUSTER:
                return f"the clusters from L2 entry {self.entry} of table {self.table} on"

    def pack(self) -> int:
        """The claim as one integer that sorts by start: a fifth of the memory."""
        return self.start << 112 | self.length << 48 | self.claimant << 40 | self.table << 16 | self.entry


def unpack(packed: int) -> Claim:
    """The inverse of :meth:`Claim.pack`."""
    return Claim(
        packed >> 112,
        packed >> 48 & (1 << 64) - 1,
        Claimant(packed >> 40 & 0xFF),
        packed >> 16 & (1 << 24) - 1,
        packed & 0xFFFF,
    )


def gaps(
    claims: Callable[[], Iterable[Claim]], end: int, overlap: Callable[[Claim, Claim], None]
) -> Iterator[tuple[int, int]]:
    """The ``(offset, length)`` gaps before `end` that no claim covers, ascending.

    `claims` makes the claims anew for each pass; `overlap` is told of each claim that starts inside
    an earlier one.
    """
    widest: Claim | None = None
    covered = 0
    for packed in _ascending(claims, overlap):
        claim = unpack(packed)
        if widest is not None and claim.start < covered:
            overlap(widest, claim)
        elif claim.start > covered:
            yield covered, min(claim.start, end) - covered
        if widest is None or claim.end > covered:
            widest, covered = claim, claim.end
    if covered < end:
        yield covered, end - covered


def _ascending(claims: Callable[[], Iterable[Claim]], overlap: Callable[[Claim, Claim], None]) -> Iterator[int]:
    low = 0
    high: int | None = 0
    while high is not None:
        low, high = high, None
        held: list[int] = []
        for claim in claims():
            if claim.start < low or (high is not None and claim.start >= high):
                continue
            held.append(claim.pack())
            if len(held) >= MAX_HELD:
                held = _without_equal_starts(held, overlap)
                if len(held) > MAX_HELD // 2:
                    high = held[MAX_HELD // 2] >> 112
                    del held[MAX_HELD // 2 :]
        held.sort()
        yield from held


def _without_equal_starts(held: list[int], overlap: Callable[[Claim, Claim], None]) -> list[int]:
    """Hostile tables can claim one place any number of times; only the widest claim stays."""
    held.sort(reverse=True)
    kept: list[int] = []
    for packed in held:
        if kept and kept[-1] >> 112 == packed >> 112:
            overlap(unpack(kept[-1]), unpack(packed))
        else:
            kept.append(packed)
    kept.reverse()
    return kept
