"""The sandbox of a program of another package, and the mounting that its supervisor does in its place.

The kernel takes mounting from whoever is in a sandbox. So mount(2) of the program stops, and is told to its supervisor
(seccomp_unotify(2), Linux 5.9), which mounts what it knows is to be mounted. The supervisor then puts the connection
in the place of the descriptor that the program has opened.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from tapfs.host.sandbox import calls, capabilities, rules
from tapfs.host.sandbox.confinement import DATA_BYTES, SYSTEM
from tapfs.host.sandbox.filter import Calls, can_tell, install_told

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
#: A program looks at the system and at itself there, and at no other process.
_PROCESS = ("/proc/self", "/proc/filesystems", "/proc/mounts", "/proc/sys/vm", "/proc/sys/kernel")

#: struct seccomp_notif: id, thread, flags, then number, architecture, place and arguments of the call; its answer: id,
#: result, error, flags; and a descriptor to be put into the program: id, flags, ours, theirs, its flags.
_TOLD = struct.Struct("=QII iIQ 6Q")
_ANSWER = struct.Struct("=Qqii")
_DESCRIPTOR = struct.Struct("=QIIII")
_RECEIVE, _SEND, _VALID, _ADD = 0xC0502100, 0xC0182101, 0x40082102, 0x40182103
_IN_PLACE = 1

_PAGE = 4096


class MountCall(NamedTuple):
    """A mount(2) that a thread of a program waits in: the kind of file system, and the words of its `data`."""

    id: int
    kind: str
    data: str


def is_possible() -> bool:
    """Whether the kernel has what this takes, Landlock (Linux 5.13) and the telling of calls."""
    return rules.version() > 0 and can_tell()


def enter(folder: str, readable: Iterable[str], writable: Iterable[str]) -> int:
    """Give up all but these files, in a process that is about to become a program of the folder; where calls are told.

    The process ends with its parent. Raises OSError.
    """
    calls.end_with_parent()
    for what, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_DATA, DATA_BYTES)):
        with suppress(ValueError, OSError):
            resource.setrlimit(what, (value, value))
    capabilities.keep_only(())
    calls.forbid_new_privileges()
    system = [folder, *(path for path in SYSTEM if path != "/proc")]
    allowed = [rules.Rule(path, rules.READING | rules.EXECUTE) for path in system]
    allowed += [rules.Rule(path, rules.READING) for path in (*_PROCESS, *readable)]
    allowed += [rules.Rule(path, rules.WRITING) for path in (*_DEVICES, *writable)]
    listener = install_told(Calls(becomes=True, identities=True))
    rules.restrict(allowed)
    return listener


def told(listener: int) -> MountCall | None:
    """The next call of the program; None: it was given up meanwhile."""
    message = bytearray(_TOLD.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, message)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    number, thread, _, _, _, _, _, _, kind, _, data, _ = _TOLD.unpack(message)
    try:
        with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
            call = MountCall(number, _text(memory.fileno(), kind), _text(memory.fileno(), data))
        fcntl.ioctl(listener, _VALID, struct.pack("=Q", number))  # else the memory was that of another thread
    except OSError:
        refuse(listener, number, errno.EFAULT)
        return None
    return call


def accept(listener: int, call: MountCall, ours: int, theirs: int) -> None:
    """Put our descriptor in the place of the program's, and have its call succeed."""
    with suppress(OSError):
        fcntl.ioctl(listener, _ADD, _DESCRIPTOR.pack(call.id, _IN_PLACE, ours, theirs, os.O_CLOEXEC))
        fcntl.ioctl(listener, _SEND, _ANSWER.pack(call.id, 0, 0, 0))


def refuse(listener: int, number: int, error: int) -> None:
    """Have the call of this number fail."""
    with suppress(OSError):
        fcntl.ioctl(listener, _SEND, _ANSWER.pack(number, 0, -error, 0))


def _text(memory: int, at: int) -> str:
    """A string in the memory of another process, of at most a page."""
    found = b""
    while at and b"\0" not in found and len(found) < _PAGE:
        piece = os.pread(memory, _PAGE - at % _PAGE, at)
        if not piece:
            break
        found += piece
        at += len(piece)
    return found.partition(b"\0")[0].decode(errors="surrogateescape")
