"""The messages of an NBD negotiation as bytes: numbers, options, replies. docs/specs/nbd.md has the protocol."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

#: The first words of the server: two magic numbers.
GREETING = b"NBDMAGIC" + b"IHAVEOPT"
OPTION_MAGIC = int.from_bytes(b"IHAVEOPT", "big")
REPLY_MAGIC = 0x0003E889045565A9

#: Zeros that an old client reads behind the answer to its EXPORT_NAME.
PADDING = bytes(124)

#: Of a name, in bytes, by the protocol.
MAX_STRING = 4096

_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_WORD = struct.Struct(">I")
_SHORT = struct.Struct(">H")
_EXPORT = struct.Struct(">HQH")
_BLOCK_SIZES = struct.Struct(">HIII")

OPTION_BYTES = _OPTION.size


class Handshake(IntFlag):
    """The flags that either side begins with."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client may ask for before it uses a disk."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """How the server answers an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_TOO_BIG = 0x80000009


class Info(IntEnum):
    """A piece of what there is to know of an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Transmission(IntFlag):
    """What a client may do with an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class MalformedError(ValueError):
    """The data of an option is not what the option has."""


class OptionHeader(NamedTuple):
    """An option that a client sends: its number, and the bytes of data that follow."""

    option: int
    length: int


def option_header(message: bytes) -> OptionHeader | None:
    """The header in `OPTION_BYTES` bytes; None: it is none."""
    magic, option, length = _OPTION.unpack(message)
    return OptionHeader(option, length) if magic == OPTION_MAGIC else None


def reply(option: int, kind: Reply, data: bytes = b"") -> bytes:
    """A whole reply."""
    return _REPLY.pack(REPLY_MAGIC, option, kind, len(data)) + data


def export_reply(size: int, flags: Transmission, *, padded: bool) -> bytes:
    """The answer to EXPORT_NAME."""
    return struct.pack(">QH", size, flags) + (PADDING if padded else b"")


def server_reply(name: str, description: str) -> bytes:
    """The data of a reply to LIST."""
    encoded = name.encode()
    return _WORD.pack(len(encoded)) + encoded + description.encode()


def export_info(size: int, flags: Transmission) -> bytes:
    """The data of a reply with the EXPORT information."""
    return _EXPORT.pack(Info.EXPORT, size, flags)


def text_info(info: Info, text: str) -> bytes:
    """The data of a reply with information that is text."""
    return _SHORT.pack(info) + text.encode()


def block_size_info(least: int, preferred: int, most: int) -> bytes:
    """The data of a reply with the BLOCK_SIZE information."""
    return _BLOCK_SIZES.pack(Info.BLOCK_SIZE, least, preferred, most)


def context_reply(number: int, name: str) -> bytes:
    """The data of a reply with a metadata context."""
    return _WORD.pack(number) + name.encode()


class Reader:
    """Reads the data of an option from its start. What is missing, or left over, raises MalformedError."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise MalformedError("the option is cut")
        self._at += length
        return self._data[self._at - length : self._at]

    def word(self) -> int:
        """Four bytes as a number."""
        number: int = _WORD.unpack(self._take(4))[0]
        return number

    def short(self) -> int:
        """Two bytes as a number."""
        number: int = _SHORT.unpack(self._take(2))[0]
        return number

    def string(self) -> str:
        """A string with its length before it."""
        length = self.word()
        if length > MAX_STRING:
            raise MalformedError("a string is longer than 4096 bytes")
        return text(self._take(length))

    def end(self) -> None:
        """There is no more."""
        if self._at != len(self._data):
            raise MalformedError("the option is longer than what it holds")


def text(data: bytes) -> str:
    """A string of the protocol."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise MalformedError("a string is no UTF-8") from error


def info_request(data: bytes) -> tuple[str, list[int]]:
    """What INFO and GO ask for: the export's name, and the kinds of information."""
    reader = Reader(data)
    name = reader.string()
    wanted = [reader.short() for _ in range(reader.short())]
    reader.end()
    return name, wanted


def context_request(data: bytes) -> tuple[str, list[str]]:
    """What LIST_META_CONTEXT and SET_META_CONTEXT ask for: the export's name, and the queries."""
    reader = Reader(data)
    name = reader.string()
    queries = [reader.string() for _ in range(min(reader.word(), len(data)))]
    reader.end()
    return name, queries
