"""A service ends in order whatever its tasks and its end meet, and a background flush is tried again."""

from __future__ import annotations

import errno
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

import tapfs
from tapfs import Image, ImageError
from tapfs.errors import ErrorKind
from tapfs.serving import periodic_flush, service
from tapfs.serving.service import Service

NO_THREAD = "can't start new thread"

#: What a task or a step of the end can meet.
FAILURES = [
    ImageError(ErrorKind.NO_SPACE, "full"),
    RuntimeError(NO_THREAD),
    MemoryError(),
    OSError(errno.EMFILE, "Too many open files"),
    ZeroDivisionError(),
    ExceptionGroup("tasks", [RuntimeError(NO_THREAD)]),
]

by_name = pytest.mark.parametrize("failure", FAILURES, ids=[type(failure).__name__ for failure in FAILURES])


class FrontEndOfTest:
    """A front end that does what the test says, and notes what happens to it."""

    def __init__(self, image: Image | None = None) -> None:
        self.service = Service("/m")
        self.done: list[str] = []
        self.image = image
        self.prepared: Callable[[], None] = lambda: None
        self.over = trio.Event()
        if image is not None:
            self.service.ending.add("close the image", image.close)

    def step(self, name: str, met: Exception | None = None) -> Callable[[], None]:
        def work() -> None:
            self.done.append(name)
            if met is not None:
                raise met

        return work

    def prepare(self) -> None:
        self.prepared()

    async def serve(self) -> None:
        await self.over.wait()

    async def end(self) -> None:
        self.done.append("end")
        self.over.set()

    def run(self) -> ImageError | None:
        try:
            self.service.run(self)
        except ImageError as error:
            return error
        return None


@pytest.fixture
def image(tmp_path: Path) -> Image:
    path = str(tmp_path / "image.qcow")
    tapfs.create(path, "qcow", 1 << 20)
    return tapfs.open(path, format="qcow", writable=True)


def content(image: Image) -> bytes:
    with tapfs.open(image.path, format="qcow") as again:
        return again.read(0, 4)


class Ends(FrontEndOfTest):
    """A front end with a step of each kind around its image, all of which fail; `serve` may, too."""

    def __init__(self, image: Image, failure: Exception, *, serving: bool) -> None:
        super().__init__()
        self.failure, self.serving = failure, serving
        self.service.ending.add("remove the entry", self.step("entry", failure))
        self.service.ending.add("close the image", image.close)
        self.service.ending.add_quick("end the session", self.step("session", failure))
        self.service.ending.add_async("unmount the files", self.unmount_files)
        self.service.ending.add("unmount", self.step("unmount", failure))

    async def unmount_files(self) -> None:
        await trio.lowlevel.checkpoint()
        self.step("files", self.failure)()

    async def serve(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.serving:
            raise self.failure


@by_name
@pytest.mark.parametrize("serving", [False, True])
def test_every_step_of_the_end_is_done(image: Image, failure: Exception, *, serving: bool) -> None:
    image.write(0, b"data")
    front_end = Ends(image, failure, serving=serving)
    met = front_end.run()
    assert met is not None
    assert met.kind is (ErrorKind.NO_SPACE if isinstance(failure, ImageError) else ErrorKind.IO)
    assert front_end.done == ["unmount", "files", "session", "entry"]
    assert content(image) == b"data"


@by_name
def test_a_task_that_fails_ends_the_service_in_order(image: Image, failure: Exception) -> None:
    image.write(0, b"data")

    class WithTask(FrontEndOfTest):
        async def serve(self) -> None:
            async def task() -> None:
                raise failure

            self.service.start(task, "work")
            await super().serve()

    front_end = WithTask(image)
    assert isinstance(front_end.run(), ImageError)
    assert front_end.done == ["end"]
    assert content(image) == b"data"


def test_a_front_end_that_cannot_end_is_cancelled(image: Image) -> None:
    class Stubborn(FrontEndOfTest):
        async def serve(self) -> None:
            async def task() -> None:
                raise ZeroDivisionError

            self.service.start(task, "work")
            await trio.sleep_forever()

        async def end(self) -> None:
            raise RuntimeError(NO_THREAD)

    image.write(0, b"data")
    assert isinstance(Stubborn(image).run(), ImageError)
    assert content(image) == b"data"


@by_name
def test_preparing_fails(image: Image, failure: Exception) -> None:
    image.write(0, b"data")
    front_end = FrontEndOfTest(image)

    def prepare() -> None:
        front_end.service.ending.add("unmount", front_end.step("unmount"))
        raise failure

    front_end.prepared = prepare
    assert isinstance(front_end.run(), ImageError)
    assert front_end.done == ["unmount"]
    assert content(image) == b"data"


def test_the_event_loop_cannot_be_started(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise OSError(errno.EMFILE, "")

    image.write(0, b"data")
    front_end = FrontEndOfTest(image)
    front_end.prepared = lambda: front_end.service.ending.add("unmount", front_end.step("unmount"))
    monkeypatch.setattr(trio, "run", run)
    met = front_end.run()
    assert str(met) == "/m: cannot serve: Too many open files; raise the limit of open files (ulimit -n)"
    assert front_end.done == ["unmount"]
    assert content(image) == b"data"


def refuse_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError(NO_THREAD)

    monkeypatch.setattr(threading.Thread, "start", start)


def test_without_a_thread_nothing_is_served_and_the_image_is_closed(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    image.write(0, b"data")
    front_end = FrontEndOfTest(image)
    front_end.prepared = front_end.step("prepared")
    refuse_threads(monkeypatch)
    met = front_end.run()
    assert met is not None
    assert "/m: cannot serve the image: no more threads can be started" in str(met)
    assert front_end.done == []
    assert content(image) == b"data"


def test_no_further_thread_is_needed_to_flush_and_to_end(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flushing(FrontEndOfTest):
        async def serve(self) -> None:
            image.write(0, b"data")
            refuse_threads(monkeypatch)
            self.service.flush_periodically(lambda: image)
            while image.unflushed_bytes:
                await trio.lowlevel.checkpoint()

    monkeypatch.setattr(periodic_flush, "_FLUSH_SECONDS", 0)
    assert Flushing(image).run() is None
    assert content(image) == b"data"


@by_name
def test_a_background_flush_is_tried_again(
    image: Image, failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flush, tries = image.flush, 0

    def failing() -> None:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise failure
        flush()

    class Flushing(FrontEndOfTest):
        async def serve(self) -> None:
            image.write(0, b"data")
            monkeypatch.setattr(image, "flush", failing)
            self.service.flush_periodically(lambda: image)
            while "works again" not in caplog.text:
                await trio.lowlevel.checkpoint()

    monkeypatch.setattr(periodic_flush, "_FLUSH_SECONDS", 0)
    with caplog.at_level(logging.INFO):
        assert Flushing(image).run() is None
    assert tries == 4
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]  # one error is said once
    assert content(image) == b"data"


class Signalled(FrontEndOfTest):
    """A front end to whose process a signal is sent while it serves, and whose task fails because of the end."""

    def __init__(self, image: Image, number: signal.Signals) -> None:
        super().__init__(image)
        self.number = number

    async def serve(self) -> None:
        self.service.start(self.task, "work")
        signal.raise_signal(self.number)
        await super().serve()

    async def task(self) -> None:
        await self.over.wait()
        raise ZeroDivisionError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it(image: Image, number: signal.Signals) -> None:
    image.write(0, b"data")
    front_end = Signalled(image, number)
    assert front_end.run() is None
    assert front_end.done == ["end"]
    assert content(image) == b"data"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_it_serves_waits_and_ends_it(image: Image, number: signal.Signals) -> None:
    class Unused(FrontEndOfTest):
        async def serve(self) -> None:
            self.done.append("serve")

    image.write(0, b"data")
    front_end = Unused(image)
    front_end.prepared = lambda: signal.raise_signal(number)  # to this thread: another might not hold it back
    handlers = [signal.getsignal(each) for each in service.ENDING]
    assert front_end.run() is None
    assert "serve" not in front_end.done
    assert content(image) == b"data"
    assert [signal.getsignal(each) for each in service.ENDING] == handlers
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(service.ENDING)


def test_a_process_that_ignores_every_signal_serves(image: Image) -> None:
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in service.ENDING}
    front_end = FrontEndOfTest(image)
    front_end.over.set()
    try:
        assert front_end.run() is None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# The control socket


def request(connection: socket.socket, command: str) -> dict[str, Any]:
    connection.sendall(json.dumps({"command": command}).encode() + b"\n")
    with connection.makefile() as answers:
        said: dict[str, Any] = json.loads(answers.readline())
    return said


class Answering(FrontEndOfTest):
    """A front end whose requests fail; a thread of the test asks."""

    def __init__(self, image: Image, folder: Path, failure: Exception) -> None:
        super().__init__(image)
        self.folder, self.failure = folder, failure
        self.answers: list[dict[str, Any]] = []
        self.thread = threading.Thread(target=self.ask)

    async def answer(self, asked: Mapping[str, Any]) -> dict[str, object]:
        if asked["command"] == "end":
            self.over.set()
            await self.service.ended.wait()
            return {"bytes": 1}
        raise self.failure

    async def serve(self) -> None:
        self.service.listen(self.folder, "socket", self.answer)
        self.thread.start()
        await super().serve()

    def ask(self) -> None:
        with socket.socket(socket.AF_UNIX) as before, socket.socket(socket.AF_UNIX) as connection:
            for each in (before, connection):
                each.connect(str(self.folder / "socket"))
            self.answers.append(request(connection, "status"))
            self.answers.append(request(connection, "status"))
            self.answers.append(request(connection, "end"))
            self.answers.append(request(before, "status"))


@by_name
def test_no_request_ends_the_service(image: Image, tmp_path: Path, failure: Exception) -> None:
    """Neither while it serves nor when the image has been closed."""
    front_end = Answering(image, tmp_path, failure)
    assert front_end.run() is None
    front_end.thread.join()
    kinds = [answer.get("kind") for answer in front_end.answers]
    kind = "no_space" if isinstance(failure, ImageError) else "io"
    assert kinds == [kind, kind, None, kind]
    assert front_end.answers[2] == {"ok": True, "bytes": 1}
