"""What parked requests of the engine's native front ends have in common: what is left of them, and what they lack."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from tapfs.kernel._engine import ffi
from tapfs.kernel.engine import EngineDisk, Outcome

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData


class Queue(IntEnum):
    """Which requests a thread takes: reads and writes, or those that wait for the host's disk."""

    MOVES = 0
    OTHERS = 1


class Parked:
    """Bytes ``[offset, offset + length)`` of the disk are what is left of a parked request."""

    def __init__(self, disk: EngineDisk, parked: CData) -> None:
        self._disk = disk
        self._parked = parked
        self._answered = False

    @property
    def offset(self) -> int:
        """The first byte of the disk that is left to do."""
        offset: int = self._parked.offset
        return offset

    @property
    def length(self) -> int:
        """Bytes that are left to do."""
        length: int = self._parked.length
        return length

    @property
    def data(self) -> memoryview:
        """What a WRITE has left to write: nobody changes it, and it is valid until the request is completed."""
        return memoryview(ffi.buffer(self._parked.data, self._parked.length))

    def outcome(self) -> Outcome:
        """What a READ or WRITE lacks. Raises the ImageError that it met instead."""
        return self._disk.finished(self._parked.outcome)
