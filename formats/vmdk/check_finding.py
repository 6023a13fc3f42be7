"""Words of a check: the claimants of a host file, and the ranges that hold data though nothing refers to them."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

from tapfs.driver import HostFile
from tapfs.formats.claims import Claim
from tapfs.formats.rounding import round_up

_READ_BYTES = 1 << 20

#: So many leaked ranges are remembered for a repair.
MAX_REMEMBERED = 4096


class Claimant(IntEnum):
    """The owner of a range of the host file."""

    HEADER = 0
    TABLE = 1
    REDUNDANT_TABLE = 2
    GRAIN = 3


def described(claim: Claim) -> str:
    """A claim in words."""
    match claim.claimant:
        case Claimant.HEADER:
            return "a grain directory or the descriptor" if claim.table else "the header"
        case Claimant.TABLE:
            return f"grain table {claim.table}"
        case Claimant.REDUNDANT_TABLE:
            return f"redundant grain table {claim.table}"
        case _:
            return f"the grains from entry {claim.entry} of grain table {claim.table} on"


class Leaks:
    """The leaked ranges of one host file. Space that nothing refers to is leaked only if it holds data."""

    def __init__(self, file: HostFile, unit: int) -> None:
        self._file = file
        self._unit = unit
        self.ranges: list[tuple[int, int]] = []

    def look(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The ``(offset, length)`` ranges of a gap that hold data, in pieces of whole units."""
        end = offset + length
        for data_offset, data_length in self._file.data_ranges(offset, end - offset):
            for at in range(data_offset, data_offset + data_length, _READ_BYTES):
                chunk = self._file.read(at, min(_READ_BYTES, data_offset + data_length - at))
                if chunk.count(0) == len(chunk):
                    continue
                for found in self._in_chunk(at, chunk):
                    if len(self.ranges) < MAX_REMEMBERED:
                        self.ranges.append(found)
                    yield found

    def _in_chunk(self, offset: int, chunk: bytes) -> Iterator[tuple[int, int]]:
        start: int | None = None
        at = 0
        while at < len(chunk):
            stop = min(len(chunk), round_up(offset + at + 1, self._unit) - offset)
            if chunk.count(0, at, stop) != stop - at:
                start = at if start is None else start
            elif start is not None:
                yield offset + start, at - start
                start = None
            at = stop
        if start is not None:
            yield offset + start, at - start
