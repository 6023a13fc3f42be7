"""The two region tables: the places of the block table and of the metadata (docs/specs/vhdx.md, "Header section")."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tapfs.driver import Finding, HostFile, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.vhdx.crc32c import crc32c_without
from tapfs.formats.vhdx.guids import guid, guid_text
from tapfs.formats.vhdx.units import HEADER_SECTION, MAX_FILE_BYTES, MIB, PAGE
from tapfs.records import NamedTuple

#: The places of the two tables, and their length.
TABLES = (192 << 10, 256 << 10)
TABLE_BYTES = 64 << 10

BAT = guid("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")

_SIGNATURE = b"regi"
_CRC_AT, _COUNT_AT, _ENTRIES_AT = 4, 8, 16
_MAX_ENTRIES = 2047
#: GUID, offset, length, flags of which bit 0 means "required".
_ENTRY = struct.Struct("<16sQII")


class Regions(NamedTuple):
    """The regions of a file; `others` are those of which only the place is known.

    `damaged` are the numbers of the tables that are not whole.
    """

    bat: Range
    metadata: Range
    others: tuple[Range, ...]
    damaged: tuple[int, ...]

    @property
    def all(self) -> tuple[Range, ...]:
        """Every region."""
        return (self.bat, self.metadata, *self.others)

    @property
    def findings(self) -> list[Finding]:
        """The damaged table, if there is one."""
        return [
            Finding(Severity.NOTE, f"region table {number + 1} is damaged; the other one is whole", TABLES[number])
            for number in self.damaged
        ]


def pack_table(regions: Sequence[tuple[bytes, Range]]) -> bytes:
    """A table on disk, 64 KiB; every region is required."""
    raw = _SIGNATURE + bytes(4) + len(regions).to_bytes(8, "little")
    raw += b"".join(_ENTRY.pack(name, place.offset, place.length, 1) for name, place in regions)
    raw = raw.ljust(TABLE_BYTES, b"\0")
    return raw[:_CRC_AT] + crc32c_without(raw, _CRC_AT).to_bytes(4, "little") + raw[_CRC_AT + 4 :]


def read_regions(file: HostFile, log: Range) -> Regions:
    """The regions by the first table that is whole; `log` is where no region may lie.

    Raises ImageError: corrupt where neither is whole or the places cannot be true, unsupported for a region that must
    be understood and is not.
    """
    damaged: list[int] = []
    for number, at in enumerate(TABLES):
        raw = file.read(at, TABLE_BYTES)
        if _is_whole(raw):
            # The second table is a copy: it is looked at here only if the first is damaged.
            return _parse(raw, at, file, log, tuple(damaged))
        damaged.append(number)
    raise ImageError(
        ErrorKind.CORRUPT,
        "both region tables are damaged: no checksum fits",
        path=file.path,
        offset=TABLES[0],
        op="open",
    )


def moved_block_table(file: HostFile, place: Range) -> bytes:
    """The first page of a region table as the one that counts, but with the block table at `place`.

    Nothing but the first page changes, because there the checksum and the first regions are.
    Raises ImageError(unsupported) where the block table is not among these.
    """
    raw = bytearray(next(raw for raw in (file.read(at, TABLE_BYTES) for at in TABLES) if _is_whole(raw)))
    for at in range(_ENTRIES_AT, PAGE - _ENTRY.size, _ENTRY.size):
        name, _, _, flags = _ENTRY.unpack_from(raw, at)
        if name == BAT:
            _ENTRY.pack_into(raw, at, name, place.offset, place.length, flags)
            raw[_CRC_AT : _CRC_AT + 4] = crc32c_without(bytes(raw), _CRC_AT).to_bytes(4, "little")
            return bytes(raw[:PAGE])
    message = "the block table is not among the first regions of the region table"
    raise ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, offset=TABLES[0], op="resize")


def whole_tables(file: HostFile) -> list[bool]:
    """Of each table whether it is whole."""
    return [_is_whole(file.read(at, TABLE_BYTES)) for at in TABLES]


def _is_whole(raw: bytes) -> bool:
    if len(raw) < TABLE_BYTES or not raw.startswith(_SIGNATURE):
        return False
    return crc32c_without(raw, _CRC_AT) == int.from_bytes(raw[_CRC_AT : _CRC_AT + 4], "little")


def _parse(raw: bytes, at: int, file: HostFile, log: Range, damaged: tuple[int, ...]) -> Regions:
    def refuse(kind: ErrorKind, message: str, field: int) -> ImageError:
        return ImageError(kind, message, path=file.path, offset=at + field, op="open")

    count = int.from_bytes(raw[_COUNT_AT : _COUNT_AT + 4], "little")
    if count > _MAX_ENTRIES:
        raise refuse(ErrorKind.CORRUPT, f"{count} regions, the limit is {_MAX_ENTRIES}", _COUNT_AT)
    known: dict[bytes, Range] = {}
    others: list[Range] = []
    places: list[tuple[Range, int]] = []
    for index in range(count):
        field = _ENTRIES_AT + index * _ENTRY.size
        name, offset, length, flags = _ENTRY.unpack_from(raw, field)
        place = Range(offset, length)
        if offset < HEADER_SECTION or offset % MIB or length % MIB or not length or place.end > MAX_FILE_BYTES:
            message = f"region {guid_text(name)} at [{offset:#x}, {place.end:#x}), where none can be"
            raise refuse(ErrorKind.CORRUPT, message, field)
        if name in {BAT, METADATA}:
            if name in known:
                raise refuse(ErrorKind.CORRUPT, f"region {guid_text(name)} is there twice", field)
            known[name] = place
        elif flags & 1:
            message = f"region {guid_text(name)} is required to be understood, and tapfs does not know it"
            raise refuse(ErrorKind.UNSUPPORTED, message, field)
        else:
            others.append(place)
        places.append((place, field))
    for name, what in ((BAT, "block table"), (METADATA, "metadata")):
        if name not in known:
            raise refuse(ErrorKind.CORRUPT, f"there is no region of the {what}", _COUNT_AT)
        if known[name].end > file.size():
            raise refuse(ErrorKind.CORRUPT, f"the region of the {what} lies past the end of the file", _ENTRIES_AT)
    _check_overlaps([*places, (log, _ENTRIES_AT)] if log.length else places, refuse_at=at, file=file)
    return Regions(known[BAT], known[METADATA], tuple(others), damaged)


def _check_overlaps(places: list[tuple[Range, int]], *, refuse_at: int, file: HostFile) -> None:
    end = 0
    for place, field in sorted(places):
        if place.offset < end:
            message = f"regions overlap each other or the log at {place.offset:#x}"
            raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=refuse_at + field, op="open")
        end = place.end
