"""Landlock: the files that a process may read, write and make from now on, and the processes that it may signal."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable
from functools import cache

from tapfs.host.sandbox import calls
from tapfs.records import NamedTuple

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (
    1 << bit for bit in range(4, 13)
)
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

#: Rights that a rule about a file has; those about a folder have all.
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

READING = READ_FILE | READ_DIR
#: In place: the file itself, a block device as well.
WRITING = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV
#: New files, folders and sockets in a folder, and the exchange of names.
MAKING = READING | WRITE_FILE | TRUNCATE | REMOVE_FILE | MAKE_REG | MAKE_DIR | MAKE_SYM | MAKE_SOCK | REFER

_EVERYTHING = (1 << 16) - 1
_BIND_TCP, _CONNECT_TCP = 1, 2
_ABSTRACT_SOCKETS, _SIGNALS = 1, 2

_CREATE_VERSION = 1
_PATH_BENEATH = 1

#: The first version of Landlock that knows what is given here, and what it is called where the kernel lacks that.
_MISSING_BELOW = ((1, "files"), (3, "truncation"), (4, "TCP"), (5, "devices"), (6, "signals"))


#: Errors of opening that say nothing of the place.
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Rule(NamedTuple):
    """What may be done with a file, or with all that lies in and below a folder."""

    path: str
    access: int


@cache
def version() -> int:
    """The version of Landlock that the kernel has; 0: none, or it is switched off."""
    try:
        return calls.call(calls.LANDLOCK_CREATE_RULESET, None, 0, _CREATE_VERSION)
    except OSError:
        return 0


def missing() -> list[str]:
    """What the kernel's Landlock cannot limit."""
    return [name for least, name in _MISSING_BELOW if version() < least]


def restrict(rules: Iterable[Rule], *, unlimited: int = 0, network: bool = False, signals: bool = False) -> bool:
    """Allow this thread, and what it starts, no more than the rules; whether the kernel did it.

    `unlimited` are rights that stay as they are; `network`: so does TCP, `signals`: so do signals to others. What does
    not exist is left out. Raises OSError where the kernel has Landlock and refuses it.
    """
    known = version()
    if known == 0:
        return False
    handled = _known_rights(known) & ~unlimited
    tcp = 0 if network or known < 4 else _BIND_TCP | _CONNECT_TCP
    scoped = 0 if known < 6 else _ABSTRACT_SOCKETS * (not network) | _SIGNALS * (not signals)
    attributes = struct.pack("QQQ", handled, tcp, scoped)[: 8 if known < 4 else 16 if known < 6 else 24]
    ruleset = calls.call(calls.LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for rule in rules:
            _add(ruleset, rule, handled)
        calls.call(calls.LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return True


def _add(ruleset: int, rule: Rule, handled: int) -> None:
    try:
        place = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
    except ValueError:
        return
    except OSError as error:
        if error.errno in _NO_DESCRIPTOR:  # without the rule the process would be refused what it needs
            raise
        return
    try:
        access = rule.access & handled
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            access &= _OF_FILES
        if access:
            calls.call(calls.LANDLOCK_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", access, place), 0)
    except OSError as error:
        if error.errno != errno.EBADFD:  # a pipe or a socket, which has no place in a file system and so no rule
            raise
    finally:
        os.close(place)


def _known_rights(known: int) -> int:
    count = 13 if known < 2 else 14 if known < 3 else 15 if known < 5 else 16
    return _EVERYTHING & ((1 << count) - 1)
