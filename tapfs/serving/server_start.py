"""Start a server of clients that connect to sockets: in this process, or in one of its own once clients may come."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from tapfs.host.sandbox import confinement
from tapfs.records import dataclass
from tapfs.serving.listening import remove_socket
from tapfs.serving.log import log_to_stderr

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.serving.pid_file import PidFile


@dataclass(frozen=True, slots=True)
class ServerStart:
    """A server that is to be started (`tapfs.serving.background.Start`). Owns what is served.

    `run` serves until the end, calls its argument once clients may come, and raises ImageError. It closes the images
    and the listeners, and removes the `sockets`, which are the paths of Unix sockets.
    """

    run: Callable[[Callable[[], None]], None]
    images: Sequence[Image]
    listeners: Sequence[socket.socket]
    sockets: Sequence[str]
    #: Where the number of the serving process is written.
    pid_file: PidFile | None = None

    @property
    def path(self) -> str:
        """What error messages name."""
        return self.images[0].path

    def serve(self, ready: Callable[[], None]) -> None:
        """Serve until the end, and call `ready` once clients may come. Raises ImageError."""
        with suppress(OSError):
            os.chdir("/")  # a working directory would keep its file system busy
        confinement.end_start()
        with ExitStack() as ending:
            if self.pid_file is not None:
                ending.callback(self.pid_file.remove)
            self.run(partial(self._ready, ready))

    def _ready(self, ready: Callable[[], None]) -> None:
        if self.pid_file is not None:
            self.pid_file.write()
        ready()

    def let_go(self) -> None:
        """In the parent, after the fork: let go of what is the child's now."""
        for listener in self.listeners:
            listener.close()
        for image in self.images:
            image.abandon()

    def require_ready(self) -> None:
        """In the parent: clients may come."""

    def clear_away(self, child: int) -> str | None:
        """In the parent: remove the sockets of a child that was killed, and the file for its number."""
        del child
        if self.pid_file is not None:
            self.pid_file.remove()
        for path in self.sockets:
            remove_socket(path)
        return None


def serve_in_foreground(start: ServerStart, ready: Callable[[], None]) -> None:
    """Serve in this process, with the log on stderr; `ready` is called when clients may come."""
    log_to_stderr()
    start.serve(ready)


def put_away(
    images: Sequence[Image], listeners: Sequence[socket.socket], sockets: Sequence[str], pid_file: PidFile | None
) -> None:
    """Close what a server was to own that could not be started."""
    with ExitStack() as closing:
        if pid_file is not None:
            closing.callback(pid_file.remove)
        for image in images:
            closing.callback(image.close)
        for listener in listeners:
            closing.callback(listener.close)
        for path in sockets:
            closing.callback(remove_socket, path)
