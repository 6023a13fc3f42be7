"""The threads that answer parked requests: each request is answered, and no thread ends early."""

from __future__ import annotations

import errno
import threading

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.kernel.parked import Queue
from tapfs.serving import parked
from tapfs.serving.failures import ErrorLog
from tapfs.serving.parked import ParkedThreads, serve_parked


class Request:
    """A request that remembers its answer."""

    def __init__(self, met: Exception | None) -> None:
        self.met = met
        self.answer: int | None = None

    def fail(self, number: int) -> None:
        self.answer = number


def answer(request: Request) -> None:
    if request.met is not None:
        raise request.met
    request.answer = 0


def test_every_request_is_answered_whatever_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parked, "_PAUSE_SECONDS", 0)
    cases: list[tuple[Exception | None, int]] = [
        (MemoryError(), errno.ENOMEM),
        (ImageError(ErrorKind.NO_SPACE, "full"), errno.ENOSPC),
        (RuntimeError("can't start new thread"), errno.EIO),
        (OSError(errno.EMFILE, ""), errno.EIO),
        (ZeroDivisionError(), errno.EIO),
        (None, 0),
    ]
    requests = [Request(met) for met, _ in cases]
    # Taking a request can fail, too, and others wait behind it.
    coming: list[Request | MemoryError | None] = [MemoryError(), *requests[:3], MemoryError(), *requests[3:], None]

    def next_parked() -> Request | None:
        taken = coming.pop(0)
        if isinstance(taken, MemoryError):
            raise taken
        return taken

    serve_parked(next_parked, answer, ErrorLog(), lambda: "disk")
    assert coming == []
    assert [request.answer for request in requests] == [number for _, number in cases]


def test_threads_that_the_host_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so, and the threads that had begun end with the server."""
    stopped = threading.Event()
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def limited(self: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    def next_parked(_queue: Queue) -> Request | None:
        stopped.wait()
        return None

    monkeypatch.setattr(threading.Thread, "start", limited)
    threads = ParkedThreads(next_parked, answer, path=lambda: "disk")
    with pytest.raises(ImageError, match="disk: cannot serve the disk: no more threads can be started"):
        threads.start()
    stopped.set()
    threads.join()
    assert [thread.is_alive() for thread in started] == [False, False]
