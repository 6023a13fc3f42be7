"""The socket by which the device model of an HVM guest comes to its disk, until its first client: then a keeper has it.

The process of a disk may end and be replaced, and it may start no program. So the supervisor listens for it, and starts
the keeper (`device_model_keeper`), which outlives supervisor and disk process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import trio

from tapfs.errors import ImageError
from tapfs.serving.local_socket import listen
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread
from tapfs.xen.device import Device
from tapfs.xen.runtime_files import device_model_socket_name, inner_socket_name, keeper_lock

_KEEPER = "tapfs.xen.supervisor.device_model_keeper"


async def attend_door(device: Device, directory: Path, keepers: list[subprocess.Popen[bytes]]) -> None:
    """Listen for device models until cancelled, or until one comes: then a keeper is started, and added to `keepers`.

    Where another supervisor has started a keeper that one goes on. Raises nothing.
    """
    if not device.made_by_libxl:
        return
    try:
        door = open_door(device, directory)
        if door is None:
            return
        listener, held = door
        try:
            await trio.lowlevel.wait_readable(listener)
            keepers.append(await in_thread(partial(start_keeper, device, directory, listener, held)))
        finally:
            listener.close()
            os.close(held)
    except (ImageError, OSError) as error:
        log.error("%s: no HVM guest can boot from the disk: %s", device, error)


def open_door(device: Device, directory: Path) -> tuple[socket.socket, int] | None:
    """A listening socket, and the keeper's lock; None: a keeper has both. Raises ImageError and OSError."""
    held = keeper_lock(directory, device)
    if held is None:
        return None
    try:
        return listen(directory, device_model_socket_name(device)), held
    except OSError:
        os.close(held)
        raise


def start_keeper(device: Device, directory: Path, listener: socket.socket, held: int) -> subprocess.Popen[bytes]:
    """Start a keeper, which has the socket and the lock as well from now on. Raises OSError."""
    words = [str(listener.fileno()), str(directory), device_model_socket_name(device), inner_socket_name(device)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _KEEPER, *words],
        stdin=subprocess.DEVNULL,
        pass_fds=(listener.fileno(), held),
        start_new_session=True,
    )
