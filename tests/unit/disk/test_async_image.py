"""The image API under trio."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

import tapfs
from tapfs import ImageError, NewImage

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 4 << 20


async def test_many_tasks_share_a_disk_and_leaving_flushes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow"
    tapfs.create_image(str(path), NewImage("qcow", SIZE))
    async with tapfs.open_async(path, writable=True) as disk:

        async def write(number: int) -> None:
            await disk.write(number * 1000, bytes([number]) * 1000)
            assert await disk.read(number * 1000, 1000) == bytes([number]) * 1000

        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(write, number)
        await disk.flush()
        await disk.write_zeroes(0, 1000)
        await disk.discard(2 << 20, 1 << 20)
        assert (await disk.extents())[-1].end == SIZE == disk.size
        assert (await disk.info())["format"] == "qcow"
    with tapfs.open(path) as image:
        assert image.read(0, 64_000) == bytes(1000) + b"".join(bytes([n]) * 1000 for n in range(1, 64))


async def test_errors_are_image_errors(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        async with tapfs.open_async(tmp_path / "missing"):
            pass


async def test_a_cancelled_task_still_closes_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow"
    tapfs.create_image(str(path), NewImage("qcow", SIZE))
    with trio.move_on_after(0) as scope:
        async with tapfs.open_async(path, writable=True) as disk:
            scope.cancel()
            await disk.write(0, b"x" * 4096)
    with tapfs.open(path, writable=True) as image:  # not locked any more
        assert not image.info["encrypted"]
