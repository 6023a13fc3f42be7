"""The driver of a qcow2 image that is read: its map, and its check and repair."""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.driver import CheckReport, ProgressCallback
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.plan import Plan


class Qcow2Driver(Qcow2Reader):
    """An open image: a :class:`tapfs.driver.Checkable`."""

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare all metadata with itself and with the file; see :mod:`tapfs.formats.qcow2.check`."""
        from tapfs.formats.qcow2.check import Check

        return Check(self, progress).report

    def repair(self) -> Sequence[Plan]:
        """Plans that mend leaks, counts and the bits that follow from them; see :mod:`tapfs.formats.qcow2.repair`."""
        from tapfs.formats.qcow2.repair import repair_plans

        return repair_plans(self)
