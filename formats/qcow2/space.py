"""The space of an open qcow2 image's file: free clusters by the refcounts, freed ones, and the end of the file.

Free clusters are looked for one refcount block after the other, when they are wanted. Whoever gets a place has it alone
from then on; its refcount is raised when it becomes a part of the image.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.allocation import HostRange, Piece
from tapfs.formats.qcow2.guard import Guard
from tapfs.formats.qcow2.header import MAX_HOST_SIZE, Header
from tapfs.formats.qcow2.refcounts import ClusterRun, Refcounts
from tapfs.formats.rounding import round_up
from tapfs.patterns import pattern

#: So many refcount blocks are looked through for one request, before it gets its places at the end.
_BLOCKS_AT_ONCE = 8
_UNUSED = pattern(rb"\0+")


class Space:
    """Hands out clusters of the image's file.

    `file_size` is the length of the file when it was opened: what lies behind it reads as zeros.
    """

    def __init__(self, path: str, header: Header, refcounts: Refcounts, guard: Guard, file_size: int) -> None:
        self._path = path
        self._cluster_size = header.cluster_size
        self._bits = header.cluster_bits
        self._refcounts = refcounts
        self._guard = guard
        self._file_size = file_size
        #: The first byte behind every cluster that is in use or was handed out.
        self.end = max(round_up(guard.end, header.cluster_size), refcounts.counted_end() << header.cluster_bits)
        #: Before this the refcounts say what is free; `_scanned` blocks of them were looked through.
        self._first_end = self.end
        self._scanned = 0
        self._free: list[HostRange] = []

    def take(self, length: int) -> list[Piece]:
        """Places for `length` bytes of whole clusters: free ones first, the rest at the end.

        Raises ImageError(no_space) where the format cannot address more, (corrupt) for a damaged refcount block.
        """
        pieces: list[Piece] = []
        left = length
        for _ in range(_BLOCKS_AT_ONCE):
            left = self._take_free(left, pieces)
            if not left or not self._scan():
                break
        left = self._take_free(left, pieces)
        if left:
            pieces += self._tail(left)
        return pieces

    def take_whole(self, clusters: int) -> int:
        """The offset of clusters in a row, for a table or a block."""
        length = clusters << self._bits
        if clusters == 1:
            return self.take(length)[0].host_offset
        return self._tail(length)[0].host_offset

    def take_tail(self, length: int, *, alignment: int) -> int:
        """The offset of `length` bytes at the end, for payloads that follow one another."""
        start = round_up(self.end, alignment)
        self._require_place(start, length)
        self.end = start + length
        return start

    def give_back(self, start: int, length: int) -> None:
        """What was taken is not needed; nothing ever referred to it."""
        self._free.append(HostRange(start, start + length))

    def freed(self, runs: list[ClusterRun]) -> None:
        """Clusters have no reference any more, durably. What a later look at the refcounts finds is left to it."""
        looked = min((self._scanned * self._refcounts.per_block) << self._bits, self._first_end)
        for run in runs:
            start, end = run.first << self._bits, (run.first + run.clusters) << self._bits
            self._guard.remove(start, end - start)
            for low, high in ((start, min(end, looked)), (max(start, self._first_end), end)):
                if low < high:
                    self._free.append(HostRange(low, high))
        self._free = list(_joined(self._free))[::-1]

    # -- inside ---------------------------------------------------------------------------------

    def _take_free(self, left: int, pieces: list[Piece]) -> int:
        """Take of the free clusters; the result is what is left of the wish."""
        while left and self._free:
            start, end = self._free.pop()
            taken = min(left, end - start)
            if end > start + taken:
                self._free.append(HostRange(start + taken, end))
            self._require_unused(start, taken)
            pieces.append(Piece(start, taken, fresh=False))
            left -= taken
        return left

    def _tail(self, length: int) -> list[Piece]:
        start = self.take_tail(length, alignment=self._cluster_size)
        # What lies inside the file as it was may hold anything: a device, an image that was preallocated.
        old = min(max(0, round_up(self._file_size, self._cluster_size) - start), length)
        pieces = [Piece(start, old, fresh=False)] if old else []
        return pieces + ([Piece(start + old, length - old, fresh=True)] if old < length else [])

    def _require_place(self, start: int, length: int) -> None:
        if start + length > MAX_HOST_SIZE:
            message = "the image file cannot grow further"
            raise ImageError(ErrorKind.NO_SPACE, message, path=self._path, offset=start, op="allocate")
        self._require_unused(start, length)

    def _require_unused(self, start: int, length: int) -> None:
        there = self._guard.over(start, length)
        if there is not None:
            raise ImageError(
                ErrorKind.CORRUPT,
                f"the refcounts say that {there} is free",
                path=self._path,
                offset=start,
                op="allocate",
                remedy="run tapfs repair",
            )

    def _scan(self) -> bool:
        """Look for free clusters in the next refcount block; False if there is none that was not looked through."""
        per_block = self._refcounts.per_block
        base = self._scanned * per_block
        limit = self._first_end >> self._bits
        if base >= limit:
            return False
        block = self._refcounts.block(self._scanned)
        self._scanned += 1
        stop = min(per_block, limit - base)
        used = bytes(stop) if block is None else self._refcounts.counting.used(block.tobytes())[:stop]
        for found in _UNUSED.finditer(used):
            start, end = base + found.start(), base + found.end()
            self._free.append(HostRange(start << self._bits, end << self._bits))
        self._free = list(_joined(self._free))[::-1]
        return True


def _joined(ranges: list[HostRange]) -> Iterator[HostRange]:
    last: HostRange | None = None
    for each in sorted(ranges):
        if last is not None and each.start <= last.end:
            last = HostRange(last.start, max(last.end, each.end))
            continue
        if last is not None:
            yield last
        last = each
    if last is not None:
        yield last
