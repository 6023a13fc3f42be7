"""The driver of a qcow2 image that is read: its map, bitmaps, check and repair, and the edits that change no map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapfs.driver import BackingReference, Bitmap, CheckReport, Driver, ProgressCallback, ZeroPlace
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, Range, clip, merge
from tapfs.formats.qcow2.bitmaps import bitmap_named, read_bitmaps
from tapfs.formats.qcow2.header import BITMAPS
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.plan import Discard, Plan, plan


class Qcow2Driver(Qcow2Reader):
    """An open image: :class:`tapfs.driver.Checkable` and :class:`tapfs.driver.Bitmapped`."""

    @property
    def placed_kinds(self) -> frozenset[Kind]:
        """The kinds of extents whose entries may have a place all the same."""
        if self.header.extended_l2:
            return frozenset({Kind.ZERO, Kind.UNALLOCATED})
        return frozenset({Kind.ZERO} if self.header.version > VERSIONS[0] else ())

    def zero_places(self, offset: int, length: int) -> list[ZeroPlace]:
        """The places of what reads as zeros; see :mod:`tapfs.formats.qcow2.zero_places`."""
        from tapfs.formats.qcow2.zero_places import zero_places

        return list(zero_places(self, offset, length))

    def bitmaps(self) -> Sequence[Bitmap]:
        """The bitmaps, in the order of the directory. Raises ImageError(corrupt)."""
        # A writer that does not know bitmaps has cleared the bit: none of them follows the disk then.
        followed = self.header.autoclear & BITMAPS != 0
        return [
            Bitmap(each.name, each.granularity, each.enabled, each.consistent and followed)
            for each in read_bitmaps(self.file, self.extensions)
        ]

    def bitmap_ranges(self, name: str) -> Iterator[Range]:
        """The ranges that a bitmap has marked; see :meth:`tapfs.driver.Bitmapped.bitmap_ranges`."""
        from tapfs.formats.qcow2.bitmap_bits import marked_ranges

        found = bitmap_named(read_bitmaps(self.file, self.extensions), name, self.file.path)
        if not found.consistent or not self.header.autoclear & BITMAPS:
            message = f"bitmap {name!r} is inconsistent: the disk has changed without it"
            raise ImageError(ErrorKind.CORRUPT, message, path=self.file.path, offset=found.offset, op="read a bitmap")
        return marked_ranges(self.file, self.header, found)

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare all metadata with itself and with the file; see :mod:`tapfs.formats.qcow2.check`."""
        from tapfs.formats.qcow2.check import Check

        if self.data_file_error is not None:
            raise self.data_file_error  # which places of data can be depends on that file
        return Check(self, progress).report

    def repair(self) -> Sequence[Plan]:
        """Plans that mend leaks, counts and the bits that follow from them; see :mod:`tapfs.formats.qcow2.repair`."""
        from tapfs.formats.qcow2.repair import repair_plans

        return repair_plans(self)

    def repair_dropping_bitmaps(self) -> Sequence[Plan]:
        """The same, and bitmaps that cannot be true are given up; see :mod:`tapfs.formats.qcow2.dropped_bitmaps`."""
        from tapfs.formats.qcow2.repair import repair_plans

        return repair_plans(self, drop_bitmaps=True)

    def rebase(self, backing: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
        """See :mod:`tapfs.formats.qcow2.rebase`. An image may have any parent."""
        from tapfs.formats.qcow2.rebase import rebase_plan

        del parent
        yield rebase_plan(self.header, self.head, self.extensions, backing, self.file.path)

    @property
    def can_uncover(self) -> bool:
        """Whether clusters can be forgotten: who knows a raw data file alone reads all of them there."""
        return not self.header.has_raw_data_file

    def unused_places(self) -> Plan:
        """Holes in a data file for what no entry leads to; see :meth:`tapfs.driver.PlaceKeeping.unused_places`."""
        end = self.data_file.size() if self.data_number and self.can_uncover else 0
        inside = min(self.size, end)
        at, found = 0, list[Extent]()
        while at < inside:
            nothing = self.empty_run(at, inside)
            found += self.map(at, min(self.header.unit, inside - at)) if nothing is None else [nothing]
            at = found[-1].end
        if at < end:  # the end of the last cluster, which the disk does not have
            found.append(Extent(at, end - at, Kind.UNALLOCATED))
        unused = (each for each in clip(merge(found), 0, end) if each.kind is Kind.UNALLOCATED)
        return plan([Discard(self.data_number, each.offset, each.length) for each in unused])
