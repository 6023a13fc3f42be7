"""The engine's marks of what was written to a disk: a copy of a disk in use looks there for what it has missed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.errors import from_os_error
from tapfs.extent import Range
from tapfs.kernel._engine import ffi, lib

if TYPE_CHECKING:
    from tapfs.kernel.engine import EngineDisk

#: Bytes of the disk that one mark stands for, while all marks fit into `_MOST_MARKS`; else a multiple of that.
_UNIT = 64 << 10
_MOST_MARKS = 1 << 24

#: Ranges that are taken at a time, at most.
_RANGES = 1 << 16


class WrittenMarks:
    """The marks of a disk of `size` bytes, from now on.

    A mark is set when a write has ended. So who reads a range after its mark was taken sees that write, and where no
    request is running the marks lack none.
    """

    def __init__(self, engine: EngineDisk, size: int, *, path: str) -> None:
        """Raises ImageError(io) where there is no memory for them."""
        unit = _UNIT
        while size // unit > _MOST_MARKS:
            unit *= 2
        self._engine = engine
        result = engine.track(unit)
        if result < 0:
            raise from_os_error(OSError(-result, ""), path=path, op="mark what is written")

    @property
    def bytes(self) -> int:
        """Of what is marked, rounded up to whole units."""
        return lib.tapfs_disk_written(self._engine.handle)

    def take(self) -> list[Range]:
        """Ranges that were marked, which ascend; their marks are gone. There may be more to take."""
        ranges = ffi.new("tapfs_range[]", _RANGES)
        count = lib.tapfs_disk_take_written(self._engine.handle, ranges, _RANGES)
        numbers = ffi.unpack(ffi.cast("uint64_t *", ranges), 2 * count)
        return [Range(offset, length) for offset, length in zip(numbers[::2], numbers[1::2], strict=True)]

    def end(self) -> None:
        """Set no more marks."""
        self._engine.untrack()
