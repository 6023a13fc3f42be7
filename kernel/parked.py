"""Parked requests of the engine's native front ends: what is left of each, what it lacks, and its answer.

A native thread parks a request that needs a driver (a map, a reservation) or must wait for the host's disk. A thread
of the owner takes it, serves it, and ends it by `resume`, `complete` or `fail`. kernel/src/serving/park.c is the other
half of this module.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import TYPE_CHECKING

from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.engine import EngineDisk, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from tapfs.kernel._engine import CData


class Queue(IntEnum):
    """Which requests a thread takes, as in serving/serving.h."""

    #: Reads and writes that lack a map.
    MOVES = 0
    #: What may take long: seeks, zeros, discards.
    OTHERS = 1
    #: Flushes.
    SYNCS = 2
    #: Writes that lack places. They are taken together, because one reservation serves many.
    WRITES = 3


def take(
    next_parked: Callable[[CData, Queue, CData, int], int],
    front_end: CData,
    queue: Queue,
    *,
    together: Container[Queue] = (Queue.WRITES,),
) -> list[CData]:
    """Wait for parked requests of a front end; none when it is being stopped.

    Of the queues that are served `together` all that wait are taken.
    """
    capacity = lib.TAPFS_PARKED_AT_ONCE if queue in together else 1
    parked = ffi.new("tapfs_parked[]", capacity)
    count = next_parked(front_end, queue, parked, capacity)
    return [ffi.new("tapfs_parked *", parked[i]) for i in range(count)]


class Parked:
    """A request that waits for the thread that took it; `resume`, `complete` or `fail` must end it.

    Bytes ``[offset, offset + length)`` of the disk are what is left of it. A front end says in a subclass how it is
    tried again and how it is answered.
    """

    def __init__(self, disk: EngineDisk, front_end: CData, parked: CData) -> None:
        self._disk = disk
        self._front_end = front_end
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

    @property
    def segment(self) -> tuple[int, int, CData]:
        """The same as a run for `tapfs.kernel.writes.Segments`: offset, length, data."""
        parked = self._parked
        return parked.offset, parked.length, parked.data

    @property
    def tried(self) -> int:
        """When the try of a READ or WRITE began that ended as `outcome` says, or earlier: `time.monotonic_ns`."""
        tried: int = self._parked.tried
        return tried

    def outcome(self) -> Outcome:
        """What a READ or WRITE lacks. Raises the ImageError that it met instead."""
        return self._disk.finished(self._parked.outcome)

    def resume(self) -> bool:
        """Try a READ or WRITE again in this thread; whether it has been answered now."""
        self._answered = self._resume() == 0
        return self._answered

    def complete(self, found: int = 0) -> None:
        """Answer with success; of a WRITE every byte is written. `found` is the offset that a SEEK has found."""
        self._answer_once(0, found)

    def fail(self, number: int) -> None:
        """Answer with an errno, unless it has been answered."""
        self._answer_once(number or errno.EIO)

    def _answer_once(self, number: int, found: int = 0) -> None:
        if not self._answered:
            self._answered = True
            self._answer(number, found)

    def _resume(self) -> int:
        """The front end's `resume_parked`."""
        raise NotImplementedError  # abstract: each front end has its own

    def _answer(self, number: int, found: int) -> None:
        """The front end's `complete`: an errno or 0, and what a SEEK has found."""
        raise NotImplementedError  # abstract: each front end has its own
