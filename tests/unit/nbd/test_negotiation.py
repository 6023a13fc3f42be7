"""The negotiation with one client: what it is told, what it may choose, and what ends its connection."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import trio

from tapfs.kernel.nbd_server import Style
from tapfs.nbd.messages import Transmission
from tapfs.nbd.negotiation import Chosen, Negotiation, Rejected
from tapfs.nbd.sockets import PlainChannel
from tests.nbd_client import EXTENDED, SIMPLE, STRUCTURED, Client, option_bytes, string

LIST, STARTTLS, INFO, GO, LIST_CONTEXTS, SET_CONTEXTS = 3, 5, 6, 7, 9, 10
ACK, UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, TOO_BIG = 1, *((1 << 31) + code for code in (1, 2, 3, 5, 6, 9))


class Disk(NamedTuple):
    name: str
    size: int = 1 << 20
    description: str = "a disk"
    flags: Transmission = Transmission.HAS_FLAGS | Transmission.READ_ONLY
    block_sizes: tuple[int, int, int] = (1, 4096, 1 << 25)
    contexts: Sequence[str] = ("base:allocation", "qemu:dirty-bitmap:monday")


class Met:
    """What the server made of the client, known once `negotiating` has ended."""

    chosen: Chosen | None = None
    rejected = False


@contextmanager
def negotiating(*names: str, tls_required: bool = False) -> Generator[tuple[Client, Met]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    met = Met()

    async def serve() -> None:
        with trio.socket.from_stdlib_socket(theirs) as connection:
            try:
                exports = [Disk(name) for name in names or ("",)]
                met.chosen = await Negotiation(PlainChannel(connection), exports, tls_required=tls_required).run()
            except Rejected:
                met.rejected = True

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    client = Client(ours)
    try:
        yield client, met
    finally:
        client.close()
        thread.join()


@pytest.mark.parametrize("style", [SIMPLE, STRUCTURED, EXTENDED])
def test_a_client_chooses_a_disk_and_a_style(style: int) -> None:
    with negotiating("one", "two") as (client, met):
        client.go("two", style)
        assert (client.size, client.flags) == (1 << 20, 3 | (1 << 12 if style == EXTENDED else 0))
    assert met.chosen == Chosen(1, Style(style), 0)


def test_the_first_disk_has_the_empty_name_too() -> None:
    with negotiating("one", "two") as (client, met):
        client.go("")
    assert met.chosen == Chosen(0, Style.STRUCTURED, 0)


def test_a_client_selects_contexts_of_the_disk_that_it_takes() -> None:
    with negotiating() as (client, met):
        wanted = ("qemu:dirty-bitmap:monday", "other:thing", "base:nothing")
        assert client.go("", contexts=wanted) == {"qemu:dirty-bitmap:monday": 1}
    assert met.chosen == Chosen(0, Style.STRUCTURED, 0b10)


def test_contexts_of_another_disk_are_not_selected() -> None:
    with negotiating("one", "two") as (client, met):
        client.greet()
        client.option(8)
        client.option(SET_CONTEXTS, string("one") + struct.pack(">I", 1) + string("base:allocation"))
        assert client.option(GO, string("two") + b"\0\0")[-1][0] == ACK
    assert met.chosen == Chosen(1, Style.STRUCTURED, 0)


def test_all_disks_and_all_contexts_are_listed() -> None:
    with negotiating("one", "zwei ü") as (client, _):
        client.greet()
        assert [data for kind, data in client.option(LIST) if kind == 2] == [
            string("one") + b"a disk",
            string("zwei ü") + b"a disk",
        ]
        client.option(8)
        listed = client.option(LIST_CONTEXTS, string("one") + bytes(4))
        assert [data[4:] for _, data in listed[:-1]] == [b"base:allocation", b"qemu:dirty-bitmap:monday"]
        queries = struct.pack(">I", 1) + string("qemu:")
        listed = client.option(LIST_CONTEXTS, string("one") + queries)
        assert [data[4:] for _, data in listed[:-1]] == [b"qemu:dirty-bitmap:monday"]


def test_the_oldest_clients_take_a_disk_at_once() -> None:
    with negotiating("one") as (client, met):
        client.greet(flags=0)
        client.connection.sendall(option_bytes(1, b"one"))
        assert client.receive(10 + 124) == struct.pack(">QH", 1 << 20, 3) + bytes(124)
    assert met.chosen == Chosen(0, Style.SIMPLE, 0)


@pytest.mark.parametrize(
    ("option", "data", "error"),
    [
        (77, b"", UNSUP),
        (STARTTLS, b"", POLICY),
        (LIST, b"x", INVALID),
        (8, b"x", INVALID),
        (GO, b"", INVALID),
        (GO, b"\0\0\0\5name", INVALID),
        (GO, string("x" * 4097) + b"\0\0", INVALID),
        (GO, string("one") + b"\0\1", INVALID),
        (GO, string("one") + b"\0\0\0", INVALID),
        (GO, b"\0\0\0\1\xff\0\0", INVALID),
        (GO, string("three") + b"\0\0", UNKNOWN),
        (LIST_CONTEXTS, string("one") + bytes(4), INVALID),  # structured replies come first
        (INFO, bytes(70_000), TOO_BIG),
    ],
)
def test_an_option_that_is_wrong_is_answered_and_the_next_one_heard(option: int, data: bytes, error: int) -> None:
    with negotiating("one") as (client, _):
        client.greet()
        assert client.option(option, data)[-1][0] == error
        assert client.option(LIST)[-1][0] == ACK


@pytest.mark.parametrize(
    "said",
    [
        b"\0\0\0\4",  # an unknown flag
        b"\0\0\0\3" + b"GET / HTTP/1.1\r\n",
        b"\0\0\0\3" + option_bytes(1, b"three"),
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 7, 1 << 31),
        b"\0\0\0\2" + option_bytes(7, string("one") + b"\0\0"),  # no fixed newstyle
        b"\0\0\0\3" + option_bytes(77) * 300,
    ],
)
def test_a_client_that_breaks_the_protocol_is_cut_off(said: bytes) -> None:
    with negotiating("one") as (client, met):
        client.receive(18)
        client.connection.sendall(said)
        try:
            while client.connection.recv(4096):
                pass
        except ConnectionError:
            pass
    assert met.rejected


def test_without_tls_nothing_is_told_where_it_is_required() -> None:
    with negotiating("secret", tls_required=True) as (client, _):
        client.greet()
        for option, data in ((LIST, b""), (GO, string("secret") + b"\0\0"), (GO, string("x") + b"\0\0")):
            assert client.option(option, data) == [(TLS_REQD, b"this server wants TLS first")]


def test_a_client_that_aborts_leaves_in_order() -> None:
    with negotiating() as (client, met):
        client.greet()
        assert client.option(2) == [(ACK, b"")]
    assert met.chosen is None
    assert not met.rejected
