"""Files that a served disk has in the runtime directory: control socket, journal, kept plan, image stamp, lock.

The process of a disk writes these files. The supervisor removes what a dead process left. The toolstack's commands
find the control socket here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tapfs.errors import from_os_error
from tapfs.serving.runtime_directory import runtime_directory
from tapfs.xen.device import LIBXL_TAP_KIND

if TYPE_CHECKING:
    from tapfs.xen.device import Device

#: As libxenstat has it.
_SHARED_MEMORY = "/dev/shm"  # noqa: S108

#: Ends of the names of a device's files in the runtime directory, after its key.
_SUFFIXES = (".socket", ".nbd", ".inner", ".keeper", ".journal", ".plan", ".plan-new", ".left", ".lock")


def directory() -> Path:
    """The directory of these files, and of the supervisor's lock. The directory may not exist yet."""
    return runtime_directory() / "xen"


def supervisor_lock_path() -> Path:
    """The lock of the one supervisor of this host, in which its number stands."""
    return directory() / "blktapctrl.lock"


def supervisor_lives() -> bool:
    """Whether the process lives that took the supervisor's lock last; one that was just started may not have yet.

    The lock is not tried: a supervisor that starts at that moment would not get it.
    """
    try:
        os.kill(int(supervisor_lock_path().read_text(encoding="ascii")), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def socket_name(device: Device) -> str:
    """The control socket of a disk in `directory`."""
    return f"{device.key}.socket"


def device_model_socket_name(device: Device) -> str:
    """The socket in `directory` by which the device model of an HVM guest uses the disk."""
    return f"{device.key}.nbd"


def inner_socket_name(device: Device) -> str:
    """The socket in `directory` by which the keeper of device models reaches the disk's process."""
    return f"{device.key}.inner"


def keeper_lock(directory: Path, device: Device) -> int | None:
    """A descriptor that holds the lock of a device's keeper; None if a keeper runs. Raises as `lock`."""
    return _locked(directory / f"{device.key}.keeper", op="lock the keeper of device models")


def xentop_folder(device: Device, pid: int, machine: str | None) -> Path | None:
    """Where xentop looks for the counters of a disk that the process `pid` serves; None: it does not look for any."""
    if device.kind != LIBXL_TAP_KIND:
        return None
    return Path(machine or _SHARED_MEMORY) / f"td3-{pid}"


def remove_xentop_folder(device: Device, pid: int, machine: str | None) -> None:
    """Remove what a process that has ended has left for xentop."""
    folder = xentop_folder(device, pid, machine)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def remove_runtime_files(directory: Path, key: str) -> bool:
    """Remove what is left of a device, unless a process still lives for it: then False."""
    held = lock(directory, key)
    if held is None:
        return False
    try:
        for suffix in _SUFFIXES:
            with suppress(OSError):
                (directory / f"{key}{suffix}").unlink()
    finally:
        os.close(held)
    return True


def keys_of_runtime_files(directory: Path) -> set[str]:
    """The keys of the devices of which something lies in the runtime directory."""
    return {path.stem for path in directory.iterdir() if path.suffix in _SUFFIXES and "-" in path.stem}


def lock(directory: Path, key: str) -> int | None:
    """A descriptor that holds the lock of a device; None if another does. Raises ImageError(io, denied, no_space)."""
    return _locked(directory / f"{key}.lock", op="lock the device")


def _locked(path: Path, *, op: str) -> int | None:
    descriptor = open_lock(path, op=op)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def open_lock(path: Path, *, op: str) -> int:
    """An open lock file, which nobody holds yet; it is made if it is not there. Raises as `lock`, with that `op`."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_os_error(error, path=str(path), op=op) from error
