"""Open and map a qcow2 image: the current disk, or one of the image's snapshots."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from tapfs.driver import (
    BackingReference,
    Codec,
    Cryptography,
    Finding,
    Geometry,
    HostFile,
    OpenRequest,
    Packing,
    Role,
    Severity,
    SnapshotRecord,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, merge
from tapfs.formats.qcow2 import extensions as ext
from tapfs.formats.qcow2.backing import backing_reference
from tapfs.formats.qcow2.details import describe
from tapfs.formats.qcow2.encryption import Encryption, read_encryption
from tapfs.formats.qcow2.entries import COPIED, SECTOR, Decoder, EntryFault, Run
from tapfs.formats.qcow2.header import (
    COMPRESSION_ZSTD,
    L1_OFFSET_AT,
    LENGTH_2,
    WORD,
    Header,
    l1_entries_for,
    parse_header,
)
from tapfs.formats.qcow2.l1 import L1Table
from tapfs.formats.qcow2.layout import slice_layout, slice_places
from tapfs.formats.qcow2.openable import require_features
from tapfs.formats.qcow2.slices import Slices
from tapfs.formats.qcow2.snapshots import Snapshot, read_snapshots, snapshot_named
from tapfs.formats.rounding import round_up
from tapfs.tables import TableLayout

#: Bytes of the file that tell how long its first cluster is, and in most images have all that is said in that.
_HEAD_BYTES = 4096


class Qcow2Reader:
    """An open image, read-only: a :class:`tapfs.driver.Driver`."""

    format_name = "qcow2"

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        self.file = file
        self.writable = request.writable
        self.further = request.further
        #: Whether clusters that the end of the file cuts are mapped.
        self._cut = request.cut
        #: Damage that a lenient open went past.
        self.open_findings: list[Finding] = []
        start = file.read(0, _HEAD_BYTES)
        self.header: Header = parse_header(start, file)
        if request.grown_size is not None:
            self.header = self.header._replace(size=round_up(request.grown_size, SECTOR))
        #: The first cluster when the image was opened; for a reader it may be less, with all that the header leads to.
        self.head = start
        if request.writable or not ext.are_whole(start, self.header):
            self.head = file.read(0, self.header.cluster_size)
        self.extensions = self._read_extensions(lenient=request.lenient)
        require_features(self.header, self.extensions, file.path, writable=request.writable and not request.lenient)
        self.encryption = self._read_encryption(lenient=request.lenient)
        self.backing = self._read_backing()
        self.snapshot: Snapshot | None = None
        if request.snapshot is not None:
            self.snapshot = snapshot_named(self.read_snapshots(), request.snapshot, file.path)
        self.size = self.header.size if self.snapshot is None else self.snapshot.disk_size
        self.l1_offset = self.header.l1_offset if self.snapshot is None else self.snapshot.l1_offset
        self.l1 = self._read_l1(lenient=request.lenient)
        self.slices = Slices(file, self.header, self.l1, self.l1_offset)
        self.decoder = Decoder(self.header, self.slices.file_size)
        self.data_number = 0
        self.data_file = file
        #: Why the data file could not be opened, if so: the image can be described without it.
        self.data_file_error: ImageError | None = None
        if self.header.has_data_file:
            self._open_data_file(request)
        self._geometry = Geometry(
            virtual_size=self.size,
            granule=self.header.granule,
            map_unit=self.header.unit,
            backing=self.backing,
            packing=Packing(self._codec, self.header.cluster_size),
            cipher=None if self.encryption is None else self.encryption.cipher,
        )

    @property
    def geometry(self) -> Geometry:
        """The constants of the image."""
        return self._geometry

    @property
    def _codec(self) -> Codec:
        return Codec.ZSTD if self.header.compression_type == COMPRESSION_ZSTD else Codec.RAW_DEFLATE

    # -- the map --------------------------------------------------------------------------------

    def map(self, offset: int, length: int) -> list[Extent]:
        """The map of the whole clusters that the range touches; see :meth:`tapfs.driver.Driver.map`."""
        if self.data_file_error is not None:
            raise self.data_file_error
        unit, per_slice = self.header.unit, self.header.slice_entries
        at, stop = offset // unit, -(-(offset + length) // unit)
        first_entry, last_entry = offset >> self.header.cluster_bits, offset + length - 1 >> self.header.cluster_bits
        disk_end = round_up(self.size, self.header.granule)
        extents: list[Extent] = []
        while at < stop:
            used = self.next_used_unit(at, stop)
            if used > at:
                extents.append(Extent(at * unit, (used - at) * unit, Kind.UNALLOCATED))
                at = used
                continue
            words = self.slices.load(at)
            if words is None:  # an entry of reserved bits alone
                extents.append(Extent(at * unit, unit, Kind.UNALLOCATED))
            else:
                base = at * per_slice
                first, end = max(first_entry - base, 0), min(last_entry + 1 - base, per_slice)
                extents.extend(self._slice_extents(at, words, first, end))
            at += 1
        while extents[-1].offset >= disk_end:  # subclusters and entries behind the end are nobody's
            extents.pop()
        last = extents[-1]
        if last.end > disk_end:
            extents[-1] = last._replace(length=disk_end - last.offset)
        return list(merge(extents))

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """The units from that of `offset` on which have no table."""
        first = offset // self.header.unit
        stop = self.next_used_unit(first, -(-end // self.header.unit))
        if stop == first:
            return None
        return Extent(offset, min(stop * self.header.unit, end) - offset, Kind.UNALLOCATED)

    def next_used_unit(self, unit: int, stop: int) -> int:
        """The first unit from `unit` on that has a table, or `stop`."""
        slices = self.header.slices
        index = unit // slices
        used = self.l1.next_used(index, min(-(-stop // slices), len(self.l1)))
        if used >= len(self.l1):
            return stop
        return min(max(unit, used * slices), stop)

    def _slice_extents(self, unit: int, words: array[int], first: int, stop: int) -> list[Extent]:
        base = unit * self.header.unit
        table_copied = self.l1[unit // self.header.slices] & COPIED != 0
        extents: list[Extent] = []
        for run in self.runs(unit, words, first, stop):
            data = run.kind is Kind.DATA
            placed = data or run.kind is Kind.COMPRESSED
            extents.append(
                Extent(
                    base + run.start,
                    run.length,
                    run.kind,
                    self.data_number if data else 0,
                    run.host_offset if placed else 0,
                    run.host_length,
                    data and run.copied and table_copied and self.may_write(run),
                )
            )
        return extents

    def runs(self, unit: int, words: array[int], first: int = 0, stop: int | None = None) -> list[Run]:
        """The runs of the entries ``[first, stop)`` of a slice, up to the end of the disk.

        Raises ImageError(corrupt) for an entry that cannot be true.
        """
        clusters = -(-(self.size - unit * self.header.unit) // self.header.cluster_size)
        found: list[Run] = []
        for run in self.decoder.runs(words, first, min(clusters, self.header.slice_entries if stop is None else stop)):
            if isinstance(run, EntryFault):
                raise self.entry_error(unit, run.entry, run.message)
            wrong = self.place_fault(run) or self.displaced(run, unit * self.header.unit)
            if wrong is not None:
                raise self.entry_error(unit, run.first, wrong)
            wrong = None if self._cut else self.cut_fault(run, unit * self.header.unit)
            if wrong is not None:
                last = run.first + (run.length - 1 >> self.header.cluster_bits)
                raise self.entry_error(unit, last, wrong)
            found.append(run)
        return found

    def may_write(self, run: Run) -> bool:
        """Whether data that belongs to this disk alone may be written in place."""
        del run
        return False

    def place_fault(self, run: Run) -> str | None:
        """What makes the place of a run impossible, or None; see `cut_fault` for one that the end of the file cuts."""
        header = self.header
        if run.kind is Kind.COMPRESSED:
            end, what = run.host_offset + run.host_length, f"payload at {run.host_offset:#x}"
            if run.host_offset >= self.slices.file_size:
                return f"{what} past the end of the file ({self.slices.file_size:#x})"
        elif run.kind is Kind.DATA:
            end, what = run.host_offset + run.length, f"cluster at {run.host_offset:#x}"
            if run.host_offset % header.granule or (not header.extended_l2 and run.host_offset % header.cluster_size):
                return f"{what} not aligned to a cluster"
            size = self.data_size
            # Of subclusters behind the end of the disk nothing need be in the file: `cut_fault` knows that end.
            last = run.host_offset - run.start % header.cluster_size if header.extended_l2 else end - header.granule
            if last >= size:
                return f"{what} past the end of the file ({size:#x})"
            if self.data_number:
                return None  # no metadata lies in a data file
        else:
            return None
        if run.host_offset < header.cluster_size:
            return f"{what} inside the header"
        for name, start, stop in self.reserved():
            if run.host_offset < stop and start < end:
                return f"{what} inside the {name}"
        return None

    def displaced(self, run: Run, base: int) -> str | None:
        """How far from its place of a data file a run is that its table has at `base` of the disk, or None.

        Two entries could else name one place, and a write to one would change both. QEMU takes such an entry for
        corrupt, too.
        """
        if not self.data_number or run.kind is not Kind.DATA or run.host_offset == base + run.start:
            return None
        return f"cluster at {run.host_offset:#x} of the data file is not at its place there ({base + run.start:#x})"

    def cut_fault(self, run: Run, base: int) -> str | None:
        """How the file was cut in a run of the slice that begins at `base` of the disk, or None.

        What the disk has of a cluster must be in the file: all of it, but for the last cluster of the disk.
        """
        if run.kind is not Kind.DATA:
            return None
        missing = run.host_offset + min(run.length, self.size - base - run.start) - self.data_size
        return f"the file was cut: it ends {missing} bytes before the data does" if missing > 0 else None

    def reserved(self) -> tuple[tuple[str, int, int], ...]:
        """The name, start and end of each table in which no data can lie."""
        header = self.header
        place = None if self.encryption is None else self.encryption.place
        return (
            *(() if place is None else (("encryption header", place.start, place.stop),)),
            ("L1 table", self.l1_offset, self.l1_offset + WORD * len(self.l1)),
            ("refcount table", header.reftable_offset, header.reftable_offset + header.reftable_length),
        )

    def entry_error(self, unit: int, entry: int, message: str) -> ImageError:
        """An entry of a slice that cannot be true."""
        at = entry * self.header.l2_entry_bytes
        number = unit * self.header.slice_entries + entry
        index, inside = divmod(number, self.header.l2_entries)
        offset = self.slices.table_offset(unit) + at
        text = f"L2 entry {inside} of table {index}: {message}"
        return ImageError(ErrorKind.CORRUPT, text, path=self.file.path, offset=offset, op="map")

    # -- the engine's tables --------------------------------------------------------------------

    def table_layout(self) -> TableLayout | None:
        """The slices of L2 tables; None for subclusters of a data file, where place 0 is told from none by two bits."""
        if self.data_file_error is not None or (self.header.extended_l2 and self.header.has_data_file):
            return None
        return slice_layout(self.header, self.host_size, self.data_number, self.reserved())

    def table_places(self, first: int, count: int) -> array[int]:
        """The places of the slices; what only `map` can tell is left to it."""
        return slice_places(self.header, self.l1, self.slices, first, count, self.table_stays)

    def table_stays(self, place: int) -> bool:
        """Whether a table that others share is never freed by this disk; a reader frees nothing."""
        del place
        return True

    @property
    def data_size(self) -> int:
        """The length of the file that guest data lies in, with what has been allocated."""
        return self.data_file.size() if self.data_number else self.slices.file_size

    @property
    def host_size(self) -> int:
        """The length that bounds the places of data."""
        return self.data_size

    # -- description ----------------------------------------------------------------------------

    @property
    def plain_details(self) -> frozenset[str]:
        """What an operator may have chosen, or must know."""
        return frozenset(
            {
                *("cluster_size", "compat", "compression", "extended_l2", "lazy_refcounts"),
                *("data_file", "data_file_raw", "encryption", "snapshots", "bitmaps", "dirty", "corrupt"),
            }
        )

    def details(self) -> Mapping[str, object]:
        """The header in words, the snapshots and the bitmaps."""
        return describe(self.file, self.header, self.extensions, self.encryption)

    def snapshots(self) -> Sequence[str]:
        """The names of the snapshots, in the order of the table; one without a name has its id."""
        return [each.name or each.id for each in self.read_snapshots()]

    def snapshot_records(self) -> Sequence[SnapshotRecord]:
        """What the image says of its snapshots, in the order of the table."""
        return [each.record for each in self.read_snapshots()]

    @property
    def snapshot_id(self) -> str | None:
        """The id of the snapshot that is read; None: it is the current disk."""
        return None if self.snapshot is None else self.snapshot.id

    def read_snapshots(self) -> list[Snapshot]:
        """The snapshot table. Raises ImageError(corrupt, out_of_bounds)."""
        return read_snapshots(self.file, self.header)

    @property
    def proves_password(self) -> bool:
        """Whether the image can tell a wrong password."""
        return self.encryption is not None and self.encryption.proves_password

    def unlock(self, password: bytes, cryptography: Cryptography) -> bytearray:
        """The key; see :mod:`tapfs.formats.qcow2.encryption`."""
        if self.encryption is None:
            raise ImageError(ErrorKind.UNSUPPORTED, "is not encrypted", path=self.file.path, op="unlock")
        return self.encryption.unlock(password, cryptography)

    # -- opening --------------------------------------------------------------------------------

    def _read_extensions(self, *, lenient: bool) -> list[ext.Extension]:
        try:
            return ext.parse_extensions(self.head, self.header, self.file.path)
        except ImageError as error:
            if not lenient:
                raise
            self.open_findings.append(Finding(Severity.CORRUPTION, error.message, error.offset))
            return []

    def _read_encryption(self, *, lenient: bool) -> Encryption | None:
        try:
            return read_encryption(self.file, self.header, self.extensions)
        except ImageError as error:
            if not lenient:
                raise
            self.open_findings.append(Finding(Severity.CORRUPTION, error.message, error.offset))
            return None

    def _read_backing(self) -> BackingReference | None:
        header = self.header
        if not header.has_backing:
            return None
        raw = self.head[header.backing_offset : header.backing_offset + header.backing_size]
        name = raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        return backing_reference(name, ext.text_of(self.extensions, ext.BACKING_FORMAT)) if name else None

    def _read_l1(self, *, lenient: bool) -> L1Table:
        header, size = self.header, self.file.size()
        entries = header.l1_entries if self.snapshot is None else self.snapshot.l1_entries
        length, start = WORD * entries, self.l1_offset
        message = None
        if entries and (start % header.cluster_size or start == 0):
            message = f"the L1 table at {start:#x} is not on a cluster behind the header"
        elif entries < l1_entries_for(self.size, header):
            message = f"an L1 table of {entries} entries is too small for a disk of {self.size} bytes"
        elif start + length > size:
            message = f"the L1 table [{start:#x}, {start + length:#x}) lies past the end of the file ({size:#x})"
        if message is not None:
            if not lenient:
                at = L1_OFFSET_AT if self.snapshot is None else self.snapshot.offset
                raise ImageError(ErrorKind.CORRUPT, message, path=self.file.path, offset=at, op="open")
            self.open_findings.append(Finding(Severity.CORRUPTION, message, L1_OFFSET_AT))
            if start % header.cluster_size or start == 0:
                return L1Table(bytearray(length))
        raw = self.file.read(start, length) if start < size else b""
        return L1Table(bytearray(raw.ljust(length, b"\0")))

    def _open_data_file(self, request: OpenRequest) -> None:
        name = ext.text_of(self.extensions, ext.DATA_FILE_NAME)
        if name is None:
            raise ImageError(
                ErrorKind.CORRUPT, "has a data file and no name of it", path=self.file.path, offset=LENGTH_2, op="open"
            )
        try:
            self.data_number, self.data_file = request.further.open(name, Role.DATA)
        except ImageError as error:
            if error.kind not in {ErrorKind.NOT_FOUND, ErrorKind.DENIED} or request.writable:
                raise
            self.data_file_error = error
            return
        if self.data_number == 0:
            message = "names itself as its data file"
            raise ImageError(ErrorKind.CORRUPT, message, path=self.file.path, offset=LENGTH_2, op="open")
