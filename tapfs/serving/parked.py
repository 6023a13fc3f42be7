"""Threads that serve the requests which a native front end has parked.

The engine's own threads answer a request that needs no driver and no waiting. They park every other request: it waits
in a queue of the engine until a thread of this module takes it. That thread may call the drivers and may block. The
queue is in C (kernel/src/serving/park.c), and a thread waits for it without holding the GIL.

Writes that lack places are taken as many as wait, and written as one write of many runs. Each is answered by itself. If
the write of all fails each is tried alone, so that a request gets its own error and no other's.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from tapfs.kernel.parked import Queue
from tapfs.kernel.writes import Segments
from tapfs.serving.failures import ErrorLog, failure_of

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.kernel._engine import CData
    from tapfs.kernel.engine import Outcome


#: Threads that supply maps, those that write what lacks places, those for what may take long, and the one that flushes:
#: an image flushes once at a time. Of those that write one makes the next reservation while the data of another moves.
_THREADS = {Queue.MOVES: 3, Queue.WRITES: 2, Queue.OTHERS: 2, Queue.SYNCS: 1}

#: Seconds for which a thread waits that has not the memory to take a request.
_PAUSE_SECONDS = 0.1


class ParkedRequest(Protocol):
    """A request that the thread which has taken it must answer."""

    def fail(self, number: int) -> None:
        """Answer with an errno, unless the request has been answered."""
        ...


_Request = TypeVar("_Request", bound=ParkedRequest)


class ParkedThreads(Generic[_Request]):
    """The threads that serve what one native server parks.

    `next_parked` waits for requests of a queue, and gives none once the server is stopped. `answer` answers a request,
    in a thread of that queue; what it raises becomes the answer. `together` answers what it can of several at once, and
    gives back the others, in their order. `path` tells the image's name for the log.
    """

    def __init__(
        self,
        next_parked: Callable[[Queue], Sequence[_Request]],
        answer: Callable[[_Request], None],
        together: Callable[[Sequence[_Request]], Sequence[_Request]],
        *,
        path: Callable[[], str],
    ) -> None:
        self._next_parked = next_parked
        self._answer = answer
        self._together = together
        self._path = path
        self._errors = ErrorLog()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start all threads. Raises ImageError(io) where the host refuses one.

        Those that have begun end when the server is stopped; `join` must follow in any case.
        """
        for queue, count in _THREADS.items():
            for _ in range(count):
                thread = threading.Thread(target=self._serve, args=(queue,), name=f"tapfs {queue.name.lower()}")
                try:
                    thread.start()
                except (RuntimeError, MemoryError) as error:
                    raise failure_of(error, op="serve the disk", path=self._path()) from error
                self._threads.append(thread)

    def join(self) -> None:
        """Wait until every thread has ended, after the server was stopped."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _serve(self, queue: Queue) -> None:
        serve_parked(lambda: self._next_parked(queue), self._answer, self._together, self._errors, self._path)


def serve_parked(
    next_parked: Callable[[], Sequence[_Request]],
    answer: Callable[[_Request], None],
    together: Callable[[Sequence[_Request]], Sequence[_Request]],
    errors: ErrorLog,
    path: Callable[[], str],
) -> None:
    """Answer requests as `ParkedThreads` says until `next_parked` gives none.

    A request that nobody answers hangs its user, and a thread that ends leaves its queue to fewer. So each request
    that was taken is answered, whatever was raised, and the thread goes on.
    """
    while True:
        try:
            taken = next_parked()
        except MemoryError as error:
            errors.answer(error, path=path())
            time.sleep(_PAUSE_SECONDS)
            continue
        if not taken:
            return
        for parked in together(taken) if len(taken) > 1 else taken:
            try:
                answer(parked)
            except Exception as error:  # noqa: BLE001  whatever it is, the user of the request must be told
                parked.fail(errors.answer(error, path=path()))


class ParkedMove(Protocol):
    """A read or write that waits in the engine for a map or a reservation."""

    @property
    def offset(self) -> int:
        """The first byte of the disk that is left to do."""
        ...

    @property
    def data(self) -> memoryview:
        """What a write has left to write."""
        ...

    def outcome(self) -> Outcome:
        """What is missing. Raises the ImageError that it met instead."""
        ...

    def resume(self) -> bool:
        """Try again; whether it is answered now."""
        ...

    def complete(self) -> None:
        """Answer with success."""
        ...


def finish_move(image: Image, parked: ParkedMove) -> None:
    """Give a read or write what it lacks until it is answered. Raises the ImageError that it has met."""
    while True:
        outcome = parked.outcome()
        if outcome.needs_reservation:
            image.write(parked.offset, parked.data)
            parked.complete()
            return
        image.supply_map(outcome)
        if parked.resume():
            return


class ParkedWrite(Protocol):
    """A write that waits in the engine for places."""

    @property
    def segment(self) -> tuple[int, int, CData]:
        """What is left to write: offset, length, and a pointer to the data."""
        ...

    def complete(self) -> None:
        """Answer with success."""
        ...


_Write = TypeVar("_Write", bound=ParkedWrite)


def finish_writes(image: Image, writes: Sequence[_Write]) -> Sequence[_Write]:
    """Write and answer several writes at once; those that must be tried alone, in their order.

    Writes that overlap keep their order: the later one begins when the earlier one has been answered.
    """
    done = 0
    try:
        for group in _disjoint(writes):
            image.write_segments(Segments(sorted((write.segment for write in group), key=_offset)))
            for write in group:
                write.complete()
                done += 1
    except Exception:  # noqa: BLE001  each write that is left meets its own error when it is tried alone
        return writes[done:]
    return ()


class ParkedFlush(Protocol):
    """A flush that somebody waits for."""

    def complete(self) -> None:
        """Answer with success."""
        ...


_Flush = TypeVar("_Flush", bound=ParkedFlush)


def finish_flushes(image: Image, flushes: Sequence[_Flush]) -> Sequence[_Flush]:
    """Answer several flushes by one; those that must be tried alone, in their order."""
    try:
        image.flush()
    except Exception:  # noqa: BLE001  each meets its own error when it is tried alone
        return flushes
    for flush in flushes:
        flush.complete()
    return ()


def _offset(segment: tuple[int, int, CData]) -> int:
    return segment[0]


def _disjoint(writes: Sequence[_Write]) -> Iterator[Sequence[_Write]]:
    """The writes in their order, cut into groups within which none overlaps another."""
    start = 0
    taken: list[tuple[int, int]] = []
    for number, write in enumerate(writes):
        offset, length, _ = write.segment
        at = bisect(taken, (offset, offset))
        if (at > 0 and taken[at - 1][1] > offset) or (at < len(taken) and taken[at][0] < offset + length):
            yield writes[start:number]
            start, taken, at = number, [], 0
        taken.insert(at, (offset, offset + length))
    yield writes[start:]
