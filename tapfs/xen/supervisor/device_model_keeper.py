"""The process that keeps the connections of device models while the process of their disk is replaced.

``python -m tapfs.xen.supervisor.device_model_keeper LISTENER DIRECTORY NAME INNER``: QEMU connects to the socket NAME
in DIRECTORY, whose open listener is the descriptor LISTENER. The keeper passes on what QEMU says to the disk's process,
which listens at INNER. QEMU tells its guest of an error when a connection ends. So when the disk's process ends the
keeper waits for the next one, says the same again to open the export, and asks it what was not answered, as the journal
does for rings. An answer is passed on when it is whole. The keeper ends when NAME is gone.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

#: Seconds that a device model waits for a disk's process before it is told of an error, and between two tries.
_PATIENCE_SECONDS = 120.0
_PAUSE_SECONDS = 0.05
#: Processes that may end over one thing that is said to open the export.
_TRIES = 3
#: Seconds between looks whether the socket is still there.
_LOOK_SECONDS = 1.0

#: Bounds of what a device model says in one message, and of what waits for answers.
_MOST_BYTES = 64 << 20
_MOST_OPTION_BYTES = 64 << 10

# The negotiation and the requests of NBD (docs/specs/nbd.md).
_GREETING_BYTES, _FLAGS_BYTES = 18, 4
_NO_ZEROES, _ZEROES_BYTES = 2, 124
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_OPTION_MAGIC, _OPTION_REPLY_MAGIC = b"IHAVEOPT", 0x0003E889045565A9
_EXPORT_NAME, _ABORT, _GO, _STRUCTURED, _EXTENDED = 1, 2, 7, 8, 11
_ACK, _ERROR_BIT, _UNSUPPORTED = 1, 1 << 31, (1 << 31) + 1
_REQUEST = struct.Struct(">IHH8sQI")
_REQUEST_MAGIC, _READ, _WRITE, _DISCONNECT = 0x25609513, 0, 1, 2
_SIMPLE = struct.Struct(">II8s")
_CHUNK = struct.Struct(">IHH8sI")
_SIMPLE_MAGIC, _CHUNK_MAGIC, _LAST_CHUNK = 0x67446698, 0x668E33EF, 1


class _EndedError(Exception):
    """The other end has closed the connection, or does not keep to the protocol."""


class _Request(NamedTuple):
    message: bytes
    kind: int
    length: int


class Relay:
    """One device model. `reach` connects to the disk's process, or raises OSError; `is_wanted`: the disk is there."""

    def __init__(
        self, client: socket.socket, reach: Callable[[], socket.socket], is_wanted: Callable[[], bool]
    ) -> None:
        self._client = client
        self._reach = reach
        self._is_wanted = is_wanted
        self._said: list[tuple[int, bytes]] = []
        self._greeting = self._flags = b""
        self._structured = False
        self._changed = threading.Condition()
        self._disk: socket.socket | None = None
        #: What has no answer yet, by its cookie, in the order in which it was asked. One thread sends at a time.
        self._pending: dict[bytes, _Request] = {}
        self._sending = threading.Lock()
        self._ended = False

    def run(self) -> None:
        """Serve the device model until it goes, or the disk does."""
        with suppress(_EndedError, OSError):
            self._disk = self._negotiate()
            threading.Thread(target=self._answer, daemon=True).start()
            self._listen()
        self._end()

    # The negotiation

    def _reached(self) -> socket.socket:
        """A connection to a disk's process that has been told all that was said so far. Tried for a while."""
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while not self._ended and self._is_wanted() and time.monotonic() < give_up:
            with suppress(_EndedError, OSError):
                disk = self._reach()
                try:
                    self._repeat(disk)
                except BaseException:
                    disk.close()
                    raise
                return disk
            time.sleep(_PAUSE_SECONDS)
        raise _EndedError

    def _repeat(self, disk: socket.socket) -> None:
        """Say to another process what was said; the device model has had the replies."""
        self._greeting = _receive(disk, _GREETING_BYTES)
        disk.sendall(self._flags)
        for option, message in self._said:
            disk.sendall(message)
            *_, (kind, _) = self._replies(disk, option)
            if option == _GO and kind != _ACK:
                raise _EndedError

    def _negotiate(self) -> socket.socket:
        """Pass on what both say until the export is open; the connection to the disk's process."""
        disk = self._reached()
        self._client.sendall(self._greeting)
        self._flags = _receive(self._client, _FLAGS_BYTES)
        with suppress(OSError):  # what comes next finds another process
            disk.sendall(self._flags)
        opened = False
        while not opened:
            head = _receive(self._client, _OPTION.size)
            magic, option, length = _OPTION.unpack(head)
            if magic != _OPTION_MAGIC or length > _MOST_OPTION_BYTES:
                raise _EndedError
            message = head + _receive(self._client, length)
            if option == _EXTENDED:
                # Its requests look otherwise. Clients go on without.
                self._client.sendall(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, _UNSUPPORTED, 0))
                continue
            disk, replies = self._said_to(disk, option, message)
            self._client.sendall(b"".join(reply for _, reply in replies))
            self._said.append((option, message))
            accepted = replies[-1][0] == _ACK
            self._structured = self._structured or (option == _STRUCTURED and accepted)
            opened = option == _EXPORT_NAME or (option == _GO and accepted)
            if option == _ABORT:
                raise _EndedError
        return disk

    def _said_to(
        self, disk: socket.socket, option: int, message: bytes
    ) -> tuple[socket.socket, list[tuple[int, bytes]]]:
        """Say one thing to the disk's process, or to the next one; that one, and its replies."""
        for _ in range(_TRIES):
            with suppress(_EndedError, OSError):
                disk.sendall(message)
                return disk, list(self._replies(disk, option))
            disk.close()
            disk = self._reached()
        raise _EndedError

    def _replies(self, disk: socket.socket, option: int) -> Iterator[tuple[int, bytes]]:
        """The replies to an option: the type of each, and its bytes."""
        if option == _EXPORT_NAME:
            zeroes = 0 if self._flags[-1] & _NO_ZEROES else _ZEROES_BYTES
            yield _ACK, _receive(disk, 10 + zeroes)
            return
        kind = 0
        while kind != _ACK and not kind & _ERROR_BIT:
            head = _receive(disk, _OPTION_REPLY.size)
            magic, _, kind, length = _OPTION_REPLY.unpack(head)
            if magic != _OPTION_REPLY_MAGIC or length > _MOST_OPTION_BYTES:
                raise _EndedError
            yield kind, head + _receive(disk, length)

    # The requests

    def _listen(self) -> None:
        """Take the requests of the device model, and pass them on. What a process did not take is pending."""
        client = _Reader(self._client)
        while True:
            head = client.take(_REQUEST.size)
            magic, _, kind, cookie, _, length = _REQUEST.unpack(head)
            if magic != _REQUEST_MAGIC or kind == _DISCONNECT or (kind == _WRITE and length > _MOST_BYTES):
                return
            message = head + client.take(length) if kind == _WRITE else head
            with self._changed:
                self._changed.wait_for(self._has_room)
            with self._sending:
                with self._changed:
                    if self._ended or cookie in self._pending:
                        return
                    self._pending[cookie] = _Request(message, kind, length)
                    disk = self._disk
                if disk is not None:
                    with suppress(OSError):
                        disk.sendall(message)

    def _has_room(self) -> bool:
        return self._ended or sum(request.length for request in self._pending.values()) < _MOST_BYTES

    def _answer(self) -> None:
        """Pass answers on; where the process ends, ask the next one what has no answer."""
        with suppress(_EndedError, OSError):
            disk = self._disk
            while disk is not None:
                try:
                    self._pass_answers(disk)
                except (_EndedError, OSError):
                    disk = self._ask_again(disk)
        self._end()

    def _pass_answers(self, disk: socket.socket) -> None:
        reader = _Reader(disk)
        chunks: dict[bytes, list[bytes]] = {}
        while True:
            cookie, message, last = self._piece(reader)
            if not last:
                chunks.setdefault(cookie, []).extend(message)
                continue
            with self._changed:
                del self._pending[cookie]
                self._changed.notify()
            try:
                for part in (*chunks.pop(cookie, ()), *message):
                    self._client.sendall(part)
            except OSError:
                self._end()
                raise

    def _piece(self, disk: _Reader) -> tuple[bytes, list[bytes], bool]:
        """A piece of an answer: the cookie, the bytes, and whether it is the last one."""
        head = disk.take(_SIMPLE.size)
        magic, error, cookie = _SIMPLE.unpack(head)
        request = self._pending.get(cookie)
        if magic == _SIMPLE_MAGIC and request is not None:
            length = request.length if request.kind == _READ and error == 0 and not self._structured else 0
            return cookie, disk.behind(head, length), True
        head += disk.take(_CHUNK.size - _SIMPLE.size)
        magic, flags, _, cookie, length = _CHUNK.unpack(head)
        if magic != _CHUNK_MAGIC or cookie not in self._pending or length > _MOST_BYTES + _MOST_OPTION_BYTES:
            raise _EndedError
        return cookie, disk.behind(head, length), bool(flags & _LAST_CHUNK)

    def _ask_again(self, lost: socket.socket) -> socket.socket:
        """The next process, which is being asked all that has no answer."""
        with self._changed:
            if self._ended:
                raise _EndedError
            self._disk = None
        with suppress(OSError):  # whoever sends to it gives up
            lost.shutdown(socket.SHUT_RDWR)
        lost.close()
        disk = self._reached()
        begun = threading.Event()
        threading.Thread(target=self._send_pending, args=(disk, begun), daemon=True).start()
        begun.wait()
        return disk

    def _send_pending(self, disk: socket.socket, begun: threading.Event) -> None:
        """Ask a new process what has no answer, before anything that comes later. Its answers are read meanwhile."""
        with self._sending:
            with self._changed:
                self._disk = disk
                messages = [request.message for request in self._pending.values()]
            begun.set()
            with suppress(OSError):
                for message in messages:
                    disk.sendall(message)

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for connection in (self._client, self._disk):
            if connection is not None:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Reader:
    """Takes what has come over a connection, of small messages many by one call. Raises _EndedError and OSError."""

    _SMALL = 16 << 10

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._waiting = b""

    def take(self, length: int) -> bytes:
        """So many bytes, in one piece."""
        return b"".join(self.behind(b"", length))

    def behind(self, head: bytes, length: int) -> list[bytes]:
        """A head and the so many bytes that follow it; large ones are not joined."""
        while len(self._waiting) < length <= self._SMALL:
            piece = self._connection.recv(self._SMALL)
            if not piece:
                raise _EndedError
            self._waiting += piece
        taken, self._waiting = self._waiting[:length], self._waiting[length:]
        rest = length - len(taken)
        return [head + taken, _receive(self._connection, rest)] if rest else [head + taken]


def _receive(connection: socket.socket, length: int) -> bytes:
    """So many bytes. Raises _EndedError."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise _EndedError
        view = view[count:]
    return bytes(data)


def main(words: list[str]) -> int:
    """Keep connections until the socket is gone; the exit code."""
    listener = socket.socket(fileno=int(words[0]))
    listener.setblocking(True)
    directory, name, inner = os.open(words[1], os.O_PATH | os.O_DIRECTORY), words[2], words[3]
    # However long the directory's own path is, these fit into the address of a socket.
    folder = Path(f"/proc/self/fd/{directory}")
    identity = os.stat(folder / name).st_ino

    def is_wanted() -> bool:
        try:
            return os.stat(folder / name).st_ino == identity
        except OSError:
            return False

    def reach() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(folder / inner))
        except OSError:
            connection.close()
            raise
        return connection

    def serve(client: socket.socket) -> None:
        with client:
            Relay(client, reach, is_wanted).run()

    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while is_wanted():
        if poll.poll(_LOOK_SECONDS * 1000):
            client, _ = listener.accept()
            threading.Thread(target=serve, args=(client,), daemon=True).start()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
