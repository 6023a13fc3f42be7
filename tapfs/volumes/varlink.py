"""One connection of a Varlink client: its calls in, replies and errors out, with descriptors.

A message is JSON with a zero byte behind it. https://varlink.org/ has the protocol. Descriptors come with the bytes of
their reply (SCM_RIGHTS), as systemd does it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

#: A client that sends more in one message is cut off.
_LONGEST = 1 << 20


class Reply(NamedTuple):
    """What a method answers once, or each time of several. Who sends it closes the descriptors."""

    parameters: Mapping[str, object]
    descriptors: Sequence[int] = ()


class VarlinkError(Exception):
    """An error that the client is told: its whole name, and its parameters."""

    def __init__(self, name: str, **parameters: object) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters


class Call(NamedTuple):
    """A call: the method's whole name, its parameters, and whether several replies are taken."""

    method: str
    parameters: dict[str, Any]
    more: bool


#: Answers a call. Raises VarlinkError.
Methods = Callable[[Call], Iterator[Reply]]


def serve_client(connection: socket.socket, methods: Methods) -> None:
    """Answer calls until the client has gone, or says what is no call."""
    with connection:
        for message in _messages(connection):
            call = _call_of(message)
            if call is None:
                return
            for answer, descriptors in _answers(call, methods):
                try:
                    if not message.get("oneway"):
                        _send(connection, answer, descriptors)
                except OSError:
                    return  # the client has gone
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)


def _answers(call: Call, methods: Methods) -> Iterator[tuple[dict[str, object], Sequence[int]]]:
    """Each message for the client, and the descriptors with it. All but the last say that more will come."""
    waiting: Reply | None = None
    try:
        for reply in methods(call):
            if waiting is not None:
                yield {"parameters": waiting.parameters, "continues": True}, waiting.descriptors
            waiting = reply
    except VarlinkError as error:
        yield {"error": error.name, "parameters": error.parameters}, ()
    else:
        last = waiting or Reply({})
        yield {"parameters": last.parameters}, last.descriptors


def _messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Each message of the client, until one is no JSON object."""
    kept = b""
    while True:
        message, ended, rest = kept.partition(b"\0")
        if not ended:
            try:
                more = connection.recv(65536)
            except OSError:
                return
            if not more or len(kept) > _LONGEST:
                return
            kept += more
            continue
        kept = rest
        try:
            decoded = json.loads(message)
        except (ValueError, RecursionError):
            return
        if not isinstance(decoded, dict):
            return
        yield decoded


def _call_of(message: dict[str, Any]) -> Call | None:
    method, parameters = message.get("method"), message.get("parameters")
    if not isinstance(method, str) or not isinstance(parameters, dict | None):
        return None
    return Call(method, parameters or {}, more=message.get("more") is True)


def _send(connection: socket.socket, answer: Mapping[str, object], descriptors: Sequence[int]) -> None:
    data = json.dumps(answer, separators=(",", ":")).encode() + b"\0"
    if descriptors:
        sent = socket.send_fds(connection, [data], list(descriptors))
        data = data[sent:]
    connection.sendall(data)
