"""dom0 as a frontend: its pages, grants and event channels, by the kernel's gntalloc and evtchn devices.

It stands in for the `Domain` of the simulated machine, so that the frontend of the suite runs against Xen itself.
Structures: Linux' include/uapi/xen/gntalloc.h and evtchn.h.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
from collections.abc import Sequence

from tests.xen.blkif import PAGE
from tests.xen.machine import PATIENCE

_ALLOCATE, _DEALLOCATE = 24 << 16 | ord("G") << 8 | 5, 16 << 16 | ord("G") << 8 | 6
_BIND_UNBOUND, _UNBIND, _NOTIFY = (4 << 16 | ord("E") << 8 | number for number in (2, 3, 4))
_WRITABLE = 1


class EventPort:
    """An event channel that dom0 offers to dom0."""

    def __init__(self) -> None:
        self._device = os.open("/dev/xen/evtchn", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.number = fcntl.ioctl(self._device, _BIND_UNBOUND, bytearray(struct.pack("=I", 0)))

    def fileno(self) -> int:
        return self._device

    def notify(self) -> None:
        fcntl.ioctl(self._device, _NOTIFY, bytearray(struct.pack("=I", self.number)))

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Wait for a notification and take it; whether one came in time."""
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return False
        os.write(self._device, os.read(self._device, PAGE))  # unmasks
        return True

    def close(self) -> None:
        fcntl.ioctl(self._device, _UNBIND, bytearray(struct.pack("=I", self.number)))
        os.close(self._device)


class GrantingDomain:
    """Pages that are granted to domain 0 for as long as they are allocated, most of them writable."""

    number = 0

    def __init__(self, pages: int = 400, readonly_pages: int = 8) -> None:
        self._device = os.open("/dev/xen/gntalloc", os.O_RDWR | os.O_CLOEXEC)
        self._writable = pages
        self._references: list[int] = []
        self._indices: list[int] = []
        total = pages + readonly_pages
        for page in range(total):
            argument = bytearray(struct.pack("=HHIQI4x", 0, _WRITABLE if page < pages else 0, 1, 0, 0))
            fcntl.ioctl(self._device, _ALLOCATE, argument)
            _, _, _, index, reference = struct.unpack("=HHIQI4x", argument)
            self._indices.append(index)
            self._references.append(reference)
        # One mapping of all: the indices follow each other.
        assert self._indices == list(range(self._indices[0], self._indices[0] + total * PAGE, PAGE))
        self.memory = mmap.mmap(self._device, total * PAGE, offset=self._indices[0])
        self.words = memoryview(self.memory).cast("I")
        self._free = {True: list(range(pages)), False: list(range(pages, total))}

    def allocate(self, count: int = 1, *, readonly: bool = False) -> list[int]:
        free = self._free[not readonly]
        pages, self._free[not readonly] = free[:count], free[count:]
        assert len(pages) == count, "no page is left"
        for page in pages:
            self.write_page(page, bytes(PAGE))
        return pages

    def free(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._free[page < self._writable].append(page)

    def read_page(self, page: int, offset: int = 0, length: int = PAGE) -> bytes:
        return self.memory[page * PAGE + offset : page * PAGE + offset + length]

    def write_page(self, page: int, data: bytes, offset: int = 0) -> None:
        self.memory[page * PAGE + offset : page * PAGE + offset + len(data)] = data

    def grant(self, page: int, *, readonly: bool = False) -> int:  # noqa: ARG002 - as that of the simulated machine
        """The reference of a page, which it has from the start."""
        return self._references[page]

    def revoke(self, *references: int) -> None:
        """The kernel takes grants back when all is closed."""

    def port(self) -> EventPort:
        return EventPort()

    def close_port(self, port: EventPort) -> None:
        port.close()

    def close(self) -> None:
        self.words.release()
        self.memory.close()
        os.close(self._device)
