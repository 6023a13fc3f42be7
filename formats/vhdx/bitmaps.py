"""Sector bitmaps: which sectors of a block of a differencing image are in it and not in its parent.

A bit is a sector, and the lowest bit of a byte is the first (docs/specs/vhdx.md, "BAT").
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.formats.vhdx.pages import Pages
from tapfs.formats.vhdx.units import PAGE
from tapfs.records import NamedTuple


class SectorRun(NamedTuple):
    """Sectors ``[first, stop)`` of a block; `present`: they are in the block, and not in the parent."""

    first: int
    stop: int
    present: bool


def sector_runs(bitmap: bytes, first: int, stop: int) -> Iterator[SectorRun]:
    """The runs of the sectors ``[first, stop)`` by a block's part of the bitmap."""
    count = 8 * len(bitmap)
    # The digits of the number, the lowest first; a one above the highest keeps the zeros before it.
    digits = bin(int.from_bytes(bitmap, "little") | 1 << count)[:2:-1]
    while first < stop:
        present = digits[first] == "1"
        end = digits.find("0" if present else "1", first, stop)
        end = stop if end < 0 else end
        yield SectorRun(first, end, present)
        first = end


def set_bits(pages: Pages, offset: int, first: int, stop: int) -> None:
    """Say that the sectors ``[first, stop)`` are present; `offset` is the host offset of the bitmap of sector 0."""
    while first < stop:
        at = offset + first // 8
        page_at = at - at % PAGE
        # Up to the end of this page.
        last = min(stop, 8 * (page_at + PAGE - offset))
        page = pages.change(page_at)
        start, end = at - page_at, -(-last // 8) + offset - page_at
        mask = (1 << last - first) - 1 << first % 8
        bits = int.from_bytes(page[start:end], "little") | mask
        page[start:end] = bits.to_bytes(end - start, "little")
        first = last


def clear_bits(pages: Pages, offset: int, length: int) -> None:
    """Say that no sector is present by the bytes ``[offset, offset + length)`` of the host file."""
    at, end = offset, offset + length
    while at < end:
        page_at = at - at % PAGE
        stop = min(end, page_at + PAGE)
        if any(pages.read(at, stop - at)):
            pages.change(page_at)[at - page_at : stop - page_at] = bytes(stop - at)
        at = stop
