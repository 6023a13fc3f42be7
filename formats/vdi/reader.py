"""Open and map a VDI image, and say which image its parent is."""

from __future__ import annotations

from tapfs.driver import (
    BackingReference,
    Finding,
    HostFile,
    OpenRequest,
    Severity,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.blocks.layout import BlockLayout
from tapfs.formats.blocks.reader import BlockReader
from tapfs.formats.rounding import round_up
from tapfs.formats.uuid_links import NULL_UUID, UuidLink, identities_of
from tapfs.formats.vdi.header import HEAD_BYTES, MAP_AT, OLD_VERSION, SECTOR, Header, parse_header

#: Entries that name no slot: the parent's block or zeros; zeros always.
FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE

_LINK_AT = {False: 424, True: 404}


class VdiReader(BlockReader):
    """The map of an open image, and what every kind of driver needs of the image."""

    format_name = "vdi"

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        header = parse_header(file.read(0, HEAD_BYTES), file)
        if request.grown_size is not None:
            size = round_up(request.grown_size, SECTOR)
            header = header._replace(size=size, blocks=-(-size // header.block_bytes))
        self.header = header
        #: Damage that a lenient open went past.
        self.open_findings: list[Finding] = []
        backing = self._parent_of(header, file, lenient=request.lenient)
        self._require_map(header, file, lenient=request.lenient)
        super().__init__(file, request, _layout(header), backing)

    @property
    def identities(self) -> frozenset[str]:
        """What differencing images over this one say that it is: its UUID, alone and with that of its last change."""
        return identities_of(self.header.creation, self.header.modification)

    def _parent_of(self, header: Header, file: HostFile, *, lenient: bool) -> BackingReference | None:
        """The parent: the image that has the UUID of the link. No name of a file stands in a VDI image."""
        if not header.has_parent:
            return None
        if header.link == NULL_UUID:
            message = "is a differencing image that names no parent"
            at = _LINK_AT[header.version == OLD_VERSION]
            if not lenient:
                raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=at, op="open")
            self.open_findings.append(Finding(Severity.CORRUPTION, message, at))
        return UuidLink(header.link, header.parent_modification).reference

    def _require_map(self, header: Header, file: HostFile, *, lenient: bool) -> None:
        layout_end = header.map_offset + 4 * -(-header.size // header.block_bytes)
        if layout_end <= file.size():
            return
        message = f"the map [{header.map_offset:#x}, {layout_end:#x}) lies past the end of the file ({file.size():#x})"
        at = MAP_AT if header.version != OLD_VERSION else header.map_offset
        if not lenient:
            raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=at, op="open")
        self.open_findings.append(Finding(Severity.CORRUPTION, message, at))


def _layout(header: Header) -> BlockLayout:
    return BlockLayout(
        virtual_size=header.size,
        block_bytes=header.block_bytes,
        table_offset=header.map_offset,
        entry_bytes=4,
        order="little",
        slot_bytes=header.slot_bytes,
        scale=header.slot_bytes,
        free=FREE,
        zero=ZERO,
        origin=header.data_offset,
        least_place=header.data_offset,
        payload_at=header.extra,
    )
