"""Hold requests of a guest that failed for want of space, until there is space: the guest only sees a pause.

An error of a disk ends the journal of most file systems, though a full host is no fault of the disk. So the thread
that serves such a request does not answer it. The thread tries again when an operator says `tapfs resume`, and by
itself every few seconds. `wait_on` says which errors are waited for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.log import log
from tapfs.serving.processes import EXIT_STOPPED

#: The errors that a disk may wait for: a full host, errors of the host's disk as well, or none.
WAIT_ON = ("space", "errors", "nothing")

#: Seconds after which a request that lacks space is tried again without anybody's word.
_AGAIN_SECONDS = 10.0

#: Seconds between two looks whether a request may be let go of.
_MOMENT_SECONDS = 0.02


class HeldRequests:
    """The requests of one disk that wait. `told` is called in any thread whenever `reason` has changed."""

    def __init__(self, wait_on: str, told: Callable[[], None]) -> None:
        self._wait_on = wait_on
        self._told = told
        self._changed = threading.Condition()
        self._retries = 0
        self._count = 0
        self._given_up: set[object] = set()
        self._leaving = False
        self._reason: ImageError | None = None

    @property
    def reason(self) -> ImageError | None:
        """What the first of the requests that wait now has met; None: none waits."""
        return self._reason

    def serve(
        self, attempt: Callable[[], None], again: Callable[[], None], *, durable: bool = False, owner: object = None
    ) -> None:
        """Call `attempt`, then, as often as what fails is to be waited for, `again`. Raises what is not waited for.

        `durable`: it makes writes durable. After an error of the host's disk a second try would succeed without them.
        `owner` is whose request it is, where several use the disk.
        """
        try:
            attempt()
        except ImageError as error:
            if not self.is_waited_for(error, durable=durable):
                raise
            self._hold(error, again, durable=durable, owner=owner)

    def is_waited_for(self, error: ImageError, *, durable: bool) -> bool:
        """Whether `serve` waits where a request meets this error. It raises such a one only to let the request go."""
        if error.kind is ErrorKind.NO_SPACE:
            return self._wait_on != "nothing"
        return error.kind is ErrorKind.IO and self._wait_on == "errors" and not durable

    def retry(self) -> None:
        """Have all requests that wait tried now."""
        with self._changed:
            self._retries += 1
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

    def _hold(self, error: ImageError, again: Callable[[], None], *, durable: bool, owner: object) -> None:
        self._enter(error)
        try:
            while self._waited(error, owner):
                try:
                    again()
                except ImageError as met:
                    if not self.is_waited_for(met, durable=durable):
                        raise
                    error = met
                else:
                    return
            raise error
        finally:
            self._leave()

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

    def _waited(self, error: ImageError, owner: object) -> bool:
        """Wait until it is time to try again; False: never."""
        seconds = _AGAIN_SECONDS if error.kind is ErrorKind.NO_SPACE else None
        with self._changed:
            seen = self._retries
            self._changed.wait_for(lambda: owner in self._given_up or self._retries != seen, seconds)
            return owner not in self._given_up


def _end_at_once() -> None:
    log.warning("ending while the guest waits; the next process goes on with what it has asked for")
    os._exit(EXIT_STOPPED)
