"""Work on windows of a disk in other threads, results in order, memory bounded.

The engine releases the GIL while it moves, scans and packs bytes, so that one thread reads and
looks for zeros while another writes.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

#: Bytes of a disk that one job works on: large enough for the engine to run at full
#: speed, small enough to stay in the processor's cache from the reader to the writer.
WINDOW_BYTES = 2 << 20

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def in_order(jobs: Iterable[_Job], work: Callable[[_Job], _Result], *, workers: int, ahead: int) -> Iterator[_Result]:
    """``work(job)`` for each job, by `workers` threads, at most `ahead` of them not yet consumed.

    Results come in the order of the jobs; `jobs` is iterated by the caller's thread. The first
    exception ends it; what runs then, or when the caller stops early, is waited for.
    """
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tapfs-window") as executor:
        try:
            for job in jobs:
                pending.append(executor.submit(work, job))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


class BufferPool:
    """Page-aligned buffers (for O_DIRECT) that are used again and again."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: deque[mmap.mmap] = deque()

    def take(self) -> mmap.mmap:
        """A buffer with any contents."""
        try:
            return self._free.pop()
        except IndexError:
            return mmap.mmap(-1, self._size)

    def give_back(self, buffer: mmap.mmap) -> None:
        """The buffer is not used any more."""
        self._free.append(buffer)
