"""Whatever a task of a serving process raises becomes one ImageError."""

from __future__ import annotations

import errno
import logging

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.failures import ErrorLog, InternalError, failure_of

DENIED = ImageError(ErrorKind.DENIED, "no", path="a.qcow")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (DENIED, ErrorKind.DENIED, "a.qcow: no"),
        (ExceptionGroup("group", [ExceptionGroup("inner", [DENIED])]), ErrorKind.DENIED, "a.qcow: no"),
        (MemoryError(), ErrorKind.IO, "/m: takes more memory than its process may have"),
        (RuntimeError("can't start new thread"), ErrorKind.IO, "/m: cannot serve: no more threads can be started"),
        (BlockingIOError(errno.EAGAIN, ""), ErrorKind.IO, "/m: cannot serve: no more processes can be started"),
        (OSError(errno.EMFILE, ""), ErrorKind.IO, "/m: cannot serve: Too many open files"),
        (OSError(errno.ENOSPC, ""), ErrorKind.NO_SPACE, "/m: cannot serve: No space left on device"),
    ],
)
def test_known_failures(error: Exception, kind: ErrorKind, words: str) -> None:
    failure = failure_of(error, op="serve", path="/m")
    assert failure.kind is kind
    assert str(failure).startswith(words)
    assert not isinstance(failure, InternalError)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("odd"),
        RuntimeError("odd"),
        ExceptionGroup("two", [ValueError("odd"), DENIED]),
    ],
)
def test_what_no_one_expects_is_a_value_too(error: Exception) -> None:
    failure = failure_of(error, op="serve", path="/m")
    assert isinstance(failure, InternalError)
    assert failure.__cause__ is error
    assert str(failure).startswith("/m: cannot serve: internal error: ")


def test_errno_of_a_request_and_one_line_in_the_log_for_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    log = ErrorLog()
    answers = [
        (MemoryError(), errno.ENOMEM),
        (DENIED, errno.EACCES),
        (OSError(errno.EMFILE, ""), errno.EIO),
        (ValueError("odd"), errno.EIO),
        (KeyError("odd"), errno.EIO),
    ]
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            for error, number in answers:
                assert log.answer(error, path="a.qcow") == number
    assert len(caplog.records) == len(answers)
    traced = [type(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert traced == [ValueError, KeyError]  # a hostile image must not fill the log with the others
