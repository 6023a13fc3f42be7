"""Create VHDX images: dynamic, fixed, or over a parent. The options are named as in qemu-img."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from tapfs.driver import CreateRequest, Identified
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.changed_table import encode
from tapfs.formats.preallocation import FALLOC, FULL, preallocation_of, space_stages
from tapfs.formats.rounding import round_up
from tapfs.formats.vhdx.blocks import BlockTable, State, make_entry
from tapfs.formats.vhdx.driver import VhdxDriver
from tapfs.formats.vhdx.guids import NO_GUID, new_guid
from tapfs.formats.vhdx.header import IDENTIFIER_BYTES, MAX_LOG_BYTES, Header, header_steps
from tapfs.formats.vhdx.locator import linkage_of, pack_locator, parent_entries
from tapfs.formats.vhdx.metadata import (
    MAX_BLOCK_BYTES,
    MAX_DISK_BYTES,
    MIN_BLOCK_BYTES,
    SECTOR_SIZES,
    Metadata,
    copied_items,
    pack_metadata,
)
from tapfs.formats.vhdx.regions import BAT, METADATA, TABLES, pack_table
from tapfs.formats.vhdx.signature import IDENTIFIER
from tapfs.formats.vhdx.units import MIB
from tapfs.patterns import pattern
from tapfs.plan import Grow, Plan, Step, Write, plan
from tapfs.records import NamedTuple

CREATE_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "subformat": "dynamic: grows as it is written (default), or fixed: every block has its place from the start",
        "block_size": "bytes, a power of two from 1M to 256M (default 8M to 64M by the size of the disk)",
        "log_size": "bytes, a multiple of 1M (default 1M)",
        "block_state_zero": "on: blocks say that they are zeros (default), off: that they are not present",
        "logical_sector_size": "bytes of the guest's sectors, 512 (default) or 4096",
        "preallocation": "of a fixed image: off (default); falloc: the file has no holes, as Windows wants it; or full",
    }
)

#: The default block size for disks up to so many bytes, as QEMU chooses it.
_BLOCK_SIZES = ((1 << 30, 8 << 20), (100 << 30, 16 << 20), (32 << 40, 32 << 20), (MAX_DISK_BYTES, 64 << 20))

#: The largest block table that is written at creation.
_MAX_WRITTEN_TABLE_BYTES = 64 << 20

_CREATOR = "tapfs"
_SIZE = pattern(r"([0-9]{1,15})([KMGkmg]?)")


class _Layout(NamedTuple):
    """The ranges of a new file."""

    log: Range
    metadata: Range
    bat: Range

    @property
    def end(self) -> int:
        """Where the blocks begin."""
        return self.bat.end


def create(request: CreateRequest) -> Plan:
    """The plan for a new image. See :meth:`tapfs.driver.CreatableFormat.create`."""
    for option in request.options:
        if option not in CREATE_OPTIONS:
            known = ", ".join(CREATE_OPTIONS)
            raise _refused(f"unknown option {option!r} for vhdx", remedy=f"the options are {known}")
    metadata = _metadata(request)
    table = BlockTable.of(metadata, 0)
    log_bytes = _size(request.options, "log_size", MIB)
    if log_bytes % MIB or not MIB <= log_bytes <= MAX_LOG_BYTES:
        raise _refused(f"log_size={log_bytes}: must be a multiple of 1 MiB, at most {MAX_LOG_BYTES}")
    log = Range(MIB, log_bytes)
    place = Range(log.end, MIB)
    layout = _Layout(log, place, Range(place.end, round_up(table.place.length, MIB)))
    head = Header(1, new_guid(), new_guid(), NO_GUID, 0, 1, log.length, log.offset)
    regions = pack_table([(BAT, layout.bat), (METADATA, layout.metadata)])
    identifier = IDENTIFIER + _CREATOR.encode("utf-16-le")
    steps: list[Step] = [
        Write(0, 0, identifier.ljust(IDENTIFIER_BYTES, b"\0")),
        *header_steps(head, 0),
        *header_steps(head._replace(sequence=2), 1),
        *(Write(0, at, regions) for at in TABLES),
        Write(0, layout.metadata.offset, _packed_metadata(request, metadata)),
        *_table_steps(request, metadata, table, layout),
    ]
    end = layout.end
    mode = preallocation_of(request.options, FALLOC, FULL)
    if metadata.leave_allocated:
        end += table.blocks * table.block_size
    elif "preallocation" in request.options:
        raise _refused("preallocation goes with subformat=fixed only")
    return plan([Grow(0, end)], *space_stages(mode, 0, 0, end), steps)


def _metadata(request: CreateRequest) -> Metadata:
    options = request.options
    parent = _parent(request)
    fixed = _choice(options, "subformat", ("dynamic", "fixed")) == "fixed"
    if parent is not None and fixed:
        raise _refused("a fixed image has no parent")
    below = 512 if parent is None else parent.geometry.sector_size or 512
    sector = _size(options, "logical_sector_size", below)
    if sector not in SECTOR_SIZES:
        raise _refused(f"logical_sector_size={sector}: must be 512 or 4096")
    if parent is not None and sector != below:
        raise _refused(f"the sectors of the parent have {below} bytes, and not {sector}")
    size = round_up(request.virtual_size, sector)
    if not 0 < size <= MAX_DISK_BYTES:
        raise _out_of_bounds(f"cannot make a VHDX image of {request.virtual_size} bytes, the limit is {MAX_DISK_BYTES}")
    if request.encrypted:
        raise _refused("VHDX has no encryption")
    usual = next(block for limit, block in _BLOCK_SIZES if size <= limit)
    block_size = _size(options, "block_size", usual)
    if not MIN_BLOCK_BYTES <= block_size <= MAX_BLOCK_BYTES or block_size & (block_size - 1):
        raise _refused(f"block_size={block_size}: must be a power of two from 1 MiB to 256 MiB")
    disk_id = parent.metadata.disk_id if isinstance(parent, VhdxDriver) else new_guid()
    # Physical sectors of 4096 bytes, as Windows says: a guest then aligns what it writes.
    return Metadata(block_size, fixed, parent is not None, size, disk_id, sector, 4096)


def _parent(request: CreateRequest) -> Identified | None:
    """The open parent. A parent locator has room for no other kind."""
    if request.backing is None:
        return None
    parent = request.parent
    if not isinstance(parent, Identified) or parent.format_name != "vhdx":
        raise _refused(
            "the parent of a VHDX image must be a VHDX image, too",
            remedy="convert the parent, or make an overlay of another format",
        )
    return parent


def _linkage(parent: Identified) -> bytes:
    """The GUID of the parent's contents."""
    found = (linkage_of(name) for name in sorted(parent.identities))
    return next((each for each in found if each is not None), NO_GUID)


def _packed_metadata(request: CreateRequest, metadata: Metadata) -> bytes:
    parent = _parent(request)
    if parent is None or request.backing is None:
        return pack_metadata(metadata)
    name = request.backing.name
    if not name or "\0" in name or "\\" in name:
        raise _refused("the name of the parent is empty or has a character that a parent locator cannot hold")
    try:
        locator = pack_locator(parent_entries(name, _linkage(parent)))
    except ValueError as error:
        raise _out_of_bounds(str(error)) from error
    further = copied_items(parent.file, parent.metadata) if isinstance(parent, VhdxDriver) else []
    packed = pack_metadata(metadata, locator=locator, further=further)
    # The region has 1 MiB: what is only taken along gives way.
    return packed if len(packed) <= MIB else pack_metadata(metadata, locator=locator)


def _table_steps(request: CreateRequest, metadata: Metadata, table: BlockTable, layout: _Layout) -> Iterator[Step]:
    """The block table, unless all of its entries are zero."""
    state_zero = _choice(request.options, "block_state_zero", ("on", "off")) == "on"
    if metadata.has_parent or (not metadata.leave_allocated and not state_zero):
        return
    if table.place.length > _MAX_WRITTEN_TABLE_BYTES:
        raise _out_of_bounds(
            f"a block table of {table.place.length} bytes is too large to be written at creation; "
            "choose a larger block_size, or block_state_zero=off"
        )
    entries = array("Q", bytes(table.place.length))
    for block in range(table.blocks):
        place = layout.end + block * table.block_size
        present = metadata.leave_allocated
        entries[table.index(block)] = make_entry(State.PRESENT, place) if present else make_entry(State.ZERO)
    yield Write(0, layout.bat.offset, encode(entries, "little"))


def _size(options: Mapping[str, str], name: str, default: int) -> int:
    """The bytes that an option says, with a suffix as qemu-img has it."""
    text = options.get(name)
    if text is None:
        return default
    found = _SIZE.fullmatch(text)
    if found is None:
        raise _refused(f"{name}={text}: is no number of bytes")
    size = int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[found[2].lower()]
    # QEMU takes 0 for "choose".
    return size or default


def _choice(options: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """The value of an option; the first choice is the default."""
    value = options.get(name, choices[0])
    if value not in choices:
        raise _refused(f"{name}={value}: must be {' or '.join(choices)}")
    return value


def _refused(message: str, *, remedy: str | None = None) -> ImageError:
    return ImageError(ErrorKind.UNSUPPORTED, message, op="create", remedy=remedy)


def _out_of_bounds(message: str) -> ImageError:
    return ImageError(ErrorKind.OUT_OF_BOUNDS, message, op="create")
