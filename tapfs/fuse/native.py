"""Data requests answered by native threads of the engine, between the kernel and pyfuse3.

pyfuse3 keeps the tree: it is given one end of a socket as if that were /dev/fuse. The engine
reads the real connection, answers what is asked of the data nodes, and passes on the rest.
What needs a driver (a map, a reservation) or waits for the disk (a flush) is parked; threads
here, which wait in the engine without holding the GIL, serve it by calling the image. They do
not go through trio: that would cost each of these requests another two changes of thread.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterable

import trio

from tapfs.disk.image import Image
from tapfs.errors import ImageError
from tapfs.fuse.tree import Tree, Window
from tapfs.kernel.fuse_server import FuseServer, ParkedRequest, Request, ServerStatistics
from tapfs.kernel.parked import Queue
from tapfs.serving.log import ErrorLog, log
from tapfs.serving.parked import finish_move

#: Threads that supply maps and reservations, and those that flush, zero and seek.
_MOVERS, _OTHERS = 3, 3

#: One engine thread per processor, within these bounds.
_LEAST_THREADS, _MOST_THREADS = 2, 4

#: Bytes of the map looked at first when a hole or its end is sought; doubled as often as needed.
_FIRST_LOOK = 2 << 20

#: What pyfuse3 may have on its way to us: the answers to what is not data are small.
_SOCKET_BYTES = 4 << 20


class NativeEngine:
    """Native threads on a mounted FUSE connection, for the windows of a tree.

    Takes over `connection`; it is closed if the engine cannot serve it. `stop` must come before
    the image is closed.
    """

    def __init__(self, image: Image, tree: Tree, connection: int, *, passthrough: bool) -> None:
        self._image = image
        self._errors = ErrorLog()
        self._threads: list[threading.Thread] = []
        self._backing = _backing_file(image) if passthrough else None
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        try:
            self._server = FuseServer(connection, ours.fileno(), image.engine_disk)
        except BaseException:
            ours.close()
            self._theirs.close()
            os.close(connection)
            self._close_backing()
            raise
        ours.detach()
        try:
            for node in tree.nodes():
                if isinstance(node.content, Window):
                    window = node.content
                    whole = window == Window(0, image.size)
                    self._server.add_node(
                        node.inode,
                        window.start,
                        window.size,
                        writable=image.writable,
                        backing=self._backing if whole else None,
                    )
        except BaseException:
            self._theirs.close()
            self._server.close()
            self._close_backing()
            raise

    def session_path(self) -> str:
        """What pyfuse3 takes as the mount point; it owns that descriptor from then on."""
        return f"/dev/fd/{self._theirs.detach()}"

    def start(self) -> None:
        """Begin to answer. Raises ImageError(io)."""
        processors = len(os.sched_getaffinity(0))
        self._server.start(max(_LEAST_THREADS, min(processors, _MOST_THREADS)))
        for queue, count in ((Queue.MOVES, _MOVERS), (Queue.OTHERS, _OTHERS)):
            for _ in range(count):
                thread = threading.Thread(target=self._serve, args=(queue,), name=f"tapfs {queue.name.lower()}")
                thread.start()
                self._threads.append(thread)

    async def wait_ended(self) -> None:
        """Return when the kernel has ended the connection: the mount is gone."""
        await trio.lowlevel.wait_readable(self._server.ended_descriptor)

    @property
    def passthrough(self) -> bool:
        """Whether the kernel serves a node by itself; known once the mount has answered."""
        return self._server.passthrough_nodes > 0

    def last_write_ns(self) -> int:
        """When the disk was last written, in nanoseconds since 1970; 0 if it was not, as far as we know."""
        if self.passthrough and self._backing is not None and self._image.writable:
            return os.fstat(self._backing).st_mtime_ns
        return self._server.last_write_ns

    def statistics(self) -> ServerStatistics:
        """Requests since the start."""
        return self._server.statistics()

    def stop(self) -> None:
        """End all threads and the connection; what was not answered fails."""
        self._server.stop()
        for thread in self._threads:
            thread.join()
        self._server.close()
        self._close_backing()

    def _close_backing(self) -> None:
        if self._backing is not None:
            os.close(self._backing)
            self._backing = None

    # In the threads

    def _serve(self, queue: Queue) -> None:
        while (parked := self._server.next_parked(queue)) is not None:
            try:
                self._answer(parked)
            except ImageError as error:
                self._errors.add(error)
                parked.fail(error.errno)
            except Exception as error:  # noqa: BLE001  a request that nobody answers would hang its user
                log.error("internal error in a request; please report", exc_info=error)
                parked.fail(errno.EIO)

    def _answer(self, parked: ParkedRequest) -> None:
        match parked.request:
            case Request.READ | Request.WRITE:
                finish_move(self._image, parked)
            case Request.SYNC:
                self._image.flush()
                parked.complete()
            case Request.ZERO:
                self._image.write_zeroes(parked.offset, parked.length)
                parked.complete()
            case Request.SEEK_DATA | Request.SEEK_HOLE:
                found = self._seek(parked.offset, parked.length, data=parked.request is Request.SEEK_DATA)
                if found is None:
                    parked.fail(errno.ENXIO)
                else:
                    parked.complete(found)

    def _seek(self, start: int, length: int, *, data: bool) -> int | None:
        """The first byte that is data, or in a hole; the end of the range is a hole, too."""
        end = start + length
        for offset, stop in _looks(start, end):
            for extent in self._image.extents(offset, stop - offset):
                if extent.data is data:
                    return extent.offset
        return None if data else end


def _backing_file(image: Image) -> int | None:
    """A descriptor for the kernel of the file that is the disk byte for byte.

    A user who keeps a disk open over a forced unmounting keeps its file open, too. Where that
    is a writer the file must stay locked, so that one is the image's own open file, with its locks;
    a reader must not keep others out.
    """
    file = image.whole_file()
    if file is None:
        return None
    return os.dup(file) if image.writable else os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)


def _looks(start: int, end: int) -> Iterable[tuple[int, int]]:
    """The range in pieces that double: what is sought is near, or the holes are large."""
    step = _FIRST_LOOK
    while start < end:
        stop = min(start + step, end)
        yield start, stop
        start = stop
        step *= 2
