"""Start a service in a process of its own, and wait until the service is ready or has failed.

The image is opened before the fork. So errors and password prompts reach the user's terminal, and the child has the
image's locks from the first moment. The child sends one message to its parent: it is ready, or it met an ImageError.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, Protocol

from tapfs.errors import EXIT_BUG, ErrorKind, ImageError
from tapfs.serving.failures import failure_of, log_failure, reported
from tapfs.serving.log import log_to_syslog
from tapfs.serving.messages import MESSAGE_LIMIT, encode, failed, result_of, succeeded
from tapfs.serving.processes import process_start
from tapfs.serving.signals import ENDING, do_nothing, handle_ending, signals_held


class Start(Protocol):
    """What is to be started, as a front end tells it."""

    @property
    def path(self) -> str:
        """What error messages name: the mount point."""
        ...

    def serve(self, ready: Callable[[], None]) -> None:
        """In the child: serve until the end, and call `ready` once the service answers. Raises ImageError."""
        ...

    def let_go(self) -> None:
        """In the parent, after the fork: let go of what is the child's now."""
        ...

    def require_ready(self) -> None:
        """In the parent, once the child is ready: see that the service can be reached. Raises ImageError."""
        ...

    def clear_away(self, child: int) -> str | None:
        """In the parent: take away what the child left if it was killed; what to do where that fails."""
        ...


def open_descriptors() -> frozenset[int]:
    """The descriptors that are open now, the standard streams aside."""
    listed = {int(name) for name in os.listdir("/proc/self/fd")}
    return frozenset(number for number in listed if number > 2 and os.path.exists(f"/proc/self/fd/{number}"))


def start_in_background(start: Start, inherited: frozenset[int]) -> None:
    """Start to serve in a child; return when it is ready.

    The child lets go of the `inherited` descriptors: whoever started us may wait for their end. Raises the ImageError
    that the child met; nothing stays behind then. No thread may have been started before.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # The child must not be ended by a signal before it obeys them in order, nor run the parent's handlers.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        child = os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(reader)
        os.close(writer)
        raise failure_of(error, op="start the serving process", path=start.path) from error
    if child == 0:
        _serve(start, {*inherited, reader}, writer)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(writer)
        start.let_go()
        _await_ready(start, child, reader)
    except BaseException:
        # Interrupted while waiting: nothing may stay behind that nobody knows of.
        with signals_held():
            if process_start(child) is not None:
                os.kill(child, signal.SIGTERM)
                os.waitpid(child, 0)
        raise


def _await_ready(start: Start, child: int, reader: int) -> None:
    error: ImageError | None = None
    ready = None
    with os.fdopen(reader, "rb") as channel:
        try:
            ready = result_of(channel.readline(MESSAGE_LIMIT))
        except ImageError as met:
            error = met
    if ready is None:
        _, status = os.waitpid(child, 0)
        remedy = start.clear_away(child)
        if error is not None:
            raise error
        code = os.waitstatus_to_exitcode(status)
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        raise ImageError(
            ErrorKind.IO, f"the serving process ended early ({how})", path=start.path, op="start", remedy=remedy
        )
    start.require_ready()


def _serve(start: Start, foreign: set[int], writer: int) -> NoReturn:
    """The child: serve, and tell the parent by one message how that began."""
    code = EXIT_BUG
    ready = False

    def tell_ready() -> None:
        nonlocal ready
        ready = True
        _tell(writer, succeeded({}))

    try:
        handle_ending(do_nothing)
        for descriptor in foreign:
            os.close(descriptor)
        os.setsid()
        os.umask(0o077)
        void = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(void, descriptor)
        os.close(void)
        log_to_syslog()
        start.serve(tell_ready)
        if not ready:
            raise ImageError(ErrorKind.IO, "a signal ended it before it answered", path=start.path, op="start")
        code = 0
    except Exception as error:  # noqa: BLE001  a forked process must not return into its parent's code
        failure = reported(error, op="serve", path=start.path)
        if ready:
            log_failure(failure, "ended")
        else:
            _tell(writer, failed(failure))
        code = failure.exit_code
    finally:
        os._exit(code)


def _tell(writer: int, message: dict[str, object]) -> None:
    with suppress(OSError):  # the parent is gone
        os.write(writer, encode(message))
        os.close(writer)
