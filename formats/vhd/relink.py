"""Give a VHD that grows another parent, its first one, or none: names and UUID in its dynamic header, and its type.

The header has two sectors, and its checksum is over both. So the new one first goes behind the last footer, and the
copy of the footer at the start leads there. The file then ends without a footer, as after a crash, and the copy counts.
Then the header is written in its own place, the copy leads to that again, and the file is cut behind the last footer.
The type of the image stands in the footers, so it changes by the same write.

What the image holds stays where it is. A sector whose bit is 0 shows the parent, or is zeros where there is none.
Readers that know no bitmaps take what the file holds there. So before an image loses its parent these sectors of its
blocks become zeros in the file: nobody has read them until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tapfs.driver import BackingReference, Driver, Identified, Identity
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.uuid_links import UuidNamed
from tapfs.formats.vhd import dynamic_header
from tapfs.formats.vhd.bitmap import sector_runs
from tapfs.formats.vhd.dynamic_header import NO_LOCATOR, SECTOR, DynamicHeader
from tapfs.formats.vhd.footer import DIFFERENCING, DYNAMIC, LENGTH
from tapfs.formats.vhd.identity import NULL_UUID
from tapfs.formats.vhd.locators import MAX_HEADER_NAME, NewLocators, new_locators
from tapfs.formats.zero_steps import zero_steps, zeroing_plans
from tapfs.plan import Grow, Plan, Shorten, Step, Write, plan

if TYPE_CHECKING:
    from tapfs.formats.vhd.reader import DynamicReader


def relink_plans(image: DynamicReader, backing: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
    """The plans that have the image name another parent, or none.

    Where the parent is not open its UUID stays what it was. Raises ImageError: unsupported for a parent that has no
    UUID and is not raw, read_only for a damaged footer, out_of_bounds for a name that is too long.
    """
    if backing is None and not image.differencing:
        return
    if not image.footers.last_good or not image.footers.copy_good:
        message = "one of the footers is damaged"
        raise ImageError(ErrorKind.READ_ONLY, message, path=image.file.path, op="rebase", remedy="run tapfs repair")
    if backing is None:
        yield from zeroing_plans(_unused_sectors(image))
        no_name = bytes(len(image.header.parent_name))
        alone = image.header._replace(parent_uuid=NULL_UUID, parent_timestamp=0, parent_name=no_name)
        yield _switch(image, alone, None)
        return
    named = image.header._replace(
        parent_uuid=image.header.parent_uuid if parent is None else parent_uuid(parent, op="rebase"),
        parent_timestamp=0,
        parent_name=header_name(backing.name, op="rebase"),
    )
    yield _switch(image, named, backing.name)


def _switch(image: DynamicReader, header: DynamicHeader, name: str | None) -> Plan:
    """The plan that puts a header in the place of the old one; `name` is that of the parent, None for no parent."""
    footer = image.footer._replace(type=DYNAMIC if name is None else DIFFERENCING).sealed()
    end = texts_at = image.footers.place
    length = len(_locators(name, 0).data)
    # What an image without a parent has in its locators says nothing.
    old_texts_at = _old_texts(image.header, length) if image.differencing and name is not None else None
    if old_texts_at is not None:
        texts_at = old_texts_at
    else:
        end += length
    copy_at = end + LENGTH
    first, last = _locators(name, copy_at + dynamic_header.LENGTH), _locators(name, texts_at)
    behind = header._replace(locators=first.locators).sealed().pack() + first.data
    led = footer._replace(data_offset=copy_at).sealed()
    own: list[Step] = [Write(0, texts_at, last.data)] if name is not None else []
    own += [
        Write(0, footer.data_offset, header._replace(locators=last.locators).sealed().pack()),
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


def _locators(name: str | None, offset: int) -> NewLocators:
    return NewLocators((NO_LOCATOR,) * 8, b"") if name is None else new_locators(name, offset)


def _unused_sectors(image: DynamicReader) -> Iterator[Write]:
    """Zeros in the file wherever the bit of a sector is 0 in a block that is there."""
    for index, place in image.table.used():
        if image.batmap is not None and image.batmap.is_full(index):
            continue
        data = place + image.header.bitmap_bytes
        for run in sector_runs(image.bitmap(place), 0, image.block_bytes(index) // SECTOR):
            if not run.present:
                yield from zero_steps(image.file, data + run.first * SECTOR, data + run.stop * SECTOR)


def parent_uuid(parent: Driver, *, op: str) -> bytes:
    """The UUID that names the parent: the null UUID for a raw disk, as tapdisk has it. Raises ImageError."""
    if parent.geometry.identity == Identity() and not isinstance(parent, Identified):
        return NULL_UUID
    if isinstance(parent, UuidNamed) and (uuid := parent.link_uuid) is not None:
        return uuid.bytes_le
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
