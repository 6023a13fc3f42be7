"""RAM disks by name: ``ram:NAME`` is a file of shared memory that any process may open.

A RAM disk lies on the host's memory file system, so it belongs to no process. It stays until `remove` or a restart
of the host, whichever of its users end. Opening a RAM disk takes no exclusive lock, because it is made to be shared.

Everybody may make files in that folder, under any name. So ``ram:NAME`` opens only a regular file of this user or of
root, and never a symbolic link. A new RAM disk is for its owner alone (mode 0600).
"""

from __future__ import annotations

import os
import stat

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.patterns import pattern
from tapfs.records import NamedTuple

PREFIX = "ram:"

#: The format of a RAM disk.
FORMAT = "ram"

#: The permissions of a new RAM disk, as of other shared memory.
NEW_MODE = 0o600

_DIRECTORY = "/dev/shm"  # noqa: S108 - the memory file system itself is meant
_FILE_PREFIX = "tapfs.ram."
_NAME = pattern(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class RamDisk(NamedTuple):
    """A RAM disk of this host: its size and the memory it has taken so far, in bytes."""

    name: str
    size: int
    allocated: int


def is_ram(name: str) -> bool:
    """Whether the name of an image is that of a RAM disk. The prefix may be in capitals, as in URLs."""
    return name[: len(PREFIX)].lower() == PREFIX


def host_path(name: str) -> str:
    """The file behind ``ram:NAME``; raises ImageError(invalid_argument) for an impossible name."""
    own = name[len(PREFIX) :]
    if not _NAME.fullmatch(own):
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT,
            "is no name of a RAM disk",
            path=name,
            op="open",
            remedy="use up to 200 letters, digits, '.', '_' and '-'",
        )
    return f"{_DIRECTORY}/{_FILE_PREFIX}{own}"


def name_of(path: str) -> str | None:
    """The name of the RAM disk whose file is at `path`, an absolute path; None if it is no RAM disk's."""
    folder, file = os.path.split(path)
    own = file.removeprefix(_FILE_PREFIX)
    return PREFIX + own if folder == _DIRECTORY and file != own and _NAME.fullmatch(own) else None


def judge(status: os.stat_result, name: str) -> None:
    """Raise ImageError(denied) for a file that another has put under the name of a RAM disk."""
    if stat.S_ISLNK(status.st_mode):
        raise ImageError(
            ErrorKind.DENIED,
            f"is a symbolic link of user {status.st_uid}, not a RAM disk",
            path=name,
            op="open",
            remedy=f"remove it (tapfs remove {name}), or name the file that it leads to",
        )
    if status.st_uid not in {0, os.geteuid()}:
        raise ImageError(
            ErrorKind.DENIED,
            f"belongs to user {status.st_uid}, and anybody may make one of any name",
            path=name,
            op="open",
            remedy=f"if you trust that user open {host_path(name)} and say {{format=raw}}",
        )


def look_up(name: str) -> int:
    """An O_PATH descriptor of the RAM disk's file, judged. Raises ImageError(not_found, denied)."""
    try:
        found = os.open(host_path(name), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ImageError(
            ErrorKind.NOT_FOUND,
            "there is no such RAM disk",
            path=name,
            op="open",
            remedy=f"make it: tapfs create -f ram {name} SIZE",
        ) from None
    except OSError as error:
        raise from_os_error(error, path=name, op="open the RAM disk") from error
    try:
        judge(os.fstat(found), name)
    except BaseException:
        os.close(found)
        raise
    return found


def remove(name: str) -> None:
    """Remove a RAM disk's name; its memory is freed when its last user closes it.

    Raises ImageError(not_found, denied).
    """
    try:
        os.unlink(host_path(name))
    except OSError as error:
        raise from_os_error(error, path=name, op="remove the RAM disk") from error


def ram_disks() -> list[RamDisk]:
    """The RAM disks of this host, by name."""
    found: list[RamDisk] = []
    from pathlib import Path

    for entry in sorted(Path(_DIRECTORY).glob(_FILE_PREFIX + "*")):
        name = entry.name.removeprefix(_FILE_PREFIX)
        try:
            status = entry.lstat()
        except OSError:
            continue  # removed meanwhile
        # Anybody may make files here, of names that are none of RAM disks.
        if _NAME.fullmatch(name) and stat.S_ISREG(status.st_mode):
            found.append(RamDisk(name, status.st_size, status.st_blocks * 512))
    return found
