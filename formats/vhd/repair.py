"""Repair a VHD where nothing has to be guessed: footers from one another, checksums, tapdisk's batmap, leaked space.

A block at an impossible place, or two blocks at one, are reported by a check and left alone. The plans, each of which a
crash may cut off anywhere:

1. The footer that counts goes, with the right checksum, first to the place where none is good, then to the other.
2. The dynamic header gets the right checksum.
3. The batmap is made anew from the bitmaps.
4. Space that nothing refers to is given back, if the metadata is free of contradictions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.formats.rounding import round_up
from tapfs.formats.vhd.bitmap import is_full
from tapfs.formats.vhd.check import Check
from tapfs.formats.vhd.dynamic_header import SECTOR
from tapfs.formats.vhd.footer import FIXED
from tapfs.formats.vhd.footers import Footers
from tapfs.plan import Discard, Plan, Step, Write, plan

if TYPE_CHECKING:
    from tapfs.formats.vhd.reader import DynamicReader


def footer_plans(footers: Footers, place: int | None = None) -> list[Plan]:
    """The plans that leave a good footer at the end, and a good copy of an image that grows.

    `place` is where the last footer goes, if not where there is one.
    """
    footer = footers.footer.sealed()
    end = footers.place if place is None else place
    plans: list[Plan] = []
    if not footers.last_good:
        plans.append(plan([Write(0, end, footer.pack())], mends="the footer at the end"))
    if footer.type != FIXED and not footers.copy_good:
        plans.append(plan([Write(0, 0, footer.pack())], mends="the copy of the footer at the start"))
    return plans


def repair_plans(image: DynamicReader) -> list[Plan]:
    """The plans for an image, to be executed one after the other; empty if all is well."""
    check = Check(image)
    plans = footer_plans(image.footers, None if image.footers.last_good else _footer_place(image))
    if not image.header.fits:
        sealed = image.header.sealed().pack()
        plans.append(plan([Write(0, image.footer.data_offset, sealed)], mends="the checksum of the dynamic header"))
    batmap = image.batmap
    if batmap is not None and batmap.bits and (check.not_full or not batmap.valid):
        plans.append(_batmap_plan(image))
    if check.leaks and _sound(image, check):
        leaked = sum(length for _, length in check.leaks)
        steps: list[Step] = [Discard(0, offset, length) for offset, length in check.leaks]
        plans.append(plan(steps, mends=f"leaked space of {leaked} bytes"))
    return plans


def _sound(image: DynamicReader, check: Check) -> bool:
    """Whether nothing contradicts the table: what the opening and the batmap said is mended before."""
    mended = sum(finding.severity == "corruption" for finding in image.findings) + len(check.not_full)
    return check.report.corruptions <= mended


def _footer_place(image: DynamicReader) -> int:
    """The last sector of the file, if the image does not refer to it, else the end of the data."""
    ends = [stop for _, stop, _ in image.metadata_ranges]
    ends += [locator.offset + locator.space_bytes for locator in image.header.locators if locator.data_length]
    ends += [image.batmap.end] if image.batmap is not None else []
    size = image.file.size()
    for index, place in image.table.used():
        if image.place_fault(index, place) is None:
            ends.append(place + image.header.bitmap_bytes + image.header.block_size)
    return max(image.footers.place, round_up(max(min(end, size) for end in ends), SECTOR))


def _batmap_plan(image: DynamicReader) -> Plan:
    batmap = image.batmap
    if batmap is None:
        raise AssertionError("no batmap")
    batmap.bits = bytearray(len(batmap.bits))
    for index, place in image.table.used():
        if image.place_fault(index, place) is None and is_full(image.read_bitmap(place), image.block_sectors):
            batmap.bits[index // 8] |= 0x80 >> index % 8
    steps: list[Step] = [Write(0, batmap.offset, batmap.sealed_head()), Write(0, batmap.map_offset, bytes(batmap.bits))]
    return plan(steps, mends="tapdisk's batmap")
