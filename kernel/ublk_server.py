"""The engine's ublk server as Python sees it: native threads that answer the requests of a block device of Linux.

A request that needs a driver of a format (a map, a reservation) or waits for the disk (flush, discard) is parked. A
thread of the owner takes it by `next_parked`, serves it, and answers through the :class:`ParkedRequest`.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from tapfs.errors import from_os_error, limit_reached
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.engine import EngineDisk
from tapfs.kernel.metrics import Metrics, read_metrics
from tapfs.kernel.parked import Parked, Queue, take

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData

_OP = "serve the block device"


class Request(IntEnum):
    """What a parked request wants, as in ublk/ublk.h."""

    READ = 0
    WRITE = 1
    SYNC = 2
    DISCARD = 3
    ZERO = 4
    #: Zeros that take space.
    FILL = 5


class UblkStatistics(NamedTuple):
    """Requests since the start: answered, whatever the answer, and how."""

    reads: int
    writes: int
    flushes: int
    discards: int
    zeroes: int
    #: Bytes of those that succeeded.
    read_bytes: int
    written_bytes: int
    #: Answered with an error.
    errors: int
    parked: int
    #: Moved by the queue's thread without waiting.
    at_once: int
    #: Moved by the kernel between the file and the pages of the request.
    passed: int
    #: How often a queue's thread has asked the kernel for more.
    batches: int
    #: Nanoseconds that requests waited for the rate limit.
    throttled_ns: int
    #: Begun and not answered, now.
    in_flight: int


class ParkedRequest(Parked):
    """One request of the kernel."""

    def __init__(self, disk: EngineDisk, server: CData, parked: CData) -> None:
        super().__init__(disk, server, parked)
        self.request = Request(parked.request)

    def _resume(self) -> int:
        return lib.tapfs_ublk_resume_parked(self._front_end, self._parked.ticket, self._parked)

    def _answer(self, number: int, found: int) -> None:
        del found  # no request of a block device seeks
        lib.tapfs_ublk_complete(self._front_end, self._parked.ticket, number)


class Shape(NamedTuple):
    """What a device and its server agree on: queues, requests of each at once, bytes of a read or write."""

    queues: int
    depth: int
    max_bytes: int


class UblkServer:
    """Serves a block device from an engine disk, by a thread for each queue.

    `device` is a descriptor of the driver's character device; or `simulated` one of a file in memory in which a test
    plays the driver. `zero_copy`: the device gives the pages of its requests to the queues' rings (`driver.ZERO_COPY`).
    `workers`: threads of each queue for what blocks. The disk, and one that replaces it, must stay
    open until `stop`, the descriptor until `close`. `pause`, `replace_disk`, `resume`, `stop` and `close` are for one
    thread at a time; all else is for any. Raises ImageError(io).
    """

    def __init__(
        self,
        disk: EngineDisk,
        shape: Shape,
        *,
        device: int = -1,
        simulated: int = -1,
        writable: bool,
        zero_copy: bool = False,
        workers: int = 4,
        io_uring: bool = True,
    ) -> None:
        self._disk = disk
        options = ffi.new(
            "tapfs_ublk_options *",
            {
                "device": device,
                "simulated": simulated,
                **shape._asdict(),
                "workers": workers,
                "writable": writable,
                "io_uring": io_uring,
                "zero_copy": zero_copy,
            },
        )
        server = lib.tapfs_ublk_new(disk.handle, options)
        if server == ffi.NULL:
            raise from_os_error(OSError(ffi.errno, ""), path=None, op=_OP)
        self._server: CData | None = ffi.gc(server, lib.tapfs_ublk_free)

    @property
    def _handle(self) -> CData:
        if self._server is None:
            raise ValueError("the server is closed")
        return self._server

    def start(self) -> None:
        """Have every queue wait for requests. Raises ImageError; only `stop` and `close` may follow then."""
        result = lib.tapfs_ublk_start(self._handle)
        if result == -errno.EAGAIN:
            raise limit_reached("threads", path=None, op=_OP)
        if result < 0:
            raise from_os_error(OSError(-result, os.strerror(-result)), path=None, op=_OP)

    @property
    def ended_descriptor(self) -> int:
        """An eventfd: readable when the kernel has ended the device, or a queue does not work (`problem`)."""
        return lib.tapfs_ublk_ended_fd(self._handle)

    def problem(self) -> int:
        """The errno of a queue that does not work; 0: none."""
        return lib.tapfs_ublk_problem(self._handle)

    def next_parked(self, queue: Queue) -> list[ParkedRequest]:
        """Wait for parked requests; none when the server is being stopped. From any thread.

        Of writes that lack places, and of flushes, all that wait are taken.
        """
        taken = take(lib.tapfs_ublk_next_parked, self._handle, queue, together=(Queue.WRITES, Queue.SYNCS))
        return [ParkedRequest(self._disk, self._handle, parked) for parked in taken]

    def pause(self) -> None:
        """Begin no more requests and wait until none is in flight; parked ones must be served meanwhile."""
        lib.tapfs_ublk_pause(self._handle)

    def replace_disk(self, disk: EngineDisk, *, writable: bool) -> None:
        """While paused: serve another disk. The old one is not used any more."""
        lib.tapfs_ublk_set_disk(self._handle, disk.handle, writable)
        self._disk = disk

    def resume(self) -> None:
        """After `pause`: go on."""
        lib.tapfs_ublk_unpause(self._handle)

    def limit(self, bytes_per_second: int, requests_per_second: int) -> None:
        """Bound what the queues begin together, from now on; 0: no bound. A request of any size passes in the end."""
        lib.tapfs_ublk_limit(self._handle, bytes_per_second, requests_per_second)

    def statistics(self) -> UblkStatistics:
        """The counters now."""
        counters = ffi.new("tapfs_ublk_statistics *")
        lib.tapfs_ublk_counters(self._handle, counters)
        return UblkStatistics._make(getattr(counters, name) for name in UblkStatistics._fields)

    def metrics(self) -> Metrics:
        """What was asked for, by kind, and how long it took."""
        return read_metrics(lib.tapfs_ublk_metrics(self._handle))

    def stop(self) -> None:
        """Finish what is in flight and end the threads; what was not begun is the kernel's again, for a successor."""
        lib.tapfs_ublk_stop(self._handle)

    def close(self) -> None:
        """Stop and free everything. No parked request may be in anybody's hands."""
        if self._server is not None:
            ffi.release(self._server)
            self._server = None


def control(descriptor: int, command: int, device: int, buffer: bytearray, data: int = 0) -> int:
    """Have the driver's control device carry out a command; what it answers. Raises OSError.

    `buffer` goes to the kernel and comes back from it.
    """
    memory = ffi.from_buffer(buffer, require_writable=True) if buffer else ffi.NULL
    result = lib.tapfs_ublk_control(descriptor, command, device, memory, len(buffer), data)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
