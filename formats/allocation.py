"""The allocator of a host file of an open image: its end, freed places, and places that may be used again."""

from __future__ import annotations

from collections.abc import Iterable

from tapfs.driver import Placement
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.rounding import round_up
from tapfs.records import NamedTuple


class HostRange(NamedTuple):
    """``[start, end)`` of the host file."""

    start: int
    end: int


class Piece(NamedTuple):
    """Allocated clusters that follow one another; `fresh` ones read as zeros."""

    host_offset: int
    length: int
    fresh: bool


class Allocation:
    """Hands out space of one host file.

    The tail, from `end` on, was never handed out in this session and lies past the end that the file
    had, so it reads as zeros. A freed range goes round: it is noted, flies with the plan that makes
    its unlinking durable and punches it, and is free once that plan is done.
    """

    def __init__(
        self,
        path: str,
        file_size: int,
        cluster_size: int,
        *,
        max_size: int,
        origin: int = 0,
        alignment: int | None = None,
    ) -> None:
        """`max_size`: the format can address no place that ends after it.

        A cluster begins at a multiple of `alignment` (of the cluster size, if that is None) after `origin`.
        """
        self._path = path
        self._cluster_size = cluster_size
        self._origin = origin
        self._alignment = alignment or cluster_size
        self._max_size = max_size
        self.end = file_size
        #: Bytes that the file must have for committed places. Places that were only handed out may not fit the host.
        self.committed_end = file_size
        #: Bytes of the file that are known to be durable.
        self.durable_end = file_size
        self._end_in_plan = file_size
        self._free: list[HostRange] = []
        self._noted: list[tuple[HostRange, bool]] = []
        self._in_plan: list[tuple[HostRange, bool]] = []

    def tail(self, length: int, *, alignment: int | None = None) -> int:
        """The host offset of `length` fresh bytes at the end of the file, on a cluster boundary.

        Raises ImageError(no_space) where the format cannot address the place.
        """
        start = self._aligned(self.end, alignment or self._alignment)
        if start + length > self._max_size:
            raise ImageError(
                ErrorKind.NO_SPACE, "the image file cannot grow further", path=self._path, offset=start, op="allocate"
            )
        self.end = start + length
        return start

    def clusters(self, length: int) -> list[Piece]:
        """Places for `length` bytes of whole clusters: free ranges first, the rest at the tail."""
        pieces: list[Piece] = []
        left = length
        while left and self._free:
            start, end = self._free.pop()
            aligned = self._aligned(start, self._alignment)
            usable = (end - aligned) // self._cluster_size * self._cluster_size
            taken = min(left, usable)
            if taken <= 0:
                continue
            if usable > taken:
                self._free.append(HostRange(aligned + taken, end))
            pieces.append(Piece(aligned, taken, fresh=False))
            left -= taken
        if left:
            pieces.append(Piece(self.tail(left), left, fresh=True))
        return pieces

    def adopt(self, ranges: Iterable[HostRange]) -> None:
        """Take ranges of the file that nothing refers to as free; they may hold anything."""
        self._free = _joined([*self._free, *ranges])
        self._free.reverse()

    def places(self, ranges: Iterable[Range]) -> list[Placement]:
        """Places for ranges of whole clusters of the disk, in file 0; for all ranges as few pieces as possible."""
        wanted = list(ranges)
        pieces = iter(self.clusters(sum(length for _, length in wanted)))
        placements: list[Placement] = []
        host_offset = left = 0
        fresh = False
        for offset, length in wanted:
            if length <= left:  # usual: one piece of the host file for all ranges
                placements.append(Placement(offset, length, host_offset, 0, fresh))
                host_offset += length
                left -= length
                continue
            at, end = offset, offset + length
            while at < end:
                if not left:
                    host_offset, left, fresh = next(pieces)
                taken = min(left, end - at)
                placements.append(Placement(at, taken, host_offset, 0, fresh))
                at += taken
                host_offset += taken
                left -= taken
        return placements

    def commit(self, start: int, length: int) -> None:
        """A range that was handed out is a part of the image now."""
        self.committed_end = max(self.committed_end, start + length)

    def release(self, start: int, length: int, *, reusable: bool = True) -> None:
        """Give a range back; what is not `reusable` is only punched."""
        self._noted.append((HostRange(start, start + length), reusable))

    def _aligned(self, place: int, alignment: int) -> int:
        return self._origin + round_up(max(0, place - self._origin), alignment)

    @property
    def noted(self) -> int:
        """How many released ranges wait for a flush."""
        return len(self._noted) + len(self._in_plan)

    def added_end(self) -> int | None:
        """The end of the file, if the plan has a lesser one, and from now on this one; None otherwise."""
        if self.committed_end <= self._end_in_plan:
            return None
        self._end_in_plan = self.committed_end
        return self.committed_end

    def begin_plan(self) -> list[HostRange]:
        """The released ranges fly with the plan that is being made; they are to be punched by it."""
        self._in_plan += self._noted
        self._noted = []
        self._end_in_plan = self.committed_end
        return _joined([released for released, _ in self._in_plan])

    def plan_done(self) -> None:
        """The plan is durable: what it released may be used again."""
        self._free = _joined(self._free + [released for released, reusable in self._in_plan if reusable])
        self._free.reverse()
        self._in_plan = []
        self.durable_end = self._end_in_plan


def _joined(ranges: list[HostRange]) -> list[HostRange]:
    joined: list[HostRange] = []
    for piece in sorted(ranges):
        if joined and piece.start <= joined[-1].end:
            joined[-1] = HostRange(joined[-1].start, max(joined[-1].end, piece.end))
        else:
            joined.append(piece)
    return joined
