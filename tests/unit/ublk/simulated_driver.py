"""Linux' ublk driver, played by a test: the other side of kernel/src/ublk/simulated.c."""

from __future__ import annotations

import mmap
import os
import select
import struct
from types import TracebackType
from typing import Self

from tapfs.kernel.ublk_server import Shape

READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = 0, 1, 2, 3, 5
FUA, NO_UNMAP = 1 << 13, 1 << 15
#: The kernel could not put the pages of the request into the queue's ring.
NOT_IN_RING = 1 << 17
SECTOR = 512

_ARMED, _GIVEN = 1, 2
_HEADER = struct.Struct("=iiII")
_DESCRIPTOR = struct.Struct("=IIQQ")
_SLOT = struct.Struct("=Ii")
_DEPTH_MAX = 4096
_SLOTS = _HEADER.size + _DEPTH_MAX * _DESCRIPTOR.size
_MEMORY = -(-(_SLOTS + _DEPTH_MAX * _SLOT.size) // 4096) * 4096
_PATIENCE_SECONDS = 30


class SimulatedDriver:
    """A device of a shape, and its users' requests. At the end of the block its memory is gone."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._stride = _MEMORY + shape.depth * shape.max_bytes
        self.descriptor = os.memfd_create("ublk")
        os.ftruncate(self.descriptor, shape.queues * self._stride)
        self._memory = mmap.mmap(self.descriptor, shape.queues * self._stride)
        self._given = [os.eventfd(0) for _ in range(shape.queues)]
        self._answered = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(shape.queues)]
        for queue in range(shape.queues):
            _HEADER.pack_into(self._memory, queue * self._stride, self._given[queue], self._answered[queue], 0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.close()
        for descriptor in (self.descriptor, *self._given, *self._answered):
            os.close(descriptor)

    def give(self, tag: int, operation: int, offset: int, length: int, data: bytes = b"", queue: int = 0) -> None:
        """Give the server a request."""
        base = queue * self._stride
        at = base + _MEMORY + tag * self.shape.max_bytes
        self._memory[at : at + len(data)] = data
        where = base + _HEADER.size + tag * _DESCRIPTOR.size
        _DESCRIPTOR.pack_into(self._memory, where, operation, length // SECTOR, offset // SECTOR, 0)
        # Last of all, and alone: the server may have answered before anything behind it is written.
        self._memory[base + _SLOTS + tag * _SLOT.size] = _GIVEN
        os.eventfd_write(self._given[queue], 1)

    def is_answered(self, tag: int, queue: int = 0) -> bool:
        """Whether the server has answered what was given under the tag."""
        return self._slot(tag, queue)[0] == _ARMED

    def answer(self, tag: int, queue: int = 0) -> int:
        """Wait for the answer; its result."""
        while not self.is_answered(tag, queue):
            assert select.select([self._answered[queue]], [], [], _PATIENCE_SECONDS)[0], "no answer"
            os.eventfd_read(self._answered[queue])
        return self._slot(tag, queue)[1]

    def data(self, tag: int, length: int, queue: int = 0) -> bytes:
        """What the server has read."""
        at = queue * self._stride + _MEMORY + tag * self.shape.max_bytes
        return self._memory[at : at + length]

    def do(self, operation: int, offset: int, length: int, data: bytes = b"", *, tag: int = 0, queue: int = 0) -> int:
        """Give a request and wait for its result."""
        self.give(tag, operation, offset, length, data, queue)
        return self.answer(tag, queue)

    def read(self, offset: int, length: int, *, tag: int = 0, queue: int = 0) -> bytes:
        """What users read there."""
        assert self.do(READ, offset, length, tag=tag, queue=queue) == length
        return self.data(tag, length, queue)

    def stop(self) -> None:
        """The device is no more."""
        for queue in range(self.shape.queues):
            struct.pack_into("=I", self._memory, queue * self._stride + 8, 1)
            os.eventfd_write(self._given[queue], 1)

    def _slot(self, tag: int, queue: int) -> tuple[int, int]:
        state, result = _SLOT.unpack_from(self._memory, queue * self._stride + _SLOTS + tag * _SLOT.size)
        return state, result
