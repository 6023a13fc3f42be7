"""RAM disks by name: ``ram:NAME`` is a file of shared memory that any process may open.

It lives on the host's memory file system, so it belongs to no process: it is there until
`remove` or a restart of the host, whoever of its users ends. Its permissions are those of the
file. Opening one takes no exclusive lock: sharing it is what it is for.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from tapfs.errors import ErrorKind, ImageError, from_os_error

PREFIX = "ram:"
_DIRECTORY = Path("/dev/shm")  # noqa: S108 - the memory file system itself is meant
_FILE_PREFIX = "tapfs.ram."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class RamDisk(NamedTuple):
    """A RAM disk of this host: its size and the memory it has taken so far, in bytes."""

    name: str
    size: int
    allocated: int


def is_ram(path: str) -> bool:
    """Whether an image path names a RAM disk (a file of such a name is written ``./ram:…``)."""
    return path.startswith(PREFIX)


def host_path(path: str) -> str:
    """The file behind ``ram:NAME``; raises ImageError(invalid_format) for an impossible name."""
    name = path.removeprefix(PREFIX)
    if not _NAME.fullmatch(name):
        raise ImageError(
            ErrorKind.INVALID_FORMAT,
            "is no name of a RAM disk",
            path=path,
            op="open",
            remedy="use up to 200 letters, digits, '.', '_' and '-'",
        )
    return str(_DIRECTORY / (_FILE_PREFIX + name))


def remove(path: str) -> None:
    """Remove a RAM disk's name; its memory is freed when its last user closes it.

    Raises ImageError(not_found, denied).
    """
    try:
        os.unlink(host_path(path))
    except OSError as error:
        raise from_os_error(error, path=path, op="remove the RAM disk") from error


def ram_disks() -> list[RamDisk]:
    """The RAM disks of this host, by name."""
    found: list[RamDisk] = []
    for entry in sorted(_DIRECTORY.glob(_FILE_PREFIX + "*")):
        try:
            status = entry.stat()
        except OSError:
            continue  # removed meanwhile
        found.append(RamDisk(entry.name.removeprefix(_FILE_PREFIX), status.st_size, status.st_blocks * 512))
    return found
