"""Where running tapfs processes leave what others must find: sockets, lists of mounts, journals."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from tapfs.errors import ErrorKind, ImageError, from_os_error


def runtime_directory() -> Path:
    """This user's directory; it may not be there yet (`make_private`)."""
    chosen = os.environ.get("TAPFS_RUNTIME_DIR")
    if chosen:
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/run/tapfs")
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    with suppress(OSError):
        # It may be inherited from another user (su, sudo).
        if session and os.stat(session).st_uid == os.geteuid():
            return Path(session).absolute() / "tapfs"
    return Path(f"/tmp/tapfs-{os.geteuid()}")  # noqa: S108  made private, and checked to be


def make_private(directory: Path) -> None:
    """Make the directory if need be, and see that it is ours alone. Raises ImageError(denied, io)."""
    try:
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        status = directory.lstat()
    except OSError as error:
        raise from_os_error(error, path=str(directory), op="make the runtime directory") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ImageError(
            ErrorKind.DENIED,
            "the runtime directory is not a directory that only its owner, you, may enter",
            path=str(directory),
            remedy="remove it, or name another in TAPFS_RUNTIME_DIR",
        )
