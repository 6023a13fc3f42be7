"""Create VHDs: fixed, dynamic, and differencing over a parent.

A disk has exactly the size that was asked for, in whole sectors, and says so by a creator whose current size every
reader takes. With `force_size=off` it is what qemu-img makes without options: a disk as large as a geometry.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tapfs.driver import CreateRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.preallocation import FALLOC, FULL, preallocation_of, space_stages
from tapfs.formats.rounding import round_up
from tapfs.formats.vhd import dynamic_header
from tapfs.formats.vhd.disk_size import LARGEST, MAX_SIZE, Cylinders, geometry_not_below
from tapfs.formats.vhd.dynamic_header import (
    DEFAULT_BLOCK_SIZE,
    ENTRY_LENGTH,
    MAX_BLOCK_SIZE,
    MIN_BLOCK_SIZE,
    SECTOR,
    DynamicHeader,
)
from tapfs.formats.vhd.footer import (
    DIFFERENCING,
    DYNAMIC,
    EPOCH,
    FIXED,
    LENGTH,
    NO_OFFSET,
    RESERVED_FEATURE,
    VERSION,
    Footer,
)
from tapfs.formats.vhd.identity import NULL_UUID
from tapfs.formats.vhd.locators import new_locators
from tapfs.formats.vhd.relink import header_name, parent_uuid
from tapfs.identifiers import new_uuid, time_of_making
from tapfs.plan import Grow, Plan, Step, Write, plan

CREATE_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "subformat": "dynamic: the file grows (default); fixed: the disk as it stands, and a footer behind it",
        "force_size": "on: exactly the size that is asked for (default); off: rounded up to a geometry",
        "azure": "on: what Azure takes, a fixed image of whole MiB",
        "preallocation": "of a fixed image: off (default); falloc: the file has no holes, as Windows wants it; or full",
        "block_size": "bytes, a power of two from 4096 to 268435456 (default 2 MiB, which every reader takes)",
    }
)

#: Creators: QEMU's for exact sizes, whose current size all readers take, and QEMU's for sizes of a geometry.
_EXACT_CREATOR, _GEOMETRY_CREATOR = b"qem2", b"qemu"
_CREATOR_VERSION = 0x00050003
_CREATOR_HOST = b"Wi2k"

_MIB = 1 << 20
#: A new table is written at once. One for 2040 GiB in blocks of 2 MiB has 4 MiB.
_MAX_TABLE_BYTES = 64 << 20
_HEADER_AT = LENGTH
_TABLE_AT = _HEADER_AT + dynamic_header.LENGTH
_TIMESTAMP_MAX = 0xFFFFFFFF


def create(request: CreateRequest) -> Plan:
    """The plan for a new image. See :meth:`tapfs.driver.CreatableFormat.create`."""
    for option in request.options:
        if option not in CREATE_OPTIONS:
            known = ", ".join(CREATE_OPTIONS)
            raise _refused(f"unknown option {option!r} for vhd", remedy=f"the options are {known}")
    if request.encrypted:
        raise _refused("a VHD is never encrypted")
    azure = _switch(request.options, "azure", default="off")
    fixed = _subformat(request.options, azure=azure) == "fixed"
    if fixed and request.backing is not None:
        raise _refused("a VHD over a parent is neither fixed nor for Azure", remedy="leave the option out")
    size, geometry = _size(request, azure=azure)
    footer = Footer(
        features=RESERVED_FEATURE,
        version=VERSION,
        data_offset=NO_OFFSET if fixed else _HEADER_AT,
        timestamp=_timestamp(time_of_making()),
        creator=_EXACT_CREATOR if geometry == LARGEST else _GEOMETRY_CREATOR,
        creator_version=_CREATOR_VERSION,
        creator_host=_CREATOR_HOST,
        original_size=size,
        current_size=size,
        cylinders=geometry.cylinders,
        heads=geometry.heads,
        sectors_per_track=geometry.sectors_per_track,
        type=FIXED if fixed else DYNAMIC if request.backing is None else DIFFERENCING,
        checksum=0,
        uuid=new_uuid().raw,
        saved_state=0,
        hidden=0,
    ).sealed()
    if fixed:
        if "block_size" in request.options:
            raise _refused("block_size goes with images that grow only")
        mode = preallocation_of(request.options, FALLOC, FULL)
        return plan([Grow(0, size)], *space_stages(mode, 0, 0, size), [Write(0, size, footer.pack())])
    if "preallocation" in request.options:
        raise _refused("preallocation goes with fixed images only")
    return _growing_plan(request, footer)


def _growing_plan(request: CreateRequest, footer: Footer) -> Plan:
    block_size = _block_size(request.options)
    entries = -(-footer.current_size // block_size)
    if entries * ENTRY_LENGTH > _MAX_TABLE_BYTES:
        raise _out_of_bounds(f"blocks of {block_size} bytes are too small for a disk of {footer.current_size} bytes")
    header = DynamicHeader(_TABLE_AT, dynamic_header.VERSION, entries, block_size)
    end = header.table_end
    steps: list[Step] = []
    if request.backing is not None:
        name = request.backing.name
        locators = new_locators(name, end)
        header = header._replace(
            parent_uuid=NULL_UUID if request.parent is None else parent_uuid(request.parent, op="create"),
            parent_timestamp=_timestamp(request.backing_mtime),
            parent_name=header_name(name, op="create"),
            locators=locators.locators,
        )
        steps.append(Write(0, end, locators.data))
        end += len(locators.data)
    table = b"\xff" * (header.table_end - header.table_offset)
    head = footer.pack() + header.sealed().pack()
    return plan([*steps, Write(0, _TABLE_AT, table)], [Write(0, 0, head), Write(0, end, footer.pack())])


def _size(request: CreateRequest, *, azure: bool) -> tuple[int, Cylinders]:
    """The size of the disk in bytes, and the geometry that its footer names."""
    if request.virtual_size < 1:
        raise _out_of_bounds(f"cannot make a VHD of {request.virtual_size} bytes")
    if request.virtual_size > MAX_SIZE:
        raise _out_of_bounds(f"{request.virtual_size} bytes are too many for a VHD, the limit is {MAX_SIZE} (2040 GiB)")
    exact = _switch(request.options, "force_size", default="on")
    if azure and not exact:
        raise _refused("azure=on and force_size=off exclude each other")
    size = round_up(request.virtual_size, _MIB if azure else SECTOR)
    geometry = LARGEST if exact else geometry_not_below(size // SECTOR)
    return (size if geometry == LARGEST else geometry.sectors * SECTOR), geometry


def _timestamp(seconds: int) -> int:
    """Seconds since 1970 as the format counts them."""
    return max(0, min(seconds - EPOCH, _TIMESTAMP_MAX))


def _subformat(options: Mapping[str, str], *, azure: bool) -> str:
    value = options.get("subformat", "fixed" if azure else "dynamic")
    if value not in {"fixed", "dynamic"}:
        raise _refused(f"subformat={value}: must be fixed or dynamic")
    if azure and value != "fixed":
        raise _refused("Azure takes fixed images only", remedy="leave subformat out")
    return value


def _block_size(options: Mapping[str, str]) -> int:
    text = options.get("block_size", str(DEFAULT_BLOCK_SIZE))
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if value & (value - 1) or not MIN_BLOCK_SIZE <= value <= MAX_BLOCK_SIZE:
        raise _refused(f"block_size={text}: must be a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}")
    return value


def _switch(options: Mapping[str, str], name: str, *, default: str) -> bool:
    value = options.get(name, default)
    if value not in {"on", "off"}:
        raise _refused(f"{name}={value}: must be on or off")
    return value == "on"


def _refused(message: str, *, remedy: str | None = None) -> ImageError:
    return ImageError(ErrorKind.UNSUPPORTED, message, op="create", remedy=remedy)


def _out_of_bounds(message: str) -> ImageError:
    return ImageError(ErrorKind.OUT_OF_BOUNDS, message, op="create")
