"""Unix sockets in the runtime directory, and lines over them."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tapfs.serving.messages import MESSAGE_LIMIT

if TYPE_CHECKING:
    import trio


def listen(directory: Path, name: str) -> socket.socket:
    """A listening socket `name` in the directory, in place of one left there."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with short_path(directory, name) as path:
            with suppress(FileNotFoundError):
                (directory / name).unlink()
            os.fchmod(listener.fileno(), 0o700)  # of the file that bind makes, whatever the umask
            listener.bind(path)
            listener.listen(16)
    except BaseException:
        listener.close()
        raise
    return listener


async def receive_line(stream: trio.SocketStream, limit: int | None = MESSAGE_LIMIT) -> bytes:
    """One line, its end included; without it where the other end breaks off or says more than `limit` bytes."""
    line = b""
    while not line.endswith(b"\n") and (limit is None or len(line) < limit):
        piece = await stream.receive_some(MESSAGE_LIMIT)
        if not piece:
            break
        line += piece
    return line


@contextmanager
def short_path(directory: Path, name: str) -> Generator[str]:
    """A path to `name` that fits into a socket address (108 bytes), however long the directory's is."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)
