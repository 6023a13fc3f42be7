"""One sparse extent in a host file: its header, whatever kind it is, and its grain tables."""

from __future__ import annotations

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk import cowd_header, sesparse_header
from tapfs.formats.vmdk.cowd_header import CowdHeader, parse_cowd_header
from tapfs.formats.vmdk.grain_runs import EntryRules
from tapfs.formats.vmdk.grain_tables import GrainLayout, GrainTables
from tapfs.formats.vmdk.markers import GRAIN_HEADER, GRAIN_LENGTH_BYTES, Trailer, find_trailer
from tapfs.formats.vmdk.sectors import MAX_BYTES, SECTOR
from tapfs.formats.vmdk.sesparse_header import SeSparseHeader, read_sesparse_header
from tapfs.formats.vmdk.sesparse_tables import SeSparseTables
from tapfs.formats.vmdk.sparse_header import (
    DESCRIPTOR_AT,
    DIRECTORY_AT,
    MAGIC,
    REDUNDANT_AT,
    UNFINISHED_MAGIC,
    SparseHeader,
    parse_sparse_header,
)
from tapfs.records import dataclass


@dataclass(frozen=True, slots=True)
class HostedExtent:
    """A hosted sparse extent in host file `number`. `header` has the place of the directory that counts."""

    number: int
    file: HostFile
    header: SparseHeader
    trailer: Trailer
    tables: GrainTables

    kind = "sparse"

    @property
    def capacity(self) -> int:
        """Bytes of the disk that the extent can hold."""
        return self.header.capacity

    @property
    def unclean(self) -> bool:
        """Whether the extent was not closed after it was written."""
        return bool(self.header.unclean)

    @property
    def header_bytes(self) -> int:
        """Bytes before the payload of a packed grain; 0 if the grains are not packed."""
        if not self.header.is_compressed:
            return 0
        return GRAIN_HEADER.size if self.header.has_markers else GRAIN_LENGTH_BYTES


@dataclass(frozen=True, slots=True)
class CowdExtent:
    """A sparse extent of ESX."""

    number: int
    file: HostFile
    header: CowdHeader
    tables: GrainTables

    kind = "vmfsSparse"
    header_bytes = 0

    @property
    def capacity(self) -> int:
        """Bytes of the disk that the extent can hold."""
        return self.header.capacity_sectors * SECTOR

    @property
    def unclean(self) -> bool:
        """Whether the extent was not closed after it was written."""
        return bool(self.header.unclean)


@dataclass(frozen=True, slots=True)
class SeSparseExtent:
    """A space-efficient sparse extent of ESXi."""

    number: int
    file: HostFile
    header: SeSparseHeader
    tables: SeSparseTables

    kind = "seSparse"
    header_bytes = 0
    unclean = False

    @property
    def capacity(self) -> int:
        """Bytes of the disk that the extent can hold."""
        return self.header.capacity


HostExtent = HostedExtent | CowdExtent | SeSparseExtent


def open_host_extent(number: int, file: HostFile, *, strict: bool = False) -> HostExtent:
    """The sparse extent in a host file, by the first bytes of the file.

    `strict`: see `GrainTables`. Raises ImageError: invalid_format for a file that holds none, unsupported,
    out_of_bounds, corrupt.
    """
    head = file.read(0, cowd_header.HEADER_BYTES)
    if head.startswith((MAGIC, UNFINISHED_MAGIC)):
        return open_hosted_extent(number, file, strict=strict)
    if head.startswith(cowd_header.MAGIC):
        return _cowd(number, file, parse_cowd_header(head, file.path), strict=strict)
    if head.startswith(sesparse_header.MAGIC_BYTES):
        header = read_sesparse_header(file)
        return SeSparseExtent(number, file, header, SeSparseTables(file, header))
    raise ImageError(
        ErrorKind.INVALID_FORMAT,
        "is named as a sparse extent of a VMDK, and holds none",
        path=file.path,
        offset=0,
        op="open",
    )


def open_hosted_extent(number: int, file: HostFile, *, strict: bool = False) -> HostedExtent:
    """The hosted sparse extent in a host file; see `open_host_extent`."""
    trailer = find_trailer(file, parse_sparse_header(file.read(0, SECTOR), file.path))
    header = trailer.header
    _check_places(file, header)
    layout = GrainLayout(
        grain=header.grain,
        table_entries=header.table_entries,
        directory_at=header.directory_sector * SECTOR,
        directory_entries=header.directory_entries,
        rules=EntryRules(header.grain_sectors, zeroed=header.has_zeroed_grains, packed=header.is_compressed),
        metadata=_metadata(header),
        redundant_at=header.redundant_sector * SECTOR if header.has_redundant else 0,
    )
    tables = GrainTables(file, layout, strict=strict, unclean=bool(header.unclean))
    return HostedExtent(number, file, header, trailer, tables)


def _metadata(header: SparseHeader) -> tuple[tuple[int, int], ...]:
    """The ranges of what is neither a table nor a grain: the header first, together with a descriptor behind it."""
    descriptor = (header.descriptor_sector * SECTOR, (header.descriptor_sector + header.descriptor_sectors) * SECTOR)
    first = (0, descriptor[1]) if descriptor[0] == SECTOR else (0, SECTOR)
    ranges: list[tuple[int, int]] = [first] if descriptor[0] <= SECTOR else [first, descriptor]
    directories = [header.directory_sector, *([header.redundant_sector] if header.has_redundant else [])]
    ranges += [(sector * SECTOR, sector * SECTOR + header.directory_bytes) for sector in directories]
    return tuple(ranges)


def _check_places(file: HostFile, header: SparseHeader) -> None:
    for sector, field in ((header.directory_sector, DIRECTORY_AT), (header.redundant_sector, REDUNDANT_AT)):
        if sector * SECTOR >= MAX_BYTES:
            message = f"a grain directory lies at sector {sector:#x}, behind the end of any file"
            raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=field, op="open")
    end = (header.descriptor_sector + header.descriptor_sectors) * SECTOR
    if header.descriptor_sector and end > file.size():
        message = f"the descriptor lies past the end of the file ({file.size():#x})"
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=DESCRIPTOR_AT, op="open")


def _cowd(number: int, file: HostFile, header: CowdHeader, *, strict: bool) -> CowdExtent:
    place = header.directory_sector * SECTOR
    length = header.needed_entries * 4
    layout = GrainLayout(
        grain=header.grain,
        table_entries=cowd_header.TABLE_ENTRIES,
        directory_at=place,
        directory_entries=header.needed_entries,
        rules=EntryRules(header.grain_sectors),
        metadata=((0, cowd_header.HEADER_BYTES), (place, place + round_up(length, SECTOR))),
    )
    return CowdExtent(number, file, header, GrainTables(file, layout, strict=strict))
