"""OVF descriptors (DMTF DSP0243): the disks of a virtual appliance and the files that hold them.

`ovf:chunkSize` splits a file into pieces NAME.000000000, NAME.000000001 and so on. `ovf:compression="gzip"` packs it,
before it is split. `ovf:parentRef` says that a disk has what differs from another disk of the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote

from tapfs.packages.contents import Digest, Package, PackagedDisk, damaged, inner_name, numbered, unsupported
from tapfs.records import replace
from tapfs.xml_tree import Element, parsed

#: A file is in no more pieces.
_MOST_PIECES = 1 << 16

#: A part of the URI in ovf:format, and the format.
_FORMATS = (("vmdk", "vmdk"), ("qcow", "qcow2"), ("vhdx", "vhdx"), ("vhd", "vhd"), ("vdi", "vdi"))

_UNITS = re.compile(r"byte\s*(?:\*\s*(\d+)\s*\^\s*(\d+))?\s*", re.ASCII)
_DIGEST = re.compile(r"\s*([A-Za-z0-9-]+)\s*\((.*)\)\s*=\s*([0-9A-Fa-f]+)\s*", re.DOTALL)
_ALGORITHMS = {"sha1": "sha1", "sha256": "sha256", "sha384": "sha384", "sha512": "sha512"}


def read_ovf(content: bytes, *, kind: str, manifest: str) -> Package:
    """The package that a descriptor describes; `manifest` is the name of its manifest. Raises ImageError."""
    root = parsed(content, damaged)
    if root.name != "Envelope":
        raise damaged("has a descriptor that is no OVF envelope")
    files = {_required(each, "id"): each for each in root.all("References", "File")}
    # oVirt and RHEV refer to a file by its name.
    files = {each.attributes.get("href", ""): each for each in files.values()} | files
    disks: list[PackagedDisk] = []
    notes: list[str] = []
    #: Of each disk its own name in the descriptor, and that of the disk over which it lies.
    identities: list[str] = []
    parents: list[str | None] = []
    for each, typed in _listed(root):
        reference = each.attributes.get("fileRef")
        if not reference:
            notes.append(f"the disk {each.attributes.get('diskId', '')} is empty: no file belongs to it")
            continue
        if reference not in files:
            raise damaged(f"has a disk in the file {reference!r}, which it does not list")
        disks.append(_disk(len(disks) + 1, each, files[reference]))
        identities.append(each.attributes.get("diskId", ""))
        # That of oVirt is the file of some image of the disk, and not surely its parent. The image knows its parent.
        parents.append(None if typed else each.attributes.get("parentRef") or None)
    for index, parent in enumerate(parents):
        if parent is not None:
            if identities.count(parent) != 1:
                raise damaged(f"has a disk over the disk {parent!r}, which it does not list")
            disks[index] = replace(disks[index], parent=identities.index(parent) + 1)
    return Package(kind, numbered(disks), manifests=(manifest,), notes=tuple(notes))


def _listed(root: Element) -> Iterator[tuple[Element, bool]]:
    """The disks, and whether a type tells their section, as that of OVF 0.9, of oVirt and of RHEV."""
    for disk in root.all("DiskSection", "Disk"):
        yield disk, False
    for section in root.all("Section"):
        if section.attributes.get("type", "").endswith("DiskSection_Type"):
            for disk in section.all("Disk"):
                yield disk, True


def _disk(number: int, disk: Element, file: Element) -> PackagedDisk:
    href = _required(file, "href")
    if "://" in href:
        raise unsupported(f"has a disk at {href!r}, which tapfs does not fetch", "fetch it, and name it")
    name = inner_name(unquote(href), "names the file")
    packing = file.attributes.get("compression", "identity") or "identity"
    if packing not in {"identity", "gzip"}:
        raise unsupported(f"has a disk packed by {packing!r}", "unpack it, and name it")
    return PackagedDisk(
        number,
        name,
        format=_format(disk.attributes.get("format", "")),
        files=_pieces(name, file),
        gzip=packing == "gzip",
        size=_capacity(disk),
    )


def _pieces(name: str, file: Element) -> tuple[str, ...]:
    told = file.attributes.get("chunkSize")
    if told is None:
        return (name,)
    piece, size = _natural(told, "chunkSize"), _natural(_required(file, "size"), "size")
    if piece == 0:
        raise damaged("has a file in pieces of no bytes")
    count = max(1, -(-size // piece))
    if count > _MOST_PIECES:
        raise damaged(f"has a file in {count} pieces")
    return tuple(f"{name}.{number:09}" for number in range(count))


def _format(uri: str) -> str | None:
    lower = uri.lower()
    return next((name for part, name in _FORMATS if part in lower), None)


def _capacity(disk: Element) -> int | None:
    """The size in bytes. It may also be a property of the appliance, which says nothing here."""
    told = disk.attributes.get("capacity", "")
    units = _UNITS.fullmatch(disk.attributes.get("capacityAllocationUnits", "byte").strip() or "byte")
    if not told.isascii() or not told.isdigit() or len(told) > 20 or units is None:
        return None
    base, exponent = (int(part) if part else 1 for part in units.groups())
    if base > 1024 or exponent > 64:
        return None
    size = int(told) * base**exponent
    return size if size < 1 << 63 else None


def _required(element: Element, attribute: str) -> str:
    value = element.attributes.get(attribute)
    if not value:
        raise damaged(f"has a {element.name} without {attribute}")
    return value


def _natural(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise damaged(f"has a file whose {what} is {text!r}")
    return int(text)


def read_manifest(content: bytes) -> list[Digest]:
    """The digests of a manifest: lines such as "SHA256(disk.vmdk)= 0123…". Raises ImageError(corrupt)."""
    found: list[Digest] = []
    for line in content.decode(errors="surrogateescape").splitlines():
        if not line.strip():
            continue
        match = _DIGEST.fullmatch(line)
        algorithm = None if match is None else _ALGORITHMS.get(match[1].lower().replace("-", ""))
        if match is None or algorithm is None:
            raise damaged(f"has a manifest with the line {line[:80]!r}")
        found.append(Digest(inner_name(match[2], "has a manifest that names"), algorithm, match[3].lower()))
    return found
