"""The threads that answer parked requests: each request is answered, and no thread ends early."""

from __future__ import annotations

import errno
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tapfs
from tapfs.errors import ErrorKind, ImageError
from tapfs.kernel._engine import ffi
from tapfs.kernel.parked import Queue
from tapfs.serving import parked
from tapfs.serving.failures import ErrorLog
from tapfs.serving.parked import ParkedThreads, finish_writes, serve_parked

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData
    from tapfs.kernel.writes import Segments


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
    coming: list[list[Request] | MemoryError] = [MemoryError(), *([each] for each in requests[:2])]
    coming += [MemoryError(), requests[2:], []]

    def next_parked() -> list[Request]:
        taken = coming.pop(0)
        if isinstance(taken, MemoryError):
            raise taken
        return taken

    serve_parked(next_parked, answer, lambda several: several, ErrorLog(), lambda: "disk")
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

    def next_parked(_queue: Queue) -> list[Request]:
        stopped.wait()
        return []

    monkeypatch.setattr(threading.Thread, "start", limited)
    threads = ParkedThreads(next_parked, answer, lambda several: several, path=lambda: "disk")
    with pytest.raises(ImageError, match="disk: cannot serve the disk: no more threads can be started"):
        threads.start()
    stopped.set()
    threads.join()
    assert [thread.is_alive() for thread in started] == [False, False]


class Write:
    """A write that lacks places."""

    def __init__(self, offset: int, data: bytes, answered: list[Write]) -> None:
        self.offset = offset
        self.data = data
        self._memory = ffi.new("uint8_t[]", data)
        self._answered = answered

    @property
    def segment(self) -> tuple[int, int, CData]:
        return self.offset, len(self.data), self._memory

    def complete(self) -> None:
        self._answered.append(self)


def test_writes_that_wait_are_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order; only those that overlap are apart, and the later one wins."""
    choice = random.Random(3)
    tapfs.create(str(tmp_path / "image"), "qcow", 1 << 20)
    model = bytearray(1 << 20)
    with tapfs.open(tmp_path / "image", writable=True) as image:
        sizes: list[int] = []
        right = type(image).write_segments

        def counted(disk: tapfs.Image, segments: Segments) -> None:
            sizes.append(segments.count)
            right(disk, segments)

        monkeypatch.setattr(type(image), "write_segments", counted)
        for _ in range(40):
            answered: list[Write] = []
            writes = [
                Write(choice.randrange(1 << 19), bytes([choice.randrange(256)]) * choice.randrange(1, 9000), answered)
                for _ in range(12)
            ]
            assert finish_writes(image, writes) == ()
            assert answered == writes
            for write in writes:
                model[write.offset : write.offset + len(write.data)] = write.data
            assert image.read(0, 1 << 20) == model
        assert max(sizes) > 4
        assert sum(sizes) == 40 * 12
        sizes.clear()
        apart = [Write(offset, b"x" * 4096, []) for offset in (0x90000, 0x80000, 0xA0000)]
        assert finish_writes(image, apart) == ()
        assert sizes == [3]


def test_a_write_that_fails_gives_its_error_to_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered stays answered; from the group that failed on each is tried alone, in its order."""
    tapfs.create(str(tmp_path / "image"), "qcow", 1 << 20)
    with tapfs.open(tmp_path / "image", writable=True) as image:
        right = type(image).write_segments
        groups: list[int] = []

        def fail_second(disk: tapfs.Image, segments: Segments) -> None:
            groups.append(segments.count)
            if len(groups) == 2:
                raise ImageError(ErrorKind.NO_SPACE, "full")
            right(disk, segments)

        monkeypatch.setattr(type(image), "write_segments", fail_second)
        answered: list[Write] = []
        writes = [Write(offset, b"x" * 100, answered) for offset in (0, 8192, 50, 16384, 60)]
        assert finish_writes(image, writes) == writes[2:]
        assert answered == writes[:2]
        assert groups == [2, 2]
