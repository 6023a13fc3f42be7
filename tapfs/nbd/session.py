"""The life of an NBD server: listening, negotiating with clients, and the end by a signal or with the last client.

Python negotiates. A client that has chosen a disk is handed to the native threads of its export, which own its socket
from then on. The parts that every front end needs are in `tapfs.serving.service`.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import trio

from tapfs.disk.image import Image
from tapfs.errors import printable
from tapfs.kernel.nbd_tls import TlsServer
from tapfs.nbd.export import Export
from tapfs.nbd.negotiation import Chosen, Negotiation, Rejected
from tapfs.nbd.sockets import PlainChannel, tune
from tapfs.serving.failures import ErrorLog, failure_of
from tapfs.serving.log import log
from tapfs.serving.service import Service

#: Clients that are connected or negotiate at once; one more is turned away.
MOST_CLIENTS = 1024

#: Seconds that a negotiation may take.
_NEGOTIATION_SECONDS = 30

#: Seconds before clients are accepted again after the host had no descriptor or memory for one.
_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Serving:
    """What is to be served where: images with the names of their exports, and sockets that listen.

    The session owns them. `sockets` are the paths of Unix sockets that are removed at the end. With `tls` no client is
    told anything without it.
    """

    images: Sequence[tuple[Image, str]]
    listeners: Sequence[socket.socket]
    sockets: Sequence[str] = ()
    exit_when_idle: bool = False
    tls: TlsServer | None = None


class Session:
    """One server from its first to its last client. There can be one in a process."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._service = Service(serving.images[0][0].path)
        self._errors = ErrorLog()
        self._exports: list[Export] = []
        self._ready: Callable[[], None] = lambda: None
        self._negotiating = 0
        self._had_clients = False

    def run(self, ready: Callable[[], None]) -> None:
        """Serve, and call `ready` once clients may come. Raises the first ImageError, when everything is put away."""
        self._ready = ready
        ending = self._service.ending
        for image, _ in self._serving.images:
            ending.add("flush and close the image", image.close)
        for path in self._serving.sockets:
            ending.add("remove the socket", partial(_remove, path))
        for listener in self._serving.listeners:
            ending.add("close a socket", listener.close)
        if self._serving.tls is not None:
            ending.add("end TLS", self._serving.tls.close)
        self._service.run(self)

    # What the service asks for

    def prepare(self) -> None:
        """Start the native threads."""
        _allow_descriptors()
        for image, name in self._serving.images:
            export = Export(image, name)
            self._service.ending.add("end the native threads", export.stop)
            export.start()
            self._exports.append(export)

    async def serve(self) -> None:
        """Let clients in until the end."""
        for image, _ in self._serving.images:
            if image.writable:
                self._service.flush_periodically(partial(_same, image))
        for export in self._exports:
            self._service.start(partial(self._watch, export), "watch the clients")
        async with trio.open_nursery() as clients:
            for listener in self._serving.listeners:
                clients.start_soon(self._accept, trio.socket.from_stdlib_socket(listener.dup()), clients)
            self._ready()

    async def end(self) -> None:
        """End for a signal: clients that have asked for something get their answers first."""
        self._service.stop_serving()

    # The tasks

    async def _watch(self, export: Export) -> None:
        """Look at each client that goes, for it may be the last."""
        while True:
            await trio.lowlevel.wait_readable(export.ended_descriptor)
            os.eventfd_read(export.ended_descriptor)
            self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._serving.exit_when_idle and self._had_clients and self._clients() == 0:
            log.info("the last client has gone")
            self._service.stop_serving()

    def _clients(self) -> int:
        return self._negotiating + sum(export.statistics().connections for export in self._exports)

    async def _accept(self, listener: trio.socket.SocketType, clients: trio.Nursery) -> None:
        with listener:
            while True:
                try:
                    connection, _ = await listener.accept()
                except OSError as error:  # no descriptor, no memory, or a client that has gone already
                    self._errors.answer(error, path=self._service.path)
                    await trio.sleep(_PAUSE_SECONDS)
                    continue
                if self._clients() >= MOST_CLIENTS:
                    connection.close()
                    continue
                self._negotiating += 1
                clients.start_soon(self._greet, connection)

    async def _greet(self, connection: trio.socket.SocketType) -> None:
        """Negotiate with a client, and hand it over. No client's fault is one of the server."""
        client = _Client(connection, self._serving.tls)
        try:
            with trio.move_on_after(_NEGOTIATION_SECONDS):
                tune(connection)
                chosen = await Negotiation(
                    PlainChannel(connection),
                    self._exports,
                    start_tls=None if self._serving.tls is None else client.start_tls,
                    tls_required=self._serving.tls is not None,
                ).run()
                if chosen is not None:
                    self._hand_over(client.connection.detach(), chosen)
        except Rejected as error:
            log.info("a client was turned away: %s%s", printable(str(error)), client.why())
        except Exception as error:  # noqa: BLE001  the others are served on
            log.error("a client could not be served: %s", failure_of(error, op="negotiate", path=self._service.path))
        finally:
            client.connection.close()
            self._negotiating -= 1
            self._end_if_idle()

    def _hand_over(self, descriptor: int, chosen: Chosen) -> None:
        try:
            self._exports[chosen.export].add(descriptor, chosen.style, chosen.contexts)
        except BaseException:
            os.close(descriptor)
            raise
        self._had_clients = True


class _Client:
    """The socket of a client that negotiates: its own, or the one behind which TLS is."""

    def __init__(self, connection: trio.socket.SocketType, tls: TlsServer | None) -> None:
        self.connection = connection
        self._tls = tls
        self._began = False

    async def start_tls(self) -> PlainChannel:
        """Have the engine decrypt what the client says from now on."""
        if self._tls is None:
            raise Rejected("there is no TLS")
        await trio.lowlevel.checkpoint()
        self._began = True
        descriptor = self.connection.detach()
        try:
            plain = self._tls.begin(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self.connection = trio.socket.from_stdlib_socket(socket.socket(fileno=plain))
        return PlainChannel(self.connection)

    def why(self) -> str:
        """What OpenSSL says of a handshake that failed, as the end of a line."""
        why = self._tls.why() if self._tls is not None and self._began else ""
        return f" ({printable(why)})" if why else ""


def _allow_descriptors() -> None:
    """Have as many descriptors as we may: a client takes one, and three with TLS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 4 * MOST_CLIENTS)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _same(image: Image) -> Image:
    return image
