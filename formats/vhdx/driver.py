"""The driver of an open VHDX image that is only read: its map, its details, its check and its repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tapfs.driver import CheckReport, ProgressCallback
from tapfs.formats.vhdx.engine_tables import TabledVhdx
from tapfs.formats.vhdx.guids import guid_text
from tapfs.plan import Plan


class VhdxDriver(TabledVhdx):
    """An open image, read-only: a :class:`tapfs.driver.Driver`."""

    @property
    def plain_details(self) -> frozenset[str]:
        """What an operator may have chosen."""
        return frozenset({"subformat", "block_size", "logical_sector_size"})

    def details(self) -> Mapping[str, object]:
        """Sizes in bytes, GUIDs as text; the words are those of docs/specs/vhdx.md."""
        metadata, header = self.metadata, self.header
        base = "fixed" if metadata.leave_allocated else "dynamic"
        return {
            "subformat": "differencing" if metadata.has_parent else base,
            "block_size": metadata.block_size,
            "logical_sector_size": metadata.logical_sector,
            "physical_sector_size": metadata.physical_sector,
            "log_size": header.log_length,
            "log_offset": header.log_offset,
            "block_table_offset": self.table.host_offset,
            "blocks": self.table.blocks,
            "disk_id": guid_text(metadata.disk_id),
            "data_write_guid": guid_text(header.data_write),
            "file_write_guid": guid_text(header.file_write),
            "header_sequence": header.sequence,
            "parent_locator": dict(self.locator_entries) or None,
        }

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare all metadata with itself and with the file; see :mod:`tapfs.formats.vhdx.check`."""
        from tapfs.formats.vhdx.check import Check

        return Check(self, progress).report

    def repair(self) -> Sequence[Plan]:
        """Plans that mend copies and give leaked space back; see :mod:`tapfs.formats.vhdx.repair`."""
        from tapfs.formats.vhdx.repair import repair_plans

        return repair_plans(self)
