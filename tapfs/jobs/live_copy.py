"""Copy a disk that is being written, until copy and disk are the same at one moment at which nobody writes.

The first pass copies what is wanted of the disk. Writes meanwhile leave marks (`tapfs.kernel.written`). Each further
pass takes the marks and copies those ranges. When little is left the front end has the disk at rest, and `finish`
copies the rest. A write that has been answered has set its mark, so at rest nothing can be missed.

Where the disk is written as fast as it is copied the passes do not end. Then the front end is asked to slow down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.pace import Pace
from tapfs.jobs.range_copy import Run, overwrite
from tapfs.kernel.written import WrittenMarks

if TYPE_CHECKING:
    from tapfs.disk.image import Image

#: So much may be left for the moment at which nobody writes, and so much whatever the rate of the copy is.
_REST_SECONDS = 0.2
_REST_BYTES = 4 << 20

#: A pass that leaves more than this part of what the pass before has left did not gain on the writers.
_GAINING = 0.7
#: Writers that are faster than the copy get so much of its rate.
_SLOWED = 0.5
#: A copy that has not ended after so many passes does not end.
_MOST_PASSES = 64

#: Threads that read: the disk is being used.
_THREADS = 2


class Progress(NamedTuple):
    """How far a live copy is.

    `offset` of `size` bytes of the disk are through the first pass; `data_bytes` were written to the target;
    `left_bytes` are to be copied again; `passes` began.
    """

    offset: int
    size: int
    data_bytes: int
    left_bytes: int
    passes: int


class CopyEndedError(Exception):
    """The copy was told to end."""


class LiveCopy:
    """One copy from `source`, which others write, to `target`, which nobody else has.

    `runs` gives what is to be copied of a range of the disk. `slow_down` is told the bytes a second that others may
    write from now on, None for any. Methods block, and raise ImageError and CopyEndedError.
    """

    def __init__(
        self,
        source: Image,
        target: Image,
        runs: Callable[[int, int], Iterable[Run]],
        *,
        rate: int | None = None,
        slow_down: Callable[[int | None], None] | None = None,
    ) -> None:
        self._source = source
        self._target = target
        self._runs = runs
        self._pace = _CountingPace(self, rate)
        self._slow_down = slow_down
        self._ended = False
        self._offset = self._data_bytes = self._passes = 0
        self._bytes_a_second = float(_REST_BYTES)
        self._marks = WrittenMarks(source.engine_disk, source.size, path=source.path)

    @property
    def progress(self) -> Progress:
        """How far it is; any thread may ask."""
        left = 0 if self._source.closed else self._marks.bytes
        return Progress(self._offset, self._source.size, self._data_bytes, left, self._passes)

    def end(self) -> None:
        """Have `run` or `finish` raise CopyEndedError soon. Any thread may call it."""
        self._ended = True

    def run(self, first: Iterable[Run]) -> None:
        """Copy `first` while others write, then what they have written, until little is left."""
        try:
            self._pass(first)
            before = self._source.size
            while (left := self._marks.bytes) > self._short_enough:
                if self._passes > _MOST_PASSES:
                    raise ImageError(
                        ErrorKind.IO,
                        f"is written faster than it can be copied: {left} bytes are left after {self._passes} passes",
                        path=self._source.path,
                        op="copy",
                        remedy="limit what the guest writes (tapfs limit), or try again later",
                    )
                if left > _GAINING * before and self._slow_down is not None:
                    self._slow_down(max(1, int(_SLOWED * self._bytes_a_second)))
                before = left
                self._pass(self._marked(left))
            self._target.flush()  # what takes long comes before the disk is at rest
        finally:
            if self._slow_down is not None:
                self._slow_down(None)

    def finish(self) -> None:
        """Copy what is left, while nobody writes. The copy is the disk then, and durable."""
        self._pace = _CountingPace(self, None)
        while self._marks.bytes:
            self._pass(self._marked(self._marks.bytes))
        self._target.flush()
        self._marks.end()

    def abandon(self) -> None:
        """No more marks are needed."""
        if not self._source.closed:
            self._marks.end()

    @property
    def _short_enough(self) -> int:
        return max(_REST_BYTES, int(_REST_SECONDS * self._bytes_a_second))

    def _marked(self, most: int) -> Iterator[Run]:
        """What is to be copied of about so many bytes that are marked."""
        taken = 0
        while taken < most and (ranges := self._marks.take()):
            taken += sum(length for _, length in ranges)
            yield from chain.from_iterable(self._runs(*each) for each in ranges)

    def _pass(self, runs: Iterable[Run]) -> None:
        self._passes += 1
        started, before = time.monotonic(), self._data_bytes
        overwrite(self._source, self._target, runs, self._pace, self._step, threads=_THREADS)
        moved, seconds = self._data_bytes - before, time.monotonic() - started
        if moved > _REST_BYTES:
            self._bytes_a_second = moved / max(seconds, 0.001)
        if self._passes == 1:
            self._offset = self._source.size

    def _step(self, offset: int, _size: int) -> None:
        if self._passes == 1:
            self._offset = offset

    def moved(self, count: int) -> None:
        """So many bytes more were written to the target. Raises CopyEndedError if the copy is to end."""
        self._data_bytes += count
        if self._ended:
            raise CopyEndedError

    def sleep(self, seconds: float) -> None:
        """Wait in pieces, so that `end` is heard."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.moved(0)
            time.sleep(min(left, 0.1))


class _CountingPace(Pace):
    """The pace of a live copy, which hears of each window that was written."""

    def __init__(self, copy: LiveCopy, rate: int | None) -> None:
        super().__init__(rate, sleep=copy.sleep)
        self._copy = copy

    def moved(self, count: int) -> None:
        self._copy.moved(count)
        super().moved(count)
