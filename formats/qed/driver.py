"""The driver of a QED image, which is only read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tapfs.driver import CheckReport, ProgressCallback
from tapfs.formats.qed.check import Check
from tapfs.formats.qed.reader import QedReader
from tapfs.plan import Plan


class QedDriver(QedReader):
    """An open image, read-only: a :class:`tapfs.driver.Driver`."""

    @property
    def plain_details(self) -> frozenset[str]:
        """What an operator may have chosen."""
        return frozenset({"cluster_size"})

    def details(self) -> Mapping[str, object]:
        """The fields of the header."""
        header = self.header
        return {
            "cluster_size": header.cluster_size,
            "table_size": header.table_bytes,
            "l1_table_offset": header.l1_offset,
            "closed": not header.dirty,
        }

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare the tables with each other and with the file. Never raises for what it finds."""
        return Check(self, progress).report

    def repair(self) -> Sequence[Plan]:
        """Nothing: QED images are only read."""
        return ()
