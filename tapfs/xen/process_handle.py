"""The process that serves one disk, as its supervisor sees it: its number and its end."""

from __future__ import annotations

import os
import signal
import struct
from contextlib import suppress

import trio

from tapfs.serving.processes import process_start
from tapfs.xen.process_name import parse_process_name, process_name

#: The exit code of a disk process whose image cannot be served; xenstore says why.
EXIT_FAILED = 3

#: The answer of the process that is forked for each disk: the number of the new process, and 0 or an errno.
ANSWER = struct.Struct("=ii")


class RunningDisk:
    """A disk process. `child`: ours to reap, so that its exit code is known."""

    def __init__(self, pid: int, descriptor: int, *, child: bool) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._child = child

    @property
    def name(self) -> str:
        """What `tapfs/process` says of it."""
        return process_name(self.pid)

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


def adopt(name: str | None) -> RunningDisk | None:
    """The living process that `tapfs/process` names; None if there is none."""
    named = parse_process_name(name)
    if named is None:
        return None
    pid, start = named
    try:
        descriptor = os.pidfd_open(pid)
    except (OSError, OverflowError):
        return None
    # The descriptor first, then the look: from now on the number cannot mean another process.
    if process_start(pid) != start:
        os.close(descriptor)
        return None
    return RunningDisk(pid, descriptor, child=False)
