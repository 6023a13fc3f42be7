"""The engine's vhost-user block device as Python sees it: native threads that answer a guest's virtqueues.

The owner speaks with the front end, and says where the guest's memory and its virtqueues are. A request that needs a
driver is parked. A thread of the owner takes it by `next_parked`, serves it, and answers through the
:class:`ParkedRequest`.
"""

from __future__ import annotations

import os
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from tapfs.errors import from_os_error
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.engine import EngineDisk
from tapfs.kernel.metrics import Metrics, read_metrics
from tapfs.kernel.parked import Parked, Queue, take

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData

#: Bounds of vhost/vhost.h: virtqueues of a device, entries of one, regions of memory, bytes of one zeroing or discard,
#: how many of those a request may have, bytes of the name that a guest may ask for.
RINGS_MAX, ENTRIES_MAX, REGIONS_MAX, ZEROES_MAX, RANGES_MAX, ID_BYTES = 64, 1024, 509, 1 << 30, 32, 20


class Request(IntEnum):
    """What a parked request wants, as in vhost/vhost.h."""

    READ = 0
    WRITE = 1
    SYNC = 2
    ZERO = 3
    #: Zeros that take space.
    FILL = 4
    DISCARD = 5


class Region(NamedTuple):
    """A part of the guest's memory: its addresses in the guest and the front end, its bytes, its place in its file."""

    guest: int
    user: int
    size: int
    offset: int


class Ring(NamedTuple):
    """A split virtqueue: the addresses of its parts in the front end, and what was negotiated.

    `base` is the index from which requests are taken, unless an in-flight region says it. `kick`, `call` and `error`
    are eventfds that do not block, -1 for none; they stay the caller's.
    """

    descriptors: int
    available: int
    used: int
    entries: int
    base: int
    kick: int
    call: int
    error: int
    event_index: bool
    indirect: bool
    #: A write is durable when it is answered.
    write_through: bool
    #: What is written into the guest's memory is noted in the log.
    logs: bool = False
    #: So is what is written into the used ring, which lies in the guest at `used_in_guest`.
    logs_ring: bool = False
    used_in_guest: int = 0


class VhostStatistics(NamedTuple):
    """Requests since the start, whatever the answer."""

    reads: int
    writes: int
    flushes: int
    zeroes: int
    discards: int
    read_bytes: int
    written_bytes: int
    #: Answered with an error.
    errors: int
    #: How often one was parked.
    parked: int
    #: How often a read or write had to wait for the host, while others went on.
    waited: int
    #: Sent to the guest.
    notifications: int
    #: How often a thread woke up.
    kicks: int
    #: Requests that a killed predecessor had taken and not answered.
    redone: int
    #: How long requests waited for the rate limit.
    throttled_ns: int


class ParkedRequest(Parked):
    """A request of a guest."""

    def __init__(self, disk: EngineDisk, device: CData, parked: CData) -> None:
        super().__init__(disk, device, parked)
        self.request = Request(parked.request)

    def leave(self) -> bool:
        """Let go of it, if its ring is being stopped; whether it was.

        It is done when the ring is started again, or fails where no in-flight region keeps it.
        """
        left = bool(lib.tapfs_vhost_leave_parked(self._front_end, self._parked.ticket))
        self._answered = self._answered or left
        return left

    def _resume(self) -> int:
        return lib.tapfs_vhost_resume_parked(self._front_end, self._parked.ticket, self._parked)

    def _answer(self, number: int, found: int) -> None:
        del found  # no request of this protocol seeks
        lib.tapfs_vhost_complete(self._front_end, self._parked.ticket, number)


def inflight_size(rings: int, entries: int) -> int:
    """Bytes of an in-flight region for so many rings."""
    return lib.tapfs_vhost_inflight_size(rings, entries)


class VhostDevice:
    """Serves `size` bytes of an engine disk to a guest that may ask for `identifier`.

    The disk stays open until `close`. Methods that change memory and rings are for one thread at a time. Those that
    the front end's words lead to raise OSError. The constructor raises ImageError(io).
    """

    def __init__(self, disk: EngineDisk, size: int, *, writable: bool, identifier: bytes) -> None:
        self._disk = disk
        device = lib.tapfs_vhost_new(disk.handle, size, writable, identifier[:ID_BYTES])
        if device == ffi.NULL:
            raise from_os_error(OSError(ffi.errno, ""), path=None, op="serve the disk")
        self._device: CData | None = ffi.gc(device, lib.tapfs_vhost_free)

    @property
    def _handle(self) -> CData:
        if self._device is None:
            raise ValueError("the device is closed")
        return self._device

    def replace_disk(self, disk: EngineDisk, size: int, *, writable: bool) -> None:
        """Serve another disk, or the same at another size. No ring is started."""
        lib.tapfs_vhost_set_disk(self._handle, disk.handle, size, writable)
        self._disk = disk

    def add_region(self, region: Region, descriptor: int) -> None:
        """Map a region beside those that there are. No ring is started."""
        _check(lib.tapfs_vhost_add_region(self._handle, ffi.new("tapfs_vhost_region *", region), descriptor))

    def remove_region(self, region: Region) -> None:
        """Unmap the region with these addresses and this size. No ring is started."""
        _check(lib.tapfs_vhost_remove_region(self._handle, ffi.new("tapfs_vhost_region *", region)))

    def remove_regions(self) -> None:
        """Unmap all. No ring is started."""
        lib.tapfs_vhost_remove_regions(self._handle)

    def track_in(self, descriptor: int, offset: int, size: int, rings: int, entries: int) -> None:
        """Note in this part of a file which requests are taken. No ring is started."""
        _check(lib.tapfs_vhost_set_inflight(self._handle, descriptor, offset, size, rings, entries))

    def track_nowhere(self) -> None:
        """Let go of the in-flight region. No ring is started."""
        _check(lib.tapfs_vhost_set_inflight(self._handle, -1, 0, 0, 0, 0))

    def log_in(self, descriptor: int, offset: int, size: int) -> None:
        """Note in this part of a file which pages of the guest are written by rings that log. No ring is started."""
        _check(lib.tapfs_vhost_set_log(self._handle, descriptor, offset, size))

    def log_nowhere(self) -> None:
        """Let go of the log. No ring is started."""
        _check(lib.tapfs_vhost_set_log(self._handle, -1, 0, 0))

    def start_ring(self, index: int, ring: Ring) -> None:
        """Serve a ring, and first what the in-flight region says."""
        _check(lib.tapfs_vhost_start_ring(self._handle, index, ffi.new("tapfs_vhost_ring *", {**ring._asdict()})))

    def set_call(self, index: int, descriptor: int) -> None:
        """Signal another eventfd, -1 for none; the ring may be started or not."""
        _check(lib.tapfs_vhost_set_call(self._handle, index, descriptor))

    def stop_ring(self, index: int, *, drains: bool = False) -> int:
        """Answer what was taken from a ring and end its thread. The index from which requests are to be taken again.

        Blocks. Parked requests must be served meanwhile. With `drains` those that are let go of are answered with an
        error, though an in-flight region could keep them.
        """
        base = lib.tapfs_vhost_stop_ring(self._handle, index, drains)
        _check(min(base, 0))
        return base

    def limit(self, bytes_per_second: int, requests_per_second: int) -> None:
        """Take no more than that from all rings together; 0: no limit. For the thread that starts rings."""
        lib.tapfs_vhost_limit(self._handle, bytes_per_second, requests_per_second)

    @property
    def problem_descriptor(self) -> int:
        """An eventfd that becomes readable when a ring has met a problem."""
        return lib.tapfs_vhost_problem_fd(self._handle)

    def problem(self, index: int) -> str | None:
        """How the guest broke the protocol of a ring since it was started, if it did."""
        problem = lib.tapfs_vhost_problem(self._handle, index)
        return None if problem == ffi.NULL else ffi.string(problem).decode()

    def next_parked(self, queue: Queue) -> list[ParkedRequest]:
        """Wait for parked requests; none when the device is being stopped. From any thread.

        Of writes that lack places, and of flushes, all that wait are taken.
        """
        taken = take(lib.tapfs_vhost_next_parked, self._handle, queue, together=(Queue.WRITES, Queue.SYNCS))
        return [ParkedRequest(self._disk, self._handle, parked) for parked in taken]

    def statistics(self) -> VhostStatistics:
        """The counters now."""
        counters = ffi.new("tapfs_vhost_statistics *")
        lib.tapfs_vhost_counters(self._handle, counters)
        return VhostStatistics._make(getattr(counters, name) for name in VhostStatistics._fields)

    def metrics(self) -> Metrics:
        """What was asked for, by kind, and how long it took."""
        return read_metrics(lib.tapfs_vhost_metrics(self._handle))

    def stop(self) -> None:
        """Have `next_parked` give nothing any more. No ring is started."""
        lib.tapfs_vhost_stop(self._handle)

    def close(self) -> None:
        """Free everything. No parked request may be in anybody's hands."""
        if self._device is not None:
            ffi.release(self._device)
            self._device = None


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
