"""Runs of free units in a bitmap whose lowest bit of each byte comes first and in which a used unit has a 1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tapfs.extent import Range

_FREE = re.compile("0+")


class BitRuns:
    """The first `count` bits of a bitmap."""

    def __init__(self, bitmap: bytes, count: int) -> None:
        if count > 8 * len(bitmap):
            raise ValueError(f"{count} bits of {len(bitmap)} bytes")
        # One character a bit, the first bit first; the bit above all others keeps the zeros before it.
        number = int.from_bytes(bitmap[: -(-count // 8)], "little")
        digits = format((number & ((1 << count) - 1)) | 1 << count, "b")
        self._digits = digits[:0:-1]

    @property
    def free(self) -> int:
        """The number of free units."""
        return self._digits.count("0")

    def any_free(self, start: int, stop: int) -> bool:
        """Whether a unit of ``[start, stop)`` is free."""
        return self._digits.find("0", start, stop) >= 0

    def runs(self) -> Iterator[tuple[int, int]]:
        """Start and stop of each run of free units."""
        return (found.span() for found in _FREE.finditer(self._digits))


def joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """Ascending ranges with those made one that touch."""
    current = Range(0, 0)
    for each in ranges:
        if current.end == each.offset and current.length:
            current = Range(current.offset, current.length + each.length)
            continue
        if current.length:
            yield current
        current = each
    if current.length:
        yield current
