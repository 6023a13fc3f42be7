"""The image API under trio and under asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio

import tapfs
from tapfs import ImageError

SIZE = 4 << 20


@pytest.fixture
def qcow(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow"
    tapfs.create(path, "qcow", SIZE)
    return path


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Coroutine[Any, Any, None]]], None]:
    """Runs an asynchronous function as programs of either library do."""
    if request.param == "trio":
        return trio.run
    return lambda function: asyncio.run(function())


def test_many_tasks_share_a_disk_and_leaving_flushes(qcow: Path, run: Callable[..., None]) -> None:
    async def main() -> None:
        async with tapfs.open_async(qcow, writable=True) as disk:
            assert repr(disk) == f"<tapfs.AsyncImage {str(qcow)!r}: qcow, {SIZE} bytes, writable>"

            async def write(number: int) -> None:
                await disk.write(number * 1000, bytes([number]) * 1000)
                assert await disk.read(number * 1000, 1000) == bytes([number]) * 1000

            async with anyio.create_task_group() as tasks:
                for number in range(64):
                    tasks.start_soon(write, number)
            await disk.flush()
            await disk.write_zeroes(0, 1000)
            await disk.discard(2 << 20, 1 << 20)
            assert (await disk.extents())[-1].end == SIZE == disk.size
            assert (await disk.info())["format"] == "qcow"
        assert disk.closed

    run(main)
    with tapfs.open(qcow) as image:
        assert image.read(0, 64_000) == bytes(1000) + b"".join(bytes([n]) * 1000 for n in range(1, 64))


def test_errors_are_image_errors(tmp_path: Path, run: Callable[..., None]) -> None:
    async def main() -> None:
        with pytest.raises(ImageError):
            async with tapfs.open_async(tmp_path / "missing"):
                pass

    run(main)


def test_a_cancelled_task_still_closes_the_disk(qcow: Path, run: Callable[..., None]) -> None:
    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with tapfs.open_async(qcow, writable=True) as disk:
                scope.cancel()
                await disk.write(0, b"x" * 4096)
        assert scope.cancelled_caught

    run(main)
    with tapfs.open(qcow, writable=True) as image:  # not locked any more
        assert not image.info["encrypted"]


class Held:
    """Makes a method of Image wait, in its thread, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.entered, self.let_go, self.done = threading.Event(), threading.Event(), threading.Event()
        real = getattr(tapfs.Image, method)

        def waits(image: tapfs.Image, *arguments: object) -> object:
            self.entered.set()
            self.let_go.wait(60)
            result = real(image, *arguments)
            self.done.set()
            return result

        monkeypatch.setattr(tapfs.Image, method, waits)

    async def begun(self) -> None:
        await anyio.to_thread.run_sync(self.entered.wait)


def test_a_write_that_is_cancelled_is_done_whole_before_the_task_goes_on(
    qcow: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., None]
) -> None:
    held = Held(monkeypatch, "write")

    async def main() -> None:
        async with tapfs.open_async(qcow, writable=True) as disk, anyio.create_task_group() as tasks:

            async def write() -> None:
                try:
                    await disk.write(0, b"x" * 4096)
                    await anyio.lowlevel.checkpoint()
                finally:
                    assert held.done.is_set()

            tasks.start_soon(write)
            await held.begun()
            tasks.cancel_scope.cancel()
            held.let_go.set()

    run(main)
    assert held.done.is_set()
    with tapfs.open(qcow) as image:
        assert image.read(0, 4096) == b"x" * 4096


def test_a_task_of_asyncio_that_is_cancelled_waits_for_its_write(qcow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, "write")

    async def main() -> None:
        async with tapfs.open_async(qcow, writable=True) as disk:
            task = asyncio.ensure_future(disk.write(0, b"x" * 4096))
            await held.begun()
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0)
            assert not task.done()
            held.let_go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert held.done.is_set()
            assert await disk.read(0, 4096) == b"x" * 4096

    asyncio.run(main())


def test_an_error_of_a_cancelled_call_is_not_left_over(qcow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, "read")
    monkeypatch.setattr(tapfs.Image, "try_read", lambda *_: None)

    async def main() -> None:
        async with tapfs.open_async(qcow) as disk:
            task = asyncio.ensure_future(disk.read(SIZE, 1))
            await held.begun()
            task.cancel()
            held.let_go.set()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


def test_a_disk_whose_opening_was_cancelled_is_closed(qcow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tapfs.api import opening

    entered, let_go = threading.Event(), threading.Event()
    real = opening.open

    def waits(*arguments: Any, **options: Any) -> tapfs.Image:
        entered.set()
        let_go.wait(60)
        return real(*arguments, **options)

    monkeypatch.setattr(opening, "open", waits)

    async def main() -> None:
        async def use() -> None:
            async with tapfs.open_async(qcow, writable=True):
                pytest.fail("it was cancelled before")

        task = asyncio.ensure_future(use())
        await asyncio.to_thread(entered.wait)
        task.cancel()
        await asyncio.sleep(0)
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    real(qcow, writable=True).close()
