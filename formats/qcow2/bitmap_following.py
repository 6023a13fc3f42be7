"""The part of a writable qcow2 driver that keeps enabled bitmaps true while the disk is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tapfs.driver import HostFile, OpenRequest, Placement, Reservation
from tapfs.extent import Extent, Kind, Range
from tapfs.formats.qcow2.bitmaps import read_bitmaps
from tapfs.formats.qcow2.edited_image import release, take
from tapfs.formats.qcow2.header import BITMAPS
from tapfs.formats.qcow2.writer import WritableQcow2Driver
from tapfs.plan import Plan, Step
from tapfs.tables import TableLayout

if TYPE_CHECKING:
    from tapfs.formats.qcow2.followed_bitmaps import FollowedBitmaps


class BitmapFollowing(WritableQcow2Driver):
    """A writable driver whose image may have bitmaps that note what is written (`followed_bitmaps.py`)."""

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        super().__init__(file, request)
        self._followed: FollowedBitmaps | None = None
        if self.header.autoclear & BITMAPS and not request.lenient:
            from tapfs.formats.qcow2.followed_bitmaps import FollowedBitmaps  # few images have any

            self._followed = FollowedBitmaps(file, self.header, self.extensions)

    def map(self, offset: int, length: int) -> list[Extent]:
        """The map, in which nothing is in place that a write has to mark first."""
        extents = super().map(offset, length)
        return self._followed.apart(extents) if self._followed else extents

    def follows(self, name: str) -> bool:
        """Whether a bitmap notes what is written now; see :meth:`tapfs.driver.BitmapFollower.follows`."""
        return self._followed is not None and name in self._followed

    def followed_ranges(self, name: str, offset: int, length: int) -> Iterator[Range]:
        """What a bitmap that follows marks of a range at this moment."""
        return iter(()) if self._followed is None else self._followed.ranges(name, offset, length)

    def table_layout(self) -> TableLayout | None:
        """None while bitmaps follow: what may be written in place is not to be seen in the tables alone."""
        return None if self._followed else super().table_layout()

    def places(self, ranges: Sequence[Range]) -> list[Placement]:
        """Places for ranges; a cluster that is this disk's alone stays where it is, and its write marks it."""
        if not self._followed or self.data_number:
            return super().places(ranges)
        return [placement for offset, length in ranges for placement in self._places(offset, length)]

    def _places(self, offset: int, length: int) -> Iterator[Placement]:
        for unit, first, stop in self.pieces(offset, length, used=False):
            words = self.slices.load(unit)
            if words is None:
                at = unit * self.header.unit + (first << self.header.cluster_bits)
                yield from super().places([Range(at, (stop - first) << self.header.cluster_bits)])
                continue
            owned = self.owns_table(unit // self.header.slices)
            for run in self.runs(unit, words, first, stop):
                at = unit * self.header.unit + run.start
                if run.kind is Kind.DATA and run.copied and owned:
                    yield Placement(at, run.length, run.host_offset, in_place=True)
                else:
                    yield from super().places([Range(at, run.length)])

    def commit(self, reservation: Reservation) -> None:
        """Publish the new map, and mark what has changed."""
        if self._followed:
            for offset, length in reservation.ranges:
                self._followed.mark(offset, length)
        super().commit(reservation)

    def end(self) -> Plan:
        """Store what the bitmaps have noted, and say that they follow the disk again."""
        if not self._followed:
            return super().end()
        listed = read_bitmaps(self.file, self.extensions)
        steps = self._followed.store(listed, self._take_bits, partial(release, self), self.file)
        return self.planned(steps.content, steps.places, steps.flags) if steps.flags else Plan()

    def _take_bits(self, content: bytes) -> tuple[int, Step]:
        """New clusters for bits or a table, where no data may go any more."""
        place, step = take(self, content)
        for at in range(0, max(1, len(content)), self.header.cluster_size):
            self.guard.add(place + at)
        return place, step
