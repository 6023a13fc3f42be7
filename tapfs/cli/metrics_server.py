"""A server of metrics by HTTP, which Prometheus or curl asks: `tapfs stats --prometheus --listen ADDRESS`."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tapfs.errors import ImageError

if TYPE_CHECKING:
    from tapfs.nbd.sockets import Address

#: The text exposition's type.
_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Seconds that a client may take to say what it wants, and to take its answer.
_PATIENCE_SECONDS = 5.0

#: A longer request is none that Prometheus sends, in bytes.
_LONGEST_REQUEST = 16 << 10


def serve(address: Address, text: Callable[[], str], ready: Callable[[str], None]) -> None:
    """Answer GET /metrics with a fresh `text`, one client after the other, until interrupted.

    `ready` is called with each place that is listened at. Raises ImageError if none can be.
    """
    from selectors import EVENT_READ, DefaultSelector

    from tapfs.nbd.sockets import listeners_at

    listeners = listeners_at(address)
    try:
        with DefaultSelector() as selector:
            for listener in listeners:
                selector.register(listener, EVENT_READ)
                ready(_place(listener, address))
            while True:
                for key, _ in selector.select():
                    _answer_one(key.fileobj, text)
    finally:
        for listener in listeners:
            listener.close()
        if address.path is not None and os.path.lexists(address.path):
            os.unlink(address.path)


def _place(listener: socket.socket, address: Address) -> str:
    if address.path is not None:
        return address.path
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"


def _answer_one(listener: object, text: Callable[[], str]) -> None:
    if not isinstance(listener, socket.socket):
        return
    try:
        connection, _ = listener.accept()
    except OSError:
        return  # it has gone, or the host lacks a descriptor now
    with connection:
        try:
            method, target = _read_request(connection)
            answer = _answer(method, target, text)
            connection.settimeout(_PATIENCE_SECONDS)
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
        except (OSError, ValueError):
            return  # it has gone, takes too long, or speaks no HTTP


def _read_request(connection: socket.socket) -> tuple[str, str]:
    """The method and the target of a request. Raises ValueError for what is none, TimeoutError."""
    give_up = time.monotonic() + _PATIENCE_SECONDS
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        connection.settimeout(max(give_up - time.monotonic(), 0.001))
        piece = connection.recv(_LONGEST_REQUEST)
        data += piece
        if not piece or len(data) > _LONGEST_REQUEST:
            raise ValueError("is no request")
    method, target, _ = data.split(b"\r\n", 1)[0].decode("ascii").split(" ")
    return method, target.partition("?")[0]


def _answer(method: str, target: str, text: Callable[[], str]) -> bytes:
    if method not in {"GET", "HEAD"}:
        status, body = "405 Method Not Allowed", "say GET\n"
    elif target != "/metrics":
        status, body = "404 Not Found", "the metrics are at /metrics\n"
    else:
        try:
            status, body = "200 OK", text()
        except ImageError as error:
            status, body = "503 Service Unavailable", f"{error}\n"
    told = body.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {_TYPE}\r\nContent-Length: {len(told)}\r\nConnection: close\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else told)
