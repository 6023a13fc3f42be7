"""The driver of a VHD that grows, read-only: its map, and what can be said, checked and repaired of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import UUID

from tapfs.driver import CheckReport, ProgressCallback
from tapfs.formats.vhd.check import Check
from tapfs.formats.vhd.description import PLAIN, footer_details, moment, notes_of, with_notes
from tapfs.formats.vhd.reader import DynamicReader
from tapfs.formats.vhd.repair import repair_plans
from tapfs.plan import Plan


class DynamicDriver(DynamicReader):
    """An open image, read-only: a :class:`tapfs.driver.Driver`."""

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
                "uuid": str(UUID(bytes=header.parent_uuid)),
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
