"""The image API under trio: the same methods, awaited, each in a worker thread."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypedDict, TypeVar, Unpack

import trio

import tapfs

Result = TypeVar("Result")

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from tapfs.disk.chain_map import MappedExtent
    from tapfs.disk.description import ImageInfo
    from tapfs.disk.image import Image
    from tapfs.host.gate import Gate

    class OpenKeywords(TypedDict, total=False):
        """The keywords of `tapfs.open`."""

        format: str | None
        writable: bool
        password: bytes | None
        backing: str | None
        backing_formats: Sequence[str]
        backing_root: str | None
        gate: Gate | None
        direct: bool
        shared: bool
        metadata_only: bool
        overlay: str | os.PathLike[str] | None
        temporary: bool


class AsyncImage:
    """An open virtual disk for trio tasks. Any number of tasks may use it at once.

    A cancelled call is awaited to its end all the same: a write is done whole or has failed.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self.size = image.size
        self.path = image.path
        self.format_name = image.format_name
        self.granule = image.granule
        self.writable = image.writable
        self.parents = image.parents

    async def info(self) -> ImageInfo:
        """What ``tapfs info --json`` prints."""
        return await _in_thread(lambda: self._image.info)

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`."""
        data = self._image.try_read(offset, length)
        if data is None:
            return await _in_thread(partial(self._image.read, offset, length))
        await trio.lowlevel.checkpoint()
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
    """`tapfs.open` for trio: ``async with tapfs.open_async(path) as disk``.

    Takes what `tapfs.open` takes. Leaving the block flushes and closes, cancelled or not.
    """
    image = await _in_thread(partial(tapfs.open, path, **options))
    try:
        yield AsyncImage(image)
    finally:
        with trio.CancelScope(shield=True):
            await _in_thread(image.close)


async def _in_thread(call: Callable[[], Result]) -> Result:
    return await trio.to_thread.run_sync(call)
