"""One process that serves an image: its start, its tasks, its end. Every front end runs in it.

The life of a service is `prepare`, `serve`, the end. The front end registers a step of the end for each thing that it
opens (`Service.ending`). An exception of a task (no thread, no descriptor, no memory, an error in the code) becomes an
ImageError and is logged. Then either the task is tried again, or the service ends in order. No error skips a step of
the end, so the image is always flushed and closed. If the event loop itself fails, the steps are done without it.
docs/front-end.md describes all of it.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import trio

from tapfs.errors import ImageError
from tapfs.serving.control import Answer, ControlSocket
from tapfs.serving.ending import Ending
from tapfs.serving.failures import failure_of, log_failure, reported
from tapfs.serving.io_flusher import become_io_flusher
from tapfs.serving.log import log
from tapfs.serving.periodic_flush import flush_periodically
from tapfs.serving.signals import ENDING, signals_held
from tapfs.serving.worker import Worker

if TYPE_CHECKING:
    from tapfs.disk.image import Image

#: Seconds for which an answer may be on its way after the end.
_ANSWER_SECONDS = 2

#: Seconds before a task that has failed is tried again.
_AGAIN_SECONDS = 1


class FrontEnd(Protocol):
    """What a service needs of its front end. Any of these may raise anything."""

    def prepare(self) -> None:
        """Get ready to serve, in the main thread, before the event loop starts."""
        ...

    async def serve(self) -> None:
        """Serve until there is no more to serve."""
        ...

    async def end(self) -> None:
        """Have `serve` return: a signal came, or a task without which there is no service has failed."""
        ...


class Service:
    """The tasks and the end of a process that serves an image; `path` names in error messages what is served.

    There can be one in a process, for it obeys the signals. `failure` is the first of the errors that ended the service
    or were met at its end.
    """

    def __init__(self, path: str, *, log_names_it: bool = False) -> None:
        """`log_names_it`: each line of the log names already what is served (`log_to_stderr`)."""
        self.path = path
        self._in_log = "" if log_names_it else f"{path}: "
        self.worker = Worker()
        self.ending = Ending(self.fail, path=path)
        self.failure: ImageError | None = None
        #: Set when every step of the end has been done.
        self.ended = trio.Event()
        self._front_end: FrontEnd | None = None
        self._tasks: trio.Nursery | None = None
        self._conversations: trio.Nursery | None = None
        self._serving = trio.CancelScope()
        self._told_to_end = False
        #: Of the tasks that the end cancels before its first step.
        self._until_the_end: list[trio.CancelScope] = []

    def run(self, front_end: FrontEnd) -> None:
        """Prepare, serve, and end. Blocks. Raises the first ImageError, when everything is done."""
        self._front_end = front_end
        become_io_flusher()  # before the first thread of ours, which takes it over
        with signals_held():
            try:
                self.worker.start(path=self.path)
                front_end.prepare()
                trio.run(self._main, front_end)
            except Exception as error:  # noqa: BLE001  the end must follow
                self.failure = self.failure or reported(error, op="serve", path=self.path)
            finally:
                self.worker.stop()
                self.ending.run_here()
        if self.failure is not None:
            raise self.failure

    def fail(self, failure: ImageError, doing: str | None = None) -> None:
        """Log a failure that the service ends by, or that its end has met while `doing`; `run` raises the first."""
        where = None if failure.path else self.path
        log_failure(failure, where if doing is None else f"cannot {doing}")
        if self.failure is None:
            self.failure = failure

    # For the front end, while `serve` runs

    def start(self, task: Callable[[], Awaitable[None]], doing: str) -> None:
        """Run a task without which there is no service: if it fails, the service ends. It is cancelled at the end."""
        _running(self._tasks).start_soon(self._vital, task, doing)

    def listen(self, directory: Path, name: str, answer: Answer) -> None:
        """Answer requests on a control socket until everything is put away. Raises ImageError if it cannot be made."""
        control = ControlSocket(directory, name, answer, path=self.path)
        conversations = _running(self._conversations)

        async def converse() -> None:
            await control.serve(conversations)

        _running(self._tasks).start_soon(self._again_and_again, converse, "answering requests")

    def flush_periodically(
        self, image: Callable[[], Image], *, alone: AbstractAsyncContextManager[object] | None = None
    ) -> None:
        """Flush every few seconds what `image` gives, holding `alone`."""

        async def flush() -> None:
            with self._scope():
                await flush_periodically(image, self.worker, alone=alone or nullcontext(), path=self.path)

        _running(self._tasks).start_soon(self._again_and_again, flush, "flushing in the background")

    def stop_serving(self) -> None:
        """Cancel `serve`; the end follows."""
        self._serving.cancel()

    # In the event loop

    async def _main(self, front_end: FrontEnd) -> None:
        async with trio.open_nursery() as signals:
            await signals.start(self._obey_signals)
            async with trio.open_nursery() as self._conversations:
                async with trio.open_nursery() as self._tasks:
                    try:
                        if not self._told_to_end:
                            with self._serving:
                                await front_end.serve()
                    except Exception as error:  # noqa: BLE001  the end must follow
                        self.fail(failure_of(error, op="serve", path=self.path))
                    finally:
                        with trio.CancelScope(shield=True):
                            await self._put_away()
                    self._tasks.cancel_scope.cancel()
                # Whoever asked us to end is still to be answered; who only keeps a connection open is not.
                self._conversations.cancel_scope.deadline = trio.current_time() + _ANSWER_SECONDS
            signals.cancel_scope.cancel()

    async def _put_away(self) -> None:
        for scope in self._until_the_end:
            scope.cancel()
        await self.ending.run(self.worker)
        self.ended.set()

    async def _obey_signals(self, task_status: trio.TaskStatus[None]) -> None:
        """End on a signal; one that the process was started to ignore stays ignored."""
        heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
        if not heeded:
            task_status.started()
            return
        with trio.open_signal_receiver(*heeded) as received:
            # A signal that came before anybody obeyed it is as good as one that comes now.
            self._told_to_end = bool(signal.sigpending() & set(heeded))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            try:
                task_status.started()
                async for number in received:
                    log.info("%sending on %s", self._in_log, signal.Signals(number).name)
                    await self._end()
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

    async def _end(self) -> None:
        """Have the front end stop; if it cannot do that in order, cancel it."""
        self._told_to_end = True
        try:
            if self._front_end is not None:
                await self._front_end.end()
        except Exception as error:  # noqa: BLE001  a service that is to end must end
            self.fail(failure_of(error, op="end the service", path=self.path))
            self.stop_serving()

    async def _vital(self, task: Callable[[], Awaitable[None]], doing: str) -> None:
        with self._scope():
            try:
                await task()
            except Exception as error:  # noqa: BLE001  whatever it is, the service must end in order
                failure = failure_of(error, op=doing, path=self.path)
                if self._told_to_end:
                    log.debug("%s", failure)  # it comes of the end, not the end of it
                else:
                    self.fail(failure)
                    await self._end()

    async def _again_and_again(self, task: Callable[[], Awaitable[None]], doing: str) -> None:
        while True:
            try:
                await task()
            except Exception as error:  # noqa: BLE001  the service goes on without it for a moment
                log_failure(failure_of(error, op="go on", path=self.path), f"{doing} failed and is tried again")
                await trio.sleep(_AGAIN_SECONDS)
            else:
                return

    def _scope(self) -> trio.CancelScope:
        """The scope of a task that ends before the first step of the end."""
        scope = trio.CancelScope()
        self._until_the_end.append(scope)
        return scope


def _running(nursery: trio.Nursery | None) -> trio.Nursery:
    if nursery is None:
        raise AssertionError("a task was started before `serve`")
    return nursery
