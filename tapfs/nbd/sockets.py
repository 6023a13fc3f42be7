"""The sockets of an NBD server: made at a path or an address, or inherited from systemd, and how clients name them."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote

import trio

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.nbd.negotiation import Rejected
from tapfs.serving.local_socket import short_path

#: The port of NBD.
DEFAULT_PORT = 10809

#: The most bytes of a Unix socket's path (unix(7): 108 with the NUL at the end).
_LONGEST_ADDRESS = 107

#: Clients that wait to be accepted.
_BACKLOG = 128

#: A client behind a network that says nothing is asked after so many seconds whether it is there, then every so many
#: seconds, and so many times. Data that nobody acknowledges ends the connection after so many milliseconds.
_IDLE_SECONDS, _PROBE_SECONDS, _PROBES, _UNANSWERED_MS = 60, 10, 6, 120_000

#: The first descriptor that systemd hands over.
_FIRST_INHERITED = 3


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: the path of a Unix socket, or else a host and a port of TCP."""

    path: str | None = None
    host: str = ""
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return self.path if self.path is not None else f"{_bracketed(self.host)}:{self.port}"


def tcp_address(text: str) -> Address:
    """``HOST:PORT``, ``HOST``, ``:PORT`` or ``[V6HOST]:PORT``. Raises ValueError."""
    host, _, port = text.rpartition(":") if not text.endswith("]") and ":" in text else (text, "", "")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} is no HOST:PORT (a host of IPv6 stands in brackets, [::1]:10809)")
    number = DEFAULT_PORT if port == "" else int(port) if port.isdecimal() else -1
    if not 0 <= number <= 65535:
        raise ValueError(f"{port!r} is no port")
    return Address(host=host, port=number)


def listeners_at(address: Address) -> list[socket.socket]:
    """Listen at an address: a Unix socket that only this user may connect to, or each address that a host has.

    Raises ImageError(locked, exists, io, denied, not_found, invalid_argument).
    """
    try:
        if address.path is not None:
            return [_listen_locally(address.path)]
        return _listen_by_tcp(address)
    except socket.gaierror as error:
        raise ImageError(
            ErrorKind.NOT_FOUND, error.strerror or "no such host", path=str(address), op="listen"
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _taken(str(address)) from error
        raise from_os_error(error, path=str(address), op="listen") from error


def _taken(place: str) -> ImageError:
    return ImageError(
        ErrorKind.LOCKED, "another process listens there", path=place, op="listen", remedy="end it, or listen elsewhere"
    )


def _listen_locally(path: str) -> socket.socket:
    directory, name = Path(os.path.abspath(path)).parent, os.path.basename(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with short_path(directory, name) as short:
            _require_length(path, short)
            _clear_away(path, short)
            os.fchmod(listener.fileno(), 0o600)  # of the file that bind makes
            listener.bind(short)
        listener.listen(_BACKLOG)
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
    raise _taken(path)


def _listen_by_tcp(address: Address) -> list[socket.socket]:
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, (host, port, *scope) in dict.fromkeys(found):
            listener = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            chosen = listeners[0].getsockname()[1] if port == 0 and len(listeners) > 1 else port
            listener.bind((host, chosen, *scope))
            listener.listen(_BACKLOG)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def inherited_listeners() -> list[socket.socket]:
    """The sockets that systemd has opened for this process (LISTEN_FDS), none if it has not."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # not for the programs that we start
    found: list[socket.socket] = []
    for descriptor in range(_FIRST_INHERITED, _FIRST_INHERITED + (int(count) if count.isdecimal() else 0)):
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


def uri_of(listener: socket.socket, export: str, *, path: str | None = None, secure: bool = False) -> str:
    """The address of an export for clients, as the NBD URI that libnbd and QEMU take.

    `path`: where the socket is, if it was bound by another name.
    """
    scheme = "nbds" if secure else "nbd"
    name = quote(export, safe="", errors="surrogateescape")
    if listener.family == socket.AF_UNIX:
        place = os.path.abspath(os.fsdecode(listener.getsockname()) if path is None else path)
        return f"{scheme}+unix:///{name}?socket={quote(place, safe='/', errors='surrogateescape')}"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{_bracketed(host)}:{port}/{name}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_reached_from_outside(listener: socket.socket) -> bool:
    """Whether other machines may connect to a socket."""
    if listener.family == socket.AF_UNIX:
        return False
    return not ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def tune(connection: trio.socket.SocketType) -> None:
    """Have a network's connection send at once, and end when the other side is gone."""
    if connection.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    with suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)


class PlainChannel:
    """A client's socket during the negotiation."""

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self._connection = connection

    async def receive(self, length: int) -> bytes:
        """Exactly so many bytes, so that what comes after the negotiation is still in the socket."""
        data = bytearray()
        while len(data) < length:
            try:
                piece = await self._connection.recv(length - len(data))
            except OSError as error:
                raise Rejected(error.strerror or str(error)) from error
            if not piece:
                raise Rejected("it has gone")
            data += piece
        return bytes(data)

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        view = memoryview(data)
        while view:
            try:
                view = view[await self._connection.send(view) :]
            except OSError as error:
                raise Rejected(error.strerror or str(error)) from error
