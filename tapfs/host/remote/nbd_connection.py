"""A connection to an NBD server: negotiation of one export, and requests of many threads at once.

The protocol is https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: fixed newstyle, with structured
replies where the server has them. A thread reads the replies and hands each to the thread that waits for it.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from contextlib import suppress
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import NamedTuple

from tapfs.errors import ErrorKind, ImageError

_GREETING = b"NBDMAGICIHAVEOPT"
_OPTION_REPLY = 0x0003E889045565A9
_REQUEST = 0x25609513
_SIMPLE = 0x67446698
_STRUCTURED = 0x668E33EF

#: The protocol's handshake flags: fixed newstyle, and no zeros behind the answer to EXPORT_NAME.
_FIXED_NEWSTYLE = 1
_HANDSHAKE = 3

#: No reply of a negotiation that is of any use is longer, and no message of an error.
_MOST_SAID = 64 << 10

_DEFAULT_PORT = 10809

#: The most for a connection and its negotiation: a server of another protocol waits for us to speak.
_CONNECT_SECONDS = 10

#: The context in which a server says which ranges read as zeros, and the bit that says so.
_ALLOCATION = b"base:allocation"
_STATE_ZERO = 2

#: No answer about the state of ranges is longer: some 130,000 ranges.
_MOST_DESCRIBED = 1 << 20

#: No wait for a server is shorter, where there is any time left.
_SOON_SECONDS = 0.001


class _Option(IntEnum):
    STARTTLS = 5
    GO = 7
    STRUCTURED_REPLY = 8
    SET_META_CONTEXT = 10


class _Reply(IntEnum):
    ACK = 1
    INFO = 3
    META_CONTEXT = 4
    ERROR = 1 << 31
    POLICY = ERROR + 2
    TLS_REQUIRED = ERROR + 5
    UNKNOWN_EXPORT = ERROR + 6


class _Chunk(IntEnum):
    NONE = 0
    DATA = 1
    HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 1 << 15


class Command(IntEnum):
    """The requests that are sent."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class Flag(IntFlag):
    """What an export can do, as far as it is asked."""

    READ_ONLY = 1 << 1
    FLUSH = 1 << 2
    WRITE_ZEROES = 1 << 6


class Endpoint(NamedTuple):
    """Where a server is and which export is meant: a path of a Unix socket, or else host and port.

    `certificates` is a folder with ca-cert.pem, and client-cert.pem and client-key.pem where the server wants them.
    """

    host: str
    port: int
    path: str | None
    export: str
    tls: bool
    certificates: str | None


class _Waiting:
    """A request on its way: where its bytes go, and whether it is over."""

    def __init__(self, command: Command, offset: int, buffer: memoryview | None) -> None:
        self.command, self.offset, self.buffer = command, offset, buffer
        self.left = 0 if buffer is None else len(buffer)
        self.placed: list[tuple[int, int]] = []
        #: Lengths of ranges from `offset` on, and whether each reads as zeros.
        self.described: list[tuple[int, bool]] = []
        self.error: ImageError | None = None
        self.over = threading.Event()


class NbdConnection:
    """One export of a server. Raises ImageError: io where the network or the server failed.

    After an error of the network it is `broken`, and every request fails. `unflushed`: whether it has acknowledged
    writes that no flush covers; that stays as it is once the connection is broken.
    """

    def __init__(self, endpoint: Endpoint, name: str, *, timeout_seconds: float) -> None:
        self._name = name
        self._timeout = timeout_seconds
        #: When a negotiation that is under way has taken too long, by the monotonic clock.
        patience = min(timeout_seconds, _CONNECT_SECONDS)
        self._give_up: float | None = time.monotonic() + patience
        self._sending = threading.Lock()
        #: Held where a request ends, so that none is acknowledged by a connection that counts as broken.
        self._settling = threading.Lock()
        self._acknowledged = self._flushed = 0
        self._waiting: dict[int, _Waiting] = {}
        self._cookie = 0
        #: The number by which the server calls the states of ranges; None: it does not tell them.
        self._allocation: int | None = None
        self.broken = False
        self.size = 0
        self.flags = Flag(0)
        try:
            self._socket = _connected(endpoint, patience)
            try:
                self._negotiate(endpoint)
                self._give_up = None
                self._socket.settimeout(None)
            except BaseException:
                self._socket.close()
                raise
        except TimeoutError as error:
            message = f"the server has given no export within {patience:g} s"
            raise self._error(message) from error
        except (OSError, struct.error) as error:
            raise error if isinstance(error, ImageError) else self._failed(error) from error
        threading.Thread(target=self._read_replies, daemon=True).start()

    def request(self, command: Command, offset: int = 0, length: int = 0, data: memoryview | None = None) -> memoryview:
        """Send a request and wait for its reply; the bytes of a READ."""
        buffer = self._replied(command, offset, length, data).buffer
        return memoryview(b"") if buffer is None else buffer

    @property
    def tells_zeros(self) -> bool:
        """Whether the server says which ranges read as zeros."""
        return self._allocation is not None

    def states(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Lengths of ranges from `offset` on, at least one, and whether each reads as zeros; maybe not to the end."""
        return self._replied(Command.BLOCK_STATUS, offset, length, None).described

    def _replied(self, command: Command, offset: int, length: int, data: memoryview | None) -> _Waiting:
        buffer = memoryview(bytearray(length)) if command is Command.READ else None
        waiting = _Waiting(command, offset, buffer)
        with self._sending:
            self._cookie += 1
            cookie = self._cookie
            with self._settling:
                if self.broken:
                    raise self._error("the connection was lost")
                self._waiting[cookie] = waiting
            try:
                self._socket.sendall(struct.pack(">IHHQQI", _REQUEST, 0, command, cookie, offset, length))
                if data is not None:
                    self._socket.sendall(data)
            except OSError as error:
                self._break(self._failed(error))
        if not waiting.over.wait(self._timeout):
            self._break(self._error(f"the server has not answered for {self._timeout:g} s"))
        if waiting.error is not None:
            waiting.error.offset = offset
            raise waiting.error
        return waiting

    @property
    def unflushed(self) -> bool:
        """Whether a crash of the server may take writes that it has acknowledged."""
        return self._acknowledged != self._flushed

    def flush(self) -> None:
        """Have every write that was acknowledged be durable, where the server can."""
        acknowledged = self._acknowledged
        if Flag.FLUSH in self.flags:
            self.request(Command.FLUSH)
        self._flushed = max(self._flushed, acknowledged)

    def close(self) -> None:
        """Tell the server, and close the connection."""
        with suppress(OSError), self._sending:
            self._socket.sendall(struct.pack(">IHHQQI", _REQUEST, 0, Command.DISCONNECT, 0, 0, 0))
        self._break(self._error("the connection is closed"))

    # Negotiation

    def _negotiate(self, endpoint: Endpoint) -> None:
        if self._receive(16) != _GREETING:
            raise ImageError(ErrorKind.UNSUPPORTED, "does not speak NBD as of 2011 or later", path=self._name)
        (flags,) = struct.unpack(">H", self._receive(2))
        if not flags & _FIXED_NEWSTYLE:
            raise ImageError(ErrorKind.UNSUPPORTED, "the NBD server is too old (no fixed newstyle)", path=self._name)
        self._socket.sendall(struct.pack(">I", flags & _HANDSHAKE))
        if endpoint.tls:
            self._option(_Option.STARTTLS, b"")
            self._have_patience()
            self._socket = _secured(self._socket, endpoint)
        export = endpoint.export.encode()
        with suppress(_RefusedOptionError):
            self._option(_Option.STRUCTURED_REPLY, b"")
            wanted = struct.pack(">II", 1, len(_ALLOCATION)) + _ALLOCATION
            for kind, data in self._option(_Option.SET_META_CONTEXT, struct.pack(">I", len(export)) + export + wanted):
                if kind == _Reply.META_CONTEXT and data[4:] == _ALLOCATION:
                    (self._allocation,) = struct.unpack(">I", data[:4])
        try:
            replies = self._option(_Option.GO, struct.pack(">I", len(export)) + export + b"\0\0")
        except _RefusedOptionError as refused:
            raise self._refused(refused, endpoint) from refused
        for kind, data in replies:
            if kind == _Reply.INFO and data[:2] == b"\0\0":
                _, self.size, known = struct.unpack(">HQH", data)
                self.flags = Flag(known & (Flag.READ_ONLY | Flag.FLUSH | Flag.WRITE_ZEROES))
                return
        raise self._error("the server does not say how large the export is")

    def _option(self, option: _Option, data: bytes) -> list[tuple[int, bytes]]:
        """The replies to an option, to its end. Raises _RefusedOptionError."""
        self._socket.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, answered, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != _OPTION_REPLY or answered != option or length > _MOST_SAID or len(replies) > _MOST_SAID:
                raise self._error("the server negotiates in no order that is known")
            replies.append((kind, self._receive(length)))
            if kind & _Reply.ERROR:
                raise _RefusedOptionError(kind, replies[-1][1].decode(errors="replace"))
            if kind == _Reply.ACK:
                return replies

    def _refused(self, refused: _RefusedOptionError, endpoint: Endpoint) -> ImageError:
        said = f": {refused.said}" if refused.said else ""
        match refused.kind:
            case _Reply.UNKNOWN_EXPORT:
                kind, message = ErrorKind.NOT_FOUND, f"the server has no export {endpoint.export!r}{said}"
            case _Reply.TLS_REQUIRED:
                kind, message = ErrorKind.DENIED, "the server wants TLS: write nbds:// or nbds+unix://"
            case _Reply.POLICY:
                kind, message = ErrorKind.DENIED, f"the server refuses the export {endpoint.export!r}{said}"
            case _:
                kind, message = ErrorKind.UNSUPPORTED, f"the server refuses the export {endpoint.export!r}{said}"
        return ImageError(kind, message, path=self._name, op="open")

    # Replies

    def _read_replies(self) -> None:
        try:
            while True:
                self._read_reply()
        except (OSError, struct.error) as error:
            self._break(error if isinstance(error, ImageError) else self._failed(error))

    def _read_reply(self) -> None:
        (magic,) = struct.unpack(">I", self._receive(4))
        if magic == _SIMPLE:
            number, cookie = struct.unpack(">IQ", self._receive(12))
            waiting = self._waiting_for(cookie)
            if number:
                waiting.error = self._told(number, "")
            elif waiting.buffer is not None:
                self._fill(waiting, waiting.offset, waiting.left)
            self._over(cookie)
            return
        if magic != _STRUCTURED:
            raise self._error("the server replies in no form that is known")
        flags, kind, cookie, length = struct.unpack(">HHQI", self._receive(16))
        waiting = self._waiting_for(cookie)
        if kind == _Chunk.DATA and length > 8:
            (offset,) = struct.unpack(">Q", self._receive(8))
            self._fill(waiting, offset, length - 8)
        elif kind == _Chunk.HOLE and length == 12:
            offset, hole = struct.unpack(">QI", self._receive(12))
            self._place(waiting, offset, hole)  # the buffer is zeros from the start
        elif kind == _Chunk.BLOCK_STATUS and 12 <= length <= _MOST_DESCRIBED and length % 8 == 4:
            self._describe(waiting, self._receive(length))
        elif kind & _Chunk.ERROR and 6 <= length <= _MOST_SAID:
            payload = self._receive(length)
            number, said = struct.unpack(">IH", payload[:6])
            waiting.error = self._told(number, payload[6 : 6 + said].decode(errors="replace"))
        elif kind != _Chunk.NONE or length:
            raise self._error("the server sends a chunk that is none")
        if flags & 1:
            self._over(cookie)

    def _describe(self, waiting: _Waiting, payload: bytes) -> None:
        """Take the states of ranges down."""
        (context,) = struct.unpack(">I", payload[:4])
        if waiting.command is not Command.BLOCK_STATUS or context != self._allocation or waiting.described:
            raise self._error("the server describes what nobody asked for")
        described = [(length, bool(state & _STATE_ZERO)) for length, state in struct.iter_unpack(">II", payload[4:])]
        if not all(length for length, _ in described):
            raise self._error("the server describes ranges of no length")
        waiting.described = described

    def _fill(self, waiting: _Waiting, offset: int, length: int) -> None:
        view = self._place(waiting, offset, length)
        while view:
            got = self._socket.recv_into(view)
            if not got:
                raise self._error("the server has closed the connection")
            view = view[got:]

    def _place(self, waiting: _Waiting, offset: int, length: int) -> memoryview:
        """Where the bytes of a chunk go."""
        start, stop = offset - waiting.offset, offset - waiting.offset + length
        if waiting.buffer is None or start < 0 or stop > len(waiting.buffer):
            raise self._error("the server sends bytes that nobody asked for")
        if any(start < end and begin < stop for begin, end in waiting.placed):
            raise self._error("the server sends the same bytes twice")  # and others would be missed
        waiting.placed.append((start, stop))
        waiting.left -= length
        return waiting.buffer[start:stop]

    def _waiting_for(self, cookie: int) -> _Waiting:
        waiting = self._waiting.get(cookie)
        if waiting is None:
            raise self._error("the server replies to what nobody asked")
        return waiting

    def _over(self, cookie: int) -> None:
        with self._settling:
            waiting = self._waiting.pop(cookie, None)
            if waiting is None:
                return  # it has failed with the connection
            if waiting.left and waiting.error is None and waiting.buffer is not None:
                waiting.error = self._error(f"the server sent all but {waiting.left} of the bytes that were asked for")
            if waiting.command is Command.BLOCK_STATUS and waiting.error is None and not waiting.described:
                waiting.error = self._error("the server does not say what the range holds")
            if waiting.command in {Command.WRITE, Command.WRITE_ZEROES} and waiting.error is None:
                self._acknowledged += 1
            waiting.over.set()

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            self._have_patience()
            got = self._socket.recv_into(view)
            if not got:
                raise self._error("the server has closed the connection")
            view = view[got:]
        return bytes(data)

    def _have_patience(self) -> None:
        """Wait for the server no longer than what is left for the whole negotiation, while that is under way."""
        if self._give_up is not None:
            left = self._give_up - time.monotonic()
            self._socket.settimeout(max(left, _SOON_SECONDS))
            if left <= 0:
                raise TimeoutError

    def _break(self, error: ImageError) -> None:
        """Have every request fail that waits or comes, and the socket closed."""
        with self._settling:
            self.broken = True
            failed = tuple(self._waiting.values())
            self._waiting.clear()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._socket.close()
        for waiting in failed:
            waiting.error = ImageError(error.kind, error.message, path=error.path, op=error.op)
            waiting.over.set()

    def _told(self, number: int, said: str) -> ImageError:
        kind = ErrorKind.NO_SPACE if number == 28 else ErrorKind.READ_ONLY if number == 1 else ErrorKind.IO
        return ImageError(kind, f"the server answers with error {number} {said}".rstrip(), path=self._name, op="fetch")

    def _failed(self, error: Exception) -> ImageError:
        return self._error(f"the server or the way to it failed: {error}")

    def _error(self, message: str) -> ImageError:
        return ImageError(ErrorKind.IO, message, path=self._name, op="fetch")


class _RefusedOptionError(Exception):
    """The server has answered an option with an error."""

    def __init__(self, kind: int, said: str) -> None:
        super().__init__(said or f"error {kind:#x}")
        self.kind, self.said = kind, said


def _connected(endpoint: Endpoint, timeout_seconds: float) -> socket.socket:
    if endpoint.path is None:
        connection = socket.create_connection((endpoint.host, endpoint.port or _DEFAULT_PORT), timeout_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_seconds)
    try:
        connection.connect(endpoint.path)
    except BaseException:
        connection.close()
        raise
    return connection


def _secured(connection: socket.socket, endpoint: Endpoint) -> ssl.SSLSocket:
    """The connection under TLS; the server proves its name, by the host's authorities or by those of the folder."""
    folder = None if endpoint.certificates is None else Path(endpoint.certificates)
    context = ssl.create_default_context(cafile=None if folder is None else folder / "ca-cert.pem")
    if folder is not None and (folder / "client-cert.pem").exists():
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context.wrap_socket(connection, server_hostname=endpoint.host or "localhost")
