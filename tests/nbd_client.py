"""An NBD client by bytes, as a second reader of the protocol: it sends whatever it is told and checks what it gets."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
SIMPLE, STRUCTURED, EXTENDED = range(3)

_OPTION_REPLY = 0x0003E889045565A9
_DONE = 1


@dataclass
class Answer:
    """What a server has said to one request. `data` holds the bytes of a READ, `states` runs by context.

    `holes` are those of the bytes that were told as holes: offsets and lengths.
    """

    error: int = 0
    data: dict[int, bytes] = field(default_factory=dict[int, bytes])
    states: dict[int, list[tuple[int, int]]] = field(default_factory=dict[int, list[tuple[int, int]]])
    holes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def whole(self) -> bytes:
        """The bytes of a READ, which leave no gap and do not overlap."""
        joined = b""
        start = min(self.data, default=0)
        for offset in sorted(self.data):
            assert offset == start + len(joined)
            joined += self.data[offset]
        return joined


def option_bytes(option: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data


def string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">I", len(encoded)) + encoded


class Client:
    """One connection. `style` says how requests and replies look, after the negotiation."""

    def __init__(self, connection: socket.socket, style: int = SIMPLE) -> None:
        self.connection = connection
        self.style = style
        self.size = 0
        self.flags = 0
        self._lengths: dict[int, int] = {}
        self._answers: dict[int, Answer] = {}
        self._partial: dict[int, Answer] = {}
        self._cookie = 0

    def receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self.connection.recv(length - len(data))
            if not piece:
                raise EOFError(f"the server has closed after {bytes(data)!r}")
            data += piece
        return bytes(data)

    # Negotiation

    def greet(self, flags: int = 3) -> int:
        """Exchange flags; those of the server."""
        assert self.receive(16) == b"NBDMAGICIHAVEOPT"
        offered = int.from_bytes(self.receive(2), "big")
        self.connection.sendall(flags.to_bytes(4, "big"))
        return offered

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """The replies to an option, to the last one."""
        self.connection.sendall(option_bytes(option, data))
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, answered, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, answered) == (_OPTION_REPLY, option)
            replies.append((kind, self.receive(length)))
            if kind == 1 or kind >> 31:
                return replies

    def go(self, name: str = "", style: int = STRUCTURED, contexts: tuple[str, ...] = ()) -> dict[str, int]:
        """Negotiate to the end; the numbers of the contexts by name."""
        self.greet()
        if style != SIMPLE:
            assert self.option(8 if style == STRUCTURED else 11) == [(1, b"")]
        numbers: dict[str, int] = {}
        if contexts:
            queries = struct.pack(">I", len(contexts)) + b"".join(map(string, contexts))
            for kind, data in self.option(10, string(name) + queries)[:-1]:
                assert kind == 4
                numbers[data[4:].decode()] = int.from_bytes(data[:4], "big")
        replies = self.option(7, string(name) + b"\0\0")
        assert replies[-1] == (1, b""), replies
        (info,) = (data for kind, data in replies if kind == 3 and data[:2] == b"\0\0")
        _, self.size, self.flags = struct.unpack(">HQH", info)
        self.style = style
        return numbers

    # Requests

    def send(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        """Send a request; its cookie."""
        self._cookie += 1
        if command == WRITE and self.style == EXTENDED and self._cookie % 2:
            flags |= PAYLOAD_LEN  # as the protocol wants it; QEMU sends none
        self._lengths[self._cookie] = length or len(data)
        self.connection.sendall(self.request_bytes(command, self._cookie, offset, length or len(data), flags) + data)
        return self._cookie

    def request_bytes(self, command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
        if self.style == EXTENDED:
            return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
        return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)

    def ask(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> Answer:
        """Send a request and wait for its answer."""
        return self.answer(self.send(command, offset, length, data, flags), offset, reads=command == READ)

    def answer(self, cookie: int, offset: int = 0, *, reads: bool = False) -> Answer:
        """The answer to a request, once it is complete. Answers to others that come before are kept.

        In the simple style the caller says whether the request `reads`, and from where.
        """
        while cookie not in self._answers:
            if self.style == SIMPLE:
                magic, error, answered = struct.unpack(">IIQ", self.receive(16))
                assert magic == 0x67446698
                assert answered == cookie or not reads, "the test mixes reads in the simple style"
                answer = Answer(error)
                if reads and not error:
                    answer.data[offset] = self.receive(self._lengths[answered])
                self._answers[answered] = answer
            else:
                self._take_chunk()
        return self._answers.pop(cookie)

    def _take_chunk(self) -> None:
        if self.style == EXTENDED:
            magic, flags, kind, cookie, _, length = struct.unpack(">IHHQQQ", self.receive(32))
            assert magic == 0x6E8A278C
        else:
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
            assert magic == 0x668E33EF
        payload = self.receive(length)
        answer = self._partial.setdefault(cookie, Answer())
        if kind == 1:
            offset = int.from_bytes(payload[:8], "big")
            assert offset not in answer.data
            answer.data[offset] = payload[8:]
        elif kind == 2:
            offset, hole = struct.unpack(">QI", payload)
            assert offset not in answer.data
            answer.data[offset] = bytes(hole)
            answer.holes.append((offset, hole))
        elif kind in {5, 6}:
            head, size, form = (4, 8, ">II") if kind == 5 else (8, 16, ">QQ")
            context = int.from_bytes(payload[:4], "big")
            assert kind == 5 or int.from_bytes(payload[4:8], "big") == (len(payload) - 8) // 16
            runs = [struct.unpack_from(form, payload, at) for at in range(head, len(payload), size)]
            answer.states[context] = [(int(run), int(bits)) for run, bits in runs]
        elif kind & 0x8000:
            answer.error = int.from_bytes(payload[:4], "big")
            assert int.from_bytes(payload[4:6], "big") == len(payload) - 6
        else:
            assert (kind, length) == (0, 0)
        if flags & _DONE:
            self._answers[cookie] = self._partial.pop(cookie)

    def close(self) -> None:
        self.connection.close()
