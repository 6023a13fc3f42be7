"""A host whose files lack something: run a program so that these calls of it fail, as they do on other file systems.

usage: refusing_host.py HOST PROGRAM [WORD…]. A seccomp filter refuses the calls of the program and of those that it
starts. `HOSTS` says what each host lacks. Only x86_64 is known here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from typing import NamedTuple


class Refused(NamedTuple):
    """Calls of a number that fail: those whose argument `which`, under a mask, is not or is a value; or all of them.

    `unless`: of calls with the argument under the mask those fail that have another value.
    """

    number: int
    error: int
    which: int = -1
    mask: int = 0xFFFFFFFF
    value: int = 0
    unless: bool = True


_NAMES = (
    "openat 257 fallocate 285 fcntl 72 flock 73 mmap 9 lseek 8 ioctl 16 linkat 265 link 86 renameat2 316 fadvise64 221"
    " copy_file_range 326 preadv2 327 pwritev2 328 io_uring_setup 425 fchmod 91 fchown 93 fsetxattr 190 fgetxattr 193"
    " sync_file_range 277 fchownat 260 fchmodat 268 getxattr 191 setxattr 188"
)
_NUMBERS = dict(zip(_NAMES.split()[::2], map(int, _NAMES.split()[1::2]), strict=True))


def _all(name: str, error: int) -> Refused:
    return Refused(_NUMBERS[name], error)


def _with(name: str, error: int, which: int, bits: int) -> Refused:
    """Calls that have one of the bits in an argument."""
    return Refused(_NUMBERS[name], error, which, bits)


def _equal(name: str, error: int, which: int, value: int, mask: int = 0xFFFFFFFF) -> Refused:
    return Refused(_NUMBERS[name], error, which, mask, value, unless=False)


_OFD_LOCKS = (36, 37, 38)
_OF_OWNERS = ("fchown", "fchownat", "fchmod", "fchmodat", "fsetxattr", "setxattr")
_TMPFILE, _DIRECT = 0x400000, 0x4000
_PUNCH, _ZERO_RANGE = 2, 16
_FICLONE, _FICLONERANGE = 0x40049409, 0x4020940D
_NOWAIT = 8

HOSTS: dict[str, tuple[Refused, ...]] = {
    "no-punch": (_with("fallocate", errno.EOPNOTSUPP, 1, _PUNCH | _ZERO_RANGE),),
    "no-fallocate": (_all("fallocate", errno.EOPNOTSUPP),),
    "no-tmpfile": (_with("openat", errno.EOPNOTSUPP, 2, _TMPFILE),),
    "no-locks": (
        *(_equal("fcntl", errno.EINVAL, 1, each) for each in _OFD_LOCKS),
        _all("flock", errno.EOPNOTSUPP),
    ),
    "no-mmap": (_equal("mmap", errno.ENODEV, 3, 1, 0x2F), _equal("mmap", errno.ENODEV, 3, 3, 0x2F)),
    "no-holes": (_equal("lseek", errno.EINVAL, 2, 3), _equal("lseek", errno.EINVAL, 2, 4)),
    # No file system has files without names, and cannot name them.
    "no-links": (
        _all("linkat", errno.EPERM),
        _all("link", errno.EPERM),
        _with("openat", errno.EOPNOTSUPP, 2, _TMPFILE),
    ),
    "no-exchange": (_all("renameat2", errno.EINVAL),),
    "no-copies": (
        _all("copy_file_range", errno.EXDEV),
        _equal("ioctl", errno.EOPNOTSUPP, 1, _FICLONE),
        _equal("ioctl", errno.EOPNOTSUPP, 1, _FICLONERANGE),
    ),
    "no-waiting": (_with("preadv2", errno.EOPNOTSUPP, 5, _NOWAIT), _with("pwritev2", errno.EOPNOTSUPP, 5, _NOWAIT)),
    "no-rings": (_all("io_uring_setup", errno.ENOSYS),),
    "no-direct": (_with("openat", errno.EINVAL, 2, _DIRECT),),
    "no-owners": tuple(
        _all(name, errno.EPERM) for name in ("fchown", "fchownat", "fchmod", "fchmodat", "fsetxattr", "setxattr")
    ),
    "no-attributes": (_all("fgetxattr", errno.EOPNOTSUPP), _all("getxattr", errno.EOPNOTSUPP)),
    "no-advice": (_all("fadvise64", errno.ENOSYS), _all("sync_file_range", errno.ENOSYS)),
}
#: A network file system of the poor: none of it.
HOSTS["nothing"] = tuple(refused for refusals in HOSTS.values() for refused in refusals)

_LOAD, _AND, _JUMP_EQUAL, _JUMP_BITS, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_ARGUMENTS = 16
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2


def program(refusals: tuple[Refused, ...]) -> bytes:
    """The filter as the kernel takes it."""
    made: list[tuple[int, int, int, int]] = []
    for refused in refusals:
        answer = (_RETURN, 0, 0, _ERRNO | refused.error)
        if refused.which < 0:
            body = [answer]
        else:
            load = (_LOAD, 0, 0, _ARGUMENTS + 8 * refused.which)
            if refused.unless:
                body = [load, (_JUMP_BITS, 0, 1, refused.mask), answer]
            else:
                body = [load, (_AND, 0, 0, refused.mask), (_JUMP_EQUAL, 0, 1, refused.value), answer]
        made += [(_LOAD, 0, 0, 0), (_JUMP_EQUAL, 0, len(body), refused.number), *body]
    return b"".join(struct.pack("HBBI", *each) for each in [*made, (_RETURN, 0, 0, _ALLOW)])


def refuse(host: str) -> None:
    """From now on this process is on the host. Raises OSError."""
    code = program(HOSTS[host])
    kept = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(kept))
    library = ctypes.CDLL(None, use_errno=True)
    for words in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, ctypes.create_string_buffer(header, 16))):
        if library.prctl(*words) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    refuse(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606  the program that it is about
