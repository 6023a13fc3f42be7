"""The driver of an open VDI image that is only read: its map, its details, its check and its repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tapfs.driver import CheckReport, ProgressCallback
from tapfs.formats.vdi.reader import VdiReader
from tapfs.plan import Plan


class VdiDriver(VdiReader):
    """An open image, read-only: a :class:`tapfs.driver.Driver`."""

    @property
    def plain_details(self) -> frozenset[str]:
        """What an operator may have chosen."""
        return frozenset({"block_size", "type"})

    def details(self) -> Mapping[str, object]:
        """The fields of the header."""
        header = self.header
        return {
            "type": header.type.name.lower(),
            "version": f"{header.version >> 16}.{header.version & 0xFFFF}",
            "block_size": header.block_bytes,
            "block_extra": header.extra,
            "blocks": header.blocks,
            "allocated_blocks": header.allocated,
            "map_offset": header.map_offset,
            "data_offset": header.data_offset,
            "comment": header.comment.decode("utf-8", "replace"),
            "uuid": str(header.creation),
            "modification_uuid": str(header.modification),
            "parent_uuid": str(header.link) if header.has_parent else None,
            "parent_modification_uuid": str(header.parent_modification) if header.has_parent else None,
        }

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare the map with itself, with the header and with the file; see :mod:`tapfs.formats.vdi.check`."""
        from tapfs.formats.vdi.check import checked

        return checked(self, progress).report

    def repair(self) -> Sequence[Plan]:
        """Plans for the count of blocks and for leaked space; see :mod:`tapfs.formats.vdi.check`."""
        from tapfs.formats.vdi.check import repair_plans

        return repair_plans(self)
