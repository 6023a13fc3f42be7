"""A FUSE server between a kernel and a libfuse session that are both played by the test."""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
from types import TracebackType
from typing import NamedTuple, Self

from tapfs.kernel.engine import EngineDisk
from tapfs.kernel.fuse_server import FuseServer

LOOKUP, FORGET, GETATTR, SETXATTR, OPEN, READ, WRITE, RELEASE = 1, 2, 3, 21, 14, 15, 16, 18
FSYNC, FLUSH, INIT, INTERRUPT, BATCH_FORGET, FALLOCATE, LSEEK = 20, 25, 26, 36, 42, 43, 46

_IN_HEADER = struct.Struct("=IIQQIIIHH")
_OUT_HEADER = struct.Struct("=IiQ")

#: For how long something may take that happens at once.
_PATIENCE = 20.0


class Answer(NamedTuple):
    """An answer to the kernel; `error` is an errno or 0."""

    unique: int
    error: int
    body: bytes


class FakeKernel:
    """Both ends of a :class:`FuseServer`: requests in, answers out, and what comes to the session."""

    def __init__(self, disk: EngineDisk) -> None:
        # Messages keep their bounds, as on /dev/fuse.
        self.device, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.device, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        #: Bytes of data that a message may hold here; how many an ordinary user gets differs.
        self.room = min(1 << 20, theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 4)
        ours, self.session = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.device.settimeout(_PATIENCE)
        self.session.settimeout(_PATIENCE)
        self.server = FuseServer(theirs.detach(), ours.detach(), disk)
        self._pipe = os.pipe()
        self._uniques = itertools.count(2, 2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.close()
        self.device.close()
        self.session.close()
        for end in self._pipe:
            os.close(end)

    def send(self, opcode: int, node: int, body: bytes = b"", *, length: int | None = None) -> int:
        """A request; `length` is a lie about how long it is. Its number."""
        unique = next(self._uniques)
        size = _IN_HEADER.size + len(body) if length is None else length
        self.device.send(_IN_HEADER.pack(size, opcode, unique, node, 0, 0, 0, 0, 0) + body)
        return unique

    def answer(self) -> Answer:
        """The next answer."""
        message = self.device.recv(2 << 20)
        length, error, unique = _OUT_HEADER.unpack_from(message)
        assert length == len(message)
        return Answer(unique, -error, message[_OUT_HEADER.size :])

    def ask(self, opcode: int, node: int, body: bytes = b"", *, length: int | None = None) -> Answer:
        """A request and its answer."""
        unique = self.send(opcode, node, body, length=length)
        answer = self.answer()
        assert answer.unique == unique
        return answer

    def silent(self, seconds: float = 0.05) -> bool:
        """Whether no answer comes."""
        return not select.select([self.device], [], [], seconds)[0]

    def forwarded(self) -> bytes:
        """What one splice of the session brings, which is how libfuse reads: it must be one message, whole."""
        assert select.select([self.session], [], [], _PATIENCE)[0]
        length = os.splice(self.session.fileno(), self._pipe[1], 1 << 20)
        message = os.read(self._pipe[0], length)
        assert struct.unpack_from("=I", message)[0] == len(message)
        return message

    def session_answers(self, unique: int, body: bytes = b"", error: int = 0) -> None:
        """An answer of the session."""
        self.session.sendall(_OUT_HEADER.pack(_OUT_HEADER.size + len(body), -error, unique) + body)


def unique_of(message: bytes) -> int:
    """The number of a forwarded request."""
    return _IN_HEADER.unpack_from(message)[2]


def read_body(offset: int, size: int) -> bytes:
    """Of READ."""
    return struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)


def write_body(offset: int, data: bytes, size: int | None = None, *, handle: int = 0, flags: int = 0) -> bytes:
    """Of WRITE; `size` is a lie about how much data there is, `flags` are those of the file and of the write."""
    return struct.pack("=QQIIQII", handle, offset, len(data) if size is None else size, 0, 0, flags, 0) + data


def open_body(flags: int) -> bytes:
    """Of OPEN."""
    return struct.pack("=II", flags, 0)


def fallocate_body(offset: int, length: int, mode: int) -> bytes:
    """Of FALLOCATE."""
    return struct.pack("=QQQII", 0, offset, length, mode, 0)


def lseek_body(offset: int, whence: int) -> bytes:
    """Of LSEEK."""
    return struct.pack("=QQII", 0, offset, whence, 0)


def flush_body(handle: int) -> bytes:
    """Of FLUSH."""
    return struct.pack("=QIIQ", handle, 0, 0, 0)


def fsync_body() -> bytes:
    """Of FSYNC."""
    return struct.pack("=QII", 0, 0, 0)


def init_body(flags: int, flags2: int) -> bytes:
    """Of INIT, by a kernel of protocol 7.40."""
    return struct.pack("=IIIII44x", 7, 40, 131072, flags, flags2)


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))
