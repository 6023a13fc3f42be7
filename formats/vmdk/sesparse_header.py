"""The headers of a space-efficient sparse extent ("seSparse") of ESXi: limits and parsing.

docs/specs/vmdk.md, "seSparse (all u64)". The first header never changes. It says where the areas of the file are; the
second, volatile one says whether a journal waits to be replayed.
"""

from __future__ import annotations

import struct

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk.sectors import MAX_BYTES, SECTOR
from tapfs.formats.vmdk.signature import SESPARSE
from tapfs.records import NamedTuple

MAGIC_BYTES = SESPARSE
VOLATILE_MAGIC = 0xCAFECAFE
VERSION = 0x200000001

GRAIN_SECTORS = 8
TABLE_SECTORS = 64
ENTRY_BYTES = 8
TABLE_ENTRIES = TABLE_SECTORS * SECTOR // ENTRY_BYTES
MAX_DIRECTORY_BYTES = 128 << 20

_LAYOUT = struct.Struct("<26Q")
_VOLATILE = struct.Struct("<4Q")

#: Why nobody but ESXi writes such an extent (docs/specs/vmdk.md, "What tapfs decides where readers disagree").
NOT_WRITTEN = "VMware has not published its journal, its free bitmap and its map from grains to entries"

#: The first word of the area after the four reserved words, and the areas in the order of the header.
_AREAS_AT = 10
AREAS = ("volatile header", "journal header", "journal", "directory", "tables", "free bitmap", "backmap", "grains")


class Area(NamedTuple):
    """A range of the host file, in bytes."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after the area."""
        return self.start + self.length


class SeSparseHeader(NamedTuple):
    """The fields that vary, in bytes."""

    capacity: int
    grain: int
    directory: Area
    tables: Area
    grains: Area
    #: The end of everything that is no grain.
    metadata_end: int

    @property
    def directory_entries(self) -> int:
        """Directory entries that the capacity needs."""
        return -(-self.capacity // (self.grain * TABLE_ENTRIES))


def read_sesparse_header(file: HostFile) -> SeSparseHeader:
    """The header of a host file, once its journal is known to be empty.

    Raises ImageError with the byte offset of the field: invalid_format, unsupported, out_of_bounds, corrupt.
    """

    def refuse(kind: ErrorKind, message: str, word: int, remedy: str | None = None) -> ImageError:
        return ImageError(kind, message, path=file.path, offset=8 * word, op="open", remedy=remedy)

    raw = file.read(0, SECTOR)
    if len(raw) < SECTOR or not raw.startswith(MAGIC_BYTES):
        raise refuse(ErrorKind.INVALID_FORMAT, "not a seSparse extent: no whole header", 0)
    words = _LAYOUT.unpack_from(raw)
    version, capacity_sectors, grain_sectors, table_sectors = words[1:5]
    if version != VERSION:
        raise refuse(ErrorKind.UNSUPPORTED, f"seSparse version {version:#x}, only {VERSION:#x} is known", 1)
    if grain_sectors != GRAIN_SECTORS or table_sectors != TABLE_SECTORS:
        message = f"grains of {grain_sectors} and tables of {table_sectors} sectors: only 8 and 64 are known"
        raise refuse(ErrorKind.UNSUPPORTED, message, 3)
    if words[5]:
        raise refuse(ErrorKind.UNSUPPORTED, f"the flags are {words[5]:#x}, and none is known", 5)
    if capacity_sectors * SECTOR >= MAX_BYTES:
        raise refuse(ErrorKind.OUT_OF_BOUNDS, f"capacity of {capacity_sectors} sectors", 2)
    areas: dict[str, Area] = {}
    for number, name in enumerate(AREAS):
        word = _AREAS_AT + 2 * number
        start, length = words[word] * SECTOR, words[word + 1] * SECTOR
        if start + length >= MAX_BYTES:
            raise refuse(ErrorKind.OUT_OF_BOUNDS, f"the {name} lies at {start:#x}, {length:#x} bytes long", word)
        areas[name] = Area(start, length)
    header = SeSparseHeader(
        capacity_sectors * SECTOR,
        grain_sectors * SECTOR,
        areas["directory"],
        areas["tables"],
        areas["grains"],
        max(area.end for name, area in areas.items() if name != "grains"),
    )
    needed = header.directory_entries * ENTRY_BYTES
    if needed > min(header.directory.length, MAX_DIRECTORY_BYTES):
        message = f"the directory has {header.directory.length} bytes, the capacity needs {needed}"
        raise refuse(ErrorKind.CORRUPT, message, _AREAS_AT + 2 * AREAS.index("directory"))
    if header.directory.start + needed > file.size():
        message = "the directory lies past the end of the file"
        raise refuse(ErrorKind.CORRUPT, message, _AREAS_AT + 2 * AREAS.index("directory"))
    if header.grains.start < header.metadata_end:
        message = "the grains begin before the end of the metadata"
        raise refuse(ErrorKind.CORRUPT, message, _AREAS_AT + 2 * AREAS.index("grains"))
    _require_clean(file, areas["volatile header"])
    return header


def _require_clean(file: HostFile, area: Area) -> None:
    raw = file.read(area.start, _VOLATILE.size)
    if len(raw) < _VOLATILE.size or int.from_bytes(raw[:8], "little") != VOLATILE_MAGIC:
        message = "the volatile header of the seSparse extent is missing"
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=area.start, op="open")
    if _VOLATILE.unpack(raw)[3]:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "has a journal that waits to be replayed, which only ESXi can do",
            path=file.path,
            offset=area.start + 24,
            op="open",
            remedy="power the virtual machine on and off on its host, or consolidate its snapshots there",
        )
