"""Images on NBD servers: our own server, a line that is cut, and servers that send what nobody asked for."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.chain import OpenOptions
from tapfs.disk.opening import open_image
from tapfs.host.remote.options import RemoteOptions
from tapfs.jobs.convert import convert_to_new
from tapfs.jobs.create import NewImage
from tests.unit.remote.cut_line import CutLine, nbd_served

MIB = 1 << 20
SIZE = 4 * MIB
TRYING = OpenOptions(format="raw", remote=RemoteOptions(tries=20, pause_seconds=0.001))
ONCE = OpenOptions(format="raw", remote=RemoteOptions(tries=1))


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def served(tmp_path: Path, content: bytes) -> Iterator[Path]:
    """The socket of qemu-nbd, which gives one client at a time the content."""
    (tmp_path / "disk").write_bytes(content)
    with nbd_served(tmp_path / "disk", "-r") as path:
        yield path


def address(path: Path, export: str = "disk") -> str:
    return f"nbd+unix:///{export}?socket={path}"


def test_a_line_that_is_cut_is_made_again_and_the_bytes_are_right(served: Path, tmp_path: Path, content: bytes) -> None:
    line = CutLine(tmp_path, served, [10, 200, 70_000, 1_500_000, 300, 2_500_000])
    with open_image(address(line.path), TRYING, password=None) as disk:
        assert disk.size == SIZE
        assert disk.read(SIZE - 5, 5) == content[-5:]
        assert disk.read(0, SIZE) == content
    line.close()


def test_what_is_not_there_is_told(served: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no export 'other'") as raised:
        tapfs.open(address(served, "other"))
    assert raised.value.kind is ErrorKind.NOT_FOUND
    with pytest.raises(ImageError, match="No such file"):
        open_image(address(tmp_path / "none"), ONCE)
    for text in ("nbd:///x", "nbd+unix:///x", "nbd://host:99999/x"):
        with pytest.raises(ImageError) as raised:
            tapfs.open(text)
        assert raised.value.kind is ErrorKind.INVALID_ARGUMENT


def _request(connection: socket.socket) -> bytes:
    """The cookie of the next request."""
    return connection.recv(28, socket.MSG_WAITALL)[8:16]


#: What a server answers to the first request, by its cookie, and what the error says.
HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "other cookie": (lambda _: struct.pack(">II", 0x67446698, 0) + b"x" * 8, "nobody asked"),
    "no reply": (lambda _: b"HTTP/1.1 200 OK\r\n\r\n", "no form that is known"),
    "error": (lambda cookie: struct.pack(">II", 0x67446698, 5) + cookie, "answers with error 5"),
    "outside": (
        lambda cookie: struct.pack(">IHH", 0x668E33EF, 1, 1) + cookie + struct.pack(">IQ", 108, SIZE) + bytes(100),
        "bytes that nobody asked for",
    ),
    "twice": (
        lambda cookie: (
            (struct.pack(">IHH", 0x668E33EF, 0, 1) + cookie + struct.pack(">IQ", 40008, 0) + bytes(40000)) * 2
        ),
        "the same bytes twice",
    ),
    "too little": (lambda cookie: struct.pack(">IHH", 0x668E33EF, 1, 0) + cookie + bytes(4), "all but"),
    "end": (lambda _: b"", "has closed the connection"),
}


def _states(cookie: bytes, *states: tuple[int, int], context: int = 1, last: int = 1) -> bytes:
    """A chunk that says the states of ranges."""
    payload = struct.pack(">I", context) + b"".join(struct.pack(">II", *state) for state in states)
    return struct.pack(">IHH", 0x668E33EF, last, 5) + cookie + struct.pack(">I", len(payload)) + payload


#: What a server that tells of holes answers to the first question about them, and what the error says.
HOSTILE_STATES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "states of another context": (lambda cookie: _states(cookie, (SIZE, 0), context=2), "describes what nobody asked"),
    "states twice": (lambda cookie: _states(cookie, (SIZE, 2), last=0) * 2, "describes what nobody asked"),
    "a range of no length": (lambda cookie: _states(cookie, (0, 2), (SIZE, 2)), "ranges of no length"),
    "no states": (lambda cookie: struct.pack(">IHH", 0x668E33EF, 1, 0) + cookie + bytes(4), "does not say what"),
    "no whole state": (lambda cookie: _states(cookie, (SIZE, 0))[:16] + struct.pack(">I", 8), "a chunk that is none"),
}


@pytest.mark.parametrize("answer", [*HOSTILE, *HOSTILE_STATES])
def test_a_hostile_server_gets_an_error_and_no_byte_in(answer: str, tmp_path: Path) -> None:
    reply, said = {**HOSTILE, **HOSTILE_STATES}[answer]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"NBDMAGICIHAVEOPT\0\3")
            connection.recv(4 + 16, socket.MSG_WAITALL)  # flags, STRUCTURED_REPLY
            connection.sendall(struct.pack(">QIII", 0x0003E889045565A9, 8, 1, 0))
            connection.recv(16 + 4 + len("disk") + 4 + 4 + len("base:allocation"), socket.MSG_WAITALL)
            if answer in HOSTILE_STATES:
                context = struct.pack(">I", 1) + b"base:allocation"
                connection.sendall(struct.pack(">QIII", 0x0003E889045565A9, 10, 4, len(context)) + context)
                connection.sendall(struct.pack(">QIII", 0x0003E889045565A9, 10, 1, 0))
            else:
                connection.sendall(struct.pack(">QIII", 0x0003E889045565A9, 10, (1 << 31) + 1, 0))
            connection.recv(16 + 4 + len("disk") + 2, socket.MSG_WAITALL)
            export = struct.pack(">HQH", 0, SIZE, 3)
            connection.sendall(struct.pack(">QIII", 0x0003E889045565A9, 7, 3, len(export)) + export)
            connection.sendall(struct.pack(">QIII", 0x0003E889045565A9, 7, 1, 0))
            connection.sendall(reply(_request(connection)))

    thread = threading.Thread(target=serve)
    thread.start()
    with (
        listener,
        open_image(address(tmp_path / "socket"), ONCE) as disk,
        pytest.raises(ImageError, match=said) as raised,
    ):
        disk.read(0, 1000)
    assert raised.value.kind is ErrorKind.IO
    thread.join()


def test_holes_there_are_holes_here_and_are_not_read(tmp_path: Path, tapfs_command: list[str]) -> None:
    """By qemu-nbd, and by our own server of a qcow2 image whose disk has a thousand pieces."""
    data = {MIB: b"one" * 5000, 5 * MIB + 512: b"two" * 100, 1 << 30: b"three"}
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(64 << 30)
        for offset, content in data.items():
            file.seek(offset)
            file.write(content)
    with nbd_served(sparse, "-r") as path, open_image(address(path), ONCE) as disk:
        extents = list(disk.extents())
        held = sum(each.length for each in extents if each.data)
        assert held < MIB
        for offset, content in data.items():
            assert disk.read(offset, len(content)) == content
            assert any(each.data and each.offset <= offset < each.end for each in extents)
        assert disk.read(10 << 30, 100) == bytes(100)
        copy = os.fstat(disk.layers[0].file.descriptor).st_blocks * 512
        assert copy < MIB  # the hole was not fetched
        tapfs.convert(sparse, tmp_path / "wanted.qcow2", format="raw", target_format="qcow2")
        convert_to_new(disk, str(tmp_path / "got.qcow2"), NewImage("qcow2", disk.size))
        assert (tmp_path / "got.qcow2").stat().st_size == (tmp_path / "wanted.qcow2").stat().st_size
    pieces = tmp_path / "pieces.qcow2"
    tapfs.create(pieces, "qcow2", 256 * MIB)
    with tapfs.open(pieces, writable=True) as disk:
        for number in range(1000):
            disk.write(number * 192 << 10, b"x")
    own = tmp_path / "own"
    words = [*tapfs_command, "serve", "--name", "disk", "--socket", own, pieces]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            with open_image(address(own), ONCE) as disk, tapfs.open(pieces) as wanted:
                assert [(each.offset, each.length) for each in disk.extents() if each.data] == [
                    (each.offset, each.length) for each in wanted.extents() if each.data
                ]
        finally:
            process.terminate()


def test_an_image_on_our_own_server(tmp_path: Path, content: bytes, tapfs_command: list[str]) -> None:
    (tmp_path / "disk").write_bytes(content)
    path = tmp_path / "own"
    words = [*tapfs_command, "serve", "-f", "raw", "--name", "disk", "--socket", path, tmp_path / "disk"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            with open_image(address(path), ONCE) as disk:
                assert disk.read(0, SIZE) == content
        finally:
            process.terminate()


def test_a_negotiation_is_bounded_as_a_whole(tmp_path: Path) -> None:
    """A server that says a byte now and then says one in time, again and again."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(b"NBDMAGICIHAVEOPT\0\3")
            connection.sendall(struct.pack(">QIII", 0x0003E889045565A9, 8, 1, 1000))
            for _ in range(1000):
                connection.sendall(b"x")
                time.sleep(0.01)

    thread = threading.Thread(target=drip)
    thread.start()
    options = OpenOptions(format="raw", remote=RemoteOptions(tries=1, timeout_seconds=0.2))
    with listener, pytest.raises(ImageError, match=r"no export within 0\.2 s"):
        open_image(address(tmp_path / "socket"), options)
    thread.join()
