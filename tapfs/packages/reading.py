"""Reading a package: its kind by its first bytes, then its descriptor and its members."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tapfs.errors import ImageError
from tapfs.packages import box, xva
from tapfs.packages.contents import (
    MOST_DESCRIPTOR_BYTES,
    Package,
    Place,
    Read,
    damaged,
    inner_name,
    unsupported,
)
from tapfs.packages.ovf import read_ovf
from tapfs.packages.signs import HEAD_BYTES, descriptor_kind, is_archive
from tapfs.packages.tar import Member, members
from tapfs.packages.vbox import read_vbox
from tapfs.packages.vmx import read_vmx
from tapfs.records import replace

#: A package but an .xva has no more members.
_MOST_MEMBERS = 1 << 16


def read_package(read: Read, size: int, *, name: str) -> Package | None:
    """The package in a file of `size` bytes that is called `name`; None: it is an archive of something else.

    Nothing that it names is opened. Raises ImageError: corrupt, unsupported, denied for names that lead out of it.
    """
    head = read(0, HEAD_BYTES)
    kind = descriptor_kind(head)
    if kind is None:
        return _archive(read, size) if is_archive(head) else None
    if size > MOST_DESCRIPTOR_BYTES:
        raise damaged(f"is a descriptor of {size} bytes")
    content = read(0, size)
    if kind == "ovf":
        return read_ovf(content, kind="ovf", manifest=f"{name.removesuffix('.ovf')}.mf")
    return read_vbox(content) if kind == "vbox" else read_vmx(content)


def _archive(read: Read, size: int) -> Package | None:
    listed = members(read, size)
    first = next(listed, None)
    if first is None:
        return None
    if first.name.removeprefix("./") == xva.DESCRIPTOR:
        return xva.read_xva(_content(read, first), (_plain(each) for each in listed))
    places = _places(itertools.chain((first,), listed))
    if places is None:
        return None

    def content(name: str) -> bytes:
        place = places[name]
        return _content(read, Member(name, place, 0))

    descriptors = [name for name in places if name.lower().endswith(".ovf") and "/" not in name]
    is_box = box.METADATA in places
    if len(descriptors) > 1:
        raise damaged(f"has several descriptors: {', '.join(sorted(descriptors))}")
    if descriptors:
        manifest = descriptors[0][: -len(".ovf")] + ".mf"
        found = read_ovf(content(descriptors[0]), kind="box" if is_box else "ova", manifest=manifest)
    elif is_box:
        machines = [name for name in places if name.lower().endswith(".vmx") and "/" not in name]
        if len(machines) > 1:
            raise damaged(f"has several machines: {', '.join(sorted(machines))}")
        if machines:
            found = read_vmx(content(machines[0]))
            for disk in found.disks:
                inner_name(disk.name, "names the file")
        else:
            found = box.read_metadata(content(box.METADATA), places)
        found = replace(found, kind="box")
    else:
        return None
    return replace(found, members=places)


def _plain(member: Member) -> Member:
    return member._replace(name=member.name.removeprefix("./"))


def _places(listed: Iterator[Member]) -> dict[str, Place | None] | None:
    """The members of an archive by name; None: so many that it is no package."""
    found: dict[str, Place | None] = {}
    error: ImageError | None = None
    for count, member in enumerate(listed):
        if count >= _MOST_MEMBERS:
            raise damaged(f"has more than {_MOST_MEMBERS} members, too many for a package", offset=member.header)
        if member.folder:
            continue
        try:
            name = inner_name(member.name, "has the member")
        except ImageError as refused:
            error = error or refused
            continue
        if name in found:
            error = error or damaged(f"has two members of one name: {name}", offset=member.header)
        found[name] = member.place
    if error is not None and (box.METADATA in found or any(name.endswith(".ovf") for name in found)):
        raise error
    return found


def _content(read: Read, member: Member) -> bytes:
    if member.place is None:
        raise unsupported(f"has a descriptor that is a link or sparse: {member.name!r}", "unpack it")
    if member.place.length > MOST_DESCRIPTOR_BYTES:
        raise damaged(f"has a descriptor of {member.place.length} bytes: {member.name}")
    return read(member.place.offset, member.place.length)
