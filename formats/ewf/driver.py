"""The driver of an open EWF image: its segments, its map, its details and its check."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tapfs.driver import CheckReport, Codec, Geometry, HostFile, OpenRequest, Packing, ProgressCallback, Role, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, merge
from tapfs.formats.ewf import SIGNATURE
from tapfs.formats.ewf.acquisition import acquisition, bad_ranges, digests
from tapfs.formats.ewf.chunks import Copy, Table, extents_of, read_copy, read_entries
from tapfs.formats.ewf.sections import NEXT, Section, next_name, sections, segment_number
from tapfs.formats.ewf.volume import Volume, parse_volume
from tapfs.plan import Plan

if TYPE_CHECKING:
    from tapfs.formats.ewf.contents import Contents

#: Chunks of a map unit: 8 MiB of the disk, as images are usually made.
_UNIT_CHUNKS = 256

#: Tables whose extents are kept. One has 16375 entries as a rule.
_KEPT_TABLES = 4

#: Packed chunks carry the number of their host file in 10 bits.
_MAX_SEGMENTS = 1023


class EwfDriver:
    """An open image: a :class:`tapfs.driver.Driver` that is `Checkable`."""

    format_name = "ewf"

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        number = segment_number(file, SIGNATURE)
        if number != 1:
            raise ImageError(
                ErrorKind.INVALID_FORMAT,
                f"is segment {number} of an EWF image",
                path=file.path,
                offset=9,
                op="open",
                remedy="name the first segment, whose suffix is E01 or s01",
            )
        self._file = file
        self._segments: list[tuple[HostFile, list[Section]]] = []
        self._tables: list[Table] = []
        self._kept: OrderedDict[int, Sequence[Extent | ImageError]] = OrderedDict()
        numbers = self._open_segments(request)
        self._volume = volume = _volume(*self._segments[0])
        for number, (segment, found) in zip(numbers, self._segments, strict=True):
            self._add_tables(number, segment, found)
        self._firsts = [table.first for table in self._tables]
        self._mapped_chunks = sum(table.entries for table in self._tables)
        self.geometry = Geometry(
            virtual_size=volume.size,
            granule=volume.chunk_bytes,
            map_unit=volume.chunk_bytes * _UNIT_CHUNKS,
            packing=Packing(Codec.ZLIB),
        )

    # -- segments -------------------------------------------------------------------------------

    def _open_segments(self, request: OpenRequest) -> Sequence[int]:
        """Open every segment and read its sections. The number of each as a host file of the image."""
        opened = [0]
        name = self._file.path.rsplit("/", 1)[-1]
        self._segments.append((self._file, list(sections(self._file, cut=request.cut))))
        # One that was cut ends neither with DONE nor with NEXT; what follows has no known place on the disk.
        while self._segments[-1][1][-1].kind == NEXT:
            count = len(opened) + 1
            if count > _MAX_SEGMENTS:
                message = f"has more than {_MAX_SEGMENTS} segments"
                raise ImageError(ErrorKind.UNSUPPORTED, message, path=self._file.path, op="open")
            try:
                number, file = request.further.open(next_name(name, count), Role.READ_ONLY_DATA)
            except ImageError as error:
                if request.cut and error.kind is ErrorKind.NOT_FOUND:
                    break
                raise
            if segment_number(file, SIGNATURE) != count:
                message = f"is not segment {count} of the image {self._file.path}"
                raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=9, op="open")
            self._segments.append((file, list(sections(file, cut=request.cut))))
            opened.append(number)
        return opened

    def _add_tables(self, number: int, file: HostFile, found: Sequence[Section]) -> None:
        first = sum(table.entries for table in self._tables)
        area: tuple[int, int] | None = None
        for at, section in enumerate(found):
            if section.kind == "sectors":
                area = (section.content, section.end)
            if section.kind != "table":
                continue
            copies = [read_copy(file, section)]
            if at + 1 < len(found) and found[at + 1].kind == "table2":
                copies.append(read_copy(file, found[at + 1]))
            # The copy whose header is whole says how many entries there are.
            count = next((copy.entries for copy in copies if copy.header_right), copies[0].entries)
            areas = ((section.content, section.end), *(() if area is None else (area,)))
            self._tables.append(Table(first, count, number, file, tuple(copies), areas))
            first += count

    # -- map ------------------------------------------------------------------------------------

    def map(self, offset: int, length: int) -> list[Extent]:
        """See :meth:`tapfs.driver.Driver.map`. Raises ImageError(corrupt) for chunks that the image lacks."""
        volume = self._volume
        first = offset // volume.chunk_bytes
        stop = min(-(-(offset + length) // volume.chunk_bytes), volume.chunks)
        found: list[Extent] = []
        while first < stop:
            index = bisect_right(self._firsts, first) - 1
            table = self._tables[index] if index >= 0 else None
            if table is None or first >= table.first + table.entries:
                raise ImageError(
                    ErrorKind.CORRUPT,
                    f"has only {self._mapped_chunks} of {volume.chunks} chunks: chunk {first} is missing",
                    path=self._file.path,
                    op="map",
                    remedy="the acquisition was not finished; the chunks that are missing cannot be read",
                )
            end = min(stop, table.first + table.entries)
            for chunk in self._extents(index)[first - table.first : end - table.first]:
                if isinstance(chunk, ImageError):
                    raise chunk.with_traceback(None)
                found.append(chunk)
            first = end
        return list(merge(found))

    def _extents(self, index: int) -> Sequence[Extent | ImageError]:
        kept = self._kept.pop(index, None)
        if kept is None:
            kept = extents_of(self._tables[index], self._volume.chunk_bytes, self._volume.size)
            while len(self._kept) >= _KEPT_TABLES:
                self._kept.popitem(last=False)
        self._kept[index] = kept
        return kept

    # -- details and check ----------------------------------------------------------------------

    @property
    def plain_details(self) -> frozenset[str]:
        """What an examiner looks for."""
        return frozenset({"segments", "acquisition", "md5", "sha1", "bad_ranges"})

    def details(self) -> Mapping[str, object]:
        """The segments, the acquisition and the digests that the image holds of its disk; nothing is computed."""
        last = self._segments[-1]
        return {
            "segments": len(self._segments),
            "chunk_size": self._volume.chunk_bytes,
            "sector_size": self._volume.sector_bytes,
            "acquisition": acquisition(*self._segments[0]),
            **digests(*last),
            "bad_ranges": bad_ranges(*last),
        }

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare every section, table and chunk with its checksum, tables with their copies, the disk with its MD5.

        It reads the whole image.
        """
        from tapfs.formats.ewf.contents import Contents  # hashlib loads OpenSSL

        report = CheckReport()
        for file, found in self._segments:
            for section in found:
                if not section.checksum_right:
                    message = f"{file.path}: the checksum of the section {section.kind!r} does not fit"
                    report.add(Severity.CORRUPTION, message, section.offset)
        if self._mapped_chunks < self._volume.chunks:
            message = f"only {self._mapped_chunks} of {self._volume.chunks} chunks are there"
            report.add(Severity.CORRUPTION, message)
        contents = Contents(self._volume.size, report)
        for table in self._tables:
            self._check_table(table, report, contents, progress)
        contents.tell()
        contents.compare_digest(digests(*self._segments[-1]).get("md5"))
        if progress is not None:
            progress(self._volume.chunks, self._volume.chunks)
        return report

    def repair(self) -> Sequence[Plan]:
        """Nothing: evidence is not changed."""
        return ()

    def _check_table(
        self, table: Table, report: CheckReport, contents: Contents, progress: ProgressCallback | None
    ) -> None:
        good: list[Copy] = []
        for copy in table.copies:
            if read_entries(table, copy) is None:
                message = f"{table.file.path}: the checksum of a table of chunks does not fit"
                report.add(Severity.CORRUPTION, message, copy.entries_at)
            else:
                good.append(copy)
        entries = [read_entries(table, copy) for copy in good]
        if len(entries) == 2 and entries[0] != entries[1]:
            message = f"{table.file.path}: the two copies of a table of chunks differ"
            report.add(Severity.CORRUPTION, message, good[1].entries_at)
        try:
            found = extents_of(table, self._volume.chunk_bytes, self._volume.size)
        except ImageError as error:
            report.add(Severity.CORRUPTION, f"{table.file.path}: {error.message}", error.offset)
            return
        for number, chunk in enumerate(found, table.first):
            if progress is not None and number % _UNIT_CHUNKS == 0:
                progress(number, self._volume.chunks)
            if isinstance(chunk, ImageError):
                report.add(Severity.CORRUPTION, f"{table.file.path}: {chunk.message}", chunk.offset)
            elif number < self._volume.chunks:
                report.allocated_bytes += chunk.host_length or chunk.length
                contents.compare(number, table.file, chunk)


def _volume(file: HostFile, found: Sequence[Section]) -> Volume:
    section = next((each for each in found if each.kind in ("volume", "disk")), None)
    if section is None:
        message = "the first segment has no volume section, so the size of the disk is unknown"
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, op="open")
    return parse_volume(file, section)
