"""Asking the process that serves a disk."""

from __future__ import annotations

from typing import Any

import trio

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.serving.local_socket import receive_line, short_path
from tapfs.serving.messages import decode, encode, error_from_data
from tapfs.xen.device import Device
from tapfs.xen.runtime_files import directory, socket_name


async def ask(device: Device, command: str, **arguments: object) -> dict[str, Any]:
    """The answer to a command, which has been carried out then (see `tapfs.xen.disk.control`).

    Raises ImageError: not_found if no process serves the disk, io if it ended without an answer, else what the
    command met.
    """
    try:
        with short_path(directory(), socket_name(device)) as path:
            stream = await trio.open_unix_socket(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ImageError(
            ErrorKind.NOT_FOUND,
            f"no process serves {device}",
            op="ask",
            remedy="see whether it is attached (tapfs list) and `tapfs blktapctrl` runs",
        ) from error
    except OSError as error:
        raise from_os_error(error, path=str(directory() / socket_name(device)), op="ask the disk's process") from error
    line = b""
    async with stream:
        try:
            await stream.send_all(encode({"command": command, **arguments}))
            line = await receive_line(stream)
        except trio.BrokenResourceError:
            pass
    answer = decode(line)
    if answer.pop("ok", None) is True:
        return answer
    raise _error_in(answer, device)


def _error_in(answer: dict[str, Any], device: Device) -> ImageError:
    try:
        return error_from_data(answer)
    except (KeyError, ValueError):
        return ImageError(
            ErrorKind.IO, f"the process of {device} ended before it had answered", op="ask", remedy="see its log"
        )
