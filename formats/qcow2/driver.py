"""The driver of a qcow2 image that is read: its map, its check and repair, and the edits that change no map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapfs.driver import BackingReference, CheckReport, Driver, ProgressCallback
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

    def rebase(self, backing: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
        """See :mod:`tapfs.formats.qcow2.rebase`. An image may have any parent."""
        from tapfs.formats.qcow2.rebase import rebase_plan

        del parent
        yield rebase_plan(self.header, self.head, self.extensions, backing, self.file.path)

    @property
    def can_uncover(self) -> bool:
        """Whether clusters can be forgotten: in a data file each has its place for ever."""
        return not self.data_number
