"""An error in a request becomes an errno and never ends the mount."""

from __future__ import annotations

import errno
import logging
import os
from typing import cast

import pyfuse3
import pytest
import trio

from tapfs.disk.image import Image
from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.operations import ImageOperations
from tapfs.fuse.tree import ROOT_INODE, Directory, Document, Tree, Window, image_tree

_CONTEXT = cast("pyfuse3.RequestContext", None)


class FakeImage:
    """An image of 16 KiB whose bytes are their offsets' low bits, with errors on demand."""

    size = allocated_bytes = 16384
    writable = True
    path = "image"

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.cold = False
        self.threads = 0

    def try_read(self, offset: int, length: int) -> bytes | None:
        return None if self.cold else self.read(offset, length)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        self.flush()
        return bytes((offset + index) & 0xFF for index in range(length))

    def flush(self) -> None:
        if self.error is not None:
            raise self.error


def operations_of(image: FakeImage, tree: Tree | None = None) -> ImageOperations:
    tree = tree or image_tree(image.size, writable=True, information=lambda: b"{}\n")
    return ImageOperations(cast("Image", image), tree, modified_ns=0)


async def opened(operations: ImageOperations, name: bytes, flags: int = os.O_RDONLY) -> int:
    entry = await operations.lookup(ROOT_INODE, name, _CONTEXT)
    return (await operations.open(entry.st_ino, flags, _CONTEXT)).fh


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("kind", list(ErrorKind))
async def test_image_error(caplog: pytest.LogCaptureFixture, kind: ErrorKind, *, cold: bool) -> None:
    image = FakeImage()
    image.cold = cold
    operations = operations_of(image)
    handle = await opened(operations, b"disk", os.O_RDWR)
    image.error = ImageError(kind, "broken", path="image", op="read")
    with caplog.at_level(logging.INFO):
        for attempt in (lambda: operations.read(handle, 0, 100), lambda: operations.fsync(handle, datasync=False)):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await attempt()
            assert caught.value.errno == image.error.errno
    assert len(caplog.records) == 1  # one line, however often it happens
    image.error = None
    assert await operations.read(handle, 255, 2) == b"\xff\x00"


async def test_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that would wait in a thread is answered in the event loop where the host refuses a thread."""

    async def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    image = FakeImage()
    image.cold = True
    operations = operations_of(image)
    monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
    handle = await opened(operations, b"disk", os.O_RDWR)
    assert await operations.read(handle, 255, 2) == b"\xff\x00"
    await operations.fsync(handle, datasync=False)
    image.error = RuntimeError("can't start new thread")  # of the image itself
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.fsync(handle, datasync=False)
    assert caught.value.errno == errno.EIO


async def test_bug(caplog: pytest.LogCaptureFixture) -> None:
    image = FakeImage()
    operations = operations_of(image)
    handle = await opened(operations, b"disk")
    image.error = ZeroDivisionError("a bug")
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.read(handle, 0, 1)
    assert caught.value.errno == errno.EIO
    assert "ZeroDivisionError" in caplog.text


async def test_handles() -> None:
    operations = operations_of(FakeImage())
    handle = await opened(operations, b"info.json")
    assert await operations.read(handle, 0, 100) == b"{}\n"
    assert await operations.read(handle, 1, 1) == b"}"
    await operations.release(handle)
    # A handle of a server that was killed: it says what it is.
    later = operations_of(FakeImage())
    assert await later.read(handle, 0, 100) == b"{}\n"
    for number in (0, 999):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.read(number, 0, 1)
        assert caught.value.errno == errno.EBADF


async def test_window_of_the_disk() -> None:
    """A partition: its own beginning, its own end."""
    tree = Tree()
    tree.add(ROOT_INODE, b"part1", 0o400, Window(512, 1000))
    operations = operations_of(FakeImage(), tree)
    handle = await opened(operations, b"part1")
    assert (await operations.lookup(ROOT_INODE, b"part1", _CONTEXT)).st_size == 1000
    assert await operations.read(handle, 1, 2) == b"\x01\x02"
    assert len(await operations.read(handle, 900, 4096)) == 100
    assert await operations.read(handle, 1000, 1) == b""


def test_tree() -> None:
    tree = Tree()
    folder = tree.add(ROOT_INODE, b"snapshots", 0o555, Directory())
    node = tree.add(folder.inode, b"first", 0o400, Window(0, 1))
    assert tree.lookup(ROOT_INODE, b"snapshots") is folder
    assert tree.lookup(folder.inode, b"first") is node
    assert tree.lookup(folder.inode, b".") is folder
    assert tree.lookup(folder.inode, b"..") is tree.node(ROOT_INODE)
    assert tree.lookup(node.inode, b"first") is None
    assert [child.name for child in tree.children(folder.inode)] == [b"first"]
    with pytest.raises(ValueError, match="first"):
        tree.add(folder.inode, b"first", 0o400, Document(bytes))
    with pytest.raises(ValueError, match="x"):
        tree.add(node.inode, b"x", 0o400, Document(bytes))
