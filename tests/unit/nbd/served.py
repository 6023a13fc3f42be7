"""An image behind the native NBD server of this process, and clients in front of it."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

from tapfs.disk.image import Image
from tapfs.kernel.nbd_server import NbdStatistics, Style
from tapfs.nbd.export import Export
from tests.fuse.conftest import wait_for
from tests.nbd_client import Client


class Served:
    """The export of an image. At the end of the block it, its clients and the image are closed."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._clients: list[Client] = []
        self._stopped = False
        self.export = Export(image, "")

    def __enter__(self) -> Self:
        self.export.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for client in self._clients:
            client.close()
        self._image.close()

    def stop(self) -> None:
        """End the native server."""
        if not self._stopped:
            self._stopped = True
            self.export.stop()

    def connect(self, style: int, contexts: int = 1) -> Client:
        """A client whose negotiation is over."""
        ours, theirs = socket.socketpair()
        ours.settimeout(30)
        theirs.setblocking(False)
        self.export.add(theirs.detach(), Style(style), contexts)
        client = Client(ours, style)
        self._clients.append(client)
        return client

    def statistics(self) -> NbdStatistics:
        """The counters now."""
        return self.export.statistics()

    def wait_until_idle(self) -> None:
        """Return when no client is left; nothing of them is in memory then."""
        wait_for(lambda: self.statistics().connections == 0)
        assert self.statistics().connections == 0
        assert self.statistics().held == 0
