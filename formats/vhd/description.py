"""The details of a VHD that `tapfs info` shows, in the words of docs/specs/vhd.md."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tapfs.driver import Finding
from tapfs.formats.vhd.disk_size import LARGEST, disk_size
from tapfs.formats.vhd.dynamic_header import SECTOR
from tapfs.formats.vhd.footer import EPOCH, Footer
from tapfs.formats.vhd.footers import Footers
from tapfs.identifiers import Uuid

#: Creators whose current size every reader takes.
_EXACT_CREATORS = frozenset({b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0"})

#: The keys that are shown without -v.
PLAIN = frozenset({"subformat", "block_size", "notes"})


def footer_details(footers: Footers) -> dict[str, object]:
    """What the footer says."""
    footer = footers.footer
    return {
        "subformat": footer.subformat,
        "creator": f"{footer.creator_name} {footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}",
        "creator_host": footer.creator_host.rstrip(b"\0 ").decode("ascii", "backslashreplace"),
        "uuid": str(Uuid(footer.uuid)),
        "created": moment(footer.timestamp),
        "current_size": footer.current_size,
        "original_size": footer.original_size,
        "geometry": f"{footer.cylinders}/{footer.heads}/{footer.sectors_per_track}",
        "footer": footers.source,
        "saved_state": footer.saved_state != 0,
        "hidden": footer.hidden != 0,
    }


def moment(timestamp: int) -> str:
    """A time of the format, in seconds since 2000, as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(EPOCH + timestamp))


def size_note(footer: Footer) -> str | None:
    """A sentence where the two sizes in the footer differ, and readers with them."""
    size, geometry = disk_size(footer), footer.geometry_size
    if footer.current_size == geometry or geometry >= LARGEST.sectors * SECTOR or footer.creator in _EXACT_CREATORS:
        return None
    if size == geometry:
        return (
            f"the disk has the {size} bytes of the geometry, as {footer.creator_name} makes it;"
            f" the current size in the footer is {footer.current_size}"
        )
    return f"QEMU before version 10 and Virtual PC take the disk to have the {geometry} bytes of the geometry"


def notes_of(footer: Footer, findings: list[Finding]) -> list[str]:
    """What a user should know of the image."""
    notes = [finding.message for finding in findings]
    if (said := size_note(footer)) is not None:
        notes.append(said)
    if footer.hidden:
        notes.append("hidden: xapi has coalesced or deleted the disk")
    if footer.saved_state:
        notes.append("the machine is in a saved state: writing to the disk destroys what the state expects")
    return notes


def with_notes(details: dict[str, object], notes: list[str]) -> Mapping[str, object]:
    """The details, with the notes where there are any."""
    return {**details, "notes": notes} if notes else details
