"""Seccomp: the filter of system calls for all threads of a process, made for what its door needs."""

from __future__ import annotations

import errno
import os
import struct

from tapfs.host.sandbox import calls
from tapfs.host.sandbox.system_calls import (
    FORKS,
    IDENTITIES,
    LAST_KNOWN,
    NEVER,
    PROGRAMS,
    SOCKETS,
    number_of,
    numbers_of,
)
from tapfs.records import NamedTuple

_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_NOT_LESS, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_KILL, _REFUSE, _TELL, _ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000

#: Places in the kernel's `struct seccomp_data`; of an argument the lower half, both architectures are little-endian.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

#: Calls of x32, which would pass a filter that compares numbers.
_X32 = 0x40000000

_CLONE_THREAD = 0x10000
_AF_UNIX = 1
#: Words typed into the user's terminal.
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_GET_SIZES = 3
_SET_MODE_FILTER, _ALL_THREADS, _NEW_LISTENER = 1, 1, 8


class Calls(NamedTuple):
    """Groups of system calls that a door needs.

    `programs`: start some. `forks`: make processes. `becomes`: become another program, in this process. `identities`:
    take other users' and groups' numbers, as far as the capabilities go; whoever gives up groups has none that count,
    and is told that it was done. `network`: sockets of every kind. `listens`: Unix sockets that others connect to.
    `connects`: connections to Unix sockets. `rings`: io_uring.
    """

    programs: bool = False
    forks: bool = False
    becomes: bool = False
    identities: bool = False
    network: bool = False
    listens: bool = False
    connects: bool = False
    rings: bool = False


def install(wanted: Calls) -> bool:
    """Filter the calls of every thread from now on; whether the kernel does it. Needs `no_new_privs` or root."""
    machine = calls.architecture()
    if machine is None:
        return False
    try:
        # A positive answer names a thread that has a filter which ours is no continuation of.
        return _set(program_for(wanted, machine), machine, _ALL_THREADS) == 0
    except OSError:
        return False


def can_tell() -> bool:
    """Whether the kernel tells calls to who listens (Linux 5.0)."""
    machine = calls.architecture()
    if machine is None:
        return False
    try:
        return calls.call(machine.seccomp, _GET_SIZES, 0, bytes(6)) == 0
    except OSError:
        return False


def install_told(wanted: Calls) -> int:
    """Filter the calls of this thread; a descriptor by which each mount(2) is told, which waits until it is answered.

    Raises OSError, and nothing is filtered then.
    """
    machine = calls.architecture()
    if machine is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return _set(program_for(wanted, machine, told=("mount",)), machine, _NEW_LISTENER)


def _set(program: bytes, machine: calls.Architecture, flags: int) -> int:
    kept = calls.kept_memory(program)
    header = struct.pack("HxxxxxxQ", len(program) // 8, calls.address_of(kept))
    return calls.call(machine.seccomp, _SET_MODE_FILTER, flags, header)


def program_for(wanted: Calls, machine: calls.Architecture, told: tuple[str, ...] = ()) -> bytes:
    """The filter as the kernel takes it; calls that are `told` wait for who listens."""
    made = _Program()
    made.load(_ARCHITECTURE)
    made.unless_equal(machine.audit, _KILL)
    made.load(_NUMBER)
    if machine.name == "x86_64":
        made.if_at_least(_X32, _REFUSE | errno.ENOSYS)
    made.if_greater(LAST_KNOWN, _REFUSE | errno.ENOSYS)
    refused = [*NEVER]
    if not (wanted.programs or wanted.becomes):
        refused += PROGRAMS
    if not (wanted.programs or wanted.forks):
        refused += FORKS
    if not (wanted.network or wanted.listens):
        refused += SOCKETS
    if not (wanted.network or wanted.connects):
        refused.append("connect")
    if not (wanted.network or wanted.listens or wanted.connects):
        refused.append("socket")
    if not wanted.rings:
        refused.append("io_uring_setup")
    if wanted.identities:
        refused = [name for name in refused if name not in IDENTITIES]
        made.if_equal(_required("setgroups", machine), _REFUSE)
    for name in told:
        made.if_equal(_required(name, machine), _TELL)
    for number in sorted(set(numbers_of(refused, machine.name))):
        made.if_equal(number, _REFUSE | errno.EPERM)
    if not (wanted.programs or wanted.forks):
        # Its flags lie in memory, which a filter cannot see. The C library takes clone instead.
        made.if_equal(_required("clone3", machine), _REFUSE | errno.ENOSYS)
        clone = made.argument_of(_required("clone", machine), 0)
        clone.unless_bits(_CLONE_THREAD, _REFUSE | errno.EPERM)
        clone.end()
    if not wanted.network and (wanted.listens or wanted.connects):
        socket = made.argument_of(_required("socket", machine), 0)
        socket.unless_equal(_AF_UNIX, _REFUSE | errno.EPERM)
        socket.end()
    typed = made.argument_of(_required("ioctl", machine), 1)
    typed.if_equal(_TIOCSTI, _REFUSE | errno.EPERM)
    typed.if_equal(_TIOCLINUX, _REFUSE | errno.EPERM)
    typed.end()
    limited = made.argument_of(_required("prlimit64", machine), 0)
    limited.unless_equal(0, _REFUSE | errno.EPERM)
    limited.end()
    made.give(_ALLOW)
    return made.bytes


def _required(name: str, machine: calls.Architecture) -> int:
    number = number_of(name, machine.name)
    if number is None:
        raise AssertionError(name)
    return number


class _Program:
    """A filter that is being written, instruction by instruction."""

    def __init__(self) -> None:
        self.bytes = b""

    def _add(self, code: int, value: int, *, yes: int = 0, no: int = 0) -> _Program:
        self.bytes += struct.pack("HBBI", code, yes, no, value)
        return self

    def load(self, place: int) -> _Program:
        return self._add(_LOAD, place)

    def give(self, answer: int) -> _Program:
        return self._add(_RETURN, answer)

    def if_equal(self, value: int, answer: int) -> _Program:
        return self._add(_JUMP_EQUAL, value, no=1).give(answer)

    def unless_equal(self, value: int, answer: int) -> _Program:
        return self._add(_JUMP_EQUAL, value, yes=1).give(answer)

    def unless_bits(self, bits: int, answer: int) -> _Program:
        return self._add(_JUMP_BITS, bits, yes=1).give(answer)

    def if_greater(self, value: int, answer: int) -> _Program:
        return self._add(_JUMP_GREATER, value, no=1).give(answer)

    def if_at_least(self, value: int, answer: int) -> _Program:
        return self._add(_JUMP_NOT_LESS, value, no=1).give(answer)

    def argument_of(self, number: int, place: int) -> _Argument:
        """What follows looks at an argument of the call `number`, whose number is loaded again by `end`."""
        return _Argument(self, number, place)


class _Argument(_Program):
    """The part of a filter that looks at one argument of one call."""

    def __init__(self, whole: _Program, number: int, place: int) -> None:
        super().__init__()
        self._whole, self._number = whole, number
        self.load(_ARGUMENTS + 8 * place)

    def end(self) -> None:
        """Put it into the whole, to be skipped by every other call. What is left of the call is allowed."""
        self.give(_ALLOW)
        self._whole._add(_JUMP_EQUAL, self._number, no=len(self.bytes) // 8)  # noqa: SLF001  a part of the same
        self._whole.bytes += self.bytes
