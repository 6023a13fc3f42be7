"""The messages of the vhost-user protocol as bytes and as values: docs/specs/vhost-user.md, "Messages".

Numbers are in the byte order of the machine. What does not have the form of its type raises :class:`MalformedError`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import NamedTuple

from tapfs.kernel.vhost_device import Region

#: The header of a message: what it asks for, flags, bytes of the payload.
HEADER = struct.Struct("=III")

#: The longest payload, and the most descriptors with a message, that any message of a front end has.
MAX_PAYLOAD = 4096
MAX_DESCRIPTORS = 16

_VERSION = 1
_VERSION_MASK = 3
_REPLY = 4
_NEED_REPLY = 8

_NUMBER = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDRESSES = struct.Struct("=IIQQQQ")
_REGIONS = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")
_CONFIGURATION = struct.Struct("=III")
_INFLIGHT = struct.Struct("=QQHH")
_LOG = struct.Struct("=QQ")

#: Regions of a table that comes in one message.
_TABLE_REGIONS = 8

#: The lengths that an in-flight description has: with and without the padding of a C structure.
_INFLIGHT_LENGTHS = (_INFLIGHT.size, _INFLIGHT.size + 4)

#: Bits 0 to 7 of a number that comes with an eventfd are a ring's index; bit 8 says that there is none.
_INDEX = 0xFF
_NO_DESCRIPTOR = 0x100


class MalformedError(ValueError):
    """A message does not have the form that its type has."""


class Kind(IntEnum):
    """What a front end asks for."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class Protocol(IntFlag):
    """The extensions of the protocol that we know."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15


class Header(NamedTuple):
    """What stands before a payload of `length` bytes."""

    kind: int
    need_reply: bool
    length: int


class State(NamedTuple):
    """A number for a ring."""

    ring: int
    number: int


class Addresses(NamedTuple):
    """Where the parts of a ring are, in the front end's memory."""

    ring: int
    flags: int
    descriptors: int
    used: int
    available: int
    #: Of the used ring in the guest, for the log.
    used_in_guest: int

    @property
    def logged(self) -> bool:
        """Whether writes into the used ring are noted in the log."""
        return bool(self.flags & 1)


class Signal(NamedTuple):
    """An eventfd for a ring comes with the message, or there is to be none."""

    ring: int
    present: bool


class Access(NamedTuple):
    """A part of the device's configuration space."""

    offset: int
    length: int
    flags: int
    data: bytes


class Inflight(NamedTuple):
    """An in-flight region: its bytes and its offset in its file, the rings that it is for and the entries of each."""

    size: int
    offset: int
    rings: int
    entries: int


class LogPlace(NamedTuple):
    """The log of a migration: its bytes and its offset in its file."""

    size: int
    offset: int


Payload = int | State | Addresses | Signal | Access | Inflight | LogPlace | Region | tuple[Region, ...] | None

_NOTHING = {
    *(Kind.GET_FEATURES, Kind.SET_OWNER, Kind.RESET_OWNER, Kind.GET_PROTOCOL_FEATURES, Kind.GET_QUEUE_NUM),
    *(Kind.SET_BACKEND_REQ_FD, Kind.RESET_DEVICE, Kind.GET_MAX_MEM_SLOTS),
}
_NUMBERS = {Kind.SET_FEATURES, Kind.SET_PROTOCOL_FEATURES}
_STATES = {Kind.SET_VRING_NUM, Kind.SET_VRING_BASE, Kind.GET_VRING_BASE, Kind.SET_VRING_ENABLE}
_SIGNALS = {Kind.SET_VRING_KICK, Kind.SET_VRING_CALL, Kind.SET_VRING_ERR}


def read_header(data: bytes) -> Header:
    """The header of a message of a front end, 12 bytes."""
    kind, flags, length = HEADER.unpack(data)
    if flags & _VERSION_MASK != _VERSION:
        raise MalformedError(f"version {flags & _VERSION_MASK} of the protocol is not known")
    if length > MAX_PAYLOAD:
        raise MalformedError(f"a message of {length} bytes is too long")
    return Header(kind, bool(flags & _NEED_REPLY), length)


def read_payload(kind: Kind, data: bytes) -> Payload:
    """What a message says."""
    try:
        if kind in _NOTHING:
            # Some front ends send a number that nobody asked for.
            return None
        if kind in _NUMBERS:
            (number,) = _NUMBER.unpack(data)
            return int(number)
        if kind in _STATES:
            return State._make(_STATE.unpack(data))
        if kind in _SIGNALS:
            (number,) = _NUMBER.unpack(data)
            return Signal(number & _INDEX, not number & _NO_DESCRIPTOR)
        return _READERS[kind](data)
    except struct.error as error:
        raise MalformedError(f"{kind.name} has {len(data)} bytes") from error


def _addresses(data: bytes) -> Addresses:
    return Addresses._make(_ADDRESSES.unpack(data))


def _table(data: bytes) -> tuple[Region, ...]:
    count, _ = _REGIONS.unpack_from(data)
    if count > _TABLE_REGIONS:
        raise MalformedError(f"a memory table has {count} regions")
    # Some front ends send room for regions that there are not.
    return tuple(_region(data, _REGIONS.size + i * _REGION.size) for i in range(count))


def _region(data: bytes, at: int) -> Region:
    guest, size, user, offset = _REGION.unpack_from(data, at)
    return Region(guest, user, size, offset)


def _single_region(data: bytes) -> Region:
    return _region(data, _NUMBER.size)


def _access(data: bytes) -> Access:
    offset, length, flags = _CONFIGURATION.unpack_from(data)
    rest = data[_CONFIGURATION.size :]
    if length > len(rest):
        raise MalformedError(f"{length} bytes of the configuration come in {len(rest)}")
    return Access(offset, length, flags, rest[:length])


def _inflight(data: bytes) -> Inflight:
    if len(data) not in _INFLIGHT_LENGTHS:
        raise MalformedError(f"an in-flight description has {len(data)} bytes")
    return Inflight._make(_INFLIGHT.unpack_from(data))


def _log_place(data: bytes) -> LogPlace:
    return LogPlace._make(_LOG.unpack(data))


_READERS: dict[Kind, Callable[[bytes], Payload]] = {
    Kind.SET_MEM_TABLE: _table,
    Kind.SET_LOG_BASE: _log_place,
    Kind.SET_VRING_ADDR: _addresses,
    Kind.GET_CONFIG: _access,
    Kind.SET_CONFIG: _access,
    Kind.GET_INFLIGHT_FD: _inflight,
    Kind.SET_INFLIGHT_FD: _inflight,
    Kind.ADD_MEM_REG: _single_region,
    Kind.REM_MEM_REG: _single_region,
}


def reply(kind: int, payload: bytes) -> bytes:
    """A message that answers one of the front end."""
    return HEADER.pack(kind, _VERSION | _REPLY, len(payload)) + payload


def number(value: int) -> bytes:
    """The payload that is a number."""
    return _NUMBER.pack(value)


def state(index: int, value: int) -> bytes:
    """The payload that is a number for a ring."""
    return _STATE.pack(index, value)


def configuration(access: Access, data: bytes) -> bytes:
    """The payload that is a part of the configuration space, as it was asked for."""
    return _CONFIGURATION.pack(access.offset, access.length, access.flags) + data


def inflight(region: Inflight, length: int) -> bytes:
    """The payload that describes an in-flight region, in as many bytes as it was asked for in."""
    return _INFLIGHT.pack(*region).ljust(length, b"\0")


#: A message to a front end, on a socket of its own: the configuration space has changed.
CONFIGURATION_CHANGED = HEADER.pack(2, _VERSION, 0)
