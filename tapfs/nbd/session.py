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
from functools import partial

import trio

from tapfs.disk.image import Image
from tapfs.kernel.nbd_tls import TlsServer
from tapfs.nbd.clients import MOST_CLIENTS, Clients
from tapfs.nbd.export import Export
from tapfs.nbd.export_in_use import ExportInUse
from tapfs.records import dataclass
from tapfs.serving.listening import remove_socket
from tapfs.serving.log import log
from tapfs.serving.served_control import ServedControl
from tapfs.serving.served_operations import OpenedBy
from tapfs.serving.service import Service


@dataclass(frozen=True, slots=True)
class Serving:
    """What is to be served where: images with the names of their exports, and sockets that listen.

    The session owns them. `addresses`: what clients call each export. `sockets` are the paths of Unix sockets that are
    removed at the end. With `tls` no client is told anything without it.
    """

    images: Sequence[tuple[Image, str]]
    listeners: Sequence[socket.socket]
    addresses: Sequence[Sequence[str]]
    opened: OpenedBy
    sockets: Sequence[str] = ()
    exit_when_idle: bool = False
    tls: TlsServer | None = None


class Session:
    """One server from its first to its last client. There can be one in a process."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._service = Service(serving.images[0][0].path)
        self._exports: list[Export] = []
        self._clients = Clients(self._exports, path=self._service.path, tls=serving.tls, left=self._end_if_idle)
        self._ready: Callable[[], None] = lambda: None

    def run(self, ready: Callable[[], None]) -> None:
        """Serve, and call `ready` once clients may come. Raises the first ImageError, when everything is put away."""
        self._ready = ready
        ending = self._service.ending
        for number in range(len(self._serving.images)):
            ending.add("flush and close the image", partial(self._close_image, number))
        for listener in self._serving.listeners:
            ending.add("close a socket", listener.close)
        for path in self._serving.sockets:
            ending.add("remove the socket", partial(remove_socket, path))
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
        control = ServedControl(self._service, "nbd")
        for export, addresses in zip(self._exports, self._serving.addresses, strict=True):
            changing = trio.Lock()
            # Not beside a swap: the old image must not be flushed once it is a parent.
            if export.image.writable:
                self._service.flush_periodically(partial(_image_of, export), alone=changing)
            control.add(
                ExportInUse(export),
                changing,
                name=export.name,
                addresses=addresses,
                opened=self._serving.opened,
                announce=trio.lowlevel.checkpoint,  # a client learns the size when it connects
            )
            self._service.start(partial(self._watch, export), "watch the clients")
        async with trio.open_nursery() as clients:
            for listener in self._serving.listeners:
                clients.start_soon(self._clients.accept, trio.socket.from_stdlib_socket(listener.dup()), clients)
            self._ready()

    async def end(self) -> None:
        """End for a signal: clients that have asked for something get their answers first."""
        self._service.stop_serving()

    def _close_image(self, number: int) -> None:
        """Close what an export serves at the end, which may be another image than at the start."""
        started = number < len(self._exports)
        (self._exports[number].image if started else self._serving.images[number][0]).close()

    # The tasks

    async def _watch(self, export: Export) -> None:
        """Look at each client that goes, for it may be the last."""
        while True:
            await trio.lowlevel.wait_readable(export.ended_descriptor)
            os.eventfd_read(export.ended_descriptor)
            self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._serving.exit_when_idle and self._clients.had_any and self._clients.count() == 0:
            log.info("the last client has gone")
            self._service.stop_serving()


def _allow_descriptors() -> None:
    """Have as many descriptors as we may: a client takes one, and three with TLS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 4 * MOST_CLIENTS)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _image_of(export: Export) -> Image:
    return export.image
