"""Create VMDKs, in the subformats and with the options of qemu-img."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from tapfs.driver import CreateRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.preallocation import FALLOC, FULL, OFF, preallocation_of, space_stages
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk.content_id import cid_of, new_cid
from tapfs.formats.vmdk.new_descriptor import Database, NewExtent, descriptor_text
from tapfs.formats.vmdk.new_extents import DESCRIPTOR_SECTORS, cowd_steps, hosted_steps, packed_header
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.sesparse_header import NOT_WRITTEN
from tapfs.formats.vmdk.stream import VmdkStreamWriter
from tapfs.plan import Grow, Plan, Step, Write, plan
from tapfs.records import NamedTuple

CREATE_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "subformat": "monolithicSparse (default; with -c streamOptimized), monolithicFlat,"
        " twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized (packed, written once), vmfs, vmfsSparse",
        "adapter_type": "ide (default), lsilogic, buslogic or legacyESX",
        "hwversion": "the version of the virtual hardware (default 4)",
        "compat6": "on: version 6 of the virtual hardware",
        "toolsversion": "the version of VMware's tools in the guest (default 2147483647: unknown)",
        "zeroed_grain": "on: an entry can say that a grain is zeros (default off; sparse subformats)",
        "preallocation": "of a flat subformat: off (default); falloc: the host reserves the space; or full",
    }
)

_ADAPTERS = ("ide", "lsilogic", "buslogic", "legacyESX")
_PART_BYTES = 2 << 30

#: The largest disk in a sparse extent: entries are sectors in 32 bits, and the tables need some of them.
_MAX_SPARSE_BYTES = (2 << 40) - (4 << 30)
_MAX_FLAT_BYTES = 1 << 62
#: The largest disk that VMware's products serve.
_MAX_PACKED_BYTES = 62 << 40


class _Subformat(NamedTuple):
    """A way to lay a disk out: the kind of its extents, how their names end, whether it is split, or packed."""

    kind: str
    ending: str
    split: bool = False
    packed: bool = False

    @property
    def sparse(self) -> bool:
        """Whether the extents have tables."""
        return self.kind in ("SPARSE", "VMFSSPARSE")


_SUBFORMATS: Mapping[str, _Subformat] = MappingProxyType(
    {
        "monolithicSparse": _Subformat("SPARSE", ""),
        "monolithicFlat": _Subformat("FLAT", "-flat.vmdk"),
        "twoGbMaxExtentSparse": _Subformat("SPARSE", "-s{:03}.vmdk", split=True),
        "twoGbMaxExtentFlat": _Subformat("FLAT", "-f{:03}.vmdk", split=True),
        "streamOptimized": _Subformat("SPARSE", "", packed=True),
        "vmfs": _Subformat("VMFS", "-flat.vmdk"),
        "vmfsSparse": _Subformat("VMFSSPARSE", "-delta.vmdk"),
    }
)


_DEVICE = (
    "the descriptor would name a device of the host, and tapfs makes files",
    "open the device itself, as a raw disk",
)

#: Subformats that are read and not made: why, and what to do.
_ONLY_READ: Final = MappingProxyType(
    {
        "seSparse": (
            NOT_WRITTEN,
            "take vmfsSparse, or a flat disk of vmfs: vmkfstools of ESXi makes seSparse of either",
        ),
        "fullDevice": _DEVICE,
        "partitionedDevice": _DEVICE,
    }
)


def further_names(request: CreateRequest) -> Sequence[str]:
    """The names of the files beside the descriptor; none for a disk of one file."""
    return [extent.name for extent in _extents(request)] if _subformat(request).ending else []


def create(request: CreateRequest) -> Plan:
    """The plan for a new disk. See :meth:`tapfs.driver.CreatableFormat.create`."""
    subformat = _subformat(request)
    zeroed = _switch(request.options, "zeroed_grain")
    if request.encrypted:
        raise _refused("a VMDK is never encrypted")
    if zeroed and (subformat.kind != "SPARSE" or subformat.packed):
        raise _refused(f"zeroed_grain=on does not go with subformat={_name(request)}")
    mode = preallocation_of(request.options, FALLOC, FULL)
    if mode != OFF and subformat.sparse:
        raise _refused(f"preallocation={mode} goes with flat subformats only: in others data has no place yet")
    extents = _extents(request)
    text = descriptor_text(
        _name(request), extents, _database(request.options), cid=new_cid(None), parent=_parent(request, subformat)
    )
    if not subformat.ending:
        if len(text) > DESCRIPTOR_SECTORS * SECTOR:
            raise _refused("the names of the disk and its parent are too long for an embedded descriptor")
        if subformat.packed:
            return _packed(request.name, extents[0].length, text)
        return _staged(hosted_steps(0, extents[0].length, text, zeroed=zeroed))
    steps: list[Step] = []
    for number, extent in enumerate(extents, 1):
        match subformat.kind:
            case "SPARSE":
                steps += hosted_steps(number, extent.length, b"", zeroed=zeroed)
            case "VMFSSPARSE":
                steps += cowd_steps(number, extent.length)
            case _:
                steps.append(Grow(number, extent.length))
    space = [stage for at, each in enumerate(extents, 1) for stage in space_stages(mode, at, 0, each.length)]
    return _staged([*steps, Write(0, 0, text)], space)


def _packed(name: str, length: int, text: bytes) -> Plan:
    """An empty stream, which is a whole disk of zeros; `convert` writes it again from its first grain on."""
    header = packed_header(length)
    trailer = VmdkStreamWriter(header, name).finish()
    head = Write(0, 0, (header.pack() + text).ljust(header.overhead_sectors * SECTOR, b"\0"))
    return plan([head, *(step for stage in trailer.stages for step in stage)])


def _staged(steps: list[Step], space: Sequence[list[Step]] = ()) -> Plan:
    grown: list[Step] = [each for each in steps if isinstance(each, Grow)]
    return plan(grown, *space, [each for each in steps if isinstance(each, Write)])


def _name(request: CreateRequest) -> str:
    return request.options.get("subformat", "streamOptimized" if request.compressed else "monolithicSparse")


def _subformat(request: CreateRequest) -> _Subformat:
    for option in request.options:
        if option not in CREATE_OPTIONS:
            raise _refused(f"unknown option {option!r} for vmdk", remedy=f"the options are {', '.join(CREATE_OPTIONS)}")
    name = _name(request)
    found = next((each for known, each in _SUBFORMATS.items() if known == name), None)
    if name in _ONLY_READ:
        raise _refused(f"subformat={name} is not made: {_ONLY_READ[name][0]}", remedy=_ONLY_READ[name][1])
    if found is None:
        raise _refused(f"subformat={name}: must be one of {', '.join(_SUBFORMATS)}")
    if request.compressed and not found.packed:
        raise _refused(
            f"subformat={name} is not written compressed", remedy="leave the subformat out: it is streamOptimized"
        )
    if request.virtual_size < 1:
        raise _out_of_bounds(f"cannot make a VMDK of {request.virtual_size} bytes")
    most = _MAX_FLAT_BYTES
    if found.sparse and not found.split:
        most = _MAX_PACKED_BYTES if found.packed else _MAX_SPARSE_BYTES
    if request.virtual_size > most:
        raise _out_of_bounds(
            f"{request.virtual_size} bytes are too many for subformat={name}, the limit is {most}",
            remedy="take subformat=twoGbMaxExtentSparse or monolithicFlat" if most == _MAX_SPARSE_BYTES else None,
        )
    return found


def _extents(request: CreateRequest) -> list[NewExtent]:
    subformat = _subformat(request)
    size = round_up(request.virtual_size, SECTOR)
    stem = request.name.removesuffix(".vmdk")
    if not subformat.ending:
        return [NewExtent(size, subformat.kind, request.name or "disk.vmdk")]
    step = _PART_BYTES if subformat.split else size
    return [
        NewExtent(min(step, size - start), subformat.kind, stem + subformat.ending.format(number))
        for number, start in enumerate(range(0, size, step), 1)
    ]


def _parent(request: CreateRequest, subformat: _Subformat) -> tuple[str, int] | None:
    if request.backing is None:
        return None
    if not subformat.sparse or subformat.packed:
        raise _refused(f"a disk with a parent is sparse and writable, and subformat={_name(request)} is not")
    if not request.backing.name:
        raise _refused("the name of the parent is empty")
    cid = cid_of(request.parent)
    if cid is None:
        raise _refused(
            f"the parent {request.backing.name} has no content ID: a VMDK is over another VMDK only",
            remedy="convert the parent to vmdk, or make the overlay in another format",
        )
    return request.backing.name, cid


def _database(options: Mapping[str, str]) -> Database:
    adapter = options.get("adapter_type", "ide")
    if adapter not in _ADAPTERS:
        raise _refused(f"adapter_type={adapter}: must be one of {', '.join(_ADAPTERS)}")
    compat6 = _switch(options, "compat6")
    if compat6 and "hwversion" in options:
        raise _refused("compat6=on says a version of the virtual hardware, and hwversion another one")
    database = Database(adapter, "6" if compat6 else _number(options, "hwversion", Database().hardware_version))
    return database._replace(tools_version=_number(options, "toolsversion", database.tools_version))


def _number(options: Mapping[str, str], name: str, default: str) -> str:
    value = options.get(name, default)
    if not (value.isascii() and value.isdigit() and len(value) <= 10):
        raise _refused(f"{name}={value}: must be a number of at most 10 digits")
    return value


def _switch(options: Mapping[str, str], name: str) -> bool:
    value = options.get(name, "off")
    if value not in {"on", "off"}:
        raise _refused(f"{name}={value}: must be on or off")
    return value == "on"


def _refused(message: str, *, remedy: str | None = None) -> ImageError:
    return ImageError(ErrorKind.UNSUPPORTED, message, op="create", remedy=remedy)


def _out_of_bounds(message: str, *, remedy: str | None = None) -> ImageError:
    return ImageError(ErrorKind.OUT_OF_BOUNDS, message, op="create", remedy=remedy)
