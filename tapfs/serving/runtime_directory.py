"""The runtime directory: the private folder for sockets, lists of mounts and journals of running tapfs processes."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from tapfs.errors import ErrorKind, ImageError, from_os_error

#: The directory of a session by the customs of systemd, and the one without a session. Both are checked to be private.
_SESSION = "/run/user/{}/tapfs"
_WITHOUT_SESSION = "/tmp/tapfs-{}"  # noqa: S108  it is checked
_OF_ROOT = Path("/run/tapfs")


def runtime_directory() -> Path:
    """This user's directory; it may not be there yet (`make_private`)."""
    chosen = os.environ.get("TAPFS_RUNTIME_DIR")
    if chosen:
        return Path(chosen).absolute()
    if _is_root():
        return _OF_ROOT
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    with suppress(OSError):
        # It may be inherited from another user (su, sudo).
        if session and os.stat(session).st_uid == os.geteuid():
            return Path(session).absolute() / "tapfs"
    return Path(_WITHOUT_SESSION.format(_user()))


def runtime_directories() -> list[Path]:
    """This user's directory, and the others in which processes of this user may have left something.

    Which one a process takes depends on its environment: cron and su have no session, or another user's. Only
    directories that are there and private to this user are named, except the first, which `make_private` makes.
    """
    own = runtime_directory()
    user = _user()
    others: list[Path] = []
    if not os.environ.get("TAPFS_RUNTIME_DIR") and not _is_root():
        session = os.environ.get("XDG_RUNTIME_DIR", "")
        others = [Path(session).absolute() / "tapfs"] if session else []
        others += [Path(place.format(user)) for place in (_SESSION, _WITHOUT_SESSION)]
    found = [own]
    for directory in others:
        if directory not in found and _is_private(directory):
            found.append(directory)
    return found


def _is_root() -> bool:
    """Whether we are the root that /run belongs to, and not the root of a user's own namespace (unshare -Ur)."""
    try:
        return os.geteuid() == 0 == os.stat(_OF_ROOT.parent).st_uid
    except OSError:
        return False


def _user() -> int:
    """The number of this user outside of a user namespace, so that the directory is the same inside and outside."""
    user = os.geteuid()
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            inside, outside, count = map(int, line.split())
            if inside <= user < inside + count:
                return outside + user - inside
    return user


def _is_private(directory: Path) -> bool:
    try:
        status = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read and write, whatever the umask. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def make_private(directory: Path) -> None:
    """Make the directory if need be, and see that it is ours alone. Raises ImageError(denied, io)."""
    try:
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
    except OSError as error:
        raise from_os_error(error, path=str(directory), op="make the runtime directory") from error
    if not _is_private(directory):
        raise ImageError(
            ErrorKind.DENIED,
            "the runtime directory is not a directory that only its owner, you, may enter",
            path=str(directory),
            remedy="remove it, or name another in TAPFS_RUNTIME_DIR",
        )
