"""Create VDI images: dynamic, fixed, and differencing over another VDI image."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from tapfs.driver import CreateRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import encode
from tapfs.formats.preallocation import FALLOC, FULL, METADATA, OFF, preallocation_of, space_stages
from tapfs.formats.rounding import round_up
from tapfs.formats.uuid_links import NULL_UUID, link_to
from tapfs.formats.vdi.header import SECTOR, VERSION, Header, Type
from tapfs.identifiers import Uuid, new_uuid
from tapfs.plan import Grow, Plan, Step, Write, plan

CREATE_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "static": "on: a fixed image, whose file has its full length from the start (default off: it grows)",
        "preallocation": "off (default); metadata: the same as static=on; falloc or full: the file has no holes, too",
    }
)

#: The only block size that QEMU and 7-Zip read, and VirtualBox's own.
_BLOCK_BYTES = 1 << 20
#: Map and data begin at multiples of this, as VirtualBox has them now.
_ALIGNMENT = 1 << 20
#: QEMU's limit.
_MOST_BLOCKS = 0x1FFFFF80

_TEXT = b"<<< Oracle VM VirtualBox Disk Image >>>\n"

#: Entries of the map that one step of the plan writes.
_PIECE_ENTRIES = 1 << 20


def create(request: CreateRequest) -> Plan:
    """The plan for a new image. See :meth:`tapfs.driver.CreatableFormat.create`."""
    for option in request.options:
        if option not in CREATE_OPTIONS:
            known = ", ".join(CREATE_OPTIONS)
            raise _refused(f"unknown option {option!r} for vdi", remedy=f"the options are {known}")
    if request.encrypted:
        raise _refused("tapfs makes no encrypted VDI images")
    mode = preallocation_of(request.options, METADATA, FALLOC, FULL)
    fixed = mode != OFF or _is_static(request.options)
    if request.virtual_size < 1:
        raise _out_of_bounds(f"cannot make a VDI image of {request.virtual_size} bytes")
    # VirtualBox rounds a size down when it opens an image: a partial last sector would be lost to it.
    size = round_up(request.virtual_size, SECTOR)
    blocks = -(-size // _BLOCK_BYTES)
    if blocks > _MOST_BLOCKS:
        most = _MOST_BLOCKS * _BLOCK_BYTES
        raise _out_of_bounds(f"{size} bytes are too many for VDI, the limit is {most}")
    link, parent_modification = _parent(request, fixed=fixed)
    kind = Type.FIXED if fixed else Type.DYNAMIC if request.backing is None else Type.DIFFERENCING
    header = Header(
        VERSION,
        kind,
        size,
        _BLOCK_BYTES,
        blocks,
        allocated=blocks if fixed else 0,
        map_offset=_ALIGNMENT,
        data_offset=round_up(_ALIGNMENT + 4 * blocks, _ALIGNMENT),
        creation=new_uuid(),
        modification=new_uuid(),
        link=link,
        parent_modification=parent_modification,
    )
    length = header.data_offset + (blocks * _BLOCK_BYTES if fixed else 0)
    # The header comes last: before it the file is no image.
    space = space_stages(mode, 0, header.data_offset, length - header.data_offset)
    return plan([Grow(0, length)], *space, list(_map_steps(header, fixed=fixed)), [Write(0, 0, header.pack(_TEXT))])


def _map_steps(header: Header, *, fixed: bool) -> Iterator[Step]:
    free = b"\xff" * (4 * min(header.blocks, _PIECE_ENTRIES))
    for first in range(0, header.blocks, _PIECE_ENTRIES):
        stop = min(first + _PIECE_ENTRIES, header.blocks)
        entries = encode(array("I", range(first, stop)), "little") if fixed else free[: 4 * (stop - first)]
        yield Write(0, header.map_offset + 4 * first, entries)


def _parent(request: CreateRequest, *, fixed: bool) -> tuple[Uuid, Uuid]:
    """The UUIDs that a differencing image has of its parent: that of the image, and that of its last change."""
    if request.backing is None:
        return NULL_UUID, NULL_UUID
    if fixed:
        raise _refused("a fixed image has no parent")
    link = link_to(request.parent)
    if link is None:
        raise _refused(
            "a VDI image finds its parent by a UUID, and the parent has none that lasts",
            remedy="make an overlay of another format, for example qcow",
        )
    return link


def _is_static(options: Mapping[str, str]) -> bool:
    static = options.get("static", "off")
    if static not in {"on", "off"}:
        raise _refused(f"static={static}: must be on or off")
    return static == "on"


def _refused(message: str, *, remedy: str | None = None) -> ImageError:
    return ImageError(ErrorKind.UNSUPPORTED, message, op="create", remedy=remedy)


def _out_of_bounds(message: str) -> ImageError:
    return ImageError(ErrorKind.OUT_OF_BOUNDS, message, op="create")
