"""The sockets of an NBD server: made at a path or an address, and how clients name them."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import quote

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.nbd.negotiation import Gone
from tapfs.records import dataclass
from tapfs.serving.listening import BACKLOG, failure_to_listen, listen_locally

#: The port of NBD.
DEFAULT_PORT = 10809

#: A client behind a network that says nothing is asked after so many seconds whether it is there, then every so many
#: seconds, and so many times. Data that nobody acknowledges ends the connection after so many milliseconds.
_IDLE_SECONDS, _PROBE_SECONDS, _PROBES, _UNANSWERED_MS = 60, 10, 6, 120_000


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
            return [listen_locally(address.path)]
        return _listen_by_tcp(address)
    except socket.gaierror as error:
        raise ImageError(
            ErrorKind.NOT_FOUND, error.strerror or "no such host", path=str(address), op="listen"
        ) from error
    except OSError as error:
        raise failure_to_listen(error, str(address)) from error


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
            listener.listen(BACKLOG)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


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
                raise Gone(error.strerror or str(error)) from error
            if not piece:
                raise Gone("it has gone")
            data += piece
        return bytes(data)

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        view = memoryview(data)
        while view:
            try:
                view = view[await self._connection.send(view) :]
            except OSError as error:
                raise Gone(error.strerror or str(error)) from error
