"""TLS before the NBD server: bytes pass, ends are told, nonsense ends; wrong files are told by file and line."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.nbd.tls import tls_server
from tests.unit.engine.engine_disks import pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# alice:00\n\n", "has no key"),
        ("alice:zz\n", "line 1 is no NAME:KEY"),
        ("a:00\n:00\n", "line 2 is no NAME:KEY"),
        ("5ec2e7", "line 1 is no NAME:KEY"),
        (f"alice:{'5e' * 65}", "line 1 is no NAME:KEY"),
        (f"{'x' * 300}:5ec2e7", "line 1 is no NAME:KEY"),
        ("alice:00\n" * 1025, "line 1025 is no NAME:KEY"),
    ],
)
def test_a_file_without_good_keys_is_refused(tmp_path: Path, text: str, message: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(text)
    with pytest.raises(ImageError, match=message) as raised:
        tls_server(certificates=None, keys=str(keys), verify_clients=False)
    assert raised.value.kind is ErrorKind.INVALID_ARGUMENT
    assert raised.value.path == str(keys)
    assert "5e" not in str(raised.value).removeprefix(str(keys))


def test_certificates_that_are_missing_or_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as missing:
        tls_server(certificates=str(tmp_path), keys=None, verify_clients=False)
    assert (missing.value.kind, missing.value.path) == (ErrorKind.NOT_FOUND, str(tmp_path / "server-cert.pem"))
    for name in ("server-cert.pem", "server-key.pem"):
        (tmp_path / name).write_text("no certificate")
    with pytest.raises(ImageError, match="no certificate and key that belong together") as wrong:
        tls_server(certificates=str(tmp_path), keys=None, verify_clients=False)
    assert wrong.value.path == str(tmp_path / "server-cert.pem")
    with pytest.raises(ImageError) as authority:
        tls_server(certificates=str(tmp_path), keys=None, verify_clients=True)
    assert authority.value.path == str(tmp_path / "ca-cert.pem")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate of the server that signs itself."""
    folder = tmp_path_factory.mktemp("certificate")
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-subj", "/CN=server", "-keyout", "server-key.pem", "-out", "server-cert.pem"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return folder


@contextmanager
def secured(folder: Path) -> Generator[tuple[socket.socket, socket.socket]]:
    """The client's socket, and the server's side of it without TLS."""
    tls = tls_server(certificates=str(folder), keys=None, verify_clients=False)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, socket.socket(fileno=tls.begin(theirs.detach())) as plain:
        ours.settimeout(30)
        plain.settimeout(30)
        yield ours, plain
        plain.close()
        tls.close()


def client_of(connection: socket.socket) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connection)


def received(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length and (piece := connection.recv(length - len(data))):
        data += piece
    return data


def test_bytes_pass_both_ways_at_once_and_each_end_is_told(certificate: Path) -> None:
    there, back = pattern(5 << 20, 1), pattern(5 << 20, 2)
    with secured(certificate) as (ours, plain):
        client = client_of(ours)
        sending = threading.Thread(target=plain.sendall, args=(back,))
        reading: list[bytes] = []
        taking = threading.Thread(target=lambda: reading.append(received(client, len(back))))
        sending.start()
        sent = threading.Thread(target=client.sendall, args=(there,))
        sent.start()
        assert received(plain, len(there)) == there
        taking.start()
        for thread in (sending, sent, taking):
            thread.join(60)
        assert reading == [back]
        plain.sendall(b"last words")
        plain.close()
        assert received(client, 100) == b"last words"
        client.close()


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(70_000)])
def test_what_is_no_tls_ends_the_plain_side(certificate: Path, words: bytes) -> None:
    with secured(certificate) as (ours, plain):
        with suppress(ConnectionError):
            ours.sendall(words)
            ours.shutdown(socket.SHUT_WR)
        assert received(plain, 1) == b""


def test_a_client_that_is_gone_ends_the_plain_side_and_a_stop_ends_all(certificate: Path) -> None:
    with secured(certificate) as (ours, plain):
        client = client_of(ours)
        client.sendall(b"x")
        assert received(plain, 1) == b"x"
        client.close()
        assert received(plain, 1) == b""
    tls = tls_server(certificates=str(certificate), keys=None, verify_clients=False)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, socket.socket(fileno=tls.begin(theirs.detach())) as plain:
        tls.close()  # which waits a moment for a handshake that never comes
        assert plain.recv(1) == b""
