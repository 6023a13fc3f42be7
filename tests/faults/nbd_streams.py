"""Streams of NBD clients that were damaged at random: the server answers, refuses or cuts off, and others go on.

A stream has requests of every kind, good ones and such with wild numbers; then bytes of it are changed. It goes to the
native server in every style, in pieces. The options of the negotiation are damaged in the same way.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import trio

import tapfs
from tapfs.nbd.negotiation import Negotiation, Rejected
from tapfs.nbd.sockets import PlainChannel
from tapfs.testing.hostile import damage
from tests import nbd_client as nbd
from tests.nbd_client import option_bytes, string
from tests.unit.nbd.served import Served

_SIZE = 4 << 20

_KINDS = ("raw", "qcow2")


def run(seed: int, streams: int, folder: Path) -> str:
    """Send so many streams. Raises AssertionError; the result says what came of them."""
    choice = random.Random(seed)
    counted: Counter[str] = Counter()
    kind = _KINDS[seed % len(_KINDS)]
    path = folder / "image"
    tapfs.create(path, kind, _SIZE)
    with Served(tapfs.open(path, format=kind, writable=True)) as server:
        for _ in range(streams):
            counted[_send_requests(server, choice)] += 1
            counted[_send_options(server, choice)] += 1
        server.wait_until_idle()
        other = server.connect(nbd.STRUCTURED)
        assert other.ask(nbd.WRITE, 0, data=b"o" * 65536, flags=nbd.FUA).error == 0
        assert other.ask(nbd.READ, 0, 65536).whole() == b"o" * 65536
    assert tapfs.check(path).corruptions == 0
    return " ".join(f"{what} {number}" for what, number in sorted(counted.items()))


def _number(choice: random.Random, most: int) -> int:
    return choice.choice((0, 1, most - 1, most, most + 1, (1 << 32) - 1, (1 << 63) - 1, choice.randrange(most)))


def _send_requests(server: Served, choice: random.Random) -> str:
    style = choice.choice((nbd.SIMPLE, nbd.STRUCTURED, nbd.EXTENDED))
    client = server.connect(style)
    stream = bytearray()
    for cookie in range(choice.randrange(1, 12)):
        command = choice.choice((*range(8), choice.randrange(1 << 16)))
        length = _number(choice, 1 << choice.randrange(1, 23))
        flags = choice.choice((0, 0, choice.randrange(64), choice.randrange(1 << 16)))
        if style == nbd.EXTENDED and command == nbd.WRITE:
            flags |= nbd.PAYLOAD_LEN
        elif style != nbd.EXTENDED:
            length &= (1 << 32) - 1
        stream += client.request_bytes(command, cookie, _number(choice, _SIZE), length, flags)
        if command == nbd.WRITE:
            stream += choice.randbytes(min(length, 1 << 17))
    for _ in range(choice.choice((0, 0, 1, 3))):
        damage(stream, choice)
    with suppress(ConnectionError):
        _send(client.connection, bytes(stream), choice)
    client.close()
    return "requests"


def _send(connection: socket.socket, stream: bytes, choice: random.Random) -> None:
    """Send in pieces, beside a thread that takes what is answered: else neither side might go on."""
    piece = choice.choice((1 + len(stream) // 7, 1 << 16))
    taking = threading.Thread(target=_take, args=(connection,))
    taking.start()
    try:
        for at in range(0, len(stream), piece):
            connection.sendall(stream[at : at + piece])
        connection.shutdown(socket.SHUT_WR)
    finally:
        taking.join()


def _take(connection: socket.socket) -> None:
    with suppress(OSError):
        while connection.recv(1 << 20):
            pass


def _send_options(server: Served, choice: random.Random) -> str:
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    queries = struct.pack(">I", 2) + string("base:allocation") + string("qemu:")
    known = [
        (3, b""),
        (5, b""),
        (6, string("") + b"\0\2\0\3\0\1"),
        (8, b""),
        (9, string("") + queries),
        (10, string("") + queries),
        (11, b""),
        (choice.randrange(1 << 32), choice.randbytes(choice.randrange(40))),
    ]
    stream = bytearray(choice.choice((0, 1, 2, 3, 3, 3, 7)).to_bytes(4, "big"))
    for _ in range(choice.randrange(8)):
        stream += option_bytes(*choice.choice(known))
    for _ in range(choice.choice((0, 1, 3))):
        damage(stream, choice)
    met: list[str] = []

    async def negotiate() -> None:
        with trio.socket.from_stdlib_socket(theirs) as connection:
            try:
                await Negotiation(PlainChannel(connection), [server.export]).run()
                met.append("negotiated")
            except Rejected:
                met.append("rejected")

    serving = threading.Thread(target=trio.run, args=(negotiate,))
    serving.start()
    with ours, suppress(ConnectionError):
        _send(ours, bytes(stream), choice)
    serving.join()
    assert len(met) == 1, "the negotiation ended by an error of its own"
    return met[0]
