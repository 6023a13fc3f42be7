"""Start a server of clients that connect to sockets: in this process, or in one of its own once clients may come."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.sandbox import confinement
from tapfs.records import dataclass
from tapfs.serving.listening import remove_socket
from tapfs.serving.log import log_to_stderr

if TYPE_CHECKING:
    from tapfs.disk.image import Image


#: A file that holds more than this is none that has a process's number in it.
_MOST_OF_A_NUMBER = 32


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
    pid_file: str | None = None

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
            self.run(partial(self._ready, ready, ending))

    def _ready(self, ready: Callable[[], None], ending: ExitStack) -> None:
        if self.pid_file is not None:
            _write_number(self.pid_file)
            ending.callback(_unlink, self.pid_file)
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
        """In the parent: remove the sockets of a child that was killed."""
        del child
        for path in self.sockets:
            remove_socket(path)
        return None


def serve_in_foreground(start: ServerStart, ready: Callable[[], None]) -> None:
    """Serve in this process, with the log on stderr; `ready` is called when clients may come."""
    log_to_stderr()
    start.serve(ready)


def put_away(images: Sequence[Image], listeners: Sequence[socket.socket], sockets: Sequence[str]) -> None:
    """Close what a server was to own that could not be started."""
    with ExitStack() as closing:
        for image in images:
            closing.callback(image.close)
        for listener in listeners:
            closing.callback(listener.close)
        for path in sockets:
            closing.callback(remove_socket, path)


def _write_number(path: str) -> None:
    """Write the number of this process to a file that is new or has held nothing else. Raises ImageError."""
    op = "write the number of the process"
    try:
        taken = os.path.exists(path) and not (os.path.isfile(path) and _holds_number(path))
        if not taken:
            Path(path).write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise from_os_error(error, path=path, op=op) from error
    if taken:
        message, remedy = "is there already, and holds no number of a process", "remove it, or name another file"
        raise ImageError(ErrorKind.EXISTS, message, path=path, op=op, remedy=remedy)


def _holds_number(path: str) -> bool:
    """Whether a file is empty or has a number in decimal and nothing else."""
    with open(path, "rb") as file:
        content = file.read(_MOST_OF_A_NUMBER).strip()
    return not content or content.isdigit()


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
