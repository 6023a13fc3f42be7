"""The control socket of a serving process: commands ask, the process answers when the thing is done.

A request is a line of JSON, ``{"command": "resize", "size": 1048576}``, and so is its answer: ``{"ok": true, ...}``, or
``{"ok": false, ...}`` with the fields of an ImageError. Any number of requests may follow each other on a connection.
Each front end has commands of its own. No request ends a service: an exception that is raised while a request is
answered is the answer. `tapfs.serving.asking` asks without an event loop.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from tapfs.serving.failures import reported
from tapfs.serving.local_socket import listen, receive_line, short_path
from tapfs.serving.messages import decode, encode, failed, result_of, succeeded

#: Carries out a request and gives the fields of its answer. Raises what kept it from that.
Answer = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, object]]]


class ControlSocket:
    """The serving end: a socket `name` in the directory, there from now on. Raises ImageError or OSError."""

    def __init__(self, directory: Path, name: str, answer: Answer, *, path: str) -> None:
        """`path` is what error messages name that do not name anything themselves."""
        self._directory, self._name, self._path = directory, name, path
        self._answer = answer
        self._listener: socket.socket | None = listen(directory, name)

    async def serve(self, conversations: trio.Nursery) -> None:
        """Accept connections until cancelled; they are served in the nursery. May be called again after an error."""
        listener = self._listener or listen(self._directory, self._name)
        self._listener = None
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
        await trio.serve_listeners(self._converse, listeners, handler_nursery=conversations)

    async def _converse(self, stream: trio.SocketStream) -> None:
        # Whoever asked may be gone by now.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                while line := await receive_line(stream):
                    await stream.send_all(encode(await self._answered(line)))

    async def _answered(self, line: bytes) -> dict[str, object]:
        try:
            return succeeded(await self._answer(decode(line)))
        except Exception as error:  # noqa: BLE001  the image must not suffer from a request
            return failed(reported(error, op="answer the request", path=self._path))


async def ask(directory: Path, name: str, command: str, **arguments: object) -> dict[str, Any] | None:
    """The answer of the process behind a socket, None if that ended without one.

    Raises the ImageError that the request met, OSError if nobody listens.
    """
    with short_path(directory, name) as path:
        stream = await trio.open_unix_socket(path)
    line = b""
    async with stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(encode({"command": command, **arguments}))
            line = await receive_line(stream, limit=None)
    return result_of(line)
