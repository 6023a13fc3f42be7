"""The messages of xenstore (xen/include/public/io/xs_wire.h, docs/misc/xenstore.txt): a header, then strings.

The header is four 32-bit numbers in the byte order of the machine: operation, request, transaction, and the
payload's length in bytes. A reply has the operation and the request of its question, or the operation ERROR and the
name of an errno; a watch event comes unasked.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

HEADER = struct.Struct("=IIII")

#: The longest payload of a message, in bytes. xenstored cuts off who sends more.
PAYLOAD_MAXIMUM = 4096
#: /dev/xen/xenbus takes a message with its header in that many bytes, so no message of ours has more.
MESSAGE_MAXIMUM = 4096
#: The longest path, in bytes.
PATH_MAXIMUM = 3072


class Operation(IntEnum):
    """What a message is."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMISSIONS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MAKE_DIRECTORY = 12
    REMOVE = 13
    SET_PERMISSIONS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESET_WATCHES = 21
    DIRECTORY_PART = 22


class Message(NamedTuple):
    """One message. `operation` may be a number that is no `Operation`."""

    operation: int
    request: int
    transaction: int
    payload: bytes

    def encode(self) -> bytes:
        """The bytes on the wire."""
        return HEADER.pack(self.operation, self.request, self.transaction, len(self.payload)) + self.payload


class ProtocolError(Exception):
    """The other end does not speak xenstore's protocol."""


class Assembler:
    """Makes messages of the pieces in which they arrive."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def feed(self, piece: bytes) -> Iterator[Message]:
        """The messages that are whole with this piece. Raises ProtocolError for a payload longer than there may be."""
        self._waiting += piece
        while len(self._waiting) >= HEADER.size:
            operation, request, transaction, length = HEADER.unpack_from(self._waiting)
            if length > PAYLOAD_MAXIMUM:
                raise ProtocolError(f"a message of {length} bytes")
            end = HEADER.size + length
            if len(self._waiting) < end:
                break
            payload = bytes(self._waiting[HEADER.size : end])
            del self._waiting[:end]
            yield Message(operation, request, transaction, payload)


def to_bytes(text: str) -> bytes:
    """A value as it is stored. Names of files that are no UTF-8 keep their bytes."""
    return text.encode(errors="surrogateescape")


def to_text(value: bytes) -> str:
    """A stored value as text: what a guest wrote may be any bytes."""
    return value.decode(errors="surrogateescape")


def join_strings(*strings: str) -> bytes:
    """A payload of strings, each ended by a NUL."""
    return b"".join(to_bytes(string) + b"\0" for string in strings)


def split_strings(payload: bytes) -> list[str]:
    """The strings of a payload; the NUL after the last may be missing."""
    return [to_text(string) for string in payload.removesuffix(b"\0").split(b"\0")] if payload else []


def errno_of(payload: bytes) -> int:
    """The errno that an ERROR names, EIO for one that this system does not have."""
    name = to_text(payload.partition(b"\0")[0])
    if name == "EQUOTA":  # oxenstored's own
        return errno.EDQUOT
    number = getattr(errno, name, None) if name[:1] == "E" else None
    return number if isinstance(number, int) else errno.EIO
