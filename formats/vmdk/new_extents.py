"""New, empty sparse extents: their headers, directories and tables.

A hosted extent gets all of its tables twice from the start, because VMware takes no holes in a grain directory. They
are zeros, and so holes of the host file. An extent of ESX gets its tables when they are needed.
"""

from __future__ import annotations

import sys
from array import array

from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk import cowd_header
from tapfs.formats.vmdk.cowd_header import CowdHeader
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.sparse_header import (
    COMPRESSION_DEFLATE,
    DIRECTORY_AT_END,
    FLAG_COMPRESSED,
    FLAG_MARKERS,
    FLAG_NEWLINES,
    FLAG_REDUNDANT,
    FLAG_ZEROED_GRAINS,
    SparseHeader,
)
from tapfs.plan import Grow, Step, Write

#: The grain of new hosted extents, and the entries of their tables: no other values are usual.
GRAIN_SECTORS = 128
TABLE_ENTRIES = 512

#: Sectors that an embedded descriptor gets: it can grow.
DESCRIPTOR_SECTORS = 20

_TABLE_SECTORS = TABLE_ENTRIES * 4 // SECTOR


def hosted_steps(number: int, length: int, text: bytes, *, zeroed: bool) -> list[Step]:
    """The steps that make host file `number` a hosted extent of `length` bytes; `text` is embedded."""
    first = 1 + (DESCRIPTOR_SECTORS if text else 0)
    empty = SparseHeader(
        version=2 if zeroed else 1,
        flags=FLAG_NEWLINES | FLAG_REDUNDANT | (FLAG_ZEROED_GRAINS if zeroed else 0),
        capacity_sectors=length // SECTOR,
        grain_sectors=GRAIN_SECTORS,
        descriptor_sector=1 if text else 0,
        descriptor_sectors=DESCRIPTOR_SECTORS if text else 0,
        table_entries=TABLE_ENTRIES,
        redundant_sector=first,
        directory_sector=0,
        overhead_sectors=0,
    )
    tables = empty.directory_entries
    directory_sectors = empty.directory_bytes // SECTOR
    second = first + directory_sectors + tables * _TABLE_SECTORS
    overhead = round_up(second + directory_sectors + tables * _TABLE_SECTORS, GRAIN_SECTORS)
    header = empty._replace(directory_sector=second, overhead_sectors=overhead)
    return [
        Grow(number, overhead * SECTOR),
        Write(number, 0, header.pack() + text),
        Write(number, first * SECTOR, _directory(first + directory_sectors, tables)),
        Write(number, second * SECTOR, _directory(second + directory_sectors, tables)),
    ]


def packed_header(length: int) -> SparseHeader:
    """The header of a streamOptimized extent of `length` bytes, whose directory and footer are at the end."""
    return SparseHeader(
        version=3,
        flags=FLAG_NEWLINES | FLAG_COMPRESSED | FLAG_MARKERS,
        capacity_sectors=length // SECTOR,
        grain_sectors=GRAIN_SECTORS,
        descriptor_sector=1,
        descriptor_sectors=DESCRIPTOR_SECTORS,
        table_entries=TABLE_ENTRIES,
        redundant_sector=0,
        directory_sector=DIRECTORY_AT_END,
        overhead_sectors=GRAIN_SECTORS,
        compression=COMPRESSION_DEFLATE,
    )


def cowd_steps(number: int, length: int) -> list[Step]:
    """The steps that make host file `number` an extent of ESX of `length` bytes."""
    sectors = length // SECTOR
    entries = -(-sectors // cowd_header.TABLE_ENTRIES)
    free = cowd_header.DIRECTORY_SECTOR + -(-entries * 4 // SECTOR)
    header = CowdHeader(
        version=cowd_header.VERSION,
        flags=cowd_header.FLAGS,
        capacity_sectors=sectors,
        grain_sectors=1,
        directory_sector=cowd_header.DIRECTORY_SECTOR,
        directory_entries=entries,
        next_free_sector=free,
    )
    return [Grow(number, free * SECTOR), Write(number, 0, header.pack())]


def _directory(first: int, tables: int) -> bytes:
    """The entries of a directory whose tables follow one another from sector `first` on."""
    entries = array("I", range(first, first + tables * _TABLE_SECTORS, _TABLE_SECTORS))
    if sys.byteorder == "big":
        entries.byteswap()
    return entries.tobytes()
