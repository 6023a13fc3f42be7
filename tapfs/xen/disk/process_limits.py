"""Limit what a disk process may take of its host, before the process opens the image, which may be hostile."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError, from_os_error

if TYPE_CHECKING:
    from tapfs.xen.disk.settings import DiskSettings

#: Bytes of a thread's stack, which count as memory whether they are used or not. The engine's threads take the
#: system's default, that of the stack limit.
_STACK = 1 << 20

#: Bytes that it takes beside what it has when it starts: the map cache, the rings' buffers, the threads.
_MIN_ROOM = 96 << 20
#: Descriptors for rings, a short chain, xenstore, the control socket and trio itself.
_MIN_OPEN_FILES = 64


def apply_limits(settings: DiskSettings) -> None:
    """Limit this process for good. Raises ImageError for limits with which it could not serve."""
    threading.stack_size(_STACK)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK, hard))
    least = _data_bytes() + _MIN_ROOM
    if settings.memory < least:
        raise _too_little("memory", settings.memory, least)
    if settings.open_files < _MIN_OPEN_FILES:
        raise _too_little("open-files", settings.open_files, _MIN_OPEN_FILES)
    # A core file would hold what the guest has on its disk, and the key of an encrypted image.
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_DATA, settings.memory)
    _limit(resource.RLIMIT_NOFILE, settings.open_files)
    if settings.nice is not None:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, settings.nice)
        except OSError as error:
            raise from_os_error(error, path=None, op=f"be nice by {settings.nice}") from error


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0


def _too_little(name: str, value: int, least: int) -> ImageError:
    return ImageError(
        ErrorKind.OUT_OF_BOUNDS,
        f"{value} are too few to serve a disk",
        path=f"tapfs/{name}",
        op="limit",
        remedy=f"allow at least {least}",
    )
