"""The clients of NBD exports: accepted, negotiated with, and handed to the native threads of what they have chosen.

Python negotiates. The native threads of an export own the socket of a client that has chosen it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio

from tapfs.errors import printable
from tapfs.kernel.nbd_tls import TlsServer
from tapfs.nbd.export import Export
from tapfs.nbd.negotiation import Chosen, Gone, Negotiation, Rejected
from tapfs.nbd.sockets import PlainChannel, tune
from tapfs.serving.failures import ErrorLog, failure_of
from tapfs.serving.log import log

#: Clients that are connected or negotiate at once; one more is turned away.
MOST_CLIENTS = 1024

#: Seconds that a negotiation may take.
_NEGOTIATION_SECONDS = 30

#: Seconds before clients are accepted again after the host had no descriptor or memory for one.
_PAUSE_SECONDS = 0.1


async def _at_once() -> None:
    await trio.lowlevel.checkpoint()


class Clients:
    """The clients of `exports`, a list that may change. `path` names in the log what is served.

    `prepare` is awaited before a client is told of the exports; what it raises ends that client. `left` is called when
    the negotiation of a client is over, however it ended. With `tls` no client is told anything without it.
    """

    def __init__(
        self,
        exports: Sequence[Export],
        *,
        path: str,
        left: Callable[[], None],
        tls: TlsServer | None = None,
        prepare: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        self._exports = exports
        self._path = path
        self._tls = tls
        self._left = left
        self._prepare = prepare
        self._errors = ErrorLog()
        self._negotiating = 0
        #: Whether a client was handed over, ever.
        self.had_any = False

    def count(self) -> int:
        """How many are connected or negotiate."""
        return self._negotiating + sum(export.statistics().connections for export in self._exports)

    async def accept(self, listener: trio.socket.SocketType, clients: trio.Nursery) -> None:
        """Let clients in until cancelled; each negotiates in a task of `clients`. Closes `listener`."""
        with listener:
            while True:
                try:
                    connection, _ = await listener.accept()
                except OSError as error:  # no descriptor, no memory, or a client that has gone already
                    self._errors.answer(error, path=self._path)
                    await trio.sleep(_PAUSE_SECONDS)
                    continue
                if self.count() >= MOST_CLIENTS:
                    connection.close()
                    continue
                self._negotiating += 1
                clients.start_soon(self._greet, connection)

    async def _greet(self, connection: trio.socket.SocketType) -> None:
        """Negotiate with a client, and hand it over. No client's fault is one of the server."""
        client = _Client(connection, self._tls)
        try:
            with trio.move_on_after(_NEGOTIATION_SECONDS):
                tune(connection)
                await self._prepare()
                chosen = await Negotiation(
                    PlainChannel(connection),
                    self._exports,
                    start_tls=None if self._tls is None else client.start_tls,
                    tls_required=self._tls is not None,
                ).run()
                if chosen is not None:
                    self._hand_over(client.connection.detach(), chosen)
        except Rejected as error:
            why = client.why()
            # Health checks and lists of exports come and go all the time.
            level = logging.DEBUG if isinstance(error, Gone) and not why else logging.INFO
            log.log(level, "a client was turned away: %s%s", printable(str(error)), why)
        except Exception as error:  # noqa: BLE001  the others are served on
            log.error("a client could not be served: %s", failure_of(error, op="negotiate", path=self._path))
        finally:
            client.connection.close()
            self._negotiating -= 1
            self._left()

    def _hand_over(self, descriptor: int, chosen: Chosen) -> None:
        try:
            self._exports[chosen.export].add(descriptor, chosen.style, chosen.contexts)
        except BaseException:
            os.close(descriptor)
            raise
        self.had_any = True


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
