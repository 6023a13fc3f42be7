"""The engine's NBD server as Python sees it: native threads that answer the requests of clients.

The owner negotiates with a client and hands its socket over. A request that needs a driver is parked. A thread of the
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

_OP = "start the NBD server"


class Request(IntEnum):
    """What a parked request wants, as in nbd/nbd.h."""

    READ = 0
    WRITE = 1
    SYNC = 2
    ZERO = 3
    #: Zeros that take space.
    FILL = 4
    #: Zeros, but only if that is quicker than writing them.
    FAST_ZERO = 5
    DISCARD = 6
    CACHE = 7
    STATUS = 8


class Style(IntEnum):
    """How replies look."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


class Access(IntEnum):
    """What clients may do with a disk.

    LATER: they may read its first page and flush; other requests wait for `NativeServer.replace_disk`.
    """

    READ_ONLY = 0
    WRITABLE = 1
    LATER = 2


class NbdStatistics(NamedTuple):
    """Requests since the start, and what there is now."""

    #: Answered with success.
    reads: int
    writes: int
    #: How often one was parked.
    parked: int
    #: How often a read or write had to wait for the host, while others went on.
    waited: int
    #: Clients that are connected now.
    connections: int
    #: Bytes of requests and replies in memory now.
    held: int


class Asked(NamedTuple):
    """The header of a request, as the native codec reads it."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class ParkedRequest(Parked):
    """A request of a client."""

    def __init__(self, disk: EngineDisk, server: CData, parked: CData) -> None:
        super().__init__(disk, server, parked)
        self.request = Request(parked.request)

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more: its client is gone, or the server stops."""
        return bool(lib.tapfs_nbd_given_up(self._front_end, self._parked.ticket))

    def wanted(self) -> tuple[list[int], bool]:
        """The contexts that a STATUS wants, and whether one run of each is enough."""
        single = ffi.new("int *")
        bits = lib.tapfs_nbd_wanted(self._front_end, self._parked.ticket, single)
        return [number for number in range(bits.bit_length()) if bits >> number & 1], bool(single[0])

    def add_states(self, context: int, states: Sequence[tuple[int, int]]) -> None:
        """The states of the range in a wanted context, from its start: lengths and bits. Raises MemoryError."""
        array = ffi.new("tapfs_nbd_state[]", states)
        if lib.tapfs_nbd_add_states(self._front_end, self._parked.ticket, context, array, len(states)) < 0:
            raise MemoryError

    def _resume(self) -> int:
        return lib.tapfs_nbd_resume_parked(self._front_end, self._parked.ticket, self._parked)

    def _answer(self, number: int, found: int) -> None:
        del found  # no request of this protocol seeks
        lib.tapfs_nbd_complete(self._front_end, self._parked.ticket, number)


class NativeServer:
    """Serves an engine disk of `size` bytes to clients. The disk stays open until `close`. Raises ImageError(io)."""

    def __init__(self, disk: EngineDisk, size: int, access: Access) -> None:
        self._disk = disk
        server = lib.tapfs_nbd_new(disk.handle, size, access)
        if server == ffi.NULL:
            raise from_os_error(OSError(ffi.errno, ""), path=None, op=_OP)
        self._server: CData | None = ffi.gc(server, lib.tapfs_nbd_free)

    @property
    def _handle(self) -> CData:
        if self._server is None:
            raise ValueError("the server is closed")
        return self._server

    def start(self, threads: int) -> None:
        """Be ready for clients. Raises ImageError(io); only `stop` and `close` may follow then."""
        result = lib.tapfs_nbd_start(self._handle, threads)
        if result == -errno.EAGAIN:
            raise limit_reached("threads", path=None, op=_OP)
        if result < 0:
            raise from_os_error(OSError(-result, os.strerror(-result)), path=None, op=_OP)

    def add(self, descriptor: int, style: Style, contexts: int) -> None:
        """Serve a client on its socket, whose negotiation is over. Takes over the descriptor, unless it raises OSError.

        Bit i of `contexts`: the client has selected the context i.
        """
        result = lib.tapfs_nbd_add(self._handle, descriptor, style, contexts)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    @property
    def ended_descriptor(self) -> int:
        """An eventfd that becomes readable when a connection has ended, and when a request waits (`Access.LATER`)."""
        return lib.tapfs_nbd_ended_fd(self._handle)

    @property
    def waits(self) -> bool:
        """Whether a request waits for the disk, or has waited (`Access.LATER`)."""
        return bool(lib.tapfs_nbd_waits(self._handle))

    def pause(self) -> None:
        """Begin nothing more that clients ask for, and wait until nothing is under way. Their connections stay."""
        lib.tapfs_nbd_pause(self._handle)

    def replace_disk(self, disk: EngineDisk, size: int, access: Access) -> None:
        """While paused: serve another disk; the old one may be closed then."""
        lib.tapfs_nbd_set_disk(self._handle, disk.handle, size, access)
        self._disk = disk

    def resume(self) -> None:
        """Go on with what clients ask for."""
        lib.tapfs_nbd_unpause(self._handle)

    def limit(self, bytes_per_second: int, requests_per_second: int) -> None:
        """Bound what all clients together may ask for, from now on; 0: no bound."""
        lib.tapfs_nbd_limit(self._handle, bytes_per_second, requests_per_second)

    def next_parked(self, queue: Queue) -> list[ParkedRequest]:
        """Wait for parked requests; none when the server is being stopped. From any thread.

        Of writes that lack places, and of flushes, all that wait are taken.
        """
        taken = take(lib.tapfs_nbd_next_parked, self._handle, queue, together=(Queue.WRITES, Queue.SYNCS))
        return [ParkedRequest(self._disk, self._handle, parked) for parked in taken]

    def statistics(self) -> NbdStatistics:
        """The counters now."""
        counters = ffi.new("tapfs_nbd_statistics *")
        lib.tapfs_nbd_counters(self._handle, counters)
        return NbdStatistics._make(getattr(counters, name) for name in NbdStatistics._fields)

    def metrics(self) -> Metrics:
        """What was asked for, by kind, and how long it took."""
        return read_metrics(lib.tapfs_nbd_metrics(self._handle))

    def stop(self) -> None:
        """Answer what clients have asked for, and end their connections and the native threads."""
        lib.tapfs_nbd_stop(self._handle)

    def close(self) -> None:
        """Free everything. No parked request may be in anybody's hands."""
        if self._server is not None:
            ffi.release(self._server)
            self._server = None


def decode(message: bytes, *, extended: bool) -> tuple[int, Asked] | None:
    """The header of a request at the start of a message, and its length; None: it is cut. Raises ValueError."""
    asked = ffi.new("tapfs_nbd_asked *")
    length = lib.tapfs_nbd_decode(message, len(message), extended, asked)
    if length < 0:
        raise ValueError("is no request")
    return (length, Asked._make(getattr(asked, name) for name in Asked._fields)) if length else None
