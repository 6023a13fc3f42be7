"""The details of a VMDK for `tapfs info`: the words of its descriptor, and one entry for each extent."""

from __future__ import annotations

from collections.abc import Mapping

from tapfs.formats.vmdk.host_extents import HostedExtent
from tapfs.formats.vmdk.parts import ClosedPart, FlatPart, Part, SparsePart
from tapfs.formats.vmdk.reader import VmdkReader

#: So many extents are described.
_MAX_SHOWN = 64


def details(image: VmdkReader) -> Mapping[str, object]:
    """Keys in snake_case. Keys of the disk database (`ddb.…`) are shown as the descriptor has them."""
    descriptor = image.descriptor
    database: dict[str, str] = {}
    found: dict[str, object] = {"extents": [_described(image, part) for part in image.parts[:_MAX_SHOWN]]}
    found["extent_count"] = len(image.parts)
    found["clean"] = not any(extent.unclean for extent in image.disk.sparse)
    if descriptor is None:
        return {"create_type": None, "cid": None, **found}
    for key in descriptor.values:
        if key.startswith("ddb."):
            database[key.removeprefix("ddb.")] = descriptor.value(key)
    cid, parent_cid = descriptor.cid, descriptor.parent_cid
    return {
        "create_type": descriptor.create_type,
        "cid": None if cid is None else f"{cid:08x}",
        "parent_cid": None if parent_cid is None else f"{parent_cid:08x}",
        "encoding": descriptor.codec,
        "change_tracking": descriptor.value("changetrackpath") or None,
        **found,
        "database": database,
    }


def _described(image: VmdkReader, part: Part) -> Mapping[str, object]:
    common: dict[str, object] = {"offset": part.offset, "length": part.length}
    match part:
        case FlatPart():
            return {**common, "kind": "flat", "file": part.file.path, "host_offset": part.host_offset}
        case ClosedPart():
            return {**common, "kind": "no access", "file": part.name}
        case SparsePart():
            extent = next(each for each in image.disk.sparse if each.number == part.number)
            common |= {"kind": extent.kind, "file": extent.file.path, "grain_size": part.tables.grain}
            if isinstance(extent, HostedExtent):
                header = extent.header
                common |= {
                    "version": header.version,
                    "compressed": header.is_compressed,
                    "zeroed_grains": header.has_zeroed_grains,
                    "redundant_tables": header.has_redundant,
                }
            return common
        case _:
            return {**common, "kind": "zero"}
