"""The metadata region: block size, disk size, sector sizes, identity, parent (docs/specs/vhdx.md, "Metadata")."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.vhdx.guids import guid, guid_text
from tapfs.formats.vhdx.units import MIB
from tapfs.records import NamedTuple

MAX_DISK_BYTES = 64 << 40
MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 1 << 20, 256 << 20
SECTOR_SIZES = (512, 4096)

#: Flags of an item: made by a user, describing the disk and not the file, to be understood.
USER, VIRTUAL_DISK, REQUIRED = 1, 2, 4

FILE_PARAMETERS = guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
SIZE = guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
DISK_ID = guid("beca12ab-b2e6-4523-93ef-c309e000c746")
_LOGICAL_SECTOR = guid("8141bf1d-a96f-4709-ba47-f233a8faab5f")
_PHYSICAL_SECTOR = guid("cda348c7-445d-4471-9cc9-e9885251c556")
LOCATOR = guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_INCOMPLETE = guid("71cc85f0-1b69-4e28-9558-c3bf83ae75d3")

#: Bits of the file parameters.
_LEAVE_ALLOCATED, HAS_PARENT = 1, 2

_SIGNATURE = b"metadata"
COUNT_AT, ENTRIES_AT = 10, 32
MAX_ENTRIES = 2047
TABLE_BYTES = 64 << 10
_MAX_ITEM_BYTES = 1 << 20
#: GUID, offset from the start of the region, length, flags.
ENTRY = struct.Struct("<16sIII4x")
#: The largest copy that is made of items which tapfs does not know.
_MAX_COPIED_BYTES = 1 << 20


class Item(NamedTuple):
    """An item of the metadata; `place` is its range in the file."""

    name: bytes
    flags: int
    place: Range


class Metadata(NamedTuple):
    """What the metadata say. Sizes are bytes; `locator` is the place of the parent locator, if there is a parent."""

    block_size: int
    leave_allocated: bool
    has_parent: bool
    size: int
    disk_id: bytes
    logical_sector: int
    physical_sector: int
    locator: Range | None = None
    #: Items of the disk that tapfs does not know: a new image over this one has them, too.
    unknown_disk_items: tuple[Item, ...] = ()


def pack_metadata(
    metadata: Metadata, *, locator: bytes | None = None, further: Sequence[tuple[bytes, int, bytes]] = ()
) -> bytes:
    """The start of a metadata region; `further` are items (name, flags, bytes) that tapfs does not know."""
    flags = metadata.leave_allocated * _LEAVE_ALLOCATED + metadata.has_parent * HAS_PARENT
    items = [
        (FILE_PARAMETERS, REQUIRED, struct.pack("<II", metadata.block_size, flags)),
        (SIZE, VIRTUAL_DISK | REQUIRED, struct.pack("<Q", metadata.size)),
        (DISK_ID, VIRTUAL_DISK | REQUIRED, metadata.disk_id),
        (_LOGICAL_SECTOR, VIRTUAL_DISK | REQUIRED, struct.pack("<I", metadata.logical_sector)),
        (_PHYSICAL_SECTOR, VIRTUAL_DISK | REQUIRED, struct.pack("<I", metadata.physical_sector)),
        *([] if locator is None else [(LOCATOR, REQUIRED, locator)]),
        *further,
    ]
    table = _SIGNATURE + bytes(2) + len(items).to_bytes(2, "little") + bytes(20)
    content = b""
    for name, item_flags, data in items:
        table += ENTRY.pack(name, TABLE_BYTES + len(content), len(data), item_flags)
        content += data.ljust(-(-len(data) // 8) * 8, b"\0")
    return table.ljust(TABLE_BYTES, b"\0") + content


def read_metadata(file: HostFile, region: Range) -> Metadata:
    """The metadata in their region of a file. Raises ImageError (corrupt, unsupported, out_of_bounds)."""
    return _Parser(file, region).metadata()


class _Parser:
    """One reading of the metadata."""

    def __init__(self, file: HostFile, region: Range) -> None:
        self._file = file
        self._items: dict[bytes, Item] = {}
        unknown: list[Item] = []
        for item in read_items(file, region):
            known = item.name in _LENGTHS
            if item.name == _INCOMPLETE:
                raise self._refusal(ErrorKind.CORRUPT, "its creation was never finished", item)
            if not known and item.flags & REQUIRED:
                message = f"metadata {guid_text(item.name)} are required to be understood, and tapfs does not know them"
                raise self._refusal(ErrorKind.UNSUPPORTED, message, item)
            if known and not item.flags & USER:
                if item.name in self._items:
                    raise self._refusal(ErrorKind.CORRUPT, f"metadata {guid_text(item.name)} are there twice", item)
                self._items[item.name] = item
            elif item.flags & VIRTUAL_DISK:
                unknown.append(item)
        self._unknown = tuple(unknown)
        self._region = region

    def metadata(self) -> Metadata:
        """The known items, each within its limits."""
        parameters = self._read(FILE_PARAMETERS, "file parameters")
        block_size, flags = struct.unpack("<II", parameters)
        if not MIN_BLOCK_BYTES <= block_size <= MAX_BLOCK_BYTES or block_size & (block_size - 1):
            message = f"block size {block_size}, must be a power of two from 1 MiB to 256 MiB"
            raise self._refusal(ErrorKind.CORRUPT, message, self._items[FILE_PARAMETERS])
        logical = self._sector_size(_LOGICAL_SECTOR, "logical")
        physical = self._sector_size(_PHYSICAL_SECTOR, "physical")
        size = int.from_bytes(self._read(SIZE, "disk size"), "little")
        if not 0 < size <= MAX_DISK_BYTES or size % logical:
            message = f"disk size {size:#x}, must be whole sectors of {logical} bytes and at most 64 TiB"
            raise self._refusal(ErrorKind.CORRUPT, message, self._items[SIZE])
        has_parent = flags & HAS_PARENT != 0
        locator = self._items.get(LOCATOR)
        return Metadata(
            block_size,
            flags & _LEAVE_ALLOCATED != 0,
            has_parent,
            size,
            self._read(DISK_ID, "identity of the disk"),
            logical,
            physical,
            locator.place if has_parent and locator is not None else None,
            self._unknown,
        )

    def _sector_size(self, name: bytes, what: str) -> int:
        size = int.from_bytes(self._read(name, f"{what} sector size"), "little")
        if size not in SECTOR_SIZES:
            message = f"{what} sectors of {size} bytes, only 512 and 4096 are known"
            raise self._refusal(ErrorKind.CORRUPT, message, self._items[name])
        return size

    def _read(self, name: bytes, what: str) -> bytes:
        item = self._items.get(name)
        length = _LENGTHS[name]
        if item is None:
            message = f"the metadata have no {what}"
            raise ImageError(ErrorKind.CORRUPT, message, path=self._file.path, offset=self._region.offset, op="open")
        if item.place.length < length:
            raise self._refusal(ErrorKind.CORRUPT, f"the {what} has {item.place.length} bytes, not {length}", item)
        return self._file.read(item.place.offset, length).ljust(length, b"\0")

    def _refusal(self, kind: ErrorKind, message: str, item: Item) -> ImageError:
        return ImageError(kind, message, path=self._file.path, offset=item.place.offset, op="open")


#: The known items and their least lengths in bytes.
_LENGTHS = {FILE_PARAMETERS: 8, SIZE: 8, DISK_ID: 16, _LOGICAL_SECTOR: 4, _PHYSICAL_SECTOR: 4, LOCATOR: 20}


def read_items(file: HostFile, region: Range) -> list[Item]:
    """All items, in the order of their table. Raises ImageError(corrupt)."""

    def refuse(message: str, field: int) -> ImageError:
        return ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=region.offset + field, op="open")

    head = file.read(region.offset, ENTRIES_AT)
    if len(head) < ENTRIES_AT or not head.startswith(_SIGNATURE):
        raise refuse("there is no metadata table", 0)
    count = int.from_bytes(head[COUNT_AT : COUNT_AT + 2], "little")
    if count > MAX_ENTRIES:
        raise refuse(f"{count} items of metadata, the limit is {MAX_ENTRIES}", COUNT_AT)
    raw = file.read(region.offset + ENTRIES_AT, count * ENTRY.size).ljust(count * ENTRY.size, b"\0")
    found: list[Item] = []
    for index, (name, offset, length, flags) in enumerate(ENTRY.iter_unpack(raw)):
        # An item without bytes has no place.
        empty = not offset and not length
        beyond = offset < TABLE_BYTES or length > _MAX_ITEM_BYTES or offset + length > region.length
        if beyond and not empty:
            message = f"metadata {guid_text(name)} at [{offset:#x}, {offset + length:#x}) of their region"
            raise refuse(f"{message}, where none can be", ENTRIES_AT + index * ENTRY.size)
        found.append(Item(name, flags, Range(region.offset + offset, length)))
    return found


def item_place(file: HostFile, region: Range, name: bytes) -> Range:
    """The place in the file of an item of metadata that were read before."""
    return next(item.place for item in read_items(file, region) if item.name == name and not item.flags & USER)


def copied_items(file: HostFile, metadata: Metadata) -> list[tuple[bytes, int, bytes]]:
    """The items of a parent that a new image over it takes along, for `pack_metadata`."""
    copied: list[tuple[bytes, int, bytes]] = []
    left = _MAX_COPIED_BYTES - MIB // 4
    for item in metadata.unknown_disk_items:
        left -= item.place.length + ENTRY.size
        if left >= 0:
            copied.append((item.name, item.flags, file.read(item.place.offset, item.place.length)))
    return copied
