"""Open and map a VHD that grows: dynamic, or differencing over a parent.

A block that is not there, and a sector whose bit is 0, reads as zeros in a dynamic image and as the parent in a
differencing one (docs/specs/vhd.md, "The sector bitmap").
"""

from __future__ import annotations

from collections import OrderedDict

from tapfs.driver import BackingReference, Finding, Geometry, HostFile, OpenRequest, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, merge
from tapfs.formats.rounding import round_up
from tapfs.formats.vhd import dynamic_header
from tapfs.formats.vhd.batmap import OLD_BITMAPS, TAPDISK, Batmap, read_batmap
from tapfs.formats.vhd.bitmap import is_full, sector_runs, turned
from tapfs.formats.vhd.disk_size import disk_size
from tapfs.formats.vhd.dynamic_header import SECTOR, DynamicHeader, read_header, require_table_for
from tapfs.formats.vhd.footer import DIFFERENCING, LENGTH, Footer
from tapfs.formats.vhd.footers import Footers
from tapfs.formats.vhd.identity import NULL_UUID, VIRTUALBOX, identities, identity_of, link_uuid
from tapfs.formats.vhd.locators import candidates, written_names
from tapfs.formats.vhd.table import AllocationTable
from tapfs.identifiers import Uuid

#: Bytes of bitmaps that are kept.
_CACHE_BYTES = 1 << 20


class DynamicReader:
    """An open image that grows: its metadata, its map, and what a check needs of it."""

    format_name = "vhd"

    def __init__(self, file: HostFile, request: OpenRequest, footers: Footers) -> None:
        self.file = file
        self.writable = request.writable
        #: Whether a block that the end of the file cuts behind its bitmap is mapped.
        self._cut = request.cut
        #: Makes space for a check to work in.
        self.scratch = request.scratch
        self.footers = footers
        self.footer: Footer = footers.footer
        #: Damage that the opening has met, and what is only worth saying.
        self.findings: list[Finding] = list(footers.findings)
        self.header: DynamicHeader = read_header(file, self.footer, footers.offset)
        if not self.header.fits:
            message = "the checksum of the dynamic header is wrong"
            at = self.footer.data_offset + dynamic_header.CHECKSUM_AT
            self.findings.append(Finding(Severity.CORRUPTION, message, at))
        self.size = disk_size(self.footer) if request.grown_size is None else round_up(request.grown_size, SECTOR)
        require_table_for(self.header, self.size, self.footer.data_offset, file.path)
        self.table = AllocationTable(file, self.header, self.size)
        self.batmap: Batmap | None = read_batmap(file, self.footer, self.header)
        self._require_no_key()
        #: Whether the bitmaps have the least significant bit first.
        self.old_bitmaps = (self.footer.creator, self.footer.creator_version) == (TAPDISK, OLD_BITMAPS)
        self.names = written_names(file, self.header) if self.differencing else []
        #: Start, end and name of each range of the file that holds metadata, but for bitmaps, locators and last footer.
        self.metadata_ranges = _metadata_ranges(self.footer.data_offset, self.header)
        self.block_sectors = self.header.block_size // SECTOR
        #: No place may reach behind this; a writer moves it as it allocates.
        self.file_size = file.size()
        self._bitmaps: OrderedDict[int, bytes] = OrderedDict()
        self._geometry = Geometry(
            virtual_size=self.size,
            granule=SECTOR,
            map_unit=self.header.block_size,  # each block costs the read of its bitmap
            backing=self._backing(request),
        )

    @property
    def geometry(self) -> Geometry:
        """The constants of the image."""
        return self._geometry

    @property
    def differencing(self) -> bool:
        """Whether the image is over a parent."""
        return self.footer.type == DIFFERENCING

    @property
    def identities(self) -> frozenset[str]:
        """The UUID that a differencing image over this one names."""
        return identities(self.footer)

    @property
    def link_uuid(self) -> Uuid | None:
        """The UUID by which a child in one of VirtualBox's formats names this image."""
        return link_uuid(self.footer)

    def map(self, offset: int, length: int) -> list[Extent]:
        """The map of the whole blocks that the range touches; see :meth:`tapfs.driver.Driver.map`."""
        block = self.header.block_size
        index, stop = offset // block, min(-(-(offset + length) // block), len(self.table))
        extents: list[Extent] = []
        while index < stop:
            used = self.table.next_used(index, stop)
            if used > index:
                extents.append(Extent(index * block, (used - index) * block, Kind.UNALLOCATED))
            if used < stop:
                extents.extend(self._block_extents(used))
            index = used + 1
        last = extents[-1]
        disk_end = round_up(self.size, SECTOR)
        if last.end > disk_end:
            extents[-1] = last._replace(length=disk_end - last.offset)
        return list(merge(extents))

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """The blocks from that of `offset` on which are not there."""
        block = self.header.block_size
        index = offset // block
        used = self.table.next_used(index, -(-end // block))
        return None if used == index else Extent(offset, min(used * block, end) - offset, Kind.UNALLOCATED)

    # -- blocks and bitmaps ---------------------------------------------------------------------

    def block_bytes(self, index: int) -> int:
        """The bytes of a block that the disk has, in whole sectors: the last block may be cut by the disk's end."""
        return min(self.header.block_size, round_up(self.size, SECTOR) - index * self.header.block_size)

    def place_fault(self, index: int, place: int) -> str | None:
        """A sentence that says why a block cannot lie at `place`, or None."""
        data = place + self.header.bitmap_bytes
        end = data + self.block_bytes(index)
        if end > self.file_size and not (self._cut and data < self.file_size):
            return f"[{place:#x}, {end:#x}) past the end of the file ({self.file_size:#x})"
        for start, stop, what in self.metadata_ranges:
            if place < stop and start < data + self.header.block_size:
                return f"[{place:#x}, {end:#x}) over {what}"
        return None

    def require_place(self, index: int) -> int | None:
        """The place of a block's bitmap, or None. Raises ImageError(corrupt) where nothing can be."""
        place = self.table.place(index)
        wrong = None if place is None else self.place_fault(index, place)
        if wrong is not None:
            raise ImageError(
                ErrorKind.CORRUPT,
                f"block {index}: {wrong}",
                path=self.file.path,
                offset=self.table.entry_offset(index),
                op="map",
            )
        return place

    def bitmap(self, place: int) -> bytes | bytearray:
        """The bitmap at `place`, the most significant bit first."""
        found = self._bitmaps.get(place)
        if found is None:
            found = self.read_bitmap(place)
            while len(self._bitmaps) * self.header.bitmap_bytes >= _CACHE_BYTES:
                self._bitmaps.popitem(last=False)
        else:
            del self._bitmaps[place]
        self._bitmaps[place] = found
        return found

    def read_bitmap(self, place: int) -> bytes:
        """The bitmap at `place` as it is on disk, the most significant bit first."""
        length = self.header.bitmap_bytes
        raw = self.file.read(place, length).ljust(length, b"\0")
        return turned(raw) if self.old_bitmaps else raw

    def forget_bitmap(self, place: int) -> None:
        """What is on disk at `place` is no bitmap any more, or another."""
        self._bitmaps.pop(place, None)

    def _block_extents(self, index: int) -> list[Extent]:
        start, length = index * self.header.block_size, self.block_bytes(index)
        place = self.require_place(index)
        if place is None:
            return [Extent(start, length, Kind.UNALLOCATED)]
        data = place + self.header.bitmap_bytes
        whole = [Extent(start, length, Kind.DATA, host_offset=data, in_place=self.writable)]
        if self.batmap is not None and self.batmap.is_full(index):
            return whole
        bitmap = self.bitmap(place)
        if is_full(bitmap, self.block_sectors):
            return whole
        return [
            Extent(
                start + run.first * SECTOR,
                (run.stop - run.first) * SECTOR,
                Kind.DATA if run.present else Kind.UNALLOCATED,
                host_offset=data + run.first * SECTOR if run.present else 0,
                in_place=self.writable and run.present,
            )
            for run in sector_runs(bitmap, 0, length // SECTOR)
        ]

    # -- opening --------------------------------------------------------------------------------

    def _require_no_key(self) -> None:
        if self.batmap is not None and self.batmap.keyed:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "the disk is encrypted by tapdisk, which tapfs cannot read",
                path=self.file.path,
                offset=self.batmap.offset,
                op="open",
            )

    def _backing(self, request: OpenRequest) -> BackingReference | None:
        if not self.differencing:
            return None
        found = candidates(self.names)
        if not found:
            message = "a differencing image whose locators give no name that a file of its parent may have"
            at = self.footer.data_offset
            if not request.lenient:
                raise ImageError(ErrorKind.CORRUPT, message, path=self.file.path, offset=at, op="open")
            self.findings.append(Finding(Severity.CORRUPTION, message, at))
            return None
        # Tapdisk names a raw parent by the null UUID. Old QEMU gave images the null UUID, too.
        null = self.header.parent_uuid == NULL_UUID
        creator = self.footer.creator
        format_name = "raw" if null and creator == TAPDISK else None if null or creator == VIRTUALBOX else "vhd"
        identity = identity_of(self.header.parent_uuid, creator)
        return BackingReference(found[0], format_name, tuple(found[1:]), identity)


def _metadata_ranges(header_at: int, header: DynamicHeader) -> list[tuple[int, int, str]]:
    return [
        (0, LENGTH, "the copy of the footer"),
        (header_at, header_at + dynamic_header.LENGTH, "the dynamic header"),
        (header.table_offset, header.table_end, "the block allocation table"),
    ]
