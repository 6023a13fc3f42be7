"""Space of a host file that no metadata refers to and that holds data: what a check calls a leak.

Space that was never written is none: writers lengthen files ahead of what they write.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.driver import HostFile
from tapfs.formats.rounding import round_up

_READ_BYTES = 1 << 20


def pieces_with_data(file: HostFile, start: int, end: int, unit: int) -> Iterator[tuple[int, int]]:
    """The ``(offset, length)`` pieces of ``[start, end)`` with other bytes than zeros, in whole units of the file.

    A piece does not go on across `_READ_BYTES` of the file, nor across a hole.
    """
    for data_offset, data_length in file.data_ranges(start, end - start):
        for at in range(data_offset, data_offset + data_length, _READ_BYTES):
            chunk = file.read(at, min(_READ_BYTES, data_offset + data_length - at))
            if chunk.count(0) != len(chunk):
                yield from _pieces_of(at, chunk, unit)


def _pieces_of(offset: int, chunk: bytes, unit: int) -> Iterator[tuple[int, int]]:
    piece_start: int | None = None
    at = 0
    while at < len(chunk):
        stop = min(len(chunk), round_up(offset + at + 1, unit) - offset)
        if chunk.count(0, at, stop) != stop - at:
            piece_start = offset + at if piece_start is None else piece_start
        elif piece_start is not None:
            yield piece_start, offset + at - piece_start
            piece_start = None
        at = stop
    if piece_start is not None:
        yield piece_start, offset + at - piece_start
