"""A look at keys of xenstore by a process that has no event loop yet, and no thread: a connection that blocks.

A process enters its sandbox while it has one thread, and what it needs there stands in xenstore.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.xen.host import Host
from tapfs.xen.xenstore.connection import open_connection
from tapfs.xen.xenstore.wire import (
    Assembler,
    Message,
    Operation,
    ProtocolError,
    errno_of,
    join_strings,
    to_text,
)

_Result = TypeVar("_Result")

_READ_BYTES = 64 << 10


class FirstLook:
    """A connection for reading keys one after the other; each read blocks. To be closed."""

    def __init__(self, host: Host) -> None:
        self._path = host.xenstore
        self._descriptor, _ = open_connection(self._path)
        os.set_blocking(self._descriptor, True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    async def read(self, path: str) -> str | None:
        """The value of a key; None if it is not there, or not for us. Raises ImageError(io)."""
        code, reply = self._ask(path)
        if code in (errno.ENOENT, errno.EACCES):
            return None
        if code:
            raise from_os_error(OSError(code, os.strerror(code)), path=path, op="read the key")
        return to_text(reply)

    def _ask(self, path: str) -> tuple[int, bytes]:
        """The number of an error, 0 for none, and the value."""
        question = Message(Operation.READ, 1, 0, join_strings(path))
        try:
            rest = memoryview(question.encode())
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            reply = self._reply()
        except (OSError, ProtocolError) as error:
            failure = error if isinstance(error, OSError) else OSError(0, str(error))
            raise from_os_error(failure, path=self._path, op="talk to xenstored") from error
        if reply.operation == Operation.ERROR:
            return errno_of(reply.payload), b""
        return 0, reply.payload

    def _reply(self) -> Message:
        assembler = Assembler()
        while True:
            piece = os.read(self._descriptor, _READ_BYTES)
            if not piece:
                raise ImageError(ErrorKind.IO, "xenstored is gone", path=self._path, op="talk to xenstored")
            for message in assembler.feed(piece):
                return message


def result_of(work: Coroutine[Any, Any, _Result]) -> _Result:
    """What a coroutine returns that never waits for an event loop."""
    try:
        work.send(None)
    except StopIteration as done:
        result: _Result = done.value
        return result
    work.close()
    raise AssertionError("it waits for an event loop")
