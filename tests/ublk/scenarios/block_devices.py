"""The machine as scenarios of block devices see it: attaching, detaching, and what they must not leave."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tapfs.errors import ImageError
from tapfs.ublk.attaching import ask, device_number
from tapfs.ublk.record import read_record, records
from tests.laboratory.commands import PATIENCE, attempt, attempt_tapfs, tapfs, wait_until

IMAGES = Path("/images")


class BlockDevices:
    """A machine with ublk and no devices yet."""

    def __init__(self) -> None:
        IMAGES.mkdir(exist_ok=True)

    def start(self) -> None:
        """Nothing runs before the first device."""

    def stop(self) -> None:
        """Nothing is left to end."""

    def attach(self, *words: str) -> str:
        """`tapfs attach --ublk`; the block device."""
        device = tapfs("attach", "--ublk", *words).splitlines()[-1]
        assert device.startswith("/dev/ublkb"), device
        return device

    def detach(self, device: str) -> None:
        """`tapfs detach --ublk`."""
        tapfs("detach", "--ublk", device)
        assert not os.path.exists(device)

    def process(self, device: str) -> int:
        """The process that serves a device."""
        record = read_record(int(device.removeprefix("/dev/ublkb")))
        assert record is not None
        return record.pid or 0

    def keeper(self, device: str) -> int:
        """The process that keeps it served."""
        record = read_record(int(device.removeprefix("/dev/ublkb")))
        assert record is not None
        return record.keeper_pid or 0

    def kill(self, device: str) -> int:
        """Kill -9 of the process that serves a device, and wait for its successor to serve; that one."""
        process = self.process(device)
        os.kill(process, signal.SIGKILL)
        wait_until("another process to serve", lambda: _serving(device) not in (0, process))
        return self.process(device)

    def leftovers(self) -> list[str]:
        """Devices and processes that are still there."""
        end = time.monotonic() + 10 * PATIENCE
        while True:
            left = [str(path) for path in Path("/dev").glob("ublk[bc]*")]
            left += [f"record {record.number}" for record in records()]
            left += [f"process {process}" for process in _processes()]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.2)

    def clean(self) -> None:
        """Take away what a failed scenario has left."""
        attempt("umount", "-l", "/run/mounted")
        for record in records():
            attempt_tapfs("detach", "--force", "--ublk", str(record.number))
        for process in _processes():
            os.kill(process, signal.SIGKILL)


def _serving(device: str) -> int:
    """The process that answers for a device; 0: none does."""
    try:
        pid: int = ask(device_number(device), "status")["pid"]
    except ImageError:
        return 0
    return pid


def _processes() -> list[int]:
    """Those that serve a device."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"tapfs.ublk.process" in words:
            found.append(int(path.parent.name))
    return found
