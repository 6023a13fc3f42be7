"""Start an NBD server from the command line: in this process, or in one of its own once clients may come."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tapfs.errors import ErrorKind, ImageError, from_os_error, printable
from tapfs.nbd.messages import MAX_STRING
from tapfs.nbd.session import Serving, Session
from tapfs.serving.log import log_to_stderr

#: A file that holds more than this is none that has a process's number in it.
_MOST_OF_A_NUMBER = 32


@dataclass(frozen=True, slots=True)
class NbdStart:
    """A server that is to be started (`tapfs.serving.background.Start`). Owns what is served."""

    serving: Serving
    #: Where the number of the serving process is written.
    pid_file: str | None = None

    @property
    def path(self) -> str:
        """What error messages name."""
        return self.serving.images[0][0].path

    def serve(self, ready: Callable[[], None]) -> None:
        """Serve until the end, and call `ready` once clients may come. Raises ImageError."""
        with suppress(OSError):
            os.chdir("/")  # a working directory would keep its file system busy
        with ExitStack() as ending:
            Session(self.serving).run(partial(self._ready, ready, ending))

    def _ready(self, ready: Callable[[], None], ending: ExitStack) -> None:
        if self.pid_file is not None:
            _write_number(self.pid_file)
            ending.callback(_unlink, self.pid_file)
        ready()

    def let_go(self) -> None:
        """In the parent, after the fork: let go of what is the child's now."""
        for listener in self.serving.listeners:
            listener.close()
        for image, _ in self.serving.images:
            image.abandon()

    def require_ready(self) -> None:
        """In the parent: clients may come."""

    def clear_away(self, child: int) -> str | None:
        """In the parent: remove the sockets of a child that was killed."""
        del child
        for path in self.serving.sockets:
            _unlink(path)
        return None


def serve_in_foreground(start: NbdStart, ready: Callable[[], None]) -> None:
    """Serve in this process, with the log on stderr; `ready` is called when clients may come."""
    log_to_stderr()
    start.serve(ready)


def put_away(serving: Serving) -> None:
    """Close what a server was to own that could not be started."""
    with ExitStack() as closing:
        for image, _ in serving.images:
            closing.callback(image.close)
        for listener in serving.listeners:
            closing.callback(listener.close)
        for path in serving.sockets:
            closing.callback(_unlink, path)


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


def export_names(names: Sequence[str], images: Sequence[str]) -> list[str]:
    """The names of the exports: those that were given, then that of the image's file; one alone has none.

    Raises ImageError(invalid_argument).
    """
    if len(names) > len(images):
        raise _wrong(f"{len(names)} names were given for {len(images)} disks")
    found = [*names, *(os.path.basename(image) for image in images[len(names) :])]
    if len(images) == 1 and not names:
        return [""]
    for name in found:
        if len(name.encode(errors="surrogateescape")) > MAX_STRING or "\0" in name or printable(name) != name:
            raise _wrong(f"{name[:80]!r} cannot be the name of an export")
        if found.count(name) > 1:
            raise _wrong(f"two exports would have the name {name!r}; give each a name of its own")
    return found


def _wrong(message: str) -> ImageError:
    return ImageError(ErrorKind.INVALID_ARGUMENT, message, op="serve")
