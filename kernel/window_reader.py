"""Windows of a disk that threads of the engine read ahead or copy: no thread of Python is changed to for any."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.segments import most_segments
from tapfs.kernel.writes import Segments
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    import mmap

    from tapfs.kernel._engine import CData
    from tapfs.kernel.engine import EngineDisk
    from tapfs.kernel.ranges import Ranges


class ReadWindow(NamedTuple):
    """Ranges, the buffer that they were read into, and the data in it; None: the engine alone could not do it.

    If the ranges were copied there are no segments, and the buffer may be used again.
    """

    ranges: Ranges
    buffer: mmap.mmap
    segments: Segments | None


class _Added(NamedTuple):
    """A window of the engine, and the memory that it points to."""

    ranges: Ranges
    buffer: mmap.mmap
    window: CData
    memory: tuple[CData, CData]


class WindowThreads:
    """At most `threads` threads of the engine besides the caller's, which work on windows of a disk in their order.

    One thread uses them, in a `with`; the disk outlives them. `capacity` windows wait or are worked on at most.
    """

    def __init__(self, disk: EngineDisk, *, threads: int, capacity: int) -> None:
        self._reader = lib.tapfs_window_reader_new(disk.handle, threads, capacity)
        if self._reader == ffi.NULL:
            raise MemoryError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lib.tapfs_window_reader_free(self._reader)
        self._reader = ffi.NULL
        self._let_go()

    def _add(self, window: CData) -> bool:
        """Have the window worked on; False: there are as many as there may be."""
        return bool(lib.tapfs_window_reader_add(self._reader, window) == 0)

    def _take(self) -> None:
        """Wait for the window that was added first, or work on it."""
        lib.tapfs_window_reader_take(self._reader)

    def _let_go(self) -> None:
        """Let go of the memory of windows that were not taken: no thread is left."""
        raise NotImplementedError  # abstract: each has other memory


class WindowReader(WindowThreads):
    """Reads windows of at most `capacity` at a time, in order, by at most `threads` threads besides the caller's.

    Zeros are looked for in pieces of `granule` bytes. One thread uses it, in a `with`; the disk outlives it. Into a
    `target`, a plain disk as large, the windows are copied, in pieces that a buffer holds and in no order.
    """

    def __init__(
        self, disk: EngineDisk, granule: int, *, threads: int, capacity: int, target: EngineDisk | None = None
    ) -> None:
        self._granule = granule
        self._target = ffi.NULL if target is None else target.handle
        self._added: deque[_Added] = deque()
        super().__init__(disk, threads=threads, capacity=capacity)

    def _let_go(self) -> None:
        while self._added:
            ffi.release(self._added.popleft().memory[0])

    def __len__(self) -> int:
        return len(self._added)

    def add(self, ranges: Ranges, buffer: mmap.mmap) -> None:
        """Have the ranges read into the buffer, which holds them, or copied through it."""
        copied = self._target != ffi.NULL
        if not copied and len(buffer) < ranges.packed:
            raise ValueError(f"a buffer of {len(buffer)} bytes is too small for {ranges.packed}")
        data = ffi.from_buffer(buffer, require_writable=True)
        most = len(buffer) // (2 * self._granule) + 3 * lib.TAPFS_PIECE_RANGES
        segments = ffi.new("tapfs_segment[]", most if copied else most_segments(ranges, self._granule))
        window = ffi.new("tapfs_window *", (ranges.array, ranges.count, data, self._granule, segments))
        window.target, window.buffer_bytes = self._target, len(buffer)
        if not self._add(window):
            ffi.release(data)
            raise ValueError("one window too many")
        self._added.append(_Added(ranges, buffer, window, (data, segments)))

    @property
    def ready(self) -> bool:
        """Whether the window that was added first is read already, so that nobody would wait for it."""
        return bool(lib.tapfs_window_reader_ready(self._reader))

    def take(self) -> ReadWindow:
        """The window that was added first, once it is read."""
        self._take()
        ranges, buffer, window, (data, segments) = self._added.popleft()
        ffi.release(data)
        if self._target != ffi.NULL:
            return ReadWindow(ranges, buffer, Segments.none() if window.copied else None)
        if window.outcome.status != lib.TAPFS_DONE:
            return ReadWindow(ranges, buffer, None)
        return ReadWindow(ranges, buffer, Segments.of_array(segments, window.segment_count))
