"""The pages of tables for which a full host may have no space: those that read as zeros, and may be holes of the file.

A page that holds anything has its space. A reservation names the others that its commit may change
(`tapfs.reservation.Reservation.metadata`). A page is looked at as it is in memory: what a commit has changed there was
named by its reservation. On a host file system with blocks of less than 4 KiB a page may have holes beside what it
holds, also in an image that was just made. They are not looked for: where such a host is full, the flush fails, which
fsync and close say, and goes on once there is space.
"""

from __future__ import annotations

from array import array

from tapfs.driver import HostSpace

_PAGE = 4096
_NOTHING = bytes(_PAGE)


def blank_entries(place: int, entries: array[int], first: int, stop: int, file: int = 0) -> list[HostSpace]:
    """The pages of a table at the host offset `place` that have one of the entries ``[first, stop)``, and only zeros.

    `entries` is all of the table. What of a page lies outside it is not named.
    """
    return _blank(place, entries, entries.itemsize, first, stop, file)


def blank_bytes(place: int, raw: bytes | bytearray, first: int, stop: int, file: int = 0) -> list[HostSpace]:
    """The same of bytes at the host offset `place`."""
    return _blank(place, raw, 1, first, stop, file)


def _blank(
    place: int, table: array[int] | bytes | bytearray, item: int, first: int, stop: int, file: int
) -> list[HostSpace]:
    # Every write that allocates comes here a few times, so nothing is looked at twice.
    found: list[HostSpace] = []
    at, end = first * item, stop * item
    at -= (place + at) % _PAGE
    while at < end:
        start = max(at, 0)
        at += _PAGE
        page = memoryview(table)[start // item : at // item].tobytes()
        if page == _NOTHING[: len(page)]:
            found.append(HostSpace(place + start, len(page), file))
    return found
