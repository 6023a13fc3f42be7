"""The driver of an open qcow image that is only read: its map, its details, its check and its repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tapfs.driver import CheckReport, ProgressCallback
from tapfs.formats.qcow import era
from tapfs.formats.qcow.header import CRYPT_AES
from tapfs.formats.qcow.reader import QcowReader
from tapfs.plan import Plan


class QcowDriver(QcowReader):
    """An open image, read-only: a :class:`tapfs.driver.Driver`."""

    @property
    def plain_details(self) -> frozenset[str]:
        """What an operator may have chosen."""
        return frozenset({"cluster_size", "layout"})

    def details(self) -> Mapping[str, object]:
        """Layout, era and byte order; the words are those of docs/specs/blktap-qcow.md."""
        header, extended = self.header, self.extended
        return {
            "cluster_size": header.cluster_size,
            "l2_bits": header.l2_bits,
            "l2_entries": header.l2_entries,
            "l1_entries": header.l1_entries,
            "l1_table_offset": header.l1_table_offset,
            "layout": "qemu" if extended is None else "blktap",
            "era": era.name(self),
            "l1_byte_order": self.l1.order,
            "extended_header": None
            if extended is None
            else {
                "cksum": f"{extended.cksum:08x}",
                "cksum_valid": self.cksum_valid,
                "min_cluster_alloc": extended.min_cluster_alloc,
                "flags": extended.flags,
                "length": extended.length,
            },
            "fast_path": self.fast_path,
            "encrypted": header.crypt_method == CRYPT_AES,
            "compression": "deflate",
            "oversized_l1": era.has_oversized_l1(self),
            "backing_mtime": header.mtime if header.has_backing else None,
        }

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare all metadata with itself and with the file; see :mod:`tapfs.formats.qcow.check`."""
        from tapfs.formats.qcow.check import Check

        return Check(self, progress).report

    def repair(self) -> Sequence[Plan]:
        """Plans that bring the image to the last era of its kind; see :mod:`tapfs.formats.qcow.repair`."""
        from tapfs.formats.qcow.repair import repair_plans

        return repair_plans(self)
