"""Start the processes of disks: forks of one process that has loaded everything, so that they share its memory.

That process is a child of the supervisor (`tapfs.xen.disk.fork_server`). Where it fails, a disk gets a process that
loads everything for itself.

The supervisor takes the lock of a device, and the process that is made for it inherits the lock. So the lock is held
from before the process exists until its last descriptor is closed, however the process ends. Two supervisors, one after
the other, never start two processes for one device, and two processes never answer one ring.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from tapfs.errors import from_os_error
from tapfs.serving.log import log
from tapfs.xen.device import Device
from tapfs.xen.process_handle import ANSWER, RunningDisk
from tapfs.xen.runtime_files import lock

_DISK, _FORK_SERVER = "tapfs.xen.disk.process", "tapfs.xen.disk.fork_server"

#: Room behind the arguments of the process that is forked, for those of the processes of disks.
_PADDING = "-" * 40

#: The descriptor by which the process that is forked hears of us.
_DESCRIPTOR = 3

#: Seconds for which an answer may take: it may still be loading, on a busy host.
_ANSWER_SECONDS = 60.0

_PR_SET_CHILD_SUBREAPER = 36


class DiskStarter:
    """Starts processes; `start` is for any thread. When it is closed, or gone, no process of a disk is harmed."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._server: tuple[int, socket.socket] | None = None

    def prepare(self) -> None:
        """Have the process that is forked begin to load. It is done without if that fails."""
        # Who is forked has a parent that ends at once, and becomes ours then.
        if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            words = ["-m", _FORK_SERVER, str(_DESCRIPTOR), _PADDING]
            try:
                pid = _spawn(words, [(os.POSIX_SPAWN_DUP2, theirs.fileno(), _DESCRIPTOR)])
            except OSError as error:
                ours.close()
                log.warning("each disk loads everything for itself: %s", error)
                return
        ours.settimeout(_ANSWER_SECONDS)
        self._server = pid, ours

    def start(self, device: Device, directory: Path) -> RunningDisk | None:
        """Start the process of a device, or None while another one lives, or may live: look again.

        Blocks. Raises ImageError(io, denied, no_space).
        """
        held = lock(directory, device.key)
        if held is None:
            return None
        words = [str(word) for word in device]
        try:
            with self._one_at_a_time:
                pid = self._spawned(words, held) if self._server is None else self._forked(*self._server, words, held)
            return None if pid is None else RunningDisk(pid, os.pidfd_open(pid), child=True)
        except OSError as error:
            raise from_os_error(error, path=sys.executable, op="start the disk process") from error
        finally:
            os.close(held)

    def close(self) -> None:
        """End the process that is forked."""
        if self._server is not None:
            pid, connection = self._server
            self._server = None
            connection.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    @staticmethod
    def _spawned(words: list[str], held: int) -> int:
        os.set_inheritable(held, True)
        return _spawn(["-m", _DISK, *words])

    def _forked(self, server: int, connection: socket.socket, words: list[str], held: int) -> int | None:
        """The number of a process that was forked. None if nobody knows whether it was: the lock tells later."""
        try:
            socket.send_fds(connection, ["\0".join(words).encode()], [held])
            answer = connection.recv(ANSWER.size)
            if len(answer) != ANSWER.size:
                raise ConnectionResetError("it has ended")
        except OSError as error:
            log.error("process %d, which is forked for disks, does not answer: %s; each loads all now", server, error)
            self.close()
            return None
        pid, number = ANSWER.unpack(answer)
        if number:
            raise OSError(number, os.strerror(number))
        return int(pid)


def _spawn(words: list[str], more: list[tuple[int, int, int]] | None = None) -> int:
    """A new Python with these arguments; its standard output is our standard error. Raises OSError."""
    # -P: what lies in the working directory is no part of tapfs. Signals to our process group are ours: a disk ends
    # when we say so.
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-P", *words],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, 2, 1),
            *(more or ()),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE),
    )
