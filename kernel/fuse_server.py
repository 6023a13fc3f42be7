"""The engine's FUSE server as Python sees it: native threads between /dev/fuse and a pyfuse3 session.

The native threads answer the requests of data nodes. A request that needs a driver is parked. A thread of the owner
takes it by `next_parked`, serves it, and answers through the :class:`ParkedRequest`.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from tapfs.errors import from_os_error, limit_reached
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.engine import EngineDisk
from tapfs.kernel.metrics import Metrics, read_metrics
from tapfs.kernel.parked import Parked, Queue, take

if TYPE_CHECKING:
    from array import array
    from collections.abc import Mapping

    from tapfs.kernel._engine import CData


#: The kernel's INIT request has 104 bytes, and may grow.
_MAX_INIT_BYTES = 256


#: Of a file that was made: where its pieces of the disk begin, ascending; their offsets of the disk; their lengths.
Pieces: TypeAlias = "tuple[array[int], array[int], array[int]]"


class Request(IntEnum):
    """What a parked request wants, as in fuse/server.h."""

    READ = 0
    WRITE = 1
    SYNC = 2
    ZERO = 3
    SEEK_DATA = 4
    SEEK_HOLE = 5


class ServerStatistics(NamedTuple):
    """Requests since the start."""

    #: Answered through the engine.
    reads: int
    writes: int
    #: How often one was parked.
    parked: int
    #: How often a read or write had to wait for the host, and was moved beside the threads that read the connection.
    waited: int
    #: Passed to the session.
    forwarded: int


class ParkedRequest(Parked):
    """A request of a data node."""

    def __init__(self, disk: EngineDisk, server: CData, parked: CData) -> None:
        super().__init__(disk, server, parked)
        self.request = Request(parked.request)

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more: its user was sent a signal, or the server stops."""
        return bool(lib.tapfs_fuse_given_up(self._front_end, self._parked.ticket))

    def _resume(self) -> int:
        return lib.tapfs_fuse_resume_parked(self._front_end, self._parked.ticket, self._parked)

    def _answer(self, number: int, found: int) -> None:
        lib.tapfs_fuse_complete(self._front_end, self._parked.ticket, number, found)


class FuseServer:
    """Serves windows of an engine disk on a FUSE connection.

    Takes over `connection`, a descriptor of /dev/fuse that is mounted, and `session`, one end of
    a stream socket pair whose other end pyfuse3 was given as ``/dev/fd/N``. The disk must stay
    open until `close`. Raises ImageError(io); the descriptors are still the caller's then.
    """

    def __init__(self, connection: int, session: int, disk: EngineDisk) -> None:
        self._disk = disk
        server = lib.tapfs_fuse_new(connection, session, disk.handle)
        if server == ffi.NULL:
            raise from_os_error(OSError(ffi.errno, ""), path=None, op="start the FUSE server")
        self._server: CData | None = ffi.gc(server, lib.tapfs_fuse_free)
        self._alive: list[CData] = []

    @property
    def _handle(self) -> CData:
        if self._server is None:
            raise ValueError("the server is closed")
        return self._server

    def add_node(self, inode: int, start: int, size: int, *, writable: bool, backing: int | None = None) -> None:
        """Serve ``[start, start + size)`` of the disk as a file; before `start`.

        `backing`: a descriptor of a regular file that is this node byte for byte; the kernel is
        asked to read and write it by itself (passthrough).
        """
        result = lib.tapfs_fuse_add_node(self._handle, inode, start, size, writable, -1 if backing is None else backing)
        self._check(result, "serve a node")

    def add_made_node(self, inode: int) -> None:
        """A file that is made later (`give_pieces`), and the session's until then; before `start`."""
        self._check(lib.tapfs_fuse_add_made_node(self._handle, inode), "serve a node")

    def give_pieces(self, inode: int, size: int, metadata: int, pieces: Pieces) -> None:
        """Serve a file of `size` bytes: `pieces` of the disk, and for what is between them the file `metadata`.

        `metadata` is a descriptor of a file in memory, needed until `close`. Once for a node that `add_made_node` has
        added; from any thread until `stop`. Raises ImageError.
        """
        starts, offsets, lengths = (ffi.from_buffer("uint64_t[]", each) for each in pieces)
        self._alive += (starts, offsets, lengths)  # and the arrays with them
        result = lib.tapfs_fuse_give_pieces(
            self._handle, inode, size, metadata, starts, offsets, lengths, len(pieces[0])
        )
        self._check(result, "serve a file that was made")

    def add_connection(self, connection: int) -> None:
        """One more descriptor of the connection, for one more thread; taken over. Before `start`."""
        self._check(lib.tapfs_fuse_add_connection(self._handle, connection), "serve the mount")

    def take_over(self, init: bytes, backing: Mapping[int, int]) -> None:
        """Go on where another process has served: `init` and `backing` are its `init_request` and `backing`.

        The kernel gives the requests again that the other one had not answered. After the nodes were added, before
        `start`. Raises ImageError(io, unsupported).
        """
        for inode, number in backing.items():
            self._check(lib.tapfs_fuse_set_backing(self._handle, inode, number), "go on with a mount")
        self._check(lib.tapfs_fuse_take_over(self._handle, init, len(init)), "go on with a mount")

    def init_request(self) -> bytes | None:
        """What a successor needs (`take_over`); None where the kernel could not give it the unanswered requests."""
        room = ffi.new("uint8_t[]", _MAX_INIT_BYTES)
        length = lib.tapfs_fuse_init_request(self._handle, room, _MAX_INIT_BYTES)
        return bytes(ffi.buffer(room, length)) if length else None

    def backing(self, inode: int) -> int:
        """By what the kernel knows the file that it reads for a node by itself; 0 if it does not."""
        return lib.tapfs_fuse_backing(self._handle, inode)

    def start(self, threads: int) -> None:
        """Start answering. Raises ImageError(io); only `stop` and `close` may follow then."""
        result = lib.tapfs_fuse_start(self._handle, threads)
        if result == -errno.EAGAIN:
            raise limit_reached("threads", path=None, op="start the FUSE server")
        self._check(result, "start the FUSE server")

    @property
    def ended_descriptor(self) -> int:
        """Becomes readable when the kernel or the session has ended the connection."""
        return lib.tapfs_fuse_ended_fd(self._handle)

    @property
    def passthrough_nodes(self) -> int:
        """How many nodes the kernel serves by itself; known once the mount has answered."""
        return lib.tapfs_fuse_passthrough_nodes(self._handle)

    @property
    def last_write_ns(self) -> int:
        """When the last write ended, in nanoseconds since 1970; 0 if there was none."""
        return lib.tapfs_fuse_last_write(self._handle)

    def next_parked(self, queue: Queue) -> list[ParkedRequest]:
        """Wait for parked requests; none when the server is being stopped. From any thread."""
        taken = take(lib.tapfs_fuse_next_parked, self._handle, queue)
        return [ParkedRequest(self._disk, self._handle, parked) for parked in taken]

    def statistics(self) -> ServerStatistics:
        """The counters now."""
        counters = ffi.new("tapfs_fuse_statistics *")
        lib.tapfs_fuse_counters(self._handle, counters)
        return ServerStatistics._make(getattr(counters, name) for name in ServerStatistics._fields)

    def metrics(self) -> Metrics:
        """What was asked for, by kind, and how long it took."""
        return read_metrics(lib.tapfs_fuse_metrics(self._handle))

    def stop(self) -> None:
        """End the native threads; requests that nobody has taken fail with EIO."""
        lib.tapfs_fuse_stop(self._handle)

    def close(self) -> None:
        """End the connection and free everything. No parked request may be in anybody's hands."""
        if self._server is not None:
            ffi.release(self._server)
            self._server = None
            self._alive.clear()

    @staticmethod
    def _check(result: int, op: str) -> None:
        if result < 0:
            raise from_os_error(OSError(-result, os.strerror(-result)), path=None, op=op)
