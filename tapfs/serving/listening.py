"""Sockets of servers that listen: made at a path for this user alone, or inherited from systemd."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.serving.local_socket import short_path
from tapfs.serving.runtime_directory import make_private, runtime_directory
from tapfs.serving.service_manager import FIRST_INHERITED

#: The most bytes of a Unix socket's path (unix(7): 108 with the NUL at the end).
_LONGEST_ADDRESS = 107

#: Clients that wait to be accepted.
BACKLOG = 128


#: Devices and inodes of the sockets that this process has made, by their paths.
_made: dict[str, tuple[int, int]] = {}


def listen_locally(path: str) -> socket.socket:
    """A Unix socket at `path` that only this user may connect to, in place of one that nobody listens on.

    Raises ImageError(locked, exists, io, denied, not_found, invalid_argument).
    """
    try:
        return _listen_at(path)
    except OSError as error:
        raise failure_to_listen(error, path) from error


def remove_socket(path: str) -> None:
    """Remove a socket that this process has made. One that another server has put in its place since stays.

    The socket still listens: its inode is not another's then.
    """
    made = _made.pop(os.path.abspath(path), None)
    with suppress(OSError, ImageError), _one_at_a_time():
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == made:
            os.unlink(path)


def remove_left_socket(path: str) -> None:
    """Remove a socket that a killed server has left. One that somebody listens on stays, and so does what is none."""
    directory, name = Path(os.path.abspath(path)).parent, os.path.basename(path)
    with suppress(OSError, ImageError), _one_at_a_time(), short_path(directory, name) as short:
        _clear_away(path, short)


@contextmanager
def _one_at_a_time() -> Generator[None]:
    """No other process of this user looks whether somebody listens, makes a socket or removes one meanwhile.

    Without it two servers could find the same left socket, and the second would remove what the first has made. A
    socket that is bound and does not listen yet looks as if nobody did. Raises ImageError and OSError.
    """
    directory = runtime_directory()
    make_private(directory)
    # The lock is on the directory itself: a file for it would stay when the last server has ended.
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def failure_to_listen(error: OSError, place: str) -> ImageError:
    """What kept a server from listening at a place."""
    if error.errno == errno.EADDRINUSE:
        return taken(place)
    return from_os_error(error, path=place, op="listen")


def taken(place: str) -> ImageError:
    """Another server has that place."""
    return ImageError(
        ErrorKind.LOCKED, "another process listens there", path=place, op="listen", remedy="end it, or listen elsewhere"
    )


def _listen_at(path: str) -> socket.socket:
    directory, name = Path(os.path.abspath(path)).parent, os.path.basename(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with short_path(directory, name) as short, _one_at_a_time():
            _require_length(path, short)
            _clear_away(path, short)
            os.fchmod(listener.fileno(), 0o600)  # of the file that bind makes
            listener.bind(short)
            listener.listen(BACKLOG)
            found = os.lstat(short)
            _made[os.path.abspath(path)] = found.st_dev, found.st_ino
    except BaseException:
        listener.close()
        raise
    return listener


def _require_length(path: str, short: str) -> None:
    """Raise ImageError if a name does not fit into a socket's address even where its directory's is a short one."""
    over = len(os.fsencode(short)) - _LONGEST_ADDRESS
    if over > 0:
        message = f"the last part of the name is too long for a socket, by {over} bytes"
        raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=path, op="listen", remedy="choose a shorter one")


def _clear_away(path: str, short: str) -> None:
    """Remove a socket that nobody listens on. Raises ImageError if it is used, or is no socket."""
    try:
        found = os.lstat(short)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ImageError(ErrorKind.EXISTS, "is there already, and no socket", path=path, op="listen")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(short)
        except ConnectionRefusedError:
            os.unlink(short)
            return
        except BlockingIOError:
            pass  # somebody listens, and many wait
    raise taken(path)


def inherited_listeners() -> list[socket.socket]:
    """The sockets that systemd has opened for this process (LISTEN_FDS), none if it has not."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # not for the programs that we start
    found: list[socket.socket] = []
    for descriptor in range(FIRST_INHERITED, FIRST_INHERITED + (int(count) if count.isdecimal() else 0)):
        try:
            os.set_inheritable(descriptor, False)
            listener = socket.socket(fileno=descriptor)
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise ImageError(
                    ErrorKind.UNSUPPORTED,
                    f"descriptor {descriptor} is a connection, not a socket that listens",
                    op="take the sockets of systemd",
                    remedy="say Accept=no in the socket unit",
                )
        except OSError as error:
            raise from_os_error(error, path=f"descriptor {descriptor}", op="take the sockets of systemd") from error
        listener.setblocking(False)
        found.append(listener)
    return found
