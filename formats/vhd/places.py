"""Places for new blocks in the file of a VHD: places of blocks that were given up, and the end of the data.

Data begins at a multiple of 4 KiB, with the block's bitmap right before it, as blktap does: then no page of the host is
shared by two blocks. A place that reads as zeros is `fresh`, and only such a one may be mapped whole: QEMU ignores
bitmaps, and would show what stood there before.
"""

from __future__ import annotations

from bisect import bisect_right

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.rounding import round_up
from tapfs.formats.vhd.dynamic_header import SECTOR, UNUSED, DynamicHeader
from tapfs.formats.vhd.footer import LENGTH
from tapfs.records import NamedTuple

_ALIGNMENT = 4096


class Place(NamedTuple):
    """The host offset of a new block's bitmap; `fresh`: the data behind it reads as zeros."""

    offset: int
    fresh: bool


class Places:
    """Hands out places for blocks of one image.

    `end` is where the data ends, with all places that were handed out. A place that is given up goes round: it is
    noted, is in the plan that makes the giving up durable and punches the place, and is free once that plan is done.
    """

    def __init__(self, file: HostFile, header: DynamicHeader, end: int, footer_place: int) -> None:
        """`end`: nothing that the image refers to lies behind it, but for the last footer at `footer_place`."""
        self._file = file
        self._bitmap_bytes = header.bitmap_bytes
        self._block_bytes = header.block_size
        #: What lies from here on was never written.
        self._untouched = file.size()
        self._footer_place = footer_place
        self.end = end
        #: The places that were handed out at the end, ascending, as far as an old footer may lie among them.
        self._at_the_end: list[int] = []
        #: The end before each of them was handed out.
        self._ends_before: dict[int, int] = {}
        self._free: list[int] = []
        self._noted: list[int] = []
        self._in_plan: list[int] = []

    def take(self) -> Place:
        """A place for a block: a free one before one at the end. Raises ImageError(no_space)."""
        if self._free:
            # A host that could not punch it has left what was there.
            return self._looked_at(self._free.pop())
        before, place = self.end, self._at_end()
        if place.offset < self._footer_place < self._end_of(place.offset) and not place.fresh:
            # The old footer would be among the data; behind it all is untouched.
            self.end = self._footer_place
            place = self._at_end()
        self.end = self._end_of(place.offset)
        self._at_the_end.append(place.offset)
        self._ends_before[place.offset] = before
        return place

    def take_back(self, offset: int) -> bool:
        """Take a place that was not used back, where it is the last one and nothing was written into it.

        Then the last footer need not move behind it: a full host may have no space there.
        """
        last = self._at_the_end[-1:] == [offset] and self._end_of(offset) == self.end
        if not last or self._file.size() > offset + self._bitmap_bytes:
            return False
        self._at_the_end.pop()
        self.end = self._ends_before.pop(offset)
        return True

    def covers(self, footer_place: int) -> bool:
        """Whether a block that was handed out since a footer was written there lies over it."""
        before = bisect_right(self._at_the_end, footer_place + LENGTH - 1)
        return before > 0 and self._end_of(self._at_the_end[before - 1]) > footer_place

    def footer_moved(self, place: int) -> None:
        """The last footer is durable at another place."""
        self._footer_place = place
        self._at_the_end = [offset for offset in self._at_the_end if self._end_of(offset) > place]
        self._ends_before = {offset: self._ends_before[offset] for offset in self._at_the_end}

    def give_up(self, offset: int) -> None:
        """A place is not needed any more."""
        self._noted.append(offset)

    @property
    def given_up(self) -> int:
        """How many places wait for a flush."""
        return len(self._noted) + len(self._in_plan)

    def begin_plan(self) -> list[tuple[int, int]]:
        """What was given up is in the plan that is being made: offset and length of the ranges to be punched."""
        self._in_plan += self._noted
        self._noted = []
        return [(offset, self._bitmap_bytes + self._block_bytes) for offset in sorted(self._in_plan)]

    def plan_done(self) -> None:
        """The plan is durable: what was in it may be used again."""
        self._free += self._in_plan
        self._in_plan = []

    def _at_end(self) -> Place:
        offset = round_up(self.end + self._bitmap_bytes, _ALIGNMENT) - self._bitmap_bytes
        if offset // SECTOR >= UNUSED:
            raise ImageError(
                ErrorKind.NO_SPACE,
                "a VHD file has at most 2 TiB",
                path=self._file.path,
                offset=offset,
                op="allocate",
            )
        untouched = offset + self._bitmap_bytes >= self._untouched
        return Place(offset, fresh=True) if untouched else self._looked_at(offset)

    def _looked_at(self, offset: int) -> Place:
        data = next(self._file.data_ranges(offset + self._bitmap_bytes, self._block_bytes), None)
        return Place(offset, fresh=data is None)

    def _end_of(self, offset: int) -> int:
        return offset + self._bitmap_bytes + self._block_bytes
