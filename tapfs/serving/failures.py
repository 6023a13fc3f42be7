"""Turn whatever a task of a serving process raised into one ImageError, which is logged, answered or kept.

A process that serves an image goes on, or ends in order, whatever one of its tasks has met. So no code of a service
may depend on the class of an exception. A thread that cannot start is a RuntimeError, a missing descriptor an OSError,
missing memory a MemoryError, and trio wraps each of these into a group.
"""

from __future__ import annotations

import errno
from typing import cast

from tapfs.errors import ErrorKind, ImageError, from_os_error, limit_reached
from tapfs.serving.log import log
from tapfs.serving.nursery_errors import error_of

#: Python's message when the host refuses a thread.
_NO_THREAD = "can't start new thread"

#: Distinct errors of requests that are logged; a hostile image must not fill the log.
_KEPT_ERRORS = 1000


class InternalError(ImageError):
    """A fault of tapfs itself; `__cause__` is what was raised, and is logged with its traceback."""


def failure_of(error: Exception, *, op: str, path: str | None) -> ImageError:
    """The ImageError for anything that was raised while doing `op`.

    `path` is the image or the mount point that the message names where the error itself names none.
    """
    error = _only(error)
    if isinstance(error, ImageError):
        return error
    if isinstance(error, MemoryError):
        return out_of_memory(path)
    if isinstance(error, BlockingIOError):  # EAGAIN of fork(2)
        return limit_reached("processes", path=path, op=op)
    if isinstance(error, OSError):
        return from_os_error(error, path=path, op=op)
    if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        return limit_reached("threads", path=path, op=op)
    failure = InternalError(
        ErrorKind.IO,
        f"cannot {op}: internal error: {type(error).__name__}: {error}",
        path=path,
        op=op,
        remedy="please report it, with the traceback in the log",
    )
    failure.__cause__ = error
    return failure


def _only(error: Exception) -> Exception:
    """The one error in a group of trio's; the group if there are several that cannot be told as one."""
    if isinstance(error, ExceptionGroup):
        one = error_of(cast("ExceptionGroup[Exception]", error))
        return one if isinstance(one, Exception) else cast("Exception", error)
    return error


def out_of_memory(path: str | None) -> ImageError:
    """The error for an image that needs more memory than its process may have."""
    return ImageError(
        ErrorKind.IO,
        "takes more memory than its process may have",
        path=path,
        op="serve",
        remedy="if the image is to be trusted allow it more (ulimit -v, tapfs attach --memory)",
    )


def log_failure(failure: ImageError, doing: str | None = None) -> None:
    """Log a failure, met while `doing` something that its message does not tell."""
    log.error("%s%s", f"{doing}: " if doing else "", failure, exc_info=_traceback(failure))


def reported(error: Exception, *, op: str, path: str | None) -> ImageError:
    """As `failure_of`, for an error that the caller tells its user: only what the user is not told is logged."""
    failure = failure_of(error, op=op, path=path)
    if isinstance(failure, InternalError) and failure is not error:
        log_failure(failure, op)
    return failure


class ErrorLog:
    """Turns what requests raise into errno values, and logs an error the first time that one of its kind is met."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str | None, str | None, str]] = set()

    def answer(self, error: Exception, *, path: str | None) -> int:
        """The errno that answers a request which raised `error`. `path` is the image."""
        failure = failure_of(error, op="answer a request", path=path)
        self._add(failure)
        return errno.ENOMEM if isinstance(error, MemoryError) else failure.errno

    def _add(self, error: ImageError) -> None:
        key = (error.kind.value, error.path, error.op, type(error.__cause__).__name__)
        if key not in self._seen and len(self._seen) < _KEPT_ERRORS:
            self._seen.add(key)
            log.error("%s (further ones like this are not logged)", error, exc_info=_traceback(error))


def _traceback(failure: ImageError) -> BaseException | None:
    return failure.__cause__ if isinstance(failure, InternalError) else None
