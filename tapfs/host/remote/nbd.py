"""Exports of NBD servers: what their addresses mean, and the connection, which is made again when it breaks."""

from __future__ import annotations

import threading
from urllib.parse import parse_qs, unquote

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.remote.address import Address
from tapfs.host.remote.nbd_connection import Command, Endpoint, Flag, NbdConnection
from tapfs.host.remote.source import Facts, has_changed

#: A server is asked for the states of at most so many bytes at once.
_MOST_ASKED_BYTES = 1 << 30


class NbdSource:
    """One export: a `tapfs.host.remote.source.Source`. It has one connection, which takes many requests at once."""

    def __init__(self, address: Address, *, timeout_seconds: float) -> None:
        self._name = str(address)
        self._endpoint = endpoint_of(address)
        self._timeout = timeout_seconds
        self._making = threading.Lock()
        #: Whether a connection was lost that had acknowledged writes which no flush covered.
        self._lost = False
        self._connection = self._made()
        self.facts = self._facts(self._connection)

    def read(self, offset: int, length: int) -> memoryview:
        """See `tapfs.host.remote.source.Source.read`."""
        return self._working().request(Command.READ, offset, length)

    def data_ranges(self, offset: int, length: int) -> tuple[list[tuple[int, int]], int]:
        """See `tapfs.host.remote.source.Mapped.data_ranges`. A server that does not tell holds data everywhere."""
        end = offset + length
        connection = self._working()
        if not connection.tells_zeros:
            return [(offset, length)], end
        ranges: list[tuple[int, int]] = []
        for count, zero in connection.states(offset, min(length, _MOST_ASKED_BYTES)):
            stop = min(offset + count, end)
            if not zero and stop > offset:
                ranges.append((offset, stop - offset))
            offset = stop
        return ranges, offset

    def write(self, offset: int, data: bytes) -> None:
        """See `tapfs.host.remote.source.WritableSource.write`. Zeros are written as such, where the server can."""
        connection = self._working()
        if Flag.WRITE_ZEROES in connection.flags and data.count(0) == len(data):
            connection.request(Command.WRITE_ZEROES, offset, len(data))
        else:
            connection.request(Command.WRITE, offset, len(data), memoryview(data))

    def flush(self) -> None:
        """See `tapfs.host.remote.source.WritableSource.flush`.

        A server that went away may have lost what it had not flushed, so no flush succeeds after that.
        """
        connection = self._working()
        if self._lost:
            raise ImageError(
                ErrorKind.IO,
                "the connection was lost before what was written had been flushed, so some of it may be lost",
                path=self._name,
                op="flush",
                remedy="check the image and write it again",
            )
        connection.flush()

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _working(self) -> NbdConnection:
        with self._making:
            if self._connection.broken:
                made = self._made()
                if self._facts(made) != self.facts:
                    made.close()
                    raise has_changed(self._name, f"it has {made.size} bytes, not {self.facts.size}")
                self._lost = self._lost or self._connection.unflushed
                self._connection = made
            return self._connection

    def _made(self) -> NbdConnection:
        return NbdConnection(self._endpoint, self._name, timeout_seconds=self._timeout)

    def _facts(self, connection: NbdConnection) -> Facts:
        return Facts(connection.size, None, 0, writable=Flag.READ_ONLY not in connection.flags)


def endpoint_of(address: Address) -> Endpoint:
    """What an address says, as https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md has it.

    Raises ImageError(invalid_argument).
    """
    parts = address.parts
    query = parse_qs(parts.query)
    unix = address.scheme.endswith("+unix")
    path = query.get("socket", [None])[0]
    if unix != (path is not None) or (not unix and not parts.hostname):
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT,
            "is no NBD address",
            path=str(address),
            op="open",
            remedy="write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=/PATH",
        )
    return Endpoint(
        host=parts.hostname or "",
        port=parts.port or 0,
        path=path,
        export=unquote(parts.path[1:]),
        tls=address.scheme.startswith("nbds"),
        certificates=query.get("tls-certificates", [None])[0],
    )
