"""The driver of an open DMG: its map, its details and its check."""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence

from tapfs.driver import CheckReport, Codec, Geometry, HostFile, Packing, ProgressCallback, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, merge
from tapfs.extent import Kind as ExtentKind
from tapfs.formats.dmg.tables import SECTOR, Block, Kind, Table, read_tables
from tapfs.formats.dmg.trailer import read_trailer
from tapfs.plan import Plan

_CODECS = {
    0x80000004: Codec.ADC,
    0x80000005: Codec.ZLIB,
    0x80000006: Codec.BZIP2,
    0x80000007: Codec.LZFSE,
    0x80000008: Codec.LZMA,
}
_MAP_UNIT = 8 << 20
#: Of packed blocks: the engine unpacks one as a whole, and has 22 bits for the length of its payload.
_MAX_BLOCK_BYTES = 64 << 20
_MAX_PAYLOAD_BYTES = (1 << 22) - 1
_READ_BYTES = 4 << 20


class DmgDriver:
    """An open image: a :class:`tapfs.driver.Driver` that is `Checkable`."""

    format_name = "dmg"

    def __init__(self, file: HostFile) -> None:
        self._file = file
        self._trailer = read_trailer(file)
        tables = read_tables(file, self._trailer)
        self._names = [table.name for table in tables if table.name]
        #: The blocks in the order of the disk, field by field: there may be millions.
        self._first, self._stop = array("Q"), array("Q")
        self._kind, self._host_offset, self._host_length = array("I"), array("Q"), array("Q")
        codecs: set[Codec] = set()
        unit = SECTOR
        for block in self._checked(tables):
            self._first.append(block.first)
            self._stop.append(block.first + block.sectors)
            self._kind.append(block.kind)
            self._host_offset.append(block.host_offset)
            self._host_length.append(block.host_length)
            if block.kind in _CODECS:
                codecs.add(_CODECS[block.kind])
                unit = max(unit, block.sectors * SECTOR)
        if len(codecs) > 1:
            names = " and ".join(sorted(codec.name.lower() for codec in codecs))
            raise ImageError(ErrorKind.UNSUPPORTED, f"is packed by {names} at once", path=file.path, op="open")
        self._codec = codecs.pop() if codecs else None
        sectors = max(self._trailer.sectors, self._stop[-1] if self._stop else 0)
        self.geometry = Geometry(
            virtual_size=sectors * SECTOR,
            granule=SECTOR,
            map_unit=_MAP_UNIT,
            packing=None if self._codec is None else Packing(self._codec, unit=unit, own_units=True),
        )

    def _checked(self, tables: Sequence[Table]) -> Iterator[Block]:
        """The blocks of all tables. Raises ImageError(corrupt, unsupported) for what cannot be."""
        size, at, end = self._file.size(), self._trailer.plist_offset or self._trailer.resources_offset, 0
        for table in tables:
            for block in table.blocks:
                fault: str | None = None
                kind = ErrorKind.CORRUPT
                if block.first < end:
                    fault = f"two blocks have sector {block.first}"
                elif block.kind in _CODECS or block.kind == Kind.RAW:
                    if block.host_offset + block.host_length > size or not block.host_length:
                        place = f"{block.host_length} bytes at {block.host_offset:#x}"
                        fault = f"the block of sector {block.first}, {place}, lies outside the file ({size:#x})"
                    elif block.kind in _CODECS and (
                        block.host_length > _MAX_PAYLOAD_BYTES or block.sectors * SECTOR > _MAX_BLOCK_BYTES
                    ):
                        kind = ErrorKind.UNSUPPORTED
                        fault = f"the packed block of sector {block.first} is too large ({block.sectors} sectors)"
                elif block.kind not in (Kind.ZERO, Kind.IGNORED):
                    kind = ErrorKind.UNSUPPORTED
                    fault = f"the block of sector {block.first} is of the unknown kind {block.kind:#x}"
                if fault is not None:
                    raise ImageError(kind, fault, path=self._file.path, offset=at, op="open")
                end = block.first + block.sectors
                yield block

    # -- map ------------------------------------------------------------------------------------

    def map(self, offset: int, length: int) -> list[Extent]:
        """See :meth:`tapfs.driver.Driver.map`. What no block has reads as zeros."""
        return list(merge(self._extents(offset, min(offset + length, self.geometry.virtual_size))))

    def _extents(self, at: int, end: int) -> Iterator[Extent]:
        index = max(bisect_right(self._first, at // SECTOR) - 1, 0)
        while at < end:
            start = self._first[index] * SECTOR if index < len(self._first) else end
            if at < start:
                yield Extent(at, min(start, end) - at, ExtentKind.ZERO)
                at = start
            elif at >= self._stop[index] * SECTOR:
                index += 1
            else:
                yield from self._block(index)
                at = self._stop[index] * SECTOR
                index += 1

    def _block(self, index: int) -> Iterator[Extent]:
        offset, end = self._first[index] * SECTOR, self._stop[index] * SECTOR
        host_offset, host_length = self._host_offset[index], self._host_length[index]
        if self._kind[index] == Kind.RAW:
            present = min(host_length // SECTOR * SECTOR, end - offset)
            if present:
                yield Extent(offset, present, ExtentKind.DATA, host_offset=host_offset)
            if present < end - offset:
                yield Extent(offset + present, end - offset - present, ExtentKind.ZERO)
        elif self._kind[index] in _CODECS:
            yield Extent(offset, end - offset, ExtentKind.COMPRESSED, host_offset=host_offset, host_length=host_length)
        else:
            yield Extent(offset, end - offset, ExtentKind.ZERO)

    # -- details and check ----------------------------------------------------------------------

    @property
    def plain_details(self) -> frozenset[str]:
        """What a user knows images of this format by."""
        return frozenset({"compression", "partitions_named"})

    def details(self) -> Mapping[str, object]:
        """The codec, and the names that the image has for its partitions."""
        return {
            "compression": None if self._codec is None else self._codec.name.lower(),
            "blocks": len(self._first),
            "partitions_named": self._names,
        }

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare the data fork with its checksum. Tables were compared with the file when the image was opened."""
        report = CheckReport()
        report.allocated_bytes = sum(self._host_length)
        start, length = self._trailer.data_offset, self._trailer.data_length
        if self._trailer.checksum is None:
            report.add(Severity.NOTE, "the image has no checksum of its data that tapfs knows")
            return report
        crc = 0
        for at in range(start, start + length, _READ_BYTES):
            crc = zlib.crc32(self._file.read(at, min(_READ_BYTES, start + length - at)), crc)
            if progress is not None:
                progress(at - start, length)
        if progress is not None:
            progress(length, length)
        if crc != self._trailer.checksum:
            message = f"the data has the CRC-32 {crc:08x}, and the trailer says {self._trailer.checksum:08x}"
            report.add(Severity.CORRUPTION, message, start)
        return report

    def repair(self) -> Sequence[Plan]:
        """Nothing: what is lost is packed data."""
        return ()
