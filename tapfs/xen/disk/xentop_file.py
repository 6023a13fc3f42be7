"""The counters of a disk for xentop: a file in memory, as libxenstat wants it for backends of the kind `vbd3`.

For other kinds libxenstat reads what a driver of the kernel has in sysfs (docs/specs/xen.md, "xentop"), so xentop shows
nothing of them.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tapfs.xen.runtime_files import xentop_folder

if TYPE_CHECKING:
    from tapfs.xen.device import Device
    from tapfs.xen.disk.served_disk import ServedDisk
    from tapfs.xen.host import Host

#: The key of the backend that says whose file it is.
PROCESS_KEY = "kthread-pid"

_SECONDS = 1.0
_SECTOR = 512
#: Version, padding, requests that found no room, then of reads and of writes: submitted, completed, sectors, and
#: microseconds; errors, flags.
_COUNTERS = struct.Struct("=II11Q")
_VERSION = 1


def make_folder(device: Device, host: Host) -> str | None:
    """The folder for this process's file, where libxenstat looks for one. Be outside of the sandbox."""
    folder = xentop_folder(device, os.getpid(), host.machine)
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None  # xentop will not show the disk
    return str(folder)


class XentopFile:
    """The file of one disk, in a folder of `make_folder`. The supervisor removes both when the process has ended."""

    def __init__(self, device: Device, disk: ServedDisk, folder: str) -> None:
        self._device = device
        self._disk = disk
        self._folder = Path(folder)

    async def keep(self) -> None:
        """Write the counters each second until cancelled. xentop sees them whole."""
        while True:
            with suppress(OSError):
                self._write()
            await trio.sleep(_SECONDS)

    def _write(self) -> None:
        counted, times = self._disk.statistics(), self._disk.metrics()
        values = (
            *(counted["reads"], counted["reads"], counted["read_bytes"] // _SECTOR, times["read"].nanoseconds // 1000),
            *(counted["writes"], counted["writes"], counted["written_bytes"] // _SECTOR),
            times["write"].nanoseconds // 1000,
        )
        name = f"vbd-{self._device.domain}-{self._device.number}"
        new = self._folder / f"{name}.new"
        new.write_bytes(_COUNTERS.pack(_VERSION, 0, 0, *values, counted["errors"], 0))
        new.replace(self._folder / name)
