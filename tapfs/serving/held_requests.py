"""Hold requests of a guest that failed for want of space, until there is space: the guest only sees a pause.

An error of a disk ends the journal of most file systems, though a full host is no fault of the disk. So the thread
that serves such a request does not answer it. The thread tries again when an operator says `tapfs resume`, and by
itself every few seconds. `wait_on` says which errors are waited for.

A request that failed may be looked at long after that: threads are few, and each waits with one request. So what counts
is when the try that failed began. One that began before the last `tapfs resume` is followed by another at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.log import log
from tapfs.serving.processes import EXIT_STOPPED

#: The errors that a disk may wait for: a full host, errors of the host's disk as well, or none.
WAIT_ON = ("space", "errors", "nothing")

#: Seconds after the begin of a try that lacked space until the next one, without anybody's word.
_AGAIN_SECONDS = 10.0

#: Seconds between two looks whether a request may be let go of.
_MOMENT_SECONDS = 0.02


class HeldRequests:
    """The requests of one disk that wait. `told` is called in any thread whenever `reason` has changed."""

    def __init__(self, wait_on: str, told: Callable[[], None]) -> None:
        self._wait_on = wait_on
        self._told = told
        self._changed = threading.Condition()
        #: When all were last to be tried again.
        self._retried_ns = 0
        self._count = 0
        self._given_up: set[object] = set()
        self._leaving = False
        self._reason: ImageError | None = None

    @property
    def reason(self) -> ImageError | None:
        """What the first of the requests that wait now has met; None: none waits."""
        return self._reason

    def serve(
        self,
        attempt: Callable[[], None],
        again: Callable[[], None],
        *,
        tried_ns: int = 0,
        durable: bool = False,
        owner: object = None,
    ) -> None:
        """Call `attempt`, then, as often as what fails is to be waited for, `again`. Raises what is not waited for.

        `tried_ns`: when the try began whose error `attempt` may raise (`time.monotonic_ns`); 0: it tries itself.
        `durable`: it makes writes durable. After an error of the host's disk a second try would succeed without them.
        `owner` is whose request it is, where several use the disk.
        """
        began = tried_ns or time.monotonic_ns()
        work, held = attempt, False
        try:
            while True:
                try:
                    work()
                except ImageError as error:
                    if not self.is_waited_for(error, durable=durable):
                        raise
                    if not held and not (work is attempt and self._is_due(error, began)):
                        held = True
                        self._enter(error)
                    if held and not self._waited(error, owner, began):
                        raise
                else:
                    return
                began, work = time.monotonic_ns(), again
        finally:
            if held:
                self._leave()

    def is_waited_for(self, error: ImageError, *, durable: bool) -> bool:
        """Whether `serve` waits where a request meets this error. It raises such a one only to let the request go."""
        if error.kind is ErrorKind.NO_SPACE:
            return self._wait_on != "nothing"
        return error.kind is ErrorKind.IO and self._wait_on == "errors" and not durable

    def retry(self) -> None:
        """Have all requests that wait tried now."""
        with self._changed:
            self._retried_ns = time.monotonic_ns()
            self._changed.notify_all()

    def give_up(self, owner: object = None) -> None:
        """Have all requests of the owner that wait fail, and none wait, until `begin`: its frontend is gone."""
        with self._changed:
            self._given_up.add(owner)
            self._changed.notify_all()

    def begin(self, owner: object = None) -> None:
        """Another frontend of the owner is connected."""
        with self._changed:
            self._given_up.discard(owner)
            self._changed.notify_all()

    def await_begin(self) -> None:
        """Wait for a moment, or until requests of the owner None wait again."""
        with self._changed:
            self._changed.wait_for(lambda: None not in self._given_up, _MOMENT_SECONDS)

    def leave(self) -> None:
        """This process is to end: from now on it ends at once if a request is to wait, or does.

        The request is in the rings' journal, so the next process does it again; an answer would be an error.
        """
        with self._changed:
            self._leaving = True
            waits = self._count > 0
        if waits:
            _end_at_once()

    def _enter(self, error: ImageError) -> None:
        with self._changed:
            self._count += 1
            first = self._reason is None
            self._reason = self._reason or error
        if self._leaving:
            _end_at_once()
        if first:
            log.error("the guest waits: %s; tapfs resume goes on when that is mended", error)
            self._told()

    def _leave(self) -> None:
        with self._changed:
            self._count -= 1
            last = self._count == 0
            if last:
                self._reason = None
        if last:
            log.info("the guest waits no more")
            self._told()

    def _is_due(self, error: ImageError, began: int) -> bool:
        """Whether a try that began then is to be followed by another now."""
        return self._retried_ns >= began or self._seconds_left(error, began) == 0

    @staticmethod
    def _seconds_left(error: ImageError, began: int) -> float | None:
        """Seconds until a try that began then is followed by another without anybody's word; None: it is not."""
        if error.kind is not ErrorKind.NO_SPACE:
            return None
        return max(0.0, _AGAIN_SECONDS - (time.monotonic_ns() - began) / 1e9)

    def _waited(self, error: ImageError, owner: object, began: int) -> bool:
        """Wait until it is time to follow a try by another; False: never."""
        seconds = self._seconds_left(error, began)
        with self._changed:
            self._changed.wait_for(lambda: owner in self._given_up or self._is_due(error, began), seconds)
            return owner not in self._given_up


def _end_at_once() -> None:
    log.warning("ending while the guest waits; the next process goes on with what it has asked for")
    os._exit(EXIT_STOPPED)
