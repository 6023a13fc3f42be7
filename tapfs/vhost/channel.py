"""The socket of a front end: messages with descriptors."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

import trio

from tapfs.vhost.messages import HEADER, MAX_DESCRIPTORS, Header, MalformedError, read_header


class Received(NamedTuple):
    """A message of a front end. The descriptors are the receiver's."""

    header: Header
    payload: bytes
    descriptors: list[int]


class Channel:
    """A connection to a front end, which stays the caller's."""

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self._connection = connection

    async def receive(self) -> Received | None:
        """The next message; None: the front end is gone. Raises MalformedError and OSError."""
        descriptors: list[int] = []
        try:
            start = await self._exactly(HEADER.size, descriptors)
            if start is None:
                return None
            header = read_header(start)
            payload = await self._exactly(header.length, descriptors)
            if payload is None:
                return None
            received = Received(header, payload, descriptors)
            descriptors = []
            return received
        finally:
            _close(descriptors)

    async def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a message whole. Raises OSError."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        while message:
            message = message[await self._connection.sendmsg([message], ancillary) :]
            ancillary = []

    async def _exactly(self, length: int, descriptors: list[int]) -> bytes | None:
        data = b""
        room = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        while len(data) < length:
            piece, ancillary, flags, _ = await self._connection.recvmsg(
                length - len(data), room, socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    found = array.array("i")
                    found.frombytes(content[: len(content) - len(content) % found.itemsize])
                    descriptors.extend(found)
            if flags & socket.MSG_CTRUNC or len(descriptors) > MAX_DESCRIPTORS:
                raise MalformedError("too many descriptors came with a message")
            if not piece:
                return None
            data += piece
        return data


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
