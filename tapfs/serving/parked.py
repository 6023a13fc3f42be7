"""Threads that serve the requests which a native front end has parked.

The engine's own threads answer a request that needs no driver and no waiting. They park every other request: it waits
in a queue of the engine until a thread of this module takes it. That thread may call the drivers and may block. The
queue is in C (kernel/src/serving/park.c), and a thread waits for it without holding the GIL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from tapfs.kernel.parked import Queue
from tapfs.serving.failures import ErrorLog, failure_of

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.kernel.engine import Outcome


#: Threads that supply maps and reservations, those for what may take long, and the one that flushes: an image flushes
#: once at a time.
_THREADS = {Queue.MOVES: 3, Queue.OTHERS: 2, Queue.SYNCS: 1}

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

    `next_parked` waits for a request of a queue, and gives None once the server is stopped. `answer` answers the
    request, in a thread of that queue; what it raises becomes the answer. `path` tells the image's name for the log.
    """

    def __init__(
        self,
        next_parked: Callable[[Queue], _Request | None],
        answer: Callable[[_Request], None],
        *,
        path: Callable[[], str],
    ) -> None:
        self._next_parked = next_parked
        self._answer = answer
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
        serve_parked(lambda: self._next_parked(queue), self._answer, self._errors, self._path)


def serve_parked(
    next_parked: Callable[[], _Request | None],
    answer: Callable[[_Request], None],
    errors: ErrorLog,
    path: Callable[[], str],
) -> None:
    """Answer one request after the other until `next_parked` gives None.

    A request that nobody answers hangs its user, and a thread that ends leaves its queue to fewer. So each request
    that was taken is answered, whatever was raised, and the thread goes on.
    """
    while True:
        try:
            parked = next_parked()
        except MemoryError as error:
            errors.answer(error, path=path())
            time.sleep(_PAUSE_SECONDS)
            continue
        if parked is None:
            return
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
