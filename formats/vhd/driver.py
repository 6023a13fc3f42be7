"""The driver of a VHD that grows, read-only: its map, and what can be said, checked and repaired of it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from tapfs.driver import CheckReport, ProgressCallback
from tapfs.extent import Kind
from tapfs.formats.vhd.check import Check
from tapfs.formats.vhd.description import PLAIN, footer_details, moment, notes_of, with_notes
from tapfs.formats.vhd.dynamic_header import ENTRY_LENGTH, SECTOR, UNUSED
from tapfs.formats.vhd.reader import DynamicReader
from tapfs.formats.vhd.repair import repair_plans
from tapfs.identifiers import Uuid
from tapfs.plan import Plan
from tapfs.tables import ASK, Bitmap, Rule, TableLayout, Where


class DynamicDriver(DynamicReader):
    """An open image, read-only: a :class:`tapfs.driver.Driver`, whose table and bitmaps the engine reads itself."""

    def table_layout(self) -> TableLayout:
        """The block allocation table and the bitmaps."""
        header = self.header
        return TableLayout(
            entry_bytes=ENTRY_LENGTH,
            big_endian=True,
            host_size=self.host_size,
            rules=(Rule(UNUSED, UNUSED, Kind.UNALLOCATED),),
            place_mask=UNUSED,
            place_shift=SECTOR.bit_length() - 1,
            place_add=header.bitmap_bytes,
            data_whole=True,
            entry_granules=self.block_sectors,
            bitmap=Bitmap(Where.IN_BLOCK, most_significant_first=not self.old_bitmaps, block_bytes=header.bitmap_bytes),
            tables_reserved=True,
            reserved=tuple((start, stop) for start, stop, _ in self.metadata_ranges),
        )

    def table_places(self, first: int, count: int) -> array[int]:
        """The entries' own places. A block that tapdisk's batmap calls full has a bitmap that does not count."""
        start = self.table.entry_offset(first)
        places = array("Q", range(start, start + count * ENTRY_LENGTH, ENTRY_LENGTH))
        if self.batmap is not None:
            for index in range(first, first + count):
                if self.batmap.is_full(index):
                    places[index - first] = ASK
        return places

    @property
    def host_size(self) -> int:
        """The length of the file, with what has been allocated."""
        return self.file_size

    @property
    def plain_details(self) -> frozenset[str]:
        """What is shown without -v."""
        return PLAIN

    def details(self) -> Mapping[str, object]:
        """What footer, header and locators say."""
        header = self.header
        details = footer_details(self.footers)
        details["block_size"] = header.block_size
        details["table_offset"] = header.table_offset
        details["table_entries"] = header.max_entries
        details["batmap"] = None if self.batmap is None else ("valid" if self.batmap.valid else "invalid")
        if self.differencing:
            details["parent"] = {
                "uuid": str(Uuid(header.parent_uuid)),
                "modified": moment(header.parent_timestamp),
                "names": [{"code": name.code, "name": name.text} for name in self.names],
            }
        return with_notes(details, notes_of(self.footer, self.findings))

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare all metadata with itself and with the file; see :mod:`tapfs.formats.vhd.check`."""
        return Check(self, progress).report

    def repair(self) -> Sequence[Plan]:
        """Plans that mend footers, checksums and batmap; see :mod:`tapfs.formats.vhd.repair`."""
        return repair_plans(self)
