"""Swap space: all of it but its first page is free while no machine that has swapped to it is running or asleep."""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.extent import Range
from tapfs.partitions.free_space.refusal import damaged, unknown
from tapfs.partitions.reader import Reader

_SIGNATURE = b"SWAPSPACE2"
_PAGES = (4096, 8192, 16384, 32768, 65536)
_VERSION_AT, _LAST_PAGE_AT, _BAD_PAGES_AT = 1024, 1028, 1032


def swap_free_ranges(disk: Reader) -> Iterator[Range]:
    """The one range behind the header, in bytes of the partition. Raises ImageError for a header of another kind.

    A machine that has suspended to the disk has put another signature in the place of this one.
    """
    for page in _PAGES:
        if disk.read(page - len(_SIGNATURE), len(_SIGNATURE)) == _SIGNATURE:
            return iter([_behind_header(disk, page)])
    raise unknown("it has no signature of swap space, as when a machine has suspended to it")


def _behind_header(disk: Reader, page: int) -> Range:
    for order in ("little", "big"):
        if int.from_bytes(disk.read(_VERSION_AT, 4), order) == 1:
            last, bad = (int.from_bytes(disk.read(at, 4), order) for at in (_LAST_PAGE_AT, _BAD_PAGES_AT))
            end = (last + 1) * page
            if not last or end > disk.size:
                raise damaged(f"it claims {end} bytes of the {disk.size} of its partition")
            if bad:
                raise unknown(f"it has {bad} bad pages")
            return Range(page, end - page)
    raise unknown("it is swap space of an unknown version")
