"""The process that serves one disk, as its supervisor sees it: started here, or found running.

A process holds the lock of its device from before it exists until its last descriptor is closed, however it
ends: the supervisor takes the lock, and the process inherits it. So two supervisors, one after the other, never
start two processes for one device, and two processes never answer one ring.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import trio

from tapfs.errors import from_os_error
from tapfs.serving.processes import process_start
from tapfs.xen.device import Device

#: Exit codes of a disk process that say more than "it crashed": the device is done; the image cannot be served, and
#: xenstore says why; it was asked to end with the device still there.
EXIT_DONE, EXIT_FAILED, EXIT_STOPPED = 0, 3, 75

#: What may lie in the runtime directory for a device, after its key.
_SUFFIXES = (".socket", ".journal", ".plan", ".plan-new", ".left", ".lock")


class RunningDisk:
    """A disk process. `child`: ours to reap, so that its exit code is known."""

    def __init__(self, pid: int, descriptor: int, *, child: bool) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._child = child

    @property
    def name(self) -> str:
        """What `tapfs/process` says of it: the pid and when it started, for a pid is used again."""
        return f"{self.pid}:{process_start(self.pid) or 0}"

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    async def ended(self) -> int | None:
        """Wait for its end: its exit code, minus the number of the signal that ended it, None if nobody knows."""
        await trio.lowlevel.wait_readable(self._descriptor)
        return self._reap() if self._child else None

    def _reap(self) -> int | None:
        result = os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG)
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def close(self) -> None:
        """Let go of it; the process itself goes on."""
        os.close(self._descriptor)


def start(device: Device, directory: Path) -> RunningDisk | None:
    """Start the process of a device, or None while another one lives. Raises ImageError(io, denied, no_space)."""
    lock = _lock(directory / f"{device.key}.lock")
    if lock is None:
        return None
    try:
        os.set_inheritable(lock, True)
        # Signals to our process group are ours: a disk ends when we say so.
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", "tapfs.xen.disk.process", device.kind, str(device.domain), str(device.number)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, 2, 1)],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE),
        )
        return RunningDisk(pid, os.pidfd_open(pid), child=True)
    except OSError as error:
        raise from_os_error(error, path=sys.executable, op="start the disk process") from error
    finally:
        os.close(lock)


def adopt(name: str | None) -> RunningDisk | None:
    """The living process that `tapfs/process` names; None if there is none."""
    pid_text, _, start_text = (name or "").partition(":")
    if not (pid_text.isdecimal() and start_text.isdecimal()):
        return None
    try:
        descriptor = os.pidfd_open(int(pid_text))
    except (OSError, OverflowError):
        return None
    # The descriptor first, then the look: from now on the number cannot mean another process.
    if process_start(int(pid_text)) != int(start_text):
        os.close(descriptor)
        return None
    return RunningDisk(int(pid_text), descriptor, child=False)


def remove_runtime_files(directory: Path, key: str) -> bool:
    """Remove what is left of a device, unless a process still lives for it: then False."""
    lock = _lock(directory / f"{key}.lock")
    if lock is None:
        return False
    try:
        for suffix in _SUFFIXES:
            with suppress(OSError):
                (directory / f"{key}{suffix}").unlink()
    finally:
        os.close(lock)
    return True


def keys_of_runtime_files(directory: Path) -> set[str]:
    """The keys of the devices of which something lies in the runtime directory."""
    return {path.stem for path in directory.iterdir() if path.suffix in _SUFFIXES and "-" in path.stem}


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None if another does. Raises ImageError(io, denied, no_space)."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_os_error(error, path=str(path), op="lock the device") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
