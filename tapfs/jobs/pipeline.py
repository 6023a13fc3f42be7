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
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from queue import SimpleQueue

#: Bytes of a disk that one job works on: large enough for the engine to run at full
#: speed, small enough to stay in the processor's cache from the reader to the writer.
WINDOW_BYTES = 2 << 20

#: More threads than this would only wait for the one that takes their results.
_MOST_WORKERS = 8

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


# Not a concurrent.futures.Future, whose module takes longer to load than a small image to convert.
class _Task(Generic[_Job, _Result]):
    """A job. Whoever claims it does it, and its end is noted here."""

    __slots__ = ("_claim", "_done", "_job", "error", "results")

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._claim = threading.Lock()
        self._done = threading.Lock()
        self._done.acquire()
        #: The one result once there is one, and the error if there was one.
        self.results: list[_Result] = []
        self.error: BaseException | None = None

    def claim(self) -> bool:
        """Whether the job is the caller's to do: the first who asks gets it."""
        return self._claim.acquire(blocking=False)

    def run(self, work: Callable[[_Job], _Result]) -> None:
        """Do the job, which the caller has claimed."""
        try:
            self.results.append(work(self._job))
        except BaseException as error:  # noqa: BLE001  raised again where the result is awaited
            self.error = error
        self._done.release()

    @property
    def ended(self) -> bool:
        """Whether the job is done, or has failed."""
        return not self._done.locked()

    def result(self) -> _Result:
        """Wait for the end of a job that somebody has claimed. Raises what the job raised."""
        with self._done:
            if self.error is not None:
                raise self.error
            (result,) = self.results
            return result


def processors() -> int:
    """How many threads can work at a time here, at most as many as are of use."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def in_order(jobs: Iterable[_Job], work: Callable[[_Job], _Result], *, workers: int, ahead: int) -> Iterator[_Result]:
    """``work(job)`` for each job, by `workers` threads, at most `ahead` of them not yet consumed.

    The caller's thread is one of them: it never waits for a job that nobody has begun, and while another does the job
    that is next, it does a later one. So nothing is delayed by a machine that is busy elsewhere.
    Results come in the order of the jobs; `jobs` is iterated by the caller's thread. The first
    exception ends it; what runs then, or when the caller stops early, is waited for. Where the host
    gives fewer threads those do the work, and where it gives none the caller's thread.
    """
    from queue import SimpleQueue  # most copies have their threads in the engine

    waiting: SimpleQueue[_Task[_Job, _Result] | None] = SimpleQueue()
    ended = threading.Event()
    threads = _started(lambda: _serve(waiting, work, ended), workers - 1)
    if not threads:
        yield from map(work, jobs)
        return
    pending: deque[_Task[_Job, _Result]] = deque()
    try:
        for job in jobs:
            task: _Task[_Job, _Result] = _Task(job)
            pending.append(task)
            waiting.put(task)
            if len(pending) >= ahead:
                yield _next_result(pending, work)
        while pending:
            yield _next_result(pending, work)
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


def _next_result(pending: deque[_Task[_Job, _Result]], work: Callable[[_Job], _Result]) -> _Result:
    """The result of the first job, which leaves the list. Until it is there this thread does others of the list."""
    first = pending.popleft()
    if first.claim():
        first.run(work)
    for task in pending:
        if first.ended:
            break
        if task.claim():
            task.run(work)
    return first.result()


def _serve(
    waiting: SimpleQueue[_Task[_Job, _Result] | None], work: Callable[[_Job], _Result], ended: threading.Event
) -> None:
    while (task := waiting.get()) is not None:
        if not ended.is_set() and task.claim():
            task.run(work)


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
            # In pages of the usual size: where files fill the memory, the host moves theirs to make a large one.
            return mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def give_back(self, buffer: mmap.mmap) -> None:
        """The buffer is not used any more."""
        self._free.append(buffer)
