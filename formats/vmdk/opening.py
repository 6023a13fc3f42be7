"""Open the host files of a VMDK: the descriptor, and every extent that it names, as the parts of the disk.

File 0 is a descriptor, or a sparse extent with an embedded descriptor, or a packed extent without one. Every other file
of a disk is refused with the name of its descriptor.
"""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.driver import Finding, HostFile, OpenRequest, Role, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk import cowd_header, sesparse_header
from tapfs.formats.vmdk.descriptor import (
    MAX_BYTES_OF_TEXT,
    Access,
    Descriptor,
    ExtentLine,
    parse_descriptor,
)
from tapfs.formats.vmdk.extent_names import candidates, descriptor_of
from tapfs.formats.vmdk.host_extents import HostedExtent, HostExtent, open_host_extent, open_hosted_extent
from tapfs.formats.vmdk.parts import ClosedPart, FlatPart, Part, SparsePart, ZeroPart
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.signature import is_descriptor
from tapfs.formats.vmdk.sparse_header import CAPACITY_AT, MAGIC, UNFINISHED_MAGIC
from tapfs.records import dataclass, field

#: The types of extents whose bytes stand in their file as they are, and of those that have tables.
FLAT_KINDS = frozenset({"FLAT", "VMFS", "VMFSTHIN"})
SPARSE_KINDS = frozenset({"SPARSE", "VMFSSPARSE", "SESPARSE"})
_DEVICE = "a device of a storage network"
#: Types of extents that lie in no file, with the place of each.
_NO_FILES = {
    "VMFSRDM": _DEVICE,
    "VMFSRAW": _DEVICE,
    "VMFSRAWDEVICEMAP": _DEVICE,
    "VMFSPASSTHROUGHRAWDEVICEMAP": _DEVICE,
    "VSANSPARSE": "an object of a vSAN datastore",
}
#: Starts of names that stand for no file, with the place of each.
_NAMES_OF_OTHERS = {
    "/dev/": "a device of the machine that made the image",
    "\\\\.\\": "a device of the machine that made the image",
    "vsan://": "an object of a vSAN datastore",
}
#: Files in memory lie here, among the devices.
_SHARED_MEMORY = "/dev/shm/"  # noqa: S108  a name that an image has


@dataclass(slots=True)
class OpenedDisk:
    """The parts of a disk in the order of the disk, and what they were made of.

    `sparse` are the host files with tables. `descriptor` is None for a packed extent that has none.
    """

    descriptor: Descriptor | None
    parts: list[Part] = field(default_factory=list[Part])
    sparse: list[HostExtent] = field(default_factory=list[HostExtent])
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.parts[-1].offset + self.parts[-1].length if self.parts else 0


#: The most bytes: of eight digits one is left, and the zero byte takes the place of another.
_LEFT_BY_A_SHORTER_CID = 6


def open_disk(file: HostFile, request: OpenRequest) -> OpenedDisk:
    """The disk that file 0 is, or describes.

    Raises ImageError: invalid_format, unsupported, out_of_bounds, corrupt, not_found and denied for the other files.
    """
    head = file.read(0, cowd_header.HEADER_BYTES)
    if head.startswith((MAGIC, UNFINISHED_MAGIC)):
        return _open_embedded(file, request)
    if head.startswith((cowd_header.MAGIC, sesparse_header.MAGIC_BYTES)) and not is_descriptor(head):
        raise _lone_part(file, "of a disk of ESX")
    raw = file.read(0, MAX_BYTES_OF_TEXT + 1)
    descriptor = parse_descriptor(raw, file.path)
    # In a file of its own nothing else follows. What a zero byte in the middle hides may be extents.
    # qemu-img writes a text with a shorter CID over the longer one, and the last bytes of that stay: the same as before
    # the zero byte (docs/specs/vmdk.md, "Delta links").
    end = raw.find(b"\0")
    rest = raw[end:].strip(b"\0") if end >= 0 else b""
    if len(rest) > _LEFT_BY_A_SHORTER_CID or not descriptor.text.endswith(rest):
        message = "the descriptor has a zero byte in it, and text behind that"
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=end, op="open")
    return _Opening(file, request, descriptor).disk


def _open_embedded(file: HostFile, request: OpenRequest) -> OpenedDisk:
    own = open_hosted_extent(0, file, strict=request.writable and not request.lenient)
    header = own.header
    if header.descriptor_sector == 0 or header.descriptor_sectors == 0:
        if not header.is_compressed:
            raise _lone_part(file, "of a split disk")
        opening = OpenedDisk(None, sparse=[own])
        opening.parts.append(_sparse_part(0, own.capacity, own, writable=False, cut=request.cut))
        return opening
    at = header.descriptor_sector * SECTOR
    length = min(header.descriptor_sectors * SECTOR, MAX_BYTES_OF_TEXT + 1)
    descriptor = parse_descriptor(file.read(at, length), file.path, at)
    return _Opening(file, request, descriptor, own).disk


def _lone_part(file: HostFile, what: str) -> ImageError:
    wanted = descriptor_of(file.path)
    remedy = "open the descriptor of the disk" + (f", which should be {wanted}" if wanted else ", a small text file")
    message = f"is one extent {what}, and has no descriptor"
    return ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, op="open", remedy=remedy)


def _sparse_part(offset: int, length: int, extent: HostExtent, *, writable: bool, cut: bool) -> SparsePart:
    extent.tables.disk_bytes = length
    extent.tables.cut = cut
    return SparsePart(offset, length, extent.number, extent.tables, writable, extent.header_bytes)


def _grown(lines: Sequence[ExtentLine], size: int | None) -> Sequence[ExtentLine]:
    """The extents as they will be of a disk that is growing to `size` bytes: the last one is larger."""
    if size is None:
        return lines
    used = [line for line in lines if line.sectors]
    before = sum(line.sectors for line in used[:-1])
    return [*used[:-1], used[-1]._replace(sectors=-(-size // SECTOR) - before)]


class _Opening:
    """One opening of the extents of a descriptor. `own` is the extent that the descriptor is embedded in."""

    def __init__(
        self, file: HostFile, request: OpenRequest, descriptor: Descriptor, own: HostedExtent | None = None
    ) -> None:
        self._file = file
        self._request = request
        self._descriptor = descriptor
        self._own = own
        self.disk = OpenedDisk(descriptor)
        # The name of a monolithic file in its own descriptor is stale after a renaming: it is the file itself.
        alone = own is not None and own.capacity > 0 and len(descriptor.extents) == 1
        for key in descriptor.repeated_keys:
            self.disk.findings.append(
                Finding(Severity.NOTE, f"the descriptor has the key {key} again: the first counts")
            )
        offset = 0
        for line in _grown(descriptor.extents, request.grown_size):
            if line.sectors == 0:
                self.disk.findings.append(Finding(Severity.NOTE, "the descriptor has an extent of size 0", line.at))
                continue
            itself = alone and line.kind in SPARSE_KINDS and line.access is not Access.NONE
            self.disk.parts.append(self._part(offset, line, itself=itself))
            offset += line.length
        if own is not None and own not in self.disk.sparse and own.capacity > 0:
            raise self._corrupt("the embedded descriptor does not name the extent that it stands in", None)

    def _part(self, offset: int, line: ExtentLine, *, itself: bool) -> Part:
        if line.kind == "ZERO":
            return ZeroPart(offset, line.length)
        if line.kind in _NO_FILES:
            message = f"has an extent of the type {line.kind}, which is {_NO_FILES[line.kind]}, not a file"
            remedy = "copy the disk by the host that has it (vmkfstools -i)"
            raise ImageError(
                ErrorKind.UNSUPPORTED, message, path=self._file.path, offset=self._at(line), op="open", remedy=remedy
            )
        if line.kind not in FLAT_KINDS | SPARSE_KINDS:
            message = f"has an extent of the unknown type {line.kind}"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=self._file.path, offset=self._at(line), op="open")
        if line.access is Access.NONE:
            return ClosedPart(offset, line.length, line.name, self._file.path, self._at(line))
        writable = self._request.writable and line.access is Access.READ_WRITE
        if line.kind in FLAT_KINDS:
            return self._flat(offset, line, writable=writable)
        return self._sparse(offset, line, itself=itself, writable=writable)

    def _flat(self, offset: int, line: ExtentLine, *, writable: bool) -> Part:
        number, file = self._open_named(line)
        if number == 0:
            raise self._corrupt("names itself as an extent of the disk", line)
        start = line.offset_sectors * SECTOR
        missing = start + line.length - file.size()
        if missing > 0:
            message = (
                f"the file {line.name} is truncated: its extent in the descriptor needs {start + line.length} bytes,"
                f" and it has {file.size()}"
            )
            if not (self._request.lenient or self._request.cut):
                raise self._corrupt(message, line)
            self.disk.findings.append(Finding(Severity.CORRUPTION, message, self._at(line)))
        return FlatPart(offset, line.length, number, file, start, writable)

    def _sparse(self, offset: int, line: ExtentLine, *, itself: bool, writable: bool) -> Part:
        strict = writable and not self._request.lenient
        if itself and self._own is not None:
            extent: HostExtent = self._own
        else:
            number, file = self._open_named(line)
            if number == 0 and self._own is None:
                raise self._corrupt("names itself as an extent of the disk", line)
            if any(number == other.number for other in self.disk.sparse):
                raise self._corrupt(f"names the sparse extent {line.name} twice", line)
            own = self._own if number == 0 else None
            extent = own or open_host_extent(number, file, strict=strict)
        if line.length > extent.capacity:
            message = f"the extent has {extent.capacity} bytes, and its line in the descriptor {line.length}"
            raise ImageError(ErrorKind.CORRUPT, message, path=extent.file.path, offset=CAPACITY_AT, op="open")
        self.disk.sparse.append(extent)
        return _sparse_part(offset, line.length, extent, writable=writable, cut=self._request.cut)

    def _open_named(self, line: ExtentLine) -> tuple[int, HostFile]:
        """The file of a line, by its name or beside the descriptor."""
        role = Role.DATA if line.access is Access.READ_WRITE else Role.READ_ONLY_DATA
        names = candidates(line.name, line.raw_name, self._file.path)
        if not names:
            raise self._corrupt(f"has an extent of the type {line.kind} without a file", line)
        first: ImageError | None = None
        for name in names:
            try:
                found = self._request.further.open(name, role)
            except ImageError as error:
                if error.kind not in (ErrorKind.NOT_FOUND, ErrorKind.DENIED):
                    raise
                first = first or error
                continue
            return found.number, found.file
        raise self._missing(line, names, first) from first

    def _missing(self, line: ExtentLine, names: Sequence[str], first: ImageError | None) -> ImageError:
        kind = ErrorKind.NOT_FOUND if first is None else first.kind
        other = next((what for start, what in _NAMES_OF_OTHERS.items() if line.name.startswith(start)), None)
        allowed = first.neutral_remedy if first is not None and kind is ErrorKind.DENIED else None
        if other is not None and not line.name.startswith(_SHARED_MEMORY):
            what = f"is {other}, and there is no file {names[-1]} beside the descriptor"
            here = "" if allowed is None else f"; on the machine that made the image, {allowed}"
            remedy = f"copy what it holds into a file {names[-1]} beside the descriptor{here}"
        else:
            what = "is missing" if first is None else first.message.removeprefix(f"its file {line.name} ")
            what += "" if len(names) == 1 else f", and there is no {' or '.join(names[1:])} beside the descriptor"
            remedy = allowed or "put the file beside the descriptor under the name that the descriptor has"
        message, offset = f"its extent {line.name} {what}", self._at(line)
        return ImageError(kind, message, path=self._file.path, offset=offset, op="open the extents", remedy=remedy)

    def _at(self, line: ExtentLine) -> int:
        return self._descriptor.base + line.at

    def _corrupt(self, message: str, line: ExtentLine | None) -> ImageError:
        at = self._descriptor.base if line is None else self._at(line)
        return ImageError(ErrorKind.CORRUPT, message, path=self._file.path, offset=at, op="open")
