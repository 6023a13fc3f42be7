"""`tapfs blktapctrl` as a process of its own, and the disk processes that it leaves."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tapfs.xen.host import MACHINE_VARIABLE
from tests.conftest import REPOSITORY

#: Seconds that something may take which happens at once on a machine that has nothing else to do.
PATIENCE = 120.0


class SupervisorProcess:
    """The supervisor of a simulated machine. Can be started again; what is left at the end is killed."""

    def __init__(self, directory: Path, log: str = "blktapctrl.log") -> None:
        self.directory = directory
        self.log = directory / log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it says, as to systemd, that it is ready."""
        address = self.directory / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
            notifications.bind(str(address))
            self._process = self.spawn(NOTIFY_SOCKET=str(address))
            poll = select.poll()
            poll.register(notifications, select.POLLIN)
            assert poll.poll(PATIENCE * 1000), self.log.read_text()
            assert notifications.recv(100) == b"READY=1"
        address.unlink()

    def spawn(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """A supervisor that may not become one."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tapfs.cli", "blktapctrl", *words],
                cwd=REPOSITORY,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit code when it has ended."""
        assert self._process is not None
        return self._process.wait(PATIENCE)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it by a signal; its exit code."""
        self.send(number)
        return self.wait()

    def disk_processes(self) -> dict[str, int]:
        """The processes of this machine's disks that run: "tap 3 51712" -> pid."""
        found = {}
        for pid in self._processes():
            try:
                words = [word for word in Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0") if word]
            except OSError:
                continue  # ended meanwhile
            if "tapfs.xen.disk.process" in words:
                found[" ".join(words[-4:-1])] = pid
        return found

    def _processes(self) -> Sequence[int]:
        """All processes that have this machine in their environment and are no zombies, but this one."""
        mark = f"{MACHINE_VARIABLE}={self.directory}".encode()
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid():
                try:
                    if mark in (process / "environ").read_bytes().split(b"\0"):
                        found.append(int(process.name))
                except OSError:
                    continue  # ended meanwhile, or not ours
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        while left := self.disk_processes():
            for pid in left.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        if self.log.exists():  # pytest shows it if the test has failed
            print(self.log.read_text(), file=sys.stderr)  # noqa: T201
