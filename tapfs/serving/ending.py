"""The end of a service: a list of steps, each done once, whatever the other steps have met."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio

from tapfs.errors import ImageError
from tapfs.serving.failures import failure_of
from tapfs.serving.worker import Worker

#: Seconds for a step that awaits where the event loop that it belongs to has failed.
_WHILE_SECONDS = 10


class _Step(NamedTuple):
    """One step: `blocking` runs in the worker, `quick` and `awaited` in the event loop."""

    doing: str
    blocking: Callable[[], None] | None = None
    quick: Callable[[], None] | None = None
    awaited: Callable[[], Awaitable[None]] | None = None


class Ending:
    """Steps that are registered as what they undo comes to be, and done in the reverse order.

    What a step raises goes to `failed` as an ImageError about `path`, with what the step was doing, and the next step
    follows.
    """

    def __init__(self, failed: Callable[[ImageError, str], None], *, path: str) -> None:
        self._failed = failed
        self._path = path
        self._steps: list[_Step] = []

    def add(self, doing: str, step: Callable[[], None]) -> None:
        """A step that may block; an error message says "cannot `doing`"."""
        self._steps.append(_Step(doing, blocking=step))

    def add_quick(self, doing: str, step: Callable[[], None]) -> None:
        """A step that must run in the thread of the event loop, and does not block."""
        self._steps.append(_Step(doing, quick=step))

    def add_async(self, doing: str, step: Callable[[], Awaitable[None]]) -> None:
        """A step that awaits."""
        self._steps.append(_Step(doing, awaited=step))

    async def run(self, worker: Worker) -> None:
        """Do every step that is left."""
        while self._steps:
            step = self._steps.pop()
            try:
                if step.blocking is not None:
                    await worker.run(step.blocking)
                if step.quick is not None:
                    step.quick()
                if step.awaited is not None:
                    await step.awaited()
            except Exception as error:  # noqa: BLE001  the next step must follow
                self._fail(error, step)

    def run_here(self) -> None:
        """Do every step that is left in the calling thread: the event loop could not be started, or has failed.

        A step that awaits gets a loop of its own for a while: it may wait for a task that is no more.
        """
        while self._steps:
            step = self._steps.pop()
            try:
                for work in (step.blocking, step.quick):
                    if work is not None:
                        work()
                if step.awaited is not None:
                    trio.run(_for_a_while, step.awaited)
            except Exception as error:  # noqa: BLE001  the next step must follow
                self._fail(error, step)

    def _fail(self, error: Exception, step: _Step) -> None:
        self._failed(failure_of(error, op=step.doing, path=self._path), step.doing)


async def _for_a_while(step: Callable[[], Awaitable[None]]) -> None:
    with trio.move_on_after(_WHILE_SECONDS):
        await step()
