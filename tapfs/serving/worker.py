"""One thread for what blocks, started before anything is served, so that the end of a service needs no new thread.

trio's own threads end after ten idle seconds. If the host then refuses another one (a limit of the user or of a
cgroup), a flush or an unmount that needs it cannot run. The worker is there from the start to the end. An unmount must
run in it and never in the event loop: the kernel may ask the very loop that would wait for the unmount.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, TypeVar

import trio

from tapfs.serving.failures import failure_of

_Result = TypeVar("_Result")

#: Bytes of the thread's stack. All of it counts where the memory of a process is limited.
_STACK_BYTES = 1 << 20


class Worker:
    """Runs jobs one after the other in one thread; between `start` and `stop`."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, *, path: str | None) -> None:
        """Start the thread. Raises ImageError(io), which names `path`, if the host refuses it."""
        thread = threading.Thread(target=self._work, name="tapfs worker")
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            raise failure_of(error, op="serve the image", path=path) from error
        finally:
            threading.stack_size(usual)
        self._thread = thread

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, or what it raised. It is not cancelled once it has begun.

        Without a worker it runs here, in the calling thread.
        """
        if self._thread is None:
            return work()
        job = _Job(work)
        self._jobs.put(job)
        with trio.CancelScope(shield=True):
            await job.done.wait()
        return job.result()

    def stop(self) -> None:
        """Finish what was given to it, and end the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class _Job(Generic[_Result]):
    """One call for the worker, and what came of it."""

    def __init__(self, work: Callable[[], _Result]) -> None:
        self.done = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._work = work
        self._results: list[_Result] = []
        self._error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:  # noqa: BLE001  it is raised again where the result is waited for
            self._error = error
        with suppress(trio.RunFinishedError):  # the event loop ended by an error of its own; nobody waits any more
            self._token.run_sync_soon(self.done.set)

    def result(self) -> _Result:
        if self._error is not None:
            raise self._error
        return self._results[0]
