"""Send requests to the process that serves a disk."""

from __future__ import annotations

from typing import Any

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.serving import control
from tapfs.xen.device import Device
from tapfs.xen.runtime_files import directory, socket_name


async def ask(device: Device, command: str, **arguments: object) -> dict[str, Any]:
    """The answer to a command, which has been carried out then (see `tapfs.xen.disk.control`).

    Raises ImageError: not_found if no process serves the disk, io if it ended without an answer, else what the
    command met.
    """
    try:
        answer = await control.ask(directory(), socket_name(device), command, **arguments)
    except ImageError:
        raise
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ImageError(
            ErrorKind.NOT_FOUND,
            f"no process serves {device}",
            op="ask",
            remedy="see whether it is attached (tapfs list) and `tapfs blktapctrl` runs",
        ) from error
    except OSError as error:
        raise from_os_error(error, path=str(directory() / socket_name(device)), op="ask the disk's process") from error
    if answer is None:
        raise ImageError(
            ErrorKind.IO, f"the process of {device} ended before it had answered", op="ask", remedy="see its log"
        )
    return answer
