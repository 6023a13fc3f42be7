"""Image locks: open-file-description locks on the byte ranges that QEMU uses too.

Byte ``100 + p`` of a host file says "I have permission p", byte ``200 + p`` "I refuse
everybody else who has it". So tapfs and QEMU refuse each other's writers, and the lock goes with
the last descriptor of the open file: a crash leaves none behind. The ranges are those of
QEMU's image locking (docs/system/images, "Disk image file locking").
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError, from_os_error

if TYPE_CHECKING:
    from pathlib import Path

_HAS_BASE = 100
_REFUSES_BASE = 200

#: Byte ``2**62 + n``, behind every image, says that requests of the disk n are under way.
_REQUESTS_BASE = 1 << 62

#: struct flock of 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")

#: A host that has no such locks (some network and FUSE file systems) is used without.
_NO_LOCKS_HERE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Permission(IntEnum):
    """QEMU's block permissions, as far as they are locked."""

    CONSISTENT_READ = 0
    WRITE = 1
    RESIZE = 3


class Sharing(Enum):
    """Who is let in beside the user of an image."""

    #: A reader lets in other readers and refuses writers. A writer refuses everybody.
    EXCLUSIVE = "exclusive"
    #: A reader also lets in writers that let other writers in. A writer is as with EXCLUSIVE.
    WITH_COOPERATING_WRITERS = "with cooperating writers"
    #: A writer lets in other such writers, and readers that let in writers. A reader is as with EXCLUSIVE.
    COOPERATING = "cooperating"
    #: Everybody is let in, and nobody is asked.
    UNCHECKED = "unchecked"


#: The sharing of a disk that is served, by its mode.
SHARING_OF_MODE = {"r": Sharing.WITH_COOPERATING_WRITERS, "w": Sharing.EXCLUSIVE, "w!": Sharing.COOPERATING}

_READER = (Permission.CONSISTENT_READ,)
_WRITER = (Permission.CONSISTENT_READ, Permission.WRITE, Permission.RESIZE)
_CHANGES = (Permission.WRITE, Permission.RESIZE)

#: The permissions that a writer refuses to others.
_REFUSED_BY_WRITERS = {
    Sharing.EXCLUSIVE: _CHANGES,
    Sharing.WITH_COOPERATING_WRITERS: _CHANGES,
    Sharing.COOPERATING: (),
    Sharing.UNCHECKED: (),
}
#: The same of a reader. One that lets writers in refuses resizing, which every exclusive writer asks for.
_REFUSED_BY_READERS = {
    Sharing.EXCLUSIVE: _CHANGES,
    Sharing.WITH_COOPERATING_WRITERS: (Permission.RESIZE,),
    Sharing.COOPERATING: _CHANGES,
    Sharing.UNCHECKED: (),
}


def lock_image(descriptor: int, path: str, *, writable: bool, sharing: Sharing = Sharing.EXCLUSIVE) -> None:
    """Lock an open host file until its last descriptor is closed.

    A reader refuses writers, a writer refuses other writers and whoever refuses writers, unless
    `sharing` says otherwise. Raises ImageError(locked) that names the holder.

    A host that has no locks is used without. A host that has locks but gives none now (ENOLCK: on NFS the lock manager
    is down) is different, because others may hold a lock there: a writer is refused with ImageError(io), and a
    reader goes on with a warning (RuntimeWarning).
    """
    has = _WRITER if writable else _READER
    refuses = (_REFUSED_BY_WRITERS if writable else _REFUSED_BY_READERS)[sharing]
    mine = [_HAS_BASE + p for p in has] + [_REFUSES_BASE + p for p in refuses]
    try:
        for byte in mine:
            _set(descriptor, fcntl.F_RDLCK, byte)
        taken = _conflict(descriptor, has, refuses, sharing)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return
        if error.errno == errno.ENOLCK:
            _do_without(path, writable=writable, sharing=sharing)
            return
        raise from_os_error(error, path=path, op="lock the image") from error
    if taken is not None:
        for byte in mine:
            _set(descriptor, fcntl.F_UNLCK, byte)
        use = "written" if taken < _REFUSES_BASE else "used"
        raise ImageError(
            ErrorKind.LOCKED,
            f"is being {use} by {_name_holders(descriptor, taken)}",
            path=path,
            op="lock",
            remedy="end that use, or say {force_share} to look all the same" if not writable else "end that use first",
        )


def _do_without(path: str, *, writable: bool, sharing: Sharing) -> None:
    """Go on where the host gives no lock although it has some; raise ImageError(io) for a writer."""
    what = "cannot be locked now: the lock manager of its host does not answer, or has no lock left"
    if writable:
        raise ImageError(
            ErrorKind.IO,
            what,
            path=path,
            op="lock",
            remedy="start it (rpc.statd for NFS), or mount the host file system with local_lock=all where only this "
            "machine writes to it",
        )
    if sharing is not Sharing.UNCHECKED:
        warnings.warn(
            f"{path!r} {what}; what is read is senseless if another writes to it", RuntimeWarning, stacklevel=2
        )


def _conflict(
    descriptor: int, has: Sequence[Permission], refuses: Sequence[Permission], sharing: Sharing
) -> int | None:
    """A byte that another holds against this use, if there is one."""
    match sharing:
        case Sharing.UNCHECKED:
            return None
        case Sharing.WITH_COOPERATING_WRITERS if Permission.WRITE not in has:
            # Whoever writes and refuses writers wants it alone.
            writes, wants_it_alone = _HAS_BASE + Permission.WRITE, _REFUSES_BASE + Permission.WRITE
            both = _held_by_another(descriptor, writes) and _held_by_another(descriptor, wants_it_alone)
            return writes if both else None
        case Sharing.COOPERATING if Permission.WRITE in has:
            refuses_writers = _REFUSES_BASE + Permission.WRITE
            return refuses_writers if _held_by_another(descriptor, refuses_writers) else None
        case _:
            against = [_REFUSES_BASE + p for p in has] + [_HAS_BASE + p for p in refuses]
            return next((byte for byte in against if _held_by_another(descriptor, byte)), None)


def mark_requests(descriptor: int, path: str, request_owner: int, *, already_open: bool) -> None:
    """Mark an open host file as one that requests of `request_owner` (a number below 2**61) go to.

    The kernel goes on with direct requests of a process that was killed, and as long as it does they keep their open
    file and this mark. Raises ImageError(locked) while it does, unless `already_open` says that the marks are our own.
    """
    byte = _REQUESTS_BASE + request_owner
    try:
        late = not already_open and _held_by_another(descriptor, byte)
        if not late:
            _set(descriptor, fcntl.F_RDLCK, byte)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return
        raise from_os_error(error, path=path, op="lock the image") from error
    if late:
        raise ImageError(
            ErrorKind.LOCKED,
            "is still being used by requests of the process that served the disk before",
            path=path,
            op="lock",
            remedy="wait until the host has finished them",
        )


def refuse_other_writers(descriptor: int, path: str) -> None:
    """Raise ImageError(locked) if another has the file open for writing, as sharers may."""
    writes = _HAS_BASE + Permission.WRITE
    try:
        taken = _held_by_another(descriptor, writes)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return
        raise from_os_error(error, path=path, op="look for other writers") from error
    if taken:
        raise ImageError(
            ErrorKind.LOCKED,
            f"is being written by {_name_holders(descriptor, writes)}, too",
            path=path,
            op="lock",
            remedy="end that use first",
        )


def is_written(descriptor: int) -> bool:
    """Whether another has the file open for writing, as far as the host tells: who reads without a lock asks so."""
    try:
        return _held_by_another(descriptor, _HAS_BASE + Permission.WRITE)
    except OSError:
        return False


def only_read_from_now_on(descriptor: int) -> None:
    """Let others read (and back up) what this open file, locked by a writer, will not write any more."""
    for permission in _CHANGES:
        with suppress(OSError):  # a host without such locks
            _set(descriptor, fcntl.F_UNLCK, _HAS_BASE + permission)


def refuse_writers(descriptor: int, *, refused: bool) -> None:
    """Have the lock of an open file refuse writers, or let them in: for who opens the file once more, to write it."""
    for permission in _CHANGES:
        with suppress(OSError):  # a host without such locks
            _set(descriptor, fcntl.F_RDLCK if refused else fcntl.F_UNLCK, _REFUSES_BASE + permission)


def refuse_as(descriptor: int, *, writable: bool, sharing: Sharing) -> None:
    """Have the lock of an open file refuse what such a use of it refuses, and no more."""
    refused = (_REFUSED_BY_WRITERS if writable else _REFUSED_BY_READERS)[sharing]
    for permission in _CHANGES:
        with suppress(OSError):  # a host without such locks
            _set(descriptor, fcntl.F_RDLCK if permission in refused else fcntl.F_UNLCK, _REFUSES_BASE + permission)


def _set(descriptor: int, kind: int, byte: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_by_another(descriptor: int, byte: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
    return bool(kind != fcntl.F_UNLCK)


def _name_holders(descriptor: int, byte: int) -> str:
    """Who holds a lock on `byte`: the kernel does not say it for such locks, /proc does."""
    names = [_name_holder(pid) for pid in lock_holders(descriptor, byte)]
    if names:
        return ", ".join(names)
    from tapfs.host.sandbox.confinement import is_entered  # most files are not held

    # Which files another process has open is not for a process in the sandbox to know.
    return "another process" if is_entered() else "another process (of another user or machine)"


def lock_holders(descriptor: int, byte: int) -> Iterator[int]:
    """The processes that hold an open-file-description lock on `byte` of this file."""
    from pathlib import Path  # who gets the lock never comes here

    status = os.fstat(descriptor)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    me = os.getpid()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        pid = int(process.name)
        try:
            entries = sorted((process / "fdinfo").iterdir())
        except OSError:
            continue  # ended meanwhile, or not ours to see
        own = process / "fdinfo" / str(descriptor) if pid == me else None
        if any(entry != own and _locks_byte(entry, place, byte) for entry in entries):
            yield pid


def _locks_byte(entry: Path, place: str, byte: int) -> bool:
    try:
        lines = entry.read_text().splitlines()
    except OSError:
        return False
    return any(_line_locks(line.split(), place, byte) for line in lines if line.startswith("lock:"))


def _line_locks(words: Iterable[str], place: str, byte: int) -> bool:
    """Whether a line ``lock: 1: OFDLCK ADVISORY READ -1 fd:01:1234 100 100`` covers `byte`."""
    fields = list(words)
    if "OFDLCK" not in fields or place not in fields:
        return False
    at = fields.index(place)
    end = fields[at + 2]
    return int(fields[at + 1]) <= byte and (end == "EOF" or byte <= int(end))


def _name_holder(pid: int) -> str:
    if pid == os.getpid():
        return f"process {pid} (this one, which has it open already)"
    return f"process {pid} ({_command(pid)})"


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return "ended"
