"""Read a host file as a plan would leave it: the plan's writes are laid over the bytes of the file.

So an image whose journal waits to be replayed can be read without being written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapfs.host_files import HostFile
from tapfs.plan import Grow, Plan, Write


class PatchedFile:
    """A `tapfs.host_files.HostFile` for a driver: the file with writes laid over it, the later over the earlier."""

    def __init__(self, file: HostFile, writes: Sequence[Write], size: int) -> None:
        """`size`: the length that the plan makes the file have at least."""
        self._file = file
        self._writes = tuple(writes)
        self._size = size

    @property
    def path(self) -> str:
        """The name for messages."""
        return self._file.path

    def size(self) -> int:
        """Length in bytes, with what the plan adds."""
        return max(self._file.size(), self._size)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end."""
        length = max(0, min(length, self.size() - offset))
        content = bytearray(self._file.read(offset, length).ljust(length, b"\0"))
        for _, start, data in self._writes:
            first, last = max(start, offset), min(start + len(data), offset + length)
            if first < last:
                content[first - offset : last - offset] = data[first - start : last - start]
        return bytes(content)

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The whole range: what is laid over a hole is data."""
        end = min(offset + length, self.size())
        if offset < end:
            yield offset, end - offset


def patched_files(files: Sequence[HostFile], plan: Plan) -> dict[int, PatchedFile]:
    """The files that a plan writes or lengthens, by their numbers, as it would leave them.

    What a plan gives back to the host stays as it is: no step may rely on the zeros.
    """
    writes: dict[int, list[Write]] = {}
    sizes: dict[int, int] = {}
    for step in (step for stage in plan.stages for step in stage):
        if isinstance(step, Write):
            writes.setdefault(step.file, []).append(step)
            sizes[step.file] = max(sizes.get(step.file, 0), step.host_offset + len(step.data))
        elif isinstance(step, Grow):
            sizes[step.file] = max(sizes.get(step.file, 0), step.size)
    return {number: PatchedFile(files[number], writes.get(number, ()), size) for number, size in sizes.items()}
