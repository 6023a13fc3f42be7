"""Vagrant's .box: the disks of an archive with a metadata.json, for the provider that it was made for.

libvirt: box.img, or the disks that metadata.json lists. virtualbox: an OVF descriptor. VMware: a .vmx. Others hold
images beside each other.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import cast

from tapfs.packages.contents import Package, PackagedDisk, damaged, inner_name, numbered

METADATA = "metadata.json"
_BOX_IMAGE = "box.img"
_IMAGES = (".vhdx", ".vhd", ".vmdk", ".vdi", ".qcow2", ".img", ".raw")


def read_metadata(content: bytes, names: Collection[str]) -> Package:
    """The package of a box that has neither an OVF descriptor nor a .vmx; `names` are those of its members."""
    try:
        told: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(f"has a metadata.json that is none: {error}") from error
    metadata = cast("dict[str, object]", told) if isinstance(told, dict) else {}
    listed = metadata.get("disks")
    kind = metadata.get("format")
    disks: list[PackagedDisk] = []
    if isinstance(listed, list):
        for number, each in enumerate(cast("list[object]", listed), 1):
            disk = cast("dict[str, object]", each) if isinstance(each, dict) else {}
            name = _text(disk.get("path"))
            if name is None:
                raise damaged("lists a disk without a path in its metadata.json")
            disks.append(_disk(number, inner_name(name, "names the file"), _text(disk.get("format"))))
    elif _BOX_IMAGE in names:
        disks.append(_disk(1, _BOX_IMAGE, _text(kind)))
    else:
        images = sorted(name for name in names if name.lower().endswith(_IMAGES))
        disks += [_disk(number, name, None) for number, name in enumerate(images, 1)]
    return Package("box", numbered(disks))


def _disk(number: int, name: str, kind: str | None) -> PackagedDisk:
    return PackagedDisk(number, name, format=kind, files=(name,))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
