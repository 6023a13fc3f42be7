"""Salvages a VHD that grows and has lost its dynamic header, both footers, or all of them, but not its block table.

Writers put the table behind the header, at 1536. Its entries are places in the file, each once, and the table ends
before the first of them. How far they are apart says how long a block is. A block says nothing of its place on the
disk, so without the table nothing is to be had.
"""

from __future__ import annotations

from tapfs.driver import HostFile, Salvage, SalvageRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import decode
from tapfs.formats.rounding import round_up
from tapfs.formats.vhd import dynamic_header
from tapfs.formats.vhd.disk_size import disk_size
from tapfs.formats.vhd.dynamic_header import (
    DEFAULT_BLOCK_SIZE,
    ENTRY_LENGTH,
    MAX_BLOCK_SIZE,
    MIN_BLOCK_SIZE,
    SECTOR,
    UNUSED,
    VERSION,
    DynamicHeader,
    read_header,
    require_table_for,
)
from tapfs.formats.vhd.footer import DIFFERENCING, DYNAMIC, FIXED, LENGTH, RESERVED_FEATURE, Footer
from tapfs.formats.vhd.footer import VERSION as FOOTER_VERSION
from tapfs.formats.vhd.footers import Footers, find_footers
from tapfs.formats.vhd.relink import header_name
from tapfs.identifiers import new_uuid
from tapfs.plan import Step, Write, plan
from tapfs.records import NamedTuple

_HEADER_AT = LENGTH
_TABLE_AT = _HEADER_AT + dynamic_header.LENGTH
_MOST_TABLE_BYTES = 64 << 20
#: A file that was cut had at most so many times its length.
_MOST_TIMES = 64
#: Blocks lie apart by their own length, their bitmap's, and what aligns the next one.
_MOST_ALIGNMENT = 4096


class _Table(NamedTuple):
    """A block table that was found: the places of its blocks, ascending, the index of the last one, entries."""

    places: tuple[int, ...]
    last: int
    entries: int


def salvage(file: HostFile, request: SalvageRequest) -> Salvage:
    """See :meth:`tapfs.salvage.SalvageableFormat.salvage`."""
    footers = _footers_of(file)
    if footers is not None and footers.footer.type == FIXED:
        return Salvage()
    header, wrong = _header_of(file, footers)
    if footers is not None and header is not None:
        return Salvage()
    rebuilt: list[str] = []
    doubts: list[str] = []
    steps: list[Step] = []
    table: _Table | None = None
    if header is None:
        table = _table_at(file, _TABLE_AT)
        if table is None:
            message = f"has no block table at {_TABLE_AT:#x}, and a block does not say where on the disk it belongs"
            raise ImageError(ErrorKind.INVALID_FORMAT, message, path=file.path, op="salvage")
        block = request.cluster_bytes or _block_of(table, file.size() if footers is None else footers.place, doubts)
        header = DynamicHeader(_TABLE_AT, VERSION, table.entries, block)
        rebuilt.append(f"the dynamic header ({wrong}), by the block table behind it, for blocks of {block} bytes")
    footer, guessed = _footer(footers, header, table, request)
    if footers is None:
        rebuilt.append("the footer, of which no copy is left")
        if not guessed:
            doubts.append(f"the disk is taken as {footer.current_size} bytes")
    if table is not None and disk_size(footer) > table.entries * header.block_size:
        message = f"a disk of {disk_size(footer)} bytes has more blocks than the table, which has {table.entries}"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=file.path, op="salvage")
    if table is not None:
        header, footer = _with_parent(header, footer, request, doubts, known=footers is not None)
        steps.append(Write(0, _HEADER_AT, header._replace(max_entries=_entries(footer, header)).sealed().pack()))
    steps.insert(0, Write(0, 0, footer.sealed().pack()))
    if footers is not None and footers.last_good:
        steps.append(Write(0, footers.place, footer.sealed().pack()))
    return Salvage(plan(steps), tuple(rebuilt), tuple(doubts), size_guessed=guessed)


def _entries(footer: Footer, header: DynamicHeader) -> int:
    return min(header.max_entries, -(-max(footer.current_size, disk_size(footer)) // header.block_size))


def _footers_of(file: HostFile) -> Footers | None:
    try:
        return find_footers(file)
    except ImageError as error:
        if error.kind is not ErrorKind.INVALID_FORMAT:
            raise
    return None


def _header_of(file: HostFile, footers: Footers | None) -> tuple[DynamicHeader | None, str]:
    """The header if it can be used, and what is wrong with it."""
    # Where no footer is left the header must be right by itself.
    footer = _new_footer(0, _HEADER_AT) if footers is None else footers.footer
    try:
        header = read_header(file, footer, 0 if footers is None else footers.offset)
        if footers is not None:
            require_table_for(header, footer.current_size, footer.data_offset, file.path)
    except ImageError as error:
        return None, error.message
    return (header, "") if header.fits else (None, "its checksum is wrong")


def _table_at(file: HostFile, at: int) -> _Table | None:
    """The table at a place of the file: up to the first block that it names."""
    size = file.size()
    raw = file.read(at, max(0, min(_MOST_TABLE_BYTES, size - at)) // ENTRY_LENGTH * ENTRY_LENGTH)
    end = size
    places: set[int] = set()
    last = -1
    for index, entry in enumerate(decode(raw, "I", "big")):
        if at + index * ENTRY_LENGTH >= end:
            break
        if entry == UNUSED:
            continue
        place = entry * SECTOR
        if place <= at or place in places or place >= _MOST_TIMES * size:
            end = at + index * ENTRY_LENGTH  # zeros, or the name of a parent, between the table and the first block
            break
        places.add(place)
        end = min(end, place)
        last = index
    entries = (end - at) // ENTRY_LENGTH
    return _Table(tuple(sorted(places)), last, entries) if places and last < entries else None


def _block_of(table: _Table, end: int, doubts: list[str]) -> int:
    """The bytes of a block, by how far blocks are apart; `end` is that of the last one, or lies behind it."""
    gaps = [later - earlier for earlier, later in zip(table.places, (*table.places[1:], end), strict=True)]
    block = MIN_BLOCK_SIZE
    found: list[int] = []
    while block <= MAX_BLOCK_SIZE:
        needed = round_up(block // SECTOR // 8, SECTOR) + block
        if min(gaps) - _MOST_ALIGNMENT < needed <= min(gaps):
            found.append(block)
        block *= 2
    if found:
        return found[-1]
    doubts.append(f"how long a block is could not be told: it is taken as {DEFAULT_BLOCK_SIZE} bytes (--cluster-size)")
    return DEFAULT_BLOCK_SIZE


def _footer(
    footers: Footers | None, header: DynamicHeader, table: _Table | None, request: SalvageRequest
) -> tuple[Footer, bool]:
    """The footer, and whether its size is a guess."""
    if footers is not None:
        return footers.footer, False
    if request.virtual_size is not None:
        size, guessed = request.virtual_size, False
    elif table is not None:
        size, guessed = (table.last + 1) * header.block_size, True
    else:
        size, guessed = header.max_entries * header.block_size, False
    has_parent = table is None and (any(header.parent_uuid) or any(header.parent_name))
    return _new_footer(size, _HEADER_AT)._replace(type=DIFFERENCING if has_parent else DYNAMIC), guessed


def _with_parent(
    header: DynamicHeader, footer: Footer, request: SalvageRequest, doubts: list[str], *, known: bool
) -> tuple[DynamicHeader, Footer]:
    """Header and footer with the parent that the user names, or none; the header's own name of it is lost."""
    if request.backing is not None:
        name = header_name(request.backing.name, op="salvage")
        return header._replace(parent_name=name), footer._replace(type=DIFFERENCING)
    if footer.type == DIFFERENCING:
        doubts.append(
            "it was over a parent, whose name is lost: blocks that it does not have read as zeros (--backing)"
        )
    elif not known:
        doubts.append("whether it had a parent stood in its footer: blocks that it does not have read as zeros")
    return header, footer._replace(type=DYNAMIC)


def _new_footer(size: int, header_at: int) -> Footer:
    return Footer(
        features=RESERVED_FEATURE,
        version=FOOTER_VERSION,
        data_offset=header_at,
        timestamp=0,
        creator=b"tap\0",
        creator_version=FOOTER_VERSION,
        creator_host=b"Wi2k",
        original_size=size,
        current_size=size,
        cylinders=0,
        heads=0,
        sectors_per_track=0,
        type=DYNAMIC,
        checksum=0,
        uuid=new_uuid().raw,
        saved_state=0,
        hidden=0,
    )
