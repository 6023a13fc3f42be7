"""The kernel's mount table: look up mounts, unmount, and find the processes that keep a mount busy."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.records import NamedTuple

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_ESCAPE = re.compile(rb"\\([0-7]{3})")
_LOOP = re.compile(r"loop\d+")

#: Holders of a busy mount that a message names.
_NAMED_HOLDERS = 5


class MountedFileSystem(NamedTuple):
    """A line of the mount table; `device` (MAJOR:MINOR) tells two mounts at one place apart."""

    device: str
    mount_point: str
    type: str
    source: str
    options: str

    @property
    def user(self) -> int | None:
        """The user who mounted it, if it is a FUSE file system."""
        found = re.search(r"(?:^|,)user_id=(\d+)", self.options)
        return None if found is None else int(found[1])

    def is_read_from(self, directory: str) -> bool:
        """Whether the file that the file system lies in is below this (real) directory, by the name of its opening.

        That is what is behind a loop device, or what a FUSE file system says.
        """
        name = self.source.removeprefix("/dev/")
        file = _read_text(Path(f"/sys/block/{name}/loop/backing_file")) if _LOOP.fullmatch(name) else self.source
        return _is_below(file, directory)


def mounted_file_systems() -> Iterator[MountedFileSystem]:
    """Every mount of this process's namespace, in the order of mounting."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        fields, tail = before.split(b" "), after.split(b" ")
        if len(fields) > 4 and len(tail) > 2:
            yield MountedFileSystem(*map(_text, (fields[2], fields[4], *tail[:3])))


def top_mount(path: str) -> MountedFileSystem | None:
    """The file system that is seen at exactly this (real) path, if one is mounted there."""
    here = mounts_at(path)
    return here[-1] if here else None


def mounts_at(path: str) -> list[MountedFileSystem]:
    """What is mounted at exactly this (real) path, the one that is seen last."""
    return [mount for mount in mounted_file_systems() if mount.mount_point == path]


def require_uncovered(path: str, device: str) -> None:
    """Raise ImageError(locked) if something is mounted over the file system of `device` at this (real) path.

    That one could not be unmounted, only lost.
    """
    here = [mount.device for mount in mounts_at(path)]
    if device in here and here[-1] != device:
        raise ImageError(
            ErrorKind.LOCKED,
            "another file system is mounted over it",
            path=path,
            op="unmount",
            remedy="unmount that one first",
        )


def is_abandoned(path: str) -> bool:
    """Whether the process that served the FUSE file system mounted at `path` has ended."""
    try:
        os.statvfs(path)  # the attributes that stat(2) gives may still be in the kernel's cache
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount what is mounted at `path`; `lazy`: out of sight now, gone with its last user.

    By umount2(2) where the process may, else by fusermount3, which lets users unmount their
    own. Blocks while the file system's server finishes. Raises ImageError(locked) naming who
    keeps it busy.
    """
    try:
        if os.geteuid() == 0 and _unmount_as_root(path, lazy=lazy):
            return
        _unmount_as_user(path, lazy=lazy)
    except ImageError:
        raise
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise from_os_error(error, path=path, op="unmount") from error
        by = holders(path)
        named = ", ".join(by[:_NAMED_HOLDERS]) + (" and others" if len(by) > _NAMED_HOLDERS else "")
        raise ImageError(
            ErrorKind.LOCKED,
            f"is busy: used by {named}" if by else "is busy",
            path=path,
            op="unmount",
            remedy="end that use, or say {force} to unmount all the same",
        ) from error


def holders(path: str) -> list[str]:
    """Who keeps the file system mounted at `path` busy, as far as /proc and /sys tell us."""
    found = [f"process {pid} ({_command(pid)})" for pid in _processes_in(path)]
    loops = Path("/sys/block").glob("loop*/loop/backing_file")
    found += [f"/dev/{loop.parent.parent.name}" for loop in loops if _is_below(_read_text(loop), path)]
    found += [f"the mount at {m.mount_point}" for m in mounted_file_systems() if m.mount_point.startswith(path + "/")]
    return found


def _unmount_as_root(path: str, *, lazy: bool) -> bool:
    """Whether umount2(2) did it; False where we may not (a root without the capability)."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    if libc.umount2(os.fsencode(path), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EPERM:
        return False
    raise OSError(number, os.strerror(number))


def _unmount_as_user(path: str, *, lazy: bool) -> None:
    program = shutil.which("fusermount3")
    if program is None:
        raise ImageError(ErrorKind.UNSUPPORTED, "unmounting needs fusermount3", path=path, remedy="apt install fuse3")
    command = [program, "-u", *(["-z"] if lazy else []), "--", path]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if result.returncode == 0:
        return
    text = result.stderr.decode(errors="backslashreplace").strip()
    if os.strerror(errno.EBUSY) in text or "Device or resource busy" in text:
        raise OSError(errno.EBUSY, text)
    raise ImageError(ErrorKind.IO, f"cannot unmount: {' '.join(text.split())}", path=path, op="unmount")


def _processes_in(path: str) -> Iterator[int]:
    """Processes with an open file, working directory or root below `path`, this one excepted."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        if any(_is_below(target, path) for target in _places_of(process)):
            yield int(process.name)


def _places_of(process: Path) -> Iterator[str]:
    links = [process / "cwd", process / "root"]
    with suppress(OSError):  # it ended, or is another user's
        links += (process / "fd").iterdir()
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue
    # A mapped file stays in use when its descriptor is closed.
    for line in _read_text(process / "maps").splitlines():
        _, slash, place = line.partition(" /")
        if slash:
            yield "/" + place


def _is_below(place: str, path: str) -> bool:
    return place == path or place.startswith(path + "/")


def _command(pid: int) -> str:
    return _read_text(Path(f"/proc/{pid}/comm")) or "ended"


def _read_text(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes()).strip()
    except OSError:
        return ""


def _text(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda escape: bytes([int(escape[1], 8)]), field))
