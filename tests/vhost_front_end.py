"""A front end of vhost-user for tests and benchmarks: what QEMU is to a server, and the driver of its guest, by bytes.

The protocol is written down a second time here, from its specifications (docs/specs/vhost-user.md).
"""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPPORTED = 0, 1, 2
NEXT, WRITE, INDIRECT = 1, 2, 4
SECTOR = 512

F_RO, F_FLUSH, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 5, 1 << 9, 1 << 12, 1 << 13, 1 << 14
F_INDIRECT, F_EVENT_INDEX, F_PROTOCOL, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 30, 1 << 32
F_LOG_ALL = 1 << 26
P_REPLY_ACK, P_BACKEND_REQ, P_CONFIG, P_INFLIGHT, P_SLOTS = 1 << 3, 1 << 5, 1 << 9, 1 << 12, 1 << 15

#: Where the guest's memory lies in the guest and in the front end.
GUEST, USER = 0x1_0000_0000, 0x7F00_0000_0000


class Descriptor(NamedTuple):
    """One descriptor of a chain: an address of the guest, bytes, flags without NEXT."""

    address: int
    length: int
    flags: int = 0


class FrontEnd:
    """A connection to a server, and `memory_bytes` of guest memory that its rings are in."""

    def __init__(self, connection: socket.socket, memory_bytes: int = 8 << 20, memory: int | None = None) -> None:
        self.connection = connection
        connection.settimeout(30)
        self.memory_file = os.memfd_create("guest") if memory is None else memory
        if memory is None:
            os.ftruncate(self.memory_file, memory_bytes)
        self.memory_bytes = memory_bytes
        self.memory = mmap.mmap(self.memory_file, memory_bytes)
        self.inflight: tuple[bytes, int] | None = None
        self.descriptors: list[int] = []

    def close(self) -> None:
        """Go away without a word."""
        self.connection.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()

    # Messages

    def send(self, kind: int, payload: bytes = b"", descriptors: Sequence[int] = (), *, flags: int = 1) -> None:
        """Send a message."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.connection.sendmsg([struct.pack("=III", kind, flags, len(payload)) + payload], ancillary)

    def receive(self) -> tuple[int, bytes, list[int]]:
        """The next answer: what it answers, its payload, its descriptors. Raises EOFError."""
        head, ancillary, _, _ = self.connection.recvmsg(12, 1024)
        if not head:
            raise EOFError("the server has ended the connection")
        descriptors = array.array("i")
        for _, _, content in ancillary:
            descriptors.frombytes(content)
        kind, flags, length = struct.unpack("=III", head)
        assert flags == 5, "a reply has version 1 and says that it is one"
        payload = self.connection.recv(length, socket.MSG_WAITALL) if length else b""
        return kind, payload, list(descriptors)

    def ask(self, kind: int, payload: bytes = b"") -> bytes:
        """The payload of the answer to a message that has one."""
        self.send(kind, payload)
        answered, answer, descriptors = self.receive()
        assert answered == kind
        assert not descriptors
        return answer

    def number(self, kind: int) -> int:
        """The number that answers a message."""
        (number,) = struct.unpack("=Q", self.ask(kind))
        return int(number)

    def tell(self, kind: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> int:
        """Send a message whose success is to be acknowledged; 0 for success."""
        self.send(kind, payload, descriptors, flags=9)
        answered, answer, _ = self.receive()
        assert answered == kind
        (number,) = struct.unpack("=Q", answer)
        return int(number)

    def negotiate(self, *, without: int = 0, inflight: bool = False, entries: int = 128, rings: int = 1) -> int:
        """All up to the rings; the features that are in use."""
        features = self.number(1) & ~without & ~F_LOG_ALL
        protocol = self.number(15)
        self.send(16, struct.pack("=Q", protocol))
        self.send(3)
        if inflight:
            if self.inflight is None:
                self.send(31, struct.pack("=QQHHI", 0, 0, rings, entries, 0))
                _, description, descriptors = self.receive()
                self.inflight = description, descriptors[0]
            assert self.tell(32, self.inflight[0], [self.inflight[1]]) == 0
        self.send(2, struct.pack("=Q", features))
        assert self.tell(5, struct.pack("=II", 1, 0) + self.region(), [self.memory_file]) == 0
        return features

    def region(self, *, guest: int = GUEST, user: int = USER, size: int | None = None, offset: int = 0) -> bytes:
        """The words of a memory region."""
        return struct.pack("=QQQQ", guest, self.memory_bytes if size is None else size, user, offset)

    def configuration(self) -> bytes:
        """The configuration space of the device."""
        return self.ask(24, struct.pack("=III", 0, 60, 0) + bytes(60))[12:]

    def event(self) -> int:
        """A new eventfd."""
        descriptor = os.eventfd(0, os.EFD_NONBLOCK)
        self.descriptors.append(descriptor)
        return descriptor


class Ring:
    """A split virtqueue as the guest's driver has it, from `at` in the guest's memory on.

    Behind its parts lies room for the data of requests: a slot of `slot_bytes` for each of its entries.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        index: int = 0,
        *,
        entries: int = 128,
        at: int = 0,
        event_index: bool = True,
        slot_bytes: int = 8192,
    ) -> None:
        self.front_end = front_end
        self.memory = front_end.memory
        self.index = index
        self.entries = entries
        self.table = at
        self.available = at + 16 * entries
        self.used = (self.available + 6 + 2 * entries + 4095) // 4096 * 4096
        self.data = (self.used + 6 + 8 * entries + 4095) // 4096 * 4096
        self.slot_bytes = slot_bytes
        self.end = self.data + entries * slot_bytes
        self.event_index = event_index
        self.added = self.seen = 0
        self.free = list(range(entries - 1, -1, -1))
        self.chains: dict[int, list[int]] = {}
        self.kick = self.call = -1

    def set_up(self, *, base: int = 0, enable: bool = True) -> None:
        """Tell the server of the ring and start it."""
        self.kick, self.call = self.front_end.event(), self.front_end.event()
        front_end = self.front_end
        front_end.send(8, struct.pack("=II", self.index, self.entries))
        front_end.send(10, struct.pack("=II", self.index, base))
        front_end.send(9, self.addresses())
        front_end.send(13, struct.pack("=Q", self.index), [self.call])
        assert front_end.tell(12, struct.pack("=Q", self.index), [self.kick]) == 0
        if enable:
            assert front_end.tell(18, struct.pack("=II", self.index, 1)) == 0

    def addresses(self, *, logged: bool = False) -> bytes:
        """The words that say where its parts are."""
        places = USER + self.table, USER + self.used, USER + self.available, GUEST + self.used
        return struct.pack("=IIQQQQ", self.index, logged, *places)

    def stop(self) -> int:
        """Have the server stop it; the index that it gives back."""
        index, base = struct.unpack("=II", self.front_end.ask(11, struct.pack("=II", self.index, 0)))
        assert index == self.index
        return int(base)

    # Requests

    def put(self, at: int, data: bytes) -> None:
        """Write into the guest's memory."""
        self.memory[at : at + len(data)] = data

    def chain(self, descriptors: Sequence[Descriptor], *, indirect: int | None = None) -> int:
        """Write a chain of descriptors, with `indirect` as a table at that place of the memory; its head."""
        numbers = [self.free.pop() for _ in range(1 if indirect is not None else len(descriptors))]
        self.chains[numbers[0]] = numbers
        if indirect is not None:
            for i, one in enumerate(descriptors):
                self._write(indirect + 16 * i, one, i + 1 if i + 1 < len(descriptors) else None)
            table = Descriptor(GUEST + indirect, 16 * len(descriptors), INDIRECT)
            self._write(self.table + 16 * numbers[0], table, None)
            return numbers[0]
        for i, one in enumerate(descriptors):
            following = numbers[i + 1] if i + 1 < len(numbers) else None
            self._write(self.table + 16 * numbers[i], one, following)
        return numbers[0]

    def _write(self, at: int, descriptor: Descriptor, following: int | None) -> None:
        flags = descriptor.flags | (NEXT if following is not None else 0)
        self.put(at, struct.pack("<QIHH", descriptor.address, descriptor.length, flags, following or 0))

    def offer(self, head: int) -> None:
        """Make a chain available, without a kick."""
        self.put(self.available + 4 + 2 * (self.added % self.entries), struct.pack("<H", head))
        self.added = (self.added + 1) & 0xFFFF
        self.put(self.available + 2, struct.pack("<H", self.added))

    def kick_it(self) -> None:
        """Kick."""
        os.eventfd_write(self.kick, 1)

    def ended(self) -> list[int]:
        """The heads that were answered since the last look, without waiting."""
        heads: list[int] = []
        (index,) = struct.unpack_from("<H", self.memory, self.used + 2)
        while self.seen != index:
            head, _ = struct.unpack_from("<II", self.memory, self.used + 4 + 8 * (self.seen % self.entries))
            self.seen = (self.seen + 1) & 0xFFFF
            self.free.extend(self.chains.pop(head))
            heads.append(head)
        # Have the server signal the next answer.
        self.put(self.available + 4 + 2 * self.entries, struct.pack("<H", self.seen))
        return heads

    def wait(self, count: int = 1, *, seconds: float = 30) -> list[int]:
        """Wait until so many requests were answered; their heads."""
        heads = self.ended()
        while len(heads) < count:
            (again,) = struct.unpack_from("<H", self.memory, self.used + 2)
            if again == self.seen:
                ready, _, _ = select.select([self.call], [], [], seconds)
                assert ready, "no answer came"
                os.eventfd_read(self.call)
            heads += self.ended()
        return heads

    def request(
        self, kind: int, sector: int = 0, data: bytes = b"", *, length: int = 0, pieces: int = 1, indirect: bool = False
    ) -> tuple[int, int]:
        """Add a request, `length` bytes of which the device writes, in so many pieces; its head and its slot."""
        slot = self.data + self.free[-1] * self.slot_bytes
        header, status, body = slot, slot + 16, slot + 512
        self.put(header, struct.pack("<IIQ", kind, 0, sector))
        self.put(status, b"\xff")
        self.put(body, data)
        size = len(data) or length
        flags = 0 if data else WRITE
        step = -(-size // pieces) if size else 0
        parts = [Descriptor(GUEST + body + i, min(step, size - i), flags) for i in range(0, size, step or 1)]
        chain = [Descriptor(GUEST + header, 16), *parts, Descriptor(GUEST + status, 1, WRITE)]
        head = self.chain(chain, indirect=slot + 32 if indirect else None)
        self.offer(head)
        return head, slot

    def do(
        self, kind: int, sector: int = 0, data: bytes = b"", *, length: int = 0, pieces: int = 1, indirect: bool = False
    ) -> tuple[int, bytes]:
        """Have one request done: its status, and what the device has written."""
        _, slot = self.request(kind, sector, data, length=length, pieces=pieces, indirect=indirect)
        self.kick_it()
        self.wait()
        return self.memory[slot + 16], bytes(self.memory[slot + 512 : slot + 512 + length])

    def read(self, sector: int, length: int, *, pieces: int = 1, indirect: bool = False) -> bytes:
        """Bytes of the disk."""
        status, data = self.do(IN, sector, length=length, pieces=pieces, indirect=indirect)
        assert status == OK
        return data

    def write(self, sector: int, data: bytes, *, pieces: int = 1, indirect: bool = False) -> None:
        """Write bytes of the disk."""
        assert self.do(OUT, sector, data, pieces=pieces, indirect=indirect)[0] == OK
