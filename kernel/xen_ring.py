"""The engine's Xen rings as Python sees them: native threads that answer a frontend's block requests.

A request that needs a driver (a map, a reservation) or waits for the disk (flush, discard) is parked. A thread of the
owner takes it by `next_parked`, serves it, and answers through the :class:`ParkedRequest`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from tapfs.errors import from_os_error, limit_reached
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.engine import EngineDisk
from tapfs.kernel.metrics import Metrics, read_metrics
from tapfs.kernel.parked import Parked, Queue, take

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData


class Protocol(IntEnum):
    """The frontend's ABI (`protocol` in xenstore). Native is that of this process."""

    NATIVE = 0
    X86_32 = 1
    X86_64 = 2


class Grants(IntEnum):
    """How data comes from and to the frontend's pages.

    PERSISTENT is for frontends that say feature-persistent; where pages cannot be mapped their data is copied.
    """

    COPY = 0
    MAP = 1
    PERSISTENT = 2


class Request(IntEnum):
    """What a parked request wants, as in xen.h."""

    READ = 0
    WRITE = 1
    SYNC = 2
    DISCARD = 3


class XenStatistics(NamedTuple):
    """Requests since the start: answered, whatever the answer, and how."""

    reads: int
    writes: int
    flushes: int
    barriers: int
    discards: int
    #: Bytes of those that succeeded.
    read_bytes: int
    written_bytes: int
    #: Answered with an error.
    errors: int
    #: Moved together with the request before.
    merged: int
    parked: int
    #: Moved by the ring's thread without waiting.
    at_once: int
    #: Of these, copied to the frontend out of the host's own memory.
    borrowed: int
    #: Sent to the frontend.
    notifications: int
    #: Responses were published so often.
    batches: int
    #: Nanoseconds that requests waited for the rate limit.
    throttled_ns: int
    #: Taken and not answered, now.
    in_flight: int


class ParkedRequest(Parked):
    """One request of a ring, or several that are moved as one."""

    def __init__(self, disk: EngineDisk, device: CData, parked: CData) -> None:
        super().__init__(disk, device, parked)
        self.request = Request(parked.request)

    def _resume(self) -> int:
        return lib.tapfs_xen_resume_parked(self._front_end, self._parked.ticket, self._parked)

    def _answer(self, number: int, found: int) -> None:
        del found  # no request of a ring seeks
        lib.tapfs_xen_complete(self._front_end, self._parked.ticket, number)


class XenDevice:
    """One block device of a frontend: its rings, served from an engine disk by a thread for each.

    `machine`: the directory of a simulated machine, None for Xen itself. `journal`: a descriptor of a file in memory
    (tmpfs), which outlives this process and has what it had taken and not answered; an empty one belongs to rings of
    which nothing was taken. `writable`: else writes, flushes and discards are refused. `indirect_segments`: the most
    in a request, up to 256; 0 refuses indirect requests. `workers`: threads of each ring for what blocks.

    The disk, and one that replaces it, must stay open until `stop`, the journal until `close`. `pause`,
    `replace_disk`, `resume`, `stop` and `close` are for one thread at a time; all else is for any.

    Raises ImageError(io, denied, not found…) if the machine, a grant or a port cannot be had.
    """

    def __init__(
        self,
        disk: EngineDisk,
        *,
        machine: str | None,
        domain: int,
        protocol: Protocol,
        grants: Grants,
        journal: int,
        writable: bool,
        discard: bool,
        indirect_segments: int = 256,
        workers: int = 4,
        io_uring: bool = True,
    ) -> None:
        self._disk = disk
        name = ffi.NULL if machine is None else ffi.new("char[]", os.fsencode(machine))
        options = ffi.new(
            "tapfs_xen_options *",
            {
                "machine": name,
                "domain": domain,
                "protocol": protocol,
                "grants": grants,
                "indirect_segments": indirect_segments,
                "workers": workers,
                "journal": journal,
                "writable": writable,
                "discard": discard,
                "io_uring": io_uring,
            },
        )
        device = lib.tapfs_xen_new(disk.handle, options)
        if device == ffi.NULL:
            raise from_os_error(OSError(ffi.errno, ""), path=machine, op="open the grants of the domain")
        self._device: CData | None = ffi.gc(device, lib.tapfs_xen_free)

    @property
    def _handle(self) -> CData:
        if self._device is None:
            raise ValueError("the device is closed")
        return self._device

    def add_ring(self, references: Sequence[int], port: int) -> None:
        """Map the pages of the next ring, 1 to 16, and bind its event channel; before `start`."""
        pages = ffi.new("uint32_t[]", list(references))
        self._check(lib.tapfs_xen_add_ring(self._handle, pages, len(references), port), "map the frontend's ring")

    def start(self) -> None:
        """Take the rings up where the journal says they are, and notify the frontend once.

        Raises ImageError; only `stop` and `close` may follow then.
        """
        result = lib.tapfs_xen_start(self._handle)
        if result == -errno.EAGAIN:
            raise limit_reached("threads", path=None, op="start the frontend's rings")
        self._check(result, "start the frontend's rings")

    @property
    def ended_descriptor(self) -> int:
        """Becomes readable when a ring has ended by itself: `problem` says why."""
        return lib.tapfs_xen_ended_fd(self._handle)

    def problem(self) -> str | None:
        """How the frontend broke the protocol, if it did. What was taken from that ring is still answered."""
        problem = lib.tapfs_xen_problem(self._handle)
        return None if problem == ffi.NULL else ffi.string(problem).decode()

    def next_parked(self, queue: Queue) -> list[ParkedRequest]:
        """Wait for parked requests; none when the device is being stopped. From any thread."""
        taken = take(lib.tapfs_xen_next_parked, self._handle, queue)
        return [ParkedRequest(self._disk, self._handle, parked) for parked in taken]

    def pause(self) -> None:
        """Take no more requests and wait until none is in flight; parked ones must be served meanwhile."""
        lib.tapfs_xen_pause(self._handle)

    def replace_disk(self, disk: EngineDisk, *, writable: bool, discard: bool) -> None:
        """While paused: serve another disk. The old one is not used any more."""
        lib.tapfs_xen_set_disk(self._handle, disk.handle, writable, discard)
        self._disk = disk

    def resume(self) -> None:
        """After `pause`: go on."""
        lib.tapfs_xen_unpause(self._handle)

    def limit(self, bytes_per_second: int, requests_per_second: int) -> None:
        """Bound what the rings take together, from now on; 0: no bound. A request of any size passes in the end."""
        lib.tapfs_xen_limit(self._handle, bytes_per_second, requests_per_second)

    def statistics(self) -> XenStatistics:
        """The counters now."""
        counters = ffi.new("tapfs_xen_statistics *")
        lib.tapfs_xen_counters(self._handle, counters)
        return XenStatistics._make(getattr(counters, name) for name in XenStatistics._fields)

    def metrics(self) -> Metrics:
        """What was asked for, by kind, and how long it took."""
        return read_metrics(lib.tapfs_xen_metrics(self._handle))

    def stop(self) -> None:
        """Pause for good and end the threads; `next_parked` gives None. What was not taken stays in the rings."""
        lib.tapfs_xen_stop(self._handle)

    def close(self) -> None:
        """Stop, unmap the rings and free everything. No parked request may be in anybody's hands."""
        if self._device is not None:
            ffi.release(self._device)
            self._device = None

    @staticmethod
    def _check(result: int, op: str) -> None:
        if result < 0:
            raise from_os_error(OSError(-result, os.strerror(-result)), path=None, op=op)
