"""The image API for asynchronous programs, on trio or asyncio: the same methods, awaited, each in a worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar, Unpack

import anyio
import anyio.lowlevel
import anyio.to_thread

from tapfs.api import opening
from tapfs.api.keywords import OpenKeywords

if TYPE_CHECKING:
    import os

    from tapfs.disk.chain_map import MappedExtent
    from tapfs.disk.description import ImageInfo
    from tapfs.disk.image import Image

Result = TypeVar("Result")


class AsyncImage:
    """An open virtual disk for tasks of trio or asyncio. Any number of tasks may use it at once.

    A call that is cancelled is awaited to its end all the same: a write is done whole or has failed.
    """

    def __init__(self, image: Image) -> None:
        """Not to be called: `tapfs.open_async` makes it."""
        self._image = image
        self.size = image.size
        self.path = image.path
        self.format_name = image.format_name
        self.granule = image.granule
        self.writable = image.writable
        self.parents = image.parents

    def __repr__(self) -> str:
        return repr(self._image).replace("tapfs.Image", "tapfs.AsyncImage", 1)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._image.closed

    async def info(self) -> ImageInfo:
        """What ``tapfs info`` shows."""
        return await _in_thread(lambda: self._image.info)

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`."""
        data = self._image.try_read(offset, length)
        if data is None:
            return await _in_thread(partial(self._image.read, offset, length))
        await anyio.lowlevel.checkpoint()
        return data

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset`."""
        await _in_thread(partial(self._image.write, offset, data))

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""
        await _in_thread(partial(self._image.write_zeroes, offset, length))

    async def discard(self, offset: int, length: int) -> None:
        """The range's contents are not needed any more."""
        await _in_thread(partial(self._image.discard, offset, length))

    async def flush(self) -> None:
        """Make everything that has been written durable."""
        await _in_thread(self._image.flush)

    async def extents(self, offset: int = 0, length: int | None = None) -> list[MappedExtent]:
        """The map of the range over the whole chain."""
        return await _in_thread(lambda: list(self._image.extents(offset, length)))


@asynccontextmanager
async def open_async(path: str | os.PathLike[str], **options: Unpack[OpenKeywords]) -> AsyncGenerator[AsyncImage]:
    """`tapfs.open` for trio and asyncio: ``async with tapfs.open_async(path) as disk``.

    Takes what `tapfs.open` takes. Leaving the block flushes and closes, cancelled or not.
    """
    image = await _in_thread(partial(opening.open, path, **options), undo=lambda opened: opened.close())
    try:
        yield AsyncImage(image)
    finally:
        with anyio.CancelScope(shield=True):
            await _in_thread(image.close)


async def _in_thread(call: Callable[[], Result], *, undo: Callable[[Result], object] | None = None) -> Result:
    """The result of a call in a thread, which is waited for although the caller is cancelled meanwhile.

    `undo` is called with a result that nobody will have, because the caller was cancelled.
    """
    await anyio.lowlevel.checkpoint_if_cancelled()
    with anyio.CancelScope(shield=True):
        if not _on_asyncio():
            return await anyio.to_thread.run_sync(call)
        # The shield holds off scopes of anyio. Task.cancel() and asyncio.timeout() go past it.
        thread = asyncio.ensure_future(anyio.to_thread.run_sync(call))
        cancelled: asyncio.CancelledError | None = None
        while not thread.done():
            try:
                await asyncio.wait([thread])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is None:
            return thread.result()
        if thread.exception() is None and undo is not None:
            undo(thread.result())
        raise cancelled
    raise AssertionError("a shielded scope does not end by itself")


def _on_asyncio() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no loop of asyncio runs here
        return False
