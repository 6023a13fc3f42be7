"""System calls of the sandbox that neither Python nor the C library has, by their numbers."""

from __future__ import annotations

import ctypes
import os
from functools import cache

from tapfs.records import NamedTuple


class Architecture(NamedTuple):
    """A processor whose system calls the sandbox knows; `audit` is its name in a seccomp filter."""

    name: str
    audit: int
    seccomp: int
    capset: int


_KNOWN = {
    "x86_64": Architecture("x86_64", 0xC000003E, seccomp=317, capset=126),
    "aarch64": Architecture("aarch64", 0xC00000B7, seccomp=277, capset=91),
}

#: The same on every architecture, as all calls of Linux 5.1 and later.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4


@cache
def architecture() -> Architecture | None:
    """This machine's; None where the sandbox does not know its system calls (a 32-bit program, too)."""
    return _KNOWN.get(os.uname().machine) if ctypes.sizeof(ctypes.c_void_p) == 8 else None


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


def call(number: int, *arguments: int | bytes | None) -> int:
    """The result of a system call; memory is given as bytes. Raises OSError."""
    given = [each if isinstance(each, bytes) else ctypes.c_long(each or 0) for each in arguments]
    result: int = _library().syscall(ctypes.c_long(number), *given)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _prctl(*arguments: int) -> bool:
    """Whether prctl(2) did it."""
    given = [ctypes.c_ulong(each) for each in (*arguments, 0, 0, 0, 0)[:5]]
    return bool(_library().prctl(*given) == 0)


def forbid_new_privileges() -> bool:
    """Whether programs that this process starts get no set-user-ID rights from now on."""
    return _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def end_with_parent() -> None:
    """Have the kernel kill this process, also as another program, when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def drop_from_bounding_set(capability: int) -> bool:
    """Whether no program that is started can get the capability any more."""
    return _prctl(_PR_CAPBSET_DROP, capability)


def clear_ambient_capabilities() -> None:
    """Have no capability pass to a program of an ordinary user."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def address_of(memory: ctypes.Array[ctypes.c_char]) -> int:
    """The address of memory that a structure for the kernel points at."""
    return ctypes.addressof(memory)


def kept_memory(data: bytes) -> ctypes.Array[ctypes.c_char]:
    """A copy of the bytes that stays where it is."""
    return ctypes.create_string_buffer(data, len(data))
