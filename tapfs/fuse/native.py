"""Data requests answered by native threads of the engine, between the kernel and pyfuse3.

pyfuse3 keeps the tree. It is given one end of a socket as if that were /dev/fuse. The engine reads the real connection,
answers the requests of data nodes, and passes the others on. A request that needs a driver (a map, a reservation) or
waits for the disk (a flush) is parked. Threads of `tapfs.serving.parked` serve it by calling the image. They do not go
through trio, which would cost each request another two changes of thread.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import trio

from tapfs.disk.image import Image
from tapfs.errors import ImageError
from tapfs.fuse import long_requests
from tapfs.fuse.handover import Handover
from tapfs.fuse.tree import MadeFile, ServedFile, Tree, Window
from tapfs.kernel.fuse_server import FuseServer, ParkedRequest, Request, ServerStatistics
from tapfs.kernel.metrics import Metrics
from tapfs.serving.log import log
from tapfs.serving.parked import ParkedThreads, finish_move, finish_writes

#: One engine thread per processor, within these bounds.
_MIN_THREADS, _MAX_THREADS = 2, 4

#: Bytes of answers that may be on their way from pyfuse3. Its answers are small, because none of them has data.
_SOCKET_BYTES = 4 << 20


class NativeEngine:
    """Native threads on a mounted FUSE connection, for the windows of a tree.

    Takes over `connections`, descriptors of one connection; they are closed if the engine cannot serve it. With
    `handover` it goes on where another process has served. `stop` must come before the image is closed.
    """

    def __init__(
        self,
        image: Image,
        tree: Tree,
        connections: Sequence[int],
        *,
        passthrough: bool,
        handover: Handover | None = None,
    ) -> None:
        self._image = image
        self._last_counted: Metrics | None = None
        self._tree = tree
        self._making = threading.Lock()
        self._stopped = False
        self._connections = tuple(connections)
        with ExitStack() as on_error:
            closing_connection = on_error.enter_context(ExitStack())
            for connection in connections:
                closing_connection.callback(os.close, connection)
            self._backing = _backing_file(image) if passthrough else None
            on_error.callback(self._close_backing)
            ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            on_error.callback(self._theirs.close)
            with ours:
                self._theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
                self._server = FuseServer(connections[0], ours.fileno(), image.engine_disk)
                ours.detach()
            closing_connection.pop_all()
            on_error.callback(self._server.close)
            for connection in connections[1:]:
                self._server.add_connection(connection)
            self._add_nodes(tree)
            if handover is not None:
                self._server.take_over(handover.init, handover.backing)
            self._parked = ParkedThreads(
                self._server.next_parked,
                self._answer,
                lambda writes: finish_writes(image, writes),
                path=lambda: image.path,
            )
            on_error.pop_all()

    def _add_nodes(self, tree: Tree) -> None:
        for node in tree.nodes():
            if isinstance(node.content, MadeFile):
                self._server.add_made_node(node.inode)
                node.content.when_made = partial(self._serve_made, node.inode)
            elif isinstance(node.content, Window):
                window = node.content
                whole = window == Window(0, self._image.size)
                self._server.add_node(
                    node.inode,
                    window.start,
                    window.size,
                    writable=self._image.writable,
                    backing=self._backing if whole else None,
                )

    def _serve_made(self, inode: int, made: ServedFile) -> None:
        """Serve a file that has just been made; where that fails the session goes on serving it."""
        with self._making:
            if self._stopped:
                return
            try:
                self._server.give_pieces(inode, made.size, made.metadata, made.pieces)
            except ImageError as error:
                log.warning("%s: a file made of it is served by pyfuse3: %s", self._image.path, error)

    def session_path(self) -> str:
        """What pyfuse3 takes as the mount point; it owns that descriptor from then on."""
        return f"/dev/fd/{self._theirs.detach()}"

    def start(self) -> None:
        """Begin to answer. Raises ImageError(io); only `stop` may follow then."""
        # First the threads that the host may refuse without harm: nothing has been taken from the kernel yet.
        self._parked.start()
        self._server.start(max(native_threads(), len(self._connections)))

    def init_request(self) -> bytes | None:
        """What a successor needs, once the mount has answered; None if there can be none."""
        return self._server.init_request()

    def backing(self) -> Mapping[int, int]:
        """By what the kernel knows the files that it reads by itself, for the inodes of their nodes."""
        numbers = {node.inode: self._server.backing(node.inode) for node in self._tree.nodes()}
        return {inode: number for inode, number in numbers.items() if number}

    @property
    def connections(self) -> Sequence[int]:
        """The descriptors of the connection; they are the engine's."""
        return self._connections

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

    def metrics(self) -> Metrics:
        """What was asked for, by kind, and how long it took; also after `stop`."""
        return self._server.metrics() if self._last_counted is None else self._last_counted

    def stop(self) -> None:
        """End all threads and the connection; what was not answered fails."""
        with self._making:
            self._stopped = True
        self._server.stop()
        self._parked.join()
        self._last_counted = self._server.metrics()
        self._theirs.close()
        self._server.close()
        self._close_backing()

    def _close_backing(self) -> None:
        if self._backing is not None:
            os.close(self._backing)
            self._backing = None

    # In the threads

    def _answer(self, parked: ParkedRequest) -> None:
        match parked.request:
            case Request.READ | Request.WRITE:
                finish_move(self._image, parked)
            case Request.SYNC:
                self._image.flush()
                parked.complete()
            case Request.ZERO:
                long_requests.zero(self._image, parked)
            case Request.SEEK_DATA | Request.SEEK_HOLE:
                long_requests.seek(self._image, parked, data=parked.request is Request.SEEK_DATA)


def native_threads() -> int:
    """How many threads read a connection."""
    return max(_MIN_THREADS, min(len(os.sched_getaffinity(0)), _MAX_THREADS))


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
