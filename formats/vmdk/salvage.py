"""Salvages a VMDK whose grain directory, footer or header is lost: packed extents by their markers, others by place.

A packed grain of a streamOptimized extent has its sector on the disk before it, so all of them are found, also in a
download that broke off (docs/specs/vmdk.md, "streamOptimized"). The tables of other hosted extents say nothing of the
sort, but their places follow from each other: a directory, and behind it all grain tables in their order, which is how
VMware, QEMU and VirtualBox lay them out.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.driver import HostFile, Salvage, SalvageRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.changed_table import encode
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk.cowd_header import MAGIC as COWD_MAGIC
from tapfs.formats.vmdk.descriptor import MAX_BYTES_OF_TEXT, Descriptor, parse_descriptor
from tapfs.formats.vmdk.grain_runs import packed_bound
from tapfs.formats.vmdk.grain_tables import decoded
from tapfs.formats.vmdk.markers import GRAIN_HEADER, Marker, MarkerType, find_trailer
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.sesparse_header import MAGIC_BYTES as SESPARSE_MAGIC
from tapfs.formats.vmdk.signature import is_descriptor
from tapfs.formats.vmdk.sparse_header import (
    COMPRESSION_DEFLATE,
    DIRECTORY_AT_END,
    FLAG_COMPRESSED,
    FLAG_MARKERS,
    FLAG_NEWLINES,
    FLAG_REDUNDANT,
    SparseHeader,
    parse_sparse_header,
)
from tapfs.plan import Plan, Step, Write, plan
from tapfs.records import NamedTuple

#: The sectors of a grain and the entries of a table that every writer takes by itself.
_GRAIN_SECTORS, _TABLE_ENTRIES = 128, 512
#: A descriptor and the directories are looked for so far from the start.
_HEAD_BYTES = 4 << 20
_PIECE = 1 << 20
#: The first byte of a zlib stream with the usual window.
_ZLIB = 0x78


def salvage(file: HostFile, request: SalvageRequest) -> Salvage:
    """See :meth:`tapfs.salvage.SalvageableFormat.salvage`. Of a disk in several files the descriptor must be whole."""
    head = file.read(0, SECTOR)
    if is_descriptor(head) or head.startswith((COWD_MAGIC, SESPARSE_MAGIC)):
        return Salvage()  # its extents are read as they are
    rebuilt: list[str] = []
    header: SparseHeader | None = None
    try:
        header = parse_sparse_header(head, file.path)
    except ImageError as error:
        rebuilt.append(f"the header, which cannot be used: {error.message}")
    found = _find_descriptor(file, header)
    if header is None:
        header = _new_header(file, found, request)
    if header.is_compressed and header.has_markers:
        return _of_markers(file, header, rebuilt)
    if rebuilt:
        return _with_directories(file, header, rebuilt, size_given=request.virtual_size is not None)
    return _checked(file, header)


# -- packed extents ---------------------------------------------------------------------------------


class _Grain(NamedTuple):
    """A packed grain: its sector on the disk, and its place and end in the file."""

    lba: int
    place: int
    end: int


def _of_markers(file: HostFile, header: SparseHeader, rebuilt: list[str]) -> Salvage:
    """The tables of a packed extent by the markers of its grains, if the directory is not there or is not whole."""
    whole = _is_whole(file, header)
    if whole and not rebuilt:
        return Salvage()
    size = file.size()
    directory = array("I", bytes(4 * header.directory_entries))
    tables: dict[int, array[int]] = {}
    doubts: list[str] = []
    unplaced: list[Range] = []
    grains = 0
    for grain in _grains(file, header, header.overhead_sectors * SECTOR, unplaced):
        index, entry = divmod(grain.lba // header.grain_sectors, header.table_entries)
        if index not in tables:
            tables[index] = array("I", bytes(header.table_bytes))
        tables[index][entry] = grain.place // SECTOR
        grains += 1
    if not grains:
        raise ImageError(ErrorKind.INVALID_FORMAT, "no grain of a VMDK is in the file", path=file.path, op="salvage")
    # One piece behind the file: the directory, and the tables behind it.
    place = round_up(size, SECTOR)
    at = place + header.directory_bytes
    packed: list[bytes] = []
    for index, table in sorted(tables.items()):
        directory[index] = at // SECTOR
        packed.append(encode(table, "little"))
        at += header.table_bytes
    first = encode(directory, "little").ljust(header.directory_bytes, b"\0")
    sized = header._replace(directory_sector=place // SECTOR, redundant_sector=0)
    rebuilt.append(f"the grain directory and {len(tables)} grain tables, by the markers of {grains} grains")
    if not whole:
        doubts.append(
            "no directory says which grains there were, so those that were not found read as if they had never been"
            f" written: the last one that was found is of byte {_last(tables, header)} of the disk"
        )
    if unplaced:
        lost = sum(each.length for each in unplaced)
        doubts.append(f"{lost} bytes of the file, from {unplaced[0].offset:#x} on, are neither grains nor markers")
    patch = plan([Write(0, 0, sized.pack()), Write(0, place, b"".join((first, *packed)))])
    return Salvage(patch, tuple(rebuilt), tuple(doubts), tuple(unplaced))


def _is_whole(file: HostFile, header: SparseHeader) -> bool:
    """Whether the directory of a packed extent is there, and leads to tables inside the file."""
    try:
        trailer = find_trailer(file, header)
    except ImageError:
        return False
    size, place = file.size(), trailer.header.directory_sector * SECTOR
    if trailer.header.directory_sector == DIRECTORY_AT_END or place + header.directory_bytes > size:
        return False
    tables = decoded(file.read(place, header.directory_bytes))
    return all(sector * SECTOR + header.table_bytes <= size for sector in tables if sector)


def _grains(file: HostFile, header: SparseHeader, start: int, skipped: list[Range]) -> Iterator[_Grain]:
    """The grains behind the header, in the order of the file; what is no grain and no marker is added to `skipped`."""
    size = file.size()
    markers = {
        Marker(header.table_bytes // SECTOR, MarkerType.TABLE).pack(),
        Marker(header.directory_bytes // SECTOR, MarkerType.DIRECTORY).pack(),
        Marker(1, MarkerType.FOOTER).pack(),
    }
    at = start
    while at + GRAIN_HEADER.size <= size:
        raw = file.read(at, SECTOR)
        lba, length = GRAIN_HEADER.unpack_from(raw)
        end = at + round_up(GRAIN_HEADER.size + length, SECTOR)
        if _may_be_grain(header, lba, length, raw) and at + GRAIN_HEADER.size + length <= size:
            yield _Grain(lba, at, end)
            at = end
            continue
        if raw in markers:
            at += SECTOR * (1 + lba)
            continue
        if skipped and skipped[-1].end == at:
            skipped[-1] = Range(skipped[-1].offset, skipped[-1].length + min(SECTOR, size - at))
        elif raw.strip(b"\0"):  # the marker of the end is zeros
            skipped.append(Range(at, min(SECTOR, size - at)))
        at += SECTOR


def _may_be_grain(header: SparseHeader, lba: int, length: int, raw: bytes) -> bool:
    return (
        0 < length <= packed_bound(header.grain)
        and lba < header.capacity_sectors
        and lba % header.grain_sectors == 0
        and raw[GRAIN_HEADER.size] & 0x0F == _ZLIB & 0x0F
        and int.from_bytes(raw[GRAIN_HEADER.size : GRAIN_HEADER.size + 2], "big") % 31 == 0
    )


def _last(tables: dict[int, array[int]], header: SparseHeader) -> int:
    index = max(tables)
    entry = max(number for number, sector in enumerate(tables[index]) if sector)
    return (index * header.table_entries + entry) * header.grain


# -- the header -------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """A descriptor in a file, and its place and space in sectors."""

    descriptor: Descriptor
    sector: int
    sectors: int


def _find_descriptor(file: HostFile, header: SparseHeader | None) -> _Found | None:
    """The embedded descriptor, where the header says or in one of the first sectors; None if there is none."""
    sectors = [1] if header is None else [header.descriptor_sector or 1]
    sectors += range(1, 64)
    for sector in sectors:
        raw = file.read(sector * SECTOR, MAX_BYTES_OF_TEXT)
        # An embedded text may begin with any of its lines (`parse_descriptor`).
        if not is_descriptor(raw[:SECTOR]) and b"createType" not in raw[:SECTOR]:
            continue
        text = raw.split(b"\0", 1)[0]
        try:
            return _Found(parse_descriptor(text, file.path, sector * SECTOR), sector, -(-len(text) // SECTOR))
        except ImageError:
            continue
    return None


def _new_header(file: HostFile, found: _Found | None, request: SalvageRequest) -> SparseHeader:
    """A header by the descriptor and what the user knows. Raises ImageError(invalid_format) without a size."""
    size = request.virtual_size
    if size is None and found is not None and len(found.descriptor.extents) == 1:
        size = found.descriptor.extents[0].length
    if size is None:
        raise ImageError(
            ErrorKind.INVALID_FORMAT,
            "the header of the VMDK is lost, and no descriptor says how large the disk is",
            path=file.path,
            op="salvage",
            remedy="say how large it is, as its size in bytes",
        )
    packed = found is not None and found.descriptor.value("createType").lower() == "streamoptimized"
    flags = FLAG_NEWLINES | (FLAG_COMPRESSED | FLAG_MARKERS if packed else 0)
    grain = _GRAIN_SECTORS if request.cluster_bytes is None else request.cluster_bytes // SECTOR
    header = SparseHeader(
        version=3 if packed else 1,
        flags=flags,
        capacity_sectors=-(-size // SECTOR),
        grain_sectors=grain,
        descriptor_sector=0 if found is None else found.sector,
        descriptor_sectors=0 if found is None else found.sectors,
        table_entries=_TABLE_ENTRIES,
        redundant_sector=0,
        directory_sector=DIRECTORY_AT_END if packed else 0,
        overhead_sectors=1 if found is None else found.sector + found.sectors,
        compression=COMPRESSION_DEFLATE if packed else 0,
    )
    return parse_sparse_header(header.pack(), file.path)


def _with_directories(file: HostFile, header: SparseHeader, rebuilt: list[str], *, size_given: bool) -> Salvage:
    """The header of an extent that is not packed, with the places of its directories."""
    places = list(_directories(file, header))
    if not places:
        message = "no grain directory of a disk of this size is in the file"
        remedy = "see whether the size that you know is right" if size_given else None
        raise ImageError(ErrorKind.INVALID_FORMAT, message, path=file.path, op="salvage", remedy=remedy)
    header = header._replace(directory_sector=places[-1], overhead_sectors=places[-1])
    if len(places) > 1:
        header = header._replace(redundant_sector=places[0], flags=header.flags | FLAG_REDUNDANT)
    rebuilt.append(f"the places of {len(places)} grain directories: sectors {', '.join(map(str, places[:2]))}")
    return Salvage(plan([Write(0, 0, header.pack())]), tuple(rebuilt))


def _directories(file: HostFile, header: SparseHeader) -> Iterator[int]:
    """The sectors of the directories: each leads to tables that lie behind it in their order."""
    tables = header.table_bytes // SECTOR
    count, space = header.directory_entries, header.directory_bytes // SECTOR
    raw = file.read(0, _HEAD_BYTES + 2 * header.directory_bytes)
    for sector in range(1, len(raw) // SECTOR):
        first = int.from_bytes(raw[sector * SECTOR : sector * SECTOR + 4], "little")
        if not sector < first <= sector + space + _GRAIN_SECTORS:
            continue
        entries = raw[sector * SECTOR : sector * SECTOR + 4 * count]
        if len(entries) < 4 * count:
            return
        words = decoded(entries)
        if words == array("I", range(first, first + count * tables, tables)):
            yield sector


# -- directories of extents whose header is good ----------------------------------------------------


def _checked(file: HostFile, header: SparseHeader) -> Salvage:
    """Entries of the grain directory that cannot be true, and whose twins cannot either, by the order of the tables."""
    size, tables = file.size(), header.table_bytes // SECTOR
    place = header.directory_sector * SECTOR
    if place + header.directory_bytes > size:
        lost = "the grain directory, which lies behind the end of the file"
        return _with_directories(file, header, [lost], size_given=False)
    own = decoded(file.read(place, header.directory_bytes))[: header.directory_entries]
    twin_place = header.redundant_sector * SECTOR
    has_twin = header.has_redundant and twin_place + header.directory_bytes <= size
    twin = decoded(file.read(twin_place, header.directory_bytes))[: header.directory_entries] if has_twin else own
    bad = {
        index
        for index in range(header.directory_entries)
        if not _possible(own[index], size, header) and not _possible(twin[index], size, header)
    }
    good = {own[index] - tables * index for index in range(len(own)) if own[index] and index not in bad}
    if not bad or len(good) != 1:
        return Salvage()  # the driver says what is wrong
    (start,) = good
    writes: list[Step] = []
    for index in sorted(bad):
        sector = start + tables * index
        if _possible(sector, size, header):
            writes.append(Write(0, place + 4 * index, sector.to_bytes(4, "little")))
    text = f"{len(writes)} entries of the grain directory, because its tables lie behind each other"
    return Salvage(plan(writes) if writes else Plan(), (text,) if writes else ())


def _possible(sector: int, size: int, header: SparseHeader) -> bool:
    return sector == 0 or (header.overhead_sectors > 0 and SECTOR < sector * SECTOR <= size - header.table_bytes)
