"""The control socket of a mount: `tapfs umount` asks, the serving process answers when it is done.

One request and one answer per connection, each a JSON line. The answer to `umount` comes
after the image is closed: `unmounted` says whether the mount is gone, `error` what went wrong.
The answer to `status` has what is counted, `bytes_read` and `bytes_written`.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import trio

from tapfs.errors import ImageError
from tapfs.serving.local_socket import receive_line, short_path
from tapfs.serving.messages import MESSAGE_LIMIT, decode, encode, error_from_data, error_to_data


class Answer(NamedTuple):
    """What became of a request to unmount."""

    unmounted: bool
    error: ImageError | None


class Answers(NamedTuple):
    """Who answers: `unmount` unmounts, forcibly or not, closes the image, and says how that went."""

    unmount: Callable[[bool], Awaitable[Answer]]
    status: Callable[[], dict[str, object]]


#: For how long a listing waits for a process that may be stopped or stuck.
_STATUS_SECONDS = 1


async def serve(listener: socket.socket, answers: Answers, conversations: trio.Nursery) -> None:
    """Accept connections until cancelled; they are answered in the nursery `conversations`."""

    async def answer(stream: trio.SocketStream) -> None:
        # Whoever asked may be gone by now.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                request = decode(await receive_line(stream))
                if request.get("command") == "status":
                    await stream.send_all(encode(answers.status()))
                if request.get("command") == "umount":
                    result = await answers.unmount(bool(request.get("force")))
                    error = None if result.error is None else error_to_data(result.error)
                    await stream.send_all(encode({"unmounted": result.unmounted, "error": error}))

    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
    await trio.serve_listeners(answer, listeners, handler_nursery=conversations)


def ask_to_unmount(directory: Path, name: str, *, force: bool) -> Answer | None:
    """Ask the process behind a socket; None if it ended without an answer. Blocks until it has one.

    Raises OSError if nobody listens.
    """
    message = _ask(directory, name, {"command": "umount", "force": force}, timeout=None)
    if "unmounted" not in message:
        return None
    error = message.get("error")
    return Answer(bool(message["unmounted"]), None if error is None else error_from_data(error))


def ask_for_status(directory: Path, name: str) -> dict[str, Any]:
    """What the process behind a socket has counted; empty if it does not say."""
    with suppress(OSError):
        return _ask(directory, name, {"command": "status"}, timeout=_STATUS_SECONDS)
    return {}


def _ask(directory: Path, name: str, request: dict[str, object], *, timeout: float | None) -> dict[str, Any]:
    """The answer to a request, empty if the other end breaks off. Raises OSError if nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        with short_path(directory, name) as path:
            connection.connect(path)
        line = b""
        with suppress(ConnectionError):
            connection.sendall(encode(request))
            while not line.endswith(b"\n"):
                piece = connection.recv(MESSAGE_LIMIT)
                if not piece:
                    break
                line += piece
    return decode(line)
