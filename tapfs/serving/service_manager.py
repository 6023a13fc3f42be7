"""The service manager that started this process: what it is told (sd_notify(3)), and descriptors that it keeps for us.

Descriptors in its store (FileDescriptorStoreMax= of a unit) outlive the process, and come back to the next one of the
unit with LISTEN_FDS, each under its name.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Sequence
from contextlib import suppress

#: The first descriptor that systemd hands over.
FIRST_INHERITED = 3


def notify(state: str, descriptors: Sequence[int] = ()) -> None:
    """Tell the service manager that started us, if one did; nothing that can fail here matters."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        # Without a connection: a process in its sandbox makes none.
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        channel.sendmsg([state.encode()], rights, 0, address)


def store(name: str, descriptors: Sequence[int]) -> None:
    """Have the service manager keep copies of these descriptors for the next process of the unit."""
    notify(f"FDSTORE=1\nFDNAME={name}", descriptors)


def forget(name: str) -> None:
    """Have it close what it keeps under the name."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def stored(*names: str) -> dict[str, list[int]]:
    """What it has kept under these names, which is ours from now on; empty if this process has got something else."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    given = os.environ.get("LISTEN_FDNAMES", "").split(":")
    if not set(names) & set(given):
        return {}
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)  # not for the programs that we start
    found: dict[str, list[int]] = {name: [] for name in names}
    for descriptor, name in enumerate(given, FIRST_INHERITED):
        os.set_inheritable(descriptor, False)
        if name in found:
            found[name].append(descriptor)
    return found
