"""Check and repair a VDI image (docs/specs/vdi.md, "Check and repair").

A repair never guesses about the guest's data. The header's count of blocks follows from the map, and leaked space is
given back where the map is free of contradictions. What two blocks claim, or what lies past the end of the file, stays
as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.driver import CheckReport, ProgressCallback, Severity
from tapfs.formats.blocks.check import BlockCheck
from tapfs.formats.claims import Claim
from tapfs.formats.uuid_links import NULL_UUID
from tapfs.formats.vdi.header import HEAD_BYTES
from tapfs.plan import Discard, Plan, Step, Write, plan

if TYPE_CHECKING:
    from tapfs.formats.vdi.reader import VdiReader

_HEADER, _MAP = 1, 2
_NAMES = {_HEADER: "the header", _MAP: "the map"}


def checked(image: VdiReader, progress: ProgressCallback | None = None) -> BlockCheck:
    """The check of an image."""
    header, report = image.header, CheckReport()
    for finding in image.open_findings:
        report.add(*finding)
    metadata = (
        Claim(0, min(HEAD_BYTES, header.map_offset), _HEADER),
        Claim(header.map_offset, header.map_end - header.map_offset, _MAP),
    )
    check = BlockCheck(image, metadata, _NAMES, report, progress, entries=header.blocks)
    at = header.places.allocated
    if check.entries_end > header.allocated:
        message = f"the header counts {header.allocated} blocks, and the map names block {check.entries_end - 1}"
        report.add(Severity.CORRUPTION, f"{message}: other programs would give its place away again", at)
    elif check.entries_end < header.allocated:
        report.add(Severity.NOTE, f"the header counts {header.allocated} blocks, and {check.entries_end} are used", at)
    if check.used < check.entries_end:
        message = f"{check.entries_end - check.used} places between blocks are not used: QEMU's check finds an error"
        report.add(Severity.NOTE, message)
    if NULL_UUID in {header.creation, header.modification}:
        report.add(
            Severity.NOTE, "a UUID of the image is null: VirtualBox does not open it", header.places.modification
        )
    if not header.has_parent and header.link != NULL_UUID:
        report.add(Severity.NOTE, f"names a parent, and by its type ({header.type.name.lower()}) it has none")
    return check


def repair_plans(image: VdiReader) -> list[Plan]:
    """The plans for an image, to be executed one after the other; empty if all is well."""
    check = checked(image)
    header = image.header
    plans: list[Plan] = []
    corruptions = check.report.corruptions
    if check.entries_end != header.allocated and check.entries_end == check.possible_end:
        word = check.entries_end.to_bytes(4, "little")
        message = f"the header counted {header.allocated} blocks instead of {check.entries_end}"
        plans.append(plan([Write(0, header.places.allocated, word)], mends=message))
        corruptions -= check.entries_end > header.allocated
    if check.leaks and not corruptions:
        leaked = sum(length for _, length in check.leaks)
        holes: list[Step] = [Discard(0, offset, length) for offset, length in check.leaks]
        plans.append(plan(holes, mends=f"leaked space of {leaked} bytes"))
    return plans
