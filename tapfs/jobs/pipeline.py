"""Work on windows of a disk in other threads, results in order, memory bounded.

The engine releases the GIL while it moves, scans and packs bytes, so that one thread reads and
looks for zeros while another writes.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar

#: Bytes of a disk that one job works on: large enough for the engine to run at full
#: speed, small enough to stay in the processor's cache from the reader to the writer.
WINDOW_BYTES = 2 << 20

#: More threads than this would only wait for the one that takes their results.
_MOST_WORKERS = 8

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


# Not a concurrent.futures.Future, whose module takes longer to load than a small image to convert.
class _Done(NamedTuple, Generic[_Result]):
    """How a job ended: its one result, or an error."""

    results: tuple[_Result, ...]
    error: BaseException | None = None


class _Task(NamedTuple, Generic[_Job, _Result]):
    """A job, and where its end is awaited."""

    job: _Job
    done: SimpleQueue[_Done[_Result]]


def processors() -> int:
    """How many threads can work at a time here, at most as many as are of use."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def in_order(jobs: Iterable[_Job], work: Callable[[_Job], _Result], *, workers: int, ahead: int) -> Iterator[_Result]:
    """``work(job)`` for each job, by `workers` threads, at most `ahead` of them not yet consumed.

    Results come in the order of the jobs; `jobs` is iterated by the caller's thread. The first
    exception ends it; what runs then, or when the caller stops early, is waited for. Where the host
    gives fewer threads those do the work, and where it gives none the caller's thread.
    """
    waiting: SimpleQueue[_Task[_Job, _Result] | None] = SimpleQueue()
    ended = threading.Event()
    threads = _started(lambda: _serve(waiting, work, ended), workers)
    if not threads:
        yield from map(work, jobs)
        return
    pending: deque[SimpleQueue[_Done[_Result]]] = deque()
    try:
        for job in jobs:
            done: SimpleQueue[_Done[_Result]] = SimpleQueue()
            pending.append(done)
            waiting.put(_Task(job, done))
            if len(pending) >= ahead:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    finally:
        ended.set()
        for _ in threads:
            waiting.put(None)
        for thread in threads:
            thread.join()


def _started(work: Callable[[], None], count: int) -> list[threading.Thread]:
    """As many of `count` threads as the host gives."""
    threads: list[threading.Thread] = []
    for _ in range(count):
        thread = threading.Thread(target=work, name="tapfs window")
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            break
        threads.append(thread)
    return threads


def _result(done: SimpleQueue[_Done[_Result]]) -> _Result:
    """Wait for a job. Raises what it raised."""
    outcome = done.get()
    if outcome.error is not None:
        raise outcome.error
    (result,) = outcome.results
    return result


def _serve(
    waiting: SimpleQueue[_Task[_Job, _Result] | None], work: Callable[[_Job], _Result], ended: threading.Event
) -> None:
    while (task := waiting.get()) is not None:
        if ended.is_set():
            continue
        try:
            task.done.put(_Done((work(task.job),)))
        except BaseException as error:  # noqa: BLE001  raised again where the result is awaited
            task.done.put(_Done((), error))


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
            buffer = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a host without large pages
                buffer.madvise(mmap.MADV_HUGEPAGE)
            return buffer

    def give_back(self, buffer: mmap.mmap) -> None:
        """The buffer is not used any more."""
        self._free.append(buffer)
