"""The file of an image as a plan would leave it, to be read before the plan is executed."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator

from tapfs.driver import HostFile
from tapfs.plan import Grow, Plan, Write


class PlannedFile:
    """A :class:`tapfs.driver.HostFile`: a file with the writes of plans laid over it; later ones count."""

    def __init__(self, file: HostFile, plans: Iterable[Plan]) -> None:
        self._file = file
        self._size = file.size()
        self._starts: list[int] = []
        self._writes: dict[int, list[bytes]] = {}
        self._longest = 0
        for step in (step for plan in plans for stage in plan.stages for step in stage):
            if isinstance(step, Write):
                if step.host_offset not in self._writes:
                    insort(self._starts, step.host_offset)
                self._writes.setdefault(step.host_offset, []).append(step.data)
                self._longest = max(self._longest, len(step.data))
                self._size = max(self._size, step.host_offset + len(step.data))
            elif isinstance(step, Grow):
                self._size = max(self._size, step.size)

    @property
    def path(self) -> str:
        """The name for messages."""
        return self._file.path

    def size(self) -> int:
        """Length in bytes."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end."""
        length = max(0, min(length, self._size - offset))
        data = bytearray(self._file.read(offset, length).ljust(length, b"\0"))
        at = bisect_right(self._starts, offset - self._longest)
        while at < len(self._starts) and self._starts[at] < offset + length:
            start = self._starts[at]
            for written in self._writes[start]:
                low, high = max(start, offset), min(start + len(written), offset + length)
                if low < high:
                    data[low - offset : high - offset] = written[low - start : high - start]
            at += 1
        return bytes(data)

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The whole request: which of it is zeros is not known before the plan is executed."""
        yield offset, length
