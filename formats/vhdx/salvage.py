"""Salvages a VHDX whose first MiB is damaged: identifier, headers and region tables are made anew, each if it is lost.

All of them stand in the first MiB, in two copies, and something written over the start of the file takes both. The
metadata are known by their signature and begin at a whole MiB; so does the block table, which is known by its entries:
each names another place in the file, at a whole MiB.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.driver import HostFile, Salvage, SalvageRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.changed_table import decode
from tapfs.formats.rounding import round_up
from tapfs.formats.vhdx.blocks import PLACE_MASK, STATE_MASK, BlockTable, State, block_fault
from tapfs.formats.vhdx.guids import NO_GUID, new_guid
from tapfs.formats.vhdx.header import Header, header_steps, read_headers
from tapfs.formats.vhdx.metadata import Metadata, read_metadata
from tapfs.formats.vhdx.regions import BAT, METADATA, TABLES, pack_table, read_regions
from tapfs.formats.vhdx.signature import IDENTIFIER
from tapfs.formats.vhdx.units import MIB
from tapfs.plan import Step, Write, plan
from tapfs.records import NamedTuple

_METADATA_SIGNATURE = b"metadata"
_LOG_SIGNATURE = b"loge"
#: A log of usual length is looked through for entries.
_LOG_BYTES, _LOG_PAGE = MIB, 4096
#: The entries of a table that tell whether the others are worth reading.
_FIRST_BYTES = 4096


class _Identified:
    """A file that is read as if it began with the identifier."""

    def __init__(self, file: HostFile) -> None:
        self._file = file

    @property
    def path(self) -> str:
        """The name for messages."""
        return self._file.path

    def size(self) -> int:
        """Length in bytes."""
        return self._file.size()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file."""
        found = self._file.read(offset, length)
        return IDENTIFIER[offset : offset + length] + found[max(0, len(IDENTIFIER) - offset) :]

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Where the file has data."""
        return self._file.data_ranges(offset, length)


class _Found(NamedTuple):
    """The regions of a file, and how many blocks the block table has in it."""

    metadata: Range
    table: Range
    blocks: int


def salvage(file: HostFile, request: SalvageRequest) -> Salvage:
    """See :meth:`tapfs.salvage.SalvageableFormat.salvage`. What the request says stands in the metadata."""
    del request
    rebuilt: list[str] = []
    doubts: list[str] = []
    steps: list[Step] = []
    if file.read(0, len(IDENTIFIER)) != IDENTIFIER:
        steps.append(Write(0, 0, IDENTIFIER))
        rebuilt.append("the identifier at the start of the file")
    seen = _Identified(file)
    log = Range(MIB, 0)
    try:
        header = read_headers(seen).current
        log = Range(header.log_offset, header.log_length)
    except ImageError as error:
        new = Header(1, new_guid(), new_guid(), NO_GUID, 0, 1, 0, 0)
        steps += [*header_steps(new, 0), *header_steps(new._replace(sequence=2), 1)]
        rebuilt.append(f"both headers, which cannot be used: {error.message}")
        if _has_log(file):
            doubts.append("there is a log, and the headers said whether it waited: changes that only it has are lost")
    try:
        read_regions(seen, log)
    except ImageError as error:
        found = _regions_of(seen)
        regions = pack_table([(BAT, found.table), (METADATA, found.metadata)])
        steps += [Write(0, at, regions) for at in TABLES]
        rebuilt.append(f"both region tables, which cannot be used: {error.message}")
        doubts.append(
            f"the block table at {found.table.offset:#x} was found by its entries, which name {found.blocks} blocks"
        )
    return Salvage(plan(steps), tuple(rebuilt), tuple(doubts))


def _has_log(file: HostFile) -> bool:
    end = min(MIB + _LOG_BYTES, file.size())
    return any(file.read(at, len(_LOG_SIGNATURE)) == _LOG_SIGNATURE for at in range(MIB, end, _LOG_PAGE))


def _regions_of(file: HostFile) -> _Found:
    """The metadata and the block table of a file. Raises ImageError(invalid_format) where there is no such."""
    for at in range(MIB, file.size(), MIB):
        if file.read(at, len(_METADATA_SIGNATURE)) != _METADATA_SIGNATURE:
            continue
        place = Range(at, MIB)
        try:
            metadata = read_metadata(file, place)
        except ImageError:
            continue
        tables = (_table_at(file, offset, metadata, place) for offset in range(MIB, file.size(), MIB))
        best = max((each for each in tables if each is not None), key=lambda each: each.blocks, default=None)
        if best is not None:
            return best
    message = "no metadata of a VHDX with a block table are in the file, and a block does not say where it belongs"
    raise ImageError(ErrorKind.INVALID_FORMAT, message, path=file.path, op="salvage")


def _table_at(file: HostFile, offset: int, metadata: Metadata, place: Range) -> _Found | None:
    """The block table that begins there, if each of its entries is possible, and no two name one place."""
    table = BlockTable.of(metadata, offset)
    region = Range(offset, round_up(table.place.length, MIB))
    if region.offset < place.end and place.offset < region.end:
        return None
    reserved = tuple(sorted((place, region)))
    places: set[int] = set()
    for length in (min(_FIRST_BYTES, table.place.length), table.place.length):
        raw = file.read(offset, length)
        if len(raw) < length:
            return None
        places.clear()
        entries = decode(raw, "Q", "little")
        for block in range(table.blocks):
            index = table.index(block)
            if index >= len(entries):
                break
            entry = entries[index]
            if block_fault(block, entry, table, reserved, file.size(), cut=True) is not None:
                return None
            if entry & STATE_MASK >= State.PRESENT:
                if entry & PLACE_MASK in places:
                    return None
                places.add(entry & PLACE_MASK)
    return _Found(place, region, len(places)) if places else None
