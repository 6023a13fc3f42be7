"""Give a differencing VHD another parent: the names and the UUID in its dynamic header.

The header has two sectors, and its checksum is over both. So the new one first goes behind the last footer, and the
copy of the footer at the start leads there. The file then ends without a footer, as after a crash, and the copy counts.
Then the header is written in its own place, the copy leads to that again, and the file is cut behind the last footer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from tapfs.driver import BackingReference, Driver, Identified, Identity
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vhd import dynamic_header
from tapfs.formats.vhd.dynamic_header import SECTOR, DynamicHeader
from tapfs.formats.vhd.footer import LENGTH
from tapfs.formats.vhd.identity import NULL_UUID
from tapfs.formats.vhd.locators import MAX_HEADER_NAME, new_locators
from tapfs.plan import Grow, Plan, Shorten, Step, Write, plan

if TYPE_CHECKING:
    from tapfs.formats.vhd.reader import DynamicReader


def relink_plan(image: DynamicReader, backing: BackingReference | None, parent: Driver | None) -> Plan:
    """The plan that has the image name another parent.

    Where the parent is not open its UUID stays what it was. Raises ImageError: unsupported for no parent, for one that
    has no UUID and is not raw, and for an image without a parent; out_of_bounds for a name that is too long.
    """
    path, footer = image.file.path, image.footer
    if backing is None or not image.differencing:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "the bits of sectors mean something else without a parent: a VHD over one cannot become one without",
            path=path,
            op="rebase",
            remedy="make a new image with tapfs convert",
        )
    if not image.footers.last_good or not image.footers.copy_good:
        message = "one of the footers is damaged"
        raise ImageError(ErrorKind.READ_ONLY, message, path=path, op="rebase", remedy="run tapfs repair")
    named = image.header._replace(
        parent_uuid=image.header.parent_uuid if parent is None else parent_uuid(parent, op="rebase"),
        parent_timestamp=0,
        parent_name=header_name(backing.name, op="rebase"),
    )
    end = image.footers.place
    text_bytes = len(new_locators(backing.name, 0).data)
    texts_at = _old_texts(image.header, text_bytes)
    if texts_at is None:
        texts_at, end = end, end + text_bytes
    copy_at = end + LENGTH
    first = new_locators(backing.name, copy_at + dynamic_header.LENGTH)
    last = new_locators(backing.name, texts_at)
    first_header = named._replace(locators=first.locators).sealed()
    last_header = named._replace(locators=last.locators).sealed()
    led = footer._replace(data_offset=copy_at).sealed()
    behind = first_header.pack() + first.data
    own: list[Step] = [
        Write(0, texts_at, last.data),
        Write(0, footer.data_offset, last_header.pack()),
        Write(0, end, footer.pack()),
    ]
    return plan(
        [Grow(0, copy_at + len(behind))],
        [Write(0, copy_at, behind)],
        [Write(0, 0, led.pack())],
        own,
        [Write(0, 0, footer.pack())],
        [Shorten(0, end + LENGTH)],
    )


def parent_uuid(parent: Driver, *, op: str) -> bytes:
    """The UUID that names the parent: the null UUID for a raw disk, as tapdisk has it. Raises ImageError."""
    if parent.geometry.identity == Identity() and not isinstance(parent, Identified):
        return NULL_UUID
    names = parent.identities if parent.format_name == "vhd" and isinstance(parent, Identified) else frozenset[str]()
    for name in names:
        return UUID(name.removeprefix("uuid:")).bytes
    raise ImageError(
        ErrorKind.UNSUPPORTED,
        f"the parent of a VHD is a VHD with a UUID or a raw disk, not a {parent.format_name} image",
        op=op,
        remedy="convert the parent, or make an overlay of another format",
    )


def header_name(name: str, *, op: str) -> bytes:
    """The base name in the header's own field. Raises ImageError."""
    if "\0" in name or "\\" in name:
        message = "the name of the parent holds a character that a VHD cannot store: NUL or a backslash"
        raise ImageError(ErrorKind.UNSUPPORTED, message, op=op)
    raw = name.rpartition("/")[2].encode("utf-16-be", "surrogatepass")
    if not raw or len(raw) > 2 * MAX_HEADER_NAME:
        message = f"the name of the parent has {len(raw) // 2} letters, 1 to {MAX_HEADER_NAME} can be stored"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, op=op)
    return raw.ljust(512, b"\0")


def _old_texts(header: DynamicHeader, length: int) -> int | None:
    """Where the locators have their texts now, if these lie in a row that has room for `length` bytes."""
    used = sorted((each.offset, each.space_bytes) for each in header.locators if each.data_length)
    if not used:
        return None
    start = at = used[0][0]
    for offset, space in used:
        if offset != at or offset % SECTOR:
            return None
        at = offset + space
    return start if at - start >= length else None
