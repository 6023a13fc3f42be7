"""The addresses of an NBD server: what is typed, where it listens, how clients name it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.nbd.sockets import Address, is_reached_from_outside, listeners_at, tcp_address, uri_of


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost", "localhost", 10809),
        ("localhost:0", "localhost", 0),
        (":99", "", 99),
        ("127.0.0.1:65535", "127.0.0.1", 65535),
        ("[::1]", "::1", 10809),
        ("[::1]:5", "::1", 5),
    ],
)
def test_a_host_and_a_port_are_read(text: str, host: str, port: int) -> None:
    assert tcp_address(text) == Address(host=host, port=port)


@pytest.mark.parametrize("text", ["::1", "fe80::1:5:7", "host:65536", "host:-1", "host:nbd", "host:1:2"])
def test_what_is_no_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no (HOST:PORT|port)"):
        tcp_address(text)


def test_clients_are_told_the_port_that_was_free_and_names_in_their_escapes() -> None:
    (listener,) = listeners_at(Address(host="127.0.0.1", port=0))
    with listener:
        port = listener.getsockname()[1]
        assert uri_of(listener, "a b/ü", secure=True) == f"nbds://127.0.0.1:{port}/a%20b%2F%C3%BC"
        assert not is_reached_from_outside(listener)
    (listener,) = listeners_at(Address(host="0.0.0.0", port=0))  # noqa: S104
    with listener:
        assert is_reached_from_outside(listener)


def test_a_path_of_any_length_is_listened_on(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    (listener,) = listeners_at(Address(str(folder / "a socket")))
    with listener:
        assert uri_of(listener, "", path=str(folder / "a socket")) == f"nbd+unix:///?socket={folder}/a%20socket"
        assert (folder / "a socket").stat().st_mode & 0o777 == 0o600
        with pytest.raises(ImageError) as used:
            listeners_at(Address(str(folder / "a socket")))
        assert used.value.kind is ErrorKind.LOCKED
    (again,) = listeners_at(Address(str(folder / "a socket")))  # nobody listens any more
    again.close()


def test_a_name_that_no_socket_can_have_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"too long for a socket, by [0-9]+ bytes; choose a shorter one") as raised:
        listeners_at(Address(str(tmp_path / ("x" * 150))))
    assert raised.value.kind is ErrorKind.INVALID_ARGUMENT
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_told_as_a_socket_that_is_taken() -> None:
    (listener,) = listeners_at(Address(host="127.0.0.1", port=0))
    with listener, pytest.raises(ImageError, match="another process listens there") as raised:
        listeners_at(Address(host="127.0.0.1", port=listener.getsockname()[1]))
    assert raised.value.kind is ErrorKind.LOCKED


def test_a_host_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ImageError, match="Name or service not known") as raised:
        listeners_at(Address(host="nowhere"))
    assert (raised.value.kind, raised.value.path) == (ErrorKind.NOT_FOUND, "nowhere:10809")
