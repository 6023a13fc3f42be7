"""The driver of an open VMDK that is only read: its map, its details, its check and its repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tapfs.driver import CheckReport, ProgressCallback
from tapfs.formats.vmdk.details import details
from tapfs.formats.vmdk.reader import VmdkReader
from tapfs.plan import Plan


class VmdkDriver(VmdkReader):
    """An open disk, read-only: a :class:`tapfs.driver.Driver`."""

    @property
    def plain_details(self) -> frozenset[str]:
        """What an operator may have chosen, and what the disks over this one know it by."""
        return frozenset({"create_type", "cid"})

    def details(self) -> Mapping[str, object]:
        """The descriptor's own words, and one entry for each extent."""
        return details(self)

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare all metadata with itself and with the files; see :mod:`tapfs.formats.vmdk.check`."""
        from tapfs.formats.vmdk.check import Check

        return Check(self, progress).report

    def repair(self) -> Sequence[Plan]:
        """Plans that make the tables agree; see :mod:`tapfs.formats.vmdk.repair`."""
        from tapfs.formats.vmdk.repair import repair

        return repair(self)
