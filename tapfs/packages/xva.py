"""XenServer's .xva: disks in chunks of 1 MiB, `Ref:NN/00000000` and so on, each with a checksum beside it.

A chunk that is missing is zeros, and so is what a short chunk lacks: an export leaves out zeros, and writes an empty
chunk now and then so that its connection stays open.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tapfs.packages.contents import (
    Chunks,
    NumberedPlaces,
    Package,
    PackagedDisk,
    Place,
    Read,
    damaged,
    numbered,
    unsupported,
)
from tapfs.packages.tar import Member
from tapfs.records import NamedTuple
from tapfs.xml_tree import Element, parsed

DESCRIPTOR = "ova.xml"

_CHUNK_BYTES = 1 << 20
#: Chunks lie at multiples of a block of the archive, so what is mapped is at least that.
_BLOCK = 512
_NAME = re.compile(r"(Ref:\d{1,12})/(\d{8,12})(?:\.(checksum|xxhash))?", re.ASCII)
#: The suffix of a member with a checksum, and the algorithm.
_CHECKSUMS = {"checksum": "sha1", "xxhash": "xxh64"}
_MOST_DIGEST_BYTES = 64

_Value = str | dict[str, "_Value"] | list["_Value"] | None


class _Disk(NamedTuple):
    position: tuple[int, str]
    reference: str
    label: str
    size: int


class _Found:
    """The chunks of one disk as the archive lists them."""

    def __init__(self) -> None:
        self.places = NumberedPlaces()
        self.checksums = {algorithm: NumberedPlaces() for algorithm in _CHECKSUMS.values()}

    def add(self, match: re.Match[str], member: Member) -> None:
        number, suffix, place = int(match[2]), match[3], member.place
        if place is None:
            raise unsupported(f"has a chunk that is a link or sparse: {member.name!r}")
        most = _CHUNK_BYTES if suffix is None else _MOST_DIGEST_BYTES
        if place.length > most or (suffix is None and place.length % _BLOCK):
            raise damaged(f"has a chunk of {place.length} bytes: {member.name}", offset=member.header)
        (self.places if suffix is None else self.checksums[_CHECKSUMS[suffix]]).add(number, place)

    def finish(self, reference: str) -> _Found:
        """The same, its members in order."""
        for places in (self.places, *self.checksums.values()):
            twice = places.sort()
            if twice is not None:
                raise damaged(f"has two members of one name for chunk {twice} of the disk {reference}")
        return self


def read_xva(descriptor: bytes, members: Iterable[Member]) -> Package:
    """The package of an archive whose first member is ova.xml with this content. Raises ImageError."""
    found: dict[str, _Found] = {}
    for member in members:
        match = _NAME.fullmatch(member.name)
        if match is not None:
            if match[1] not in found:
                found[match[1]] = _Found()
            found[match[1]].add(match, member)
    disks: list[PackagedDisk] = []
    for each in sorted(_disks(parsed(descriptor, damaged))):
        chunks = found.get(each.reference, _Found()).finish(each.reference)
        last = chunks.places.numbers[-1] if chunks.places.numbers else -1
        if last * _CHUNK_BYTES >= each.size:
            raise damaged(f"has chunk {last} of the disk {each.reference}, which ends before it")
        disks.append(
            PackagedDisk(
                len(disks) + 1,
                each.reference,
                chunks=Chunks(each.size, _CHUNK_BYTES, chunks.places, chunks.checksums),
                size=each.size,
            )
        )
    return Package("xva", numbered(disks))


def checksum_of(read: Read, place: Place) -> str:
    """What a member with a checksum says, in lower-case hexadecimal digits."""
    return read(place.offset, place.length).decode("ascii", errors="replace").strip().lower()


def _disks(root: Element) -> list[_Disk]:
    """The disks by the number of the device that they are attached as."""
    description = _value(root)
    objects = description.get("objects") if isinstance(description, dict) else None
    if not isinstance(objects, list):
        raise damaged("has an ova.xml that is no description of a XenServer machine")
    fields: dict[str, list[tuple[str, dict[str, _Value]]]] = {"VBD": [], "VDI": []}
    for each in objects:
        if isinstance(each, dict):
            kind, reference, snapshot = each.get("class"), each.get("id"), each.get("snapshot")
            if isinstance(kind, str) and kind in fields and isinstance(reference, str) and isinstance(snapshot, dict):
                fields[kind].append((reference, snapshot))
    attached: dict[str, str] = {}
    for _, device in fields["VBD"]:
        reference = device.get("VDI")
        if device.get("type") == "Disk" and isinstance(reference, str):
            attached[reference] = str(device.get("userdevice", ""))
    found: list[_Disk] = []
    for reference, disk in fields["VDI"]:
        if reference not in attached:
            continue
        size = disk.get("virtual_size")
        if not isinstance(size, str) or not size.isdecimal() or len(size) > 18:
            raise damaged(f"says no size of the disk {reference}")
        place = attached[reference]
        position = int(place) if place.isdecimal() and len(place) < 9 else 1 << 30
        found.append(_Disk((position, place), reference, str(disk.get("name_label", "")), int(size)))
    return found


def _value(element: Element) -> _Value:
    """A value of XML-RPC: a struct, an array, or a text of any type."""
    for child in element.children:
        if child.name == "struct":
            names = ((member.first("name"), member.first("value")) for member in child.all("member"))
            return {name.text: _value(value) for name, value in names if name is not None and value is not None}
        if child.name == "array":
            return [_value(value) for value in child.all("data", "value")]
        return child.text
    return element.text
