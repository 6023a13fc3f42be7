"""Open and map a qcow version 1 image."""

from __future__ import annotations

import sys
from array import array

from tapfs.driver import (
    BackingReference,
    Cipher,
    CipherAlgorithm,
    CipherMode,
    Codec,
    Cryptography,
    Finding,
    Geometry,
    HostFile,
    OpenRequest,
    Packing,
    Severity,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, merge
from tapfs.formats.changed_table import ByteOrder
from tapfs.formats.qcow.entries import COMPRESSED, SECTOR, Run, extent_of, fault, runs
from tapfs.formats.qcow.extended import ExtendedHeader, parse_extended
from tapfs.formats.qcow.header import (
    BACKING_FILE_OFFSET_AT,
    CRYPT_AES,
    ENTRY_LENGTH,
    L1_TABLE_OFFSET_AT,
    LENGTH,
    Header,
    parse_header,
)
from tapfs.formats.qcow.l1 import L1Table, decide_order, implausible_entries
from tapfs.formats.qcow.tables import Tables
from tapfs.formats.rounding import round_up
from tapfs.tables import ASK, Rule, TableLayout

#: Bytes of the file that are read at open: header, extended header and the longest name.
HEAD_BYTES = 4096

#: The one cipher of qcow: AES-128 in CBC mode, the IV is the number of the guest's sector.
_KEY_BYTES = 16
_AES = Cipher(CipherAlgorithm.AES, CipherMode.CBC, _KEY_BYTES)

#: L2 tables looked at when both byte orders of L1 are plausible.
_EVIDENCE_TABLES = 8


class QcowReader:
    """The map of an open image, and what every kind of driver needs of the image."""

    format_name = "qcow"

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        self.file = file
        self.writable = request.writable
        #: Makes space for a check to work in.
        self.scratch = request.scratch
        #: Damage that a lenient open went past.
        self.open_findings: list[Finding] = []
        #: Whether a lenient open had to guess the byte order of L1.
        self.order_uncertain = False
        head = file.read(0, HEAD_BYTES)
        self.header: Header = parse_header(head, file)
        if request.grown_size is not None:
            self.header = self.header._replace(size=round_up(request.grown_size, SECTOR))
        self.extended: ExtendedHeader | None = parse_extended(head, self.header)
        self.backing = self._read_backing(lenient=request.lenient)
        self.l1 = self._read_l1(lenient=request.lenient, cut=request.cut)
        self.cksum_valid = self.extended is not None and self.extended.cksum == self.l1.cksum()
        self.tables = Tables(file, self.header, self.l1)
        self.decide_fast_path()
        self._geometry = Geometry(
            virtual_size=self.header.size,
            granule=self.header.cluster_size,
            map_unit=self.header.unit,
            backing=self.backing,
            packing=Packing(Codec.RAW_DEFLATE),
            cipher=_AES if self.header.crypt_method == CRYPT_AES else None,
        )

    @property
    def geometry(self) -> Geometry:
        """The constants of the image."""
        return self._geometry

    def map(self, offset: int, length: int) -> list[Extent]:
        """The map of the whole clusters that the range touches; see :meth:`tapfs.driver.Driver.map`."""
        unit = self.header.unit
        first, stop = offset // unit, -(-(offset + length) // unit)
        disk_end = round_up(self.header.size, self.header.cluster_size)
        bits, entries = self.header.cluster_bits, self.header.l2_entries
        extents: list[Extent] = []
        index = first
        while index < stop:
            used = self.l1.next_used(index, stop)
            if used > index:
                extents.append(Extent(index * unit, (used - index) * unit, Kind.UNALLOCATED))
                index = used
                continue
            table = self.tables.load(index)
            if table is not None:
                base = index * entries
                start, end = max((offset >> bits) - base, 0), min((offset + length - 1 >> bits) + 1 - base, entries)
                extents.extend(self._table_extents(index, table, start, end))
            index += 1
        last = extents[-1]
        if last.end > disk_end:
            extents[-1] = last._replace(length=disk_end - last.offset)
        return list(merge(extents))

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """The units from that of `offset` on which have no table."""
        index = offset // self.header.unit
        stop = self.l1.next_used(index, -(-end // self.header.unit))
        if stop == index:
            return None
        return Extent(offset, min(stop * self.header.unit, end) - offset, Kind.UNALLOCATED)

    def table_layout(self) -> TableLayout | None:
        """The L2 tables, unless L1 alone gives clusters or header copies may lie over tables."""
        header = self.header
        if self.follows_formula:
            return None
        shift = 63 - header.cluster_bits
        return TableLayout(
            entry_bytes=ENTRY_LENGTH,
            big_endian=True,
            host_size=self.host_size,
            rules=(Rule((1 << 64) - 1, 0, Kind.UNALLOCATED), Rule(COMPRESSED, COMPRESSED, Kind.COMPRESSED)),
            place_mask=COMPRESSED - 1,
            place_alignment=SECTOR,
            packed_place_mask=(1 << shift) - 1,
            packed_length_shift=shift,
            packed_length_mask=(1 << header.cluster_bits) - 1,
            table_alignment=header.cluster_size,
            least_place=LENGTH,
            reserved=((header.l1_table_offset, header.l1_end),),
        )

    def table_places(self, first: int, count: int) -> array[int]:
        """The L1 entries; tables that differ from the disk are left to `map`."""
        places = array("Q", bytes(self.l1.raw[ENTRY_LENGTH * first : ENTRY_LENGTH * (first + count)]))
        if self.l1.order != sys.byteorder:
            places.byteswap()
        for index in self.tables.changed_between(first, first + count):
            places[index - first] = ASK
        return places

    @property
    def host_size(self) -> int:
        """The length of the file, with what has been allocated."""
        return self.tables.file_size

    def unlock(self, password: bytes, cryptography: Cryptography) -> bytearray:
        """The first 16 bytes of the password, with zeros behind a shorter one. Nothing tells a wrong password."""
        del cryptography  # nothing is derived
        return bytearray(password[:_KEY_BYTES].ljust(_KEY_BYTES, b"\0"))

    def decide_fast_path(self) -> None:
        """Decide from the extended header whether L1 alone gives every cluster."""
        #: Whether blktap filled every L2 table whole, right before its clusters.
        self.follows_formula = (
            self.extended is not None
            and self.extended.min_cluster_alloc == self.header.l2_entries
            and not self.header.has_backing
        )
        #: Whether blktap relies on that and never reads L2.
        self.fast_path = self.cksum_valid and self.follows_formula
        self.tables.formula = self.fast_path
        self.tables.strays_follow_formula = self.follows_formula

    def table_runs(self, index: int, table: array[int], first: int = 0, stop: int | None = None) -> list[Run]:
        """The runs of the entries ``[first, stop)`` of a table, clipped to the disk; those past its end count not."""
        clusters = -(-(self.header.size - index * self.header.unit) // self.header.cluster_size)
        end = min(clusters, self.header.l2_entries if stop is None else stop)
        return list(runs(table, self.header.cluster_bits, first, end))

    def _table_extents(self, index: int, table: array[int], first: int, stop: int) -> list[Extent]:
        header = self.header
        extents: list[Extent] = []
        for run in self.table_runs(index, table, first, stop):
            self.require_possible(index, run)
            extents.append(extent_of(run, index * header.unit, header.cluster_bits, writable=self.writable))
        return extents

    def require_possible(self, index: int, run: Run) -> None:
        """Raise ImageError(corrupt) if this run of L2 table `index` lies where nothing can be."""
        wrong = fault(run, self.header, self.tables.file_size)
        if wrong is not None:
            raise ImageError(
                ErrorKind.CORRUPT,
                f"L2 entry {run.first} of table {index}: {wrong}",
                path=self.file.path,
                offset=self.l1[index] + ENTRY_LENGTH * run.first,
                op="map",
            )

    def _read_backing(self, *, lenient: bool) -> BackingReference | None:
        header = self.header
        if not header.has_backing:
            return None
        raw = self.file.read(header.backing_file_offset, header.backing_file_size)
        if len(raw) < header.backing_file_size:
            message = (
                f"backing_file_offset is {header.backing_file_offset:#x}: the name of "
                f"{header.backing_file_size} bytes lies past the end of the file"
            )
            if not lenient:
                raise ImageError(
                    ErrorKind.CORRUPT, message, path=self.file.path, offset=BACKING_FILE_OFFSET_AT, op="open"
                )
            self.open_findings.append(Finding(Severity.CORRUPTION, message, BACKING_FILE_OFFSET_AT))
        name = raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        return BackingReference(name) if name else None

    def _read_l1(self, *, lenient: bool, cut: bool) -> L1Table:
        header, size = self.header, self.file.size()
        raw = bytearray(
            self.file.read(header.l1_table_offset, header.l1_length) if header.l1_table_offset < size else b""
        )
        if len(raw) < header.l1_length:
            message = f"L1 table [{header.l1_table_offset:#x}, {header.l1_end:#x}) past the end of the file ({size:#x})"
            if not lenient:
                raise ImageError(ErrorKind.CORRUPT, message, path=self.file.path, offset=L1_TABLE_OFFSET_AT, op="open")
            self.open_findings.append(Finding(Severity.CORRUPTION, message, L1_TABLE_OFFSET_AT))
            raw.extend(bytes(header.l1_length - len(raw)))
        order = decide_order(
            raw,
            self.extended,
            cluster_size=header.cluster_size,
            file_size=size,
            tables_plausible=lambda order: self._tables_plausible(L1Table(raw, order)),
        )
        if order is None:
            message = "the entries of the L1 table are outside the file or unaligned in either byte order"
            if not (lenient or cut):
                raise ImageError(
                    ErrorKind.CORRUPT, message, path=self.file.path, offset=header.l1_table_offset, op="open"
                )
            # Of a file that was cut, entries lead behind its end. In the wrong order they lead much further.
            wrong: dict[ByteOrder, tuple[int, int]] = {
                "big": implausible_entries(raw, "big", header.cluster_size, size),
                "little": implausible_entries(raw, "little", header.cluster_size, size),
            }
            order = "little" if wrong["little"] < wrong["big"] else "big"
            self.order_uncertain = True
        return L1Table(raw, order)

    def _tables_plausible(self, l1: L1Table) -> bool:
        header = self.header
        tables = Tables(self.file, header, l1)
        for _, (index, entry) in zip(range(_EVIDENCE_TABLES), l1.used(), strict=False):
            if tables.table_fault(entry) is not None:
                return False
            if any(
                fault(run, header, tables.file_size) for run in self.table_runs(index, tables.read_from_disk(entry))
            ):
                return False
        return True
