"""Find this machine's Xen: its xenstore, and whether disks can be served here at all."""

from __future__ import annotations

import os

from tapfs.errors import ErrorKind, ImageError
from tapfs.records import dataclass

#: A directory that stands in for Xen: its xenstore, guests' memory, grants and event channels (tests/xen/machine.py).
MACHINE_VARIABLE = "TAPFS_XEN_MACHINE"
#: The socket of xenstored in a machine directory.
MACHINE_SOCKET = "xenstored.socket"

#: Xen's own variable for a xenstored that listens elsewhere.
_SOCKET_VARIABLE = "XENSTORED_PATH"
_SOCKET = "/run/xenstored/socket"
#: The kernel's way to xenstored, where that runs in a domain of its own.
_XENBUS = "/dev/xen/xenbus"
#: One of them is there in every domain of Xen.
_DIRECTORIES = ("/dev/xen", "/proc/xen", "/sys/hypervisor/properties")
#: Devices that serving a guest's disk needs besides, and the kernel modules that bring them.
_DEVICES = {"/dev/xen/gntdev": "xen-gntdev", "/dev/xen/evtchn": "xen-evtchn"}
_CAPABILITIES = "/proc/xen/capabilities"


@dataclass(frozen=True, slots=True)
class Host:
    """A Xen host: the path of its xenstore (socket or device); `machine` is the directory of a simulated one."""

    xenstore: str
    machine: str | None = None


def find_host() -> Host:
    """The host that this process runs on, the simulated one of TAPFS_XEN_MACHINE first.

    Raises ImageError(unsupported) where there is no Xen, or where this domain cannot serve disks. Any domain with the
    devices can: whether it is the control domain or a driver domain decides what it may do in xenstore.
    """
    machine = os.environ.get(MACHINE_VARIABLE)
    if machine:
        machine = os.path.abspath(machine)
        return Host(os.environ.get(_SOCKET_VARIABLE) or os.path.join(machine, MACHINE_SOCKET), machine)
    if not any(os.path.isdir(directory) for directory in _DIRECTORIES):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "this machine does not run Xen",
            remedy="`tapfs mount` shows what is in an image anywhere",
        )
    missing = [device for device in _DEVICES if not os.path.exists(device)]
    if missing and not _in_control():
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "this is a guest of Xen, not its control domain",
            remedy=f"run tapfs in domain 0; if this is a driver domain: modprobe -a {' '.join(_DEVICES.values())}",
        )
    for device in missing:
        raise ImageError(ErrorKind.UNSUPPORTED, "is missing", path=device, remedy=f"modprobe {_DEVICES[device]}")
    return Host(_find_xenstore())


def _find_xenstore() -> str:
    chosen = os.environ.get(_SOCKET_VARIABLE)
    if chosen:
        return chosen
    for path in (_SOCKET, _XENBUS):
        if os.path.exists(path):
            return path
    raise ImageError(
        ErrorKind.UNSUPPORTED, "no xenstored runs", path=_SOCKET, remedy="start Xen's services (xencommons)"
    )


def _in_control() -> bool:
    """Whether this is the control domain, as far as the kernel says (xenfs may not be mounted)."""
    try:
        with open(_CAPABILITIES, encoding="ascii", errors="replace") as file:
            return "control_d" in file.read()
    except OSError:
        return True
