"""The text of a new descriptor (docs/specs/vmdk.md, "Descriptor").

The order of the sections is the one that VirtualBox demands, and a comment stands right before the extents: QEMU counts
an extent twice that follows an empty line. An embedded descriptor has room for what VirtualBox adds to it.
"""

from __future__ import annotations

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk.descriptor import NO_CID
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.records import NamedTuple

_IDE_HEADS, _OTHER_HEADS, _TRACK_SECTORS = 16, 255, 63
_MAX_IDE_CYLINDERS = 16383


class NewExtent(NamedTuple):
    """An extent line to be written."""

    length: int
    kind: str
    name: str


class Database(NamedTuple):
    """The disk database: the virtual hardware that the disk is for."""

    adapter_type: str = "ide"
    hardware_version: str = "4"
    tools_version: str = "2147483647"


def descriptor_text(
    create_type: str,
    extents: list[NewExtent],
    database: Database,
    *,
    cid: int,
    parent: tuple[str, int] | None = None,
) -> bytes:
    """The bytes of a descriptor. `parent` is the name and the content ID of the parent.

    Raises ImageError(unsupported) for a name that cannot stand in one.
    """
    name, parent_cid = parent or ("", NO_CID)
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        f"CID={cid:08x}",
        f"parentCID={parent_cid:08x}",
        f'createType="{create_type}"',
    ]
    if parent is not None:
        lines.append(f'parentFileNameHint="{require_writable_name(name)}"')
    lines += ["", "# Extent description"]
    for extent in extents:
        place = " 0" if extent.kind == "FLAT" else ""
        lines.append(f'RW {extent.length // SECTOR} {extent.kind} "{require_writable_name(extent.name)}"{place}')
    lines += ["", "# The Disk Data Base", "#DDB", ""]
    size = sum(extent.length for extent in extents)
    for key, value in _database(database, size):
        lines.append(f'ddb.{key} = "{value}"')
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def _database(database: Database, size: int) -> list[tuple[str, str]]:
    is_ide = database.adapter_type == "ide"
    heads = _IDE_HEADS if is_ide else _OTHER_HEADS
    cylinders = size // (heads * _TRACK_SECTORS * SECTOR)
    if is_ide:
        cylinders = min(cylinders, _MAX_IDE_CYLINDERS)
    return [
        ("virtualHWVersion", database.hardware_version),
        ("geometry.cylinders", str(cylinders)),
        ("geometry.heads", str(heads)),
        ("geometry.sectors", str(_TRACK_SECTORS)),
        ("adapterType", database.adapter_type),
        ("toolsVersion", database.tools_version),
    ]


def require_writable_name(name: str) -> str:
    """The name, if a descriptor can hold it: nothing escapes a quote or a line end in one."""
    if any(character in '"\n\r\0' for character in name):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"the name {name!r} cannot stand in a VMDK: it has a quote, a line end or a NUL",
            op="create",
            remedy="choose another name",
        )
    return name
