"""Questions to the control socket of a serving process, without an event loop: commands that only ask start faster."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.local_socket import short_path
from tapfs.serving.messages import MESSAGE_LIMIT, encode, result_of


def unknown_command(request: Mapping[str, Any]) -> ImageError:
    """The error for a request that a front end does not know."""
    return ImageError(ErrorKind.UNSUPPORTED, f"unknown command {request.get('command')!r}", op="control")


def ask_and_block(
    directory: Path, name: str, command: str, *, seconds: float | None = None, **arguments: object
) -> dict[str, Any] | None:
    """The answer of the process behind a socket, None if that ended without one.

    `seconds`: the longest to wait at a time (TimeoutError, an OSError). Raises the ImageError that the request met,
    OSError if nobody listens.
    """
    line = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        with short_path(directory, name) as path:
            connection.connect(path)
        with suppress(ConnectionError):
            connection.sendall(encode({"command": command, **arguments}))
            while not line.endswith(b"\n"):
                piece = connection.recv(MESSAGE_LIMIT)
                if not piece:
                    break
                line += piece
    return result_of(line)
