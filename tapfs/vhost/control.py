"""The control socket of a vhost-user server: where it is, and the questions of other commands to it."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.asking import ask_and_block
from tapfs.serving.runtime_directory import runtime_directories


def control_name(socket_path: str) -> str:
    """The name, in the runtime directory, of the control socket of the server to which machines connect there."""
    where = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(socket_path))), os.path.basename(socket_path))
    return f"vhost-{hashlib.blake2b(os.fsencode(where), digest_size=12).hexdigest()}.control"


def ask_server(socket_path: str, command: str, **details: Any) -> dict[str, Any]:
    """Have the server do a command; its answer. Raises the ImageError that it met, or ImageError(not_found)."""
    for directory in runtime_directories():
        try:
            answer = ask_and_block(directory, control_name(socket_path), command, **details)
        except ImageError:
            raise
        except OSError:
            continue
        if answer is not None:
            return answer
    raise ImageError(
        ErrorKind.NOT_FOUND,
        "no server of yours listens there for virtual machines",
        path=socket_path,
        op=command,
        remedy="name the socket as it was given to tapfs serve --vhost-user",
    )
