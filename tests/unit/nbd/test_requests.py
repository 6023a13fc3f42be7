"""Requests at the bounds of what the native server takes: read-only disks, long requests, clients that go or stall."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

import tapfs
from tests import nbd_client as nbd
from tests.fuse.conftest import wait_for
from tests.unit.nbd.served import Served

MIB = 1 << 20
STYLES = [nbd.SIMPLE, nbd.STRUCTURED, nbd.EXTENDED]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"".join(bytes([number]) * 4096 for number in range(1, 256)) * 50)
    return path


@pytest.mark.parametrize("style", STYLES)
def test_a_read_only_disk_refuses_writers_and_goes_on(image: Path, style: int) -> None:
    with Served(tapfs.open(image, format="raw")) as server:
        client = server.connect(style)
        assert client.ask(nbd.WRITE, 0, data=bytes(3 * MIB)).error == errno.EPERM
        assert client.ask(nbd.TRIM, 0, 4096).error == errno.EPERM
        assert client.ask(nbd.WRITE_ZEROES, 0, 4096).error == errno.EPERM
        assert client.ask(nbd.FLUSH).error == 0
        assert client.ask(99, 0, 4096).error == errno.EINVAL
        assert client.ask(nbd.READ, 0, 32 * MIB).whole() == image.read_bytes()[: 32 * MIB]
        assert client.ask(nbd.READ, 0, 32 * MIB + 1).error == errno.EINVAL


@pytest.mark.parametrize("style", STYLES)
def test_nothing_behind_the_end_of_the_disk_is_read_or_written(image: Path, style: int) -> None:
    before = image.read_bytes()
    size = len(before)
    with Served(tapfs.open(image, format="raw", writable=True)) as server:
        client = server.connect(style)
        for offset, length in ((size - 1, 2), (size, 1), (size - 4096, 8192), ((1 << 63) - 1, 1), ((1 << 64) - 1, 1)):
            for command in (nbd.READ, nbd.TRIM, nbd.CACHE, *([] if style == nbd.SIMPLE else [nbd.BLOCK_STATUS])):
                assert client.ask(command, offset, length).error == errno.EINVAL
            assert client.ask(nbd.WRITE_ZEROES, offset, length).error == errno.ENOSPC
            assert client.ask(nbd.WRITE, offset, data=b"w" * length).error == errno.ENOSPC
        assert client.ask(nbd.READ, size - 1, 1).whole() == before[-1:]
        assert client.ask(nbd.READ, size, 0).error == 0
    assert image.read_bytes() == before


def _one_processor(_process: int) -> set[int]:
    return {0}


@pytest.mark.parametrize("style", STYLES)
def test_a_client_that_takes_no_answers_holds_a_bounded_memory(
    image: Path, style: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one native thread each answer to the other client comes after a look at the first.
    monkeypatch.setattr(os, "sched_getaffinity", _one_processor)
    with Served(tapfs.open(image, format="raw")) as server:
        greedy, other = server.connect(style), server.connect(nbd.STRUCTURED)
        asked = [greedy.send(nbd.READ, number * MIB, 8 * MIB) for number in range(40)]
        for _ in range(20):
            assert other.ask(nbd.READ, 0, 4096).whole() == b"\1" * 4096
        assert server.statistics().held <= 11 * MIB
        whole = image.read_bytes()
        for number, cookie in enumerate(asked):
            answer = greedy.answer(cookie, number * MIB, reads=True)
            assert answer.whole() == whole[number * MIB : (number + 8) * MIB]
        greedy.close()
        other.close()
        server.wait_until_idle()


@pytest.mark.parametrize("style", STYLES)
def test_a_client_that_sends_much_and_goes_leaves_nothing(image: Path, style: int) -> None:
    with Served(tapfs.open(image, format="raw", writable=True)) as server:
        for cut in (0, 1, 4096, 5 * MIB):
            client = server.connect(style)
            for number in range(4):
                client.send(nbd.READ, number * MIB, MIB)
            flags = nbd.PAYLOAD_LEN if style == nbd.EXTENDED else 0
            client.connection.sendall(client.request_bytes(nbd.WRITE, 99, 0, 8 * MIB, flags) + bytes(cut))
            client.close()
        server.wait_until_idle()


def test_a_write_that_was_sent_whole_is_done_though_its_client_has_gone(image: Path) -> None:
    with Served(tapfs.open(image, format="raw", writable=True)) as server:
        client = server.connect(nbd.STRUCTURED)
        for number in range(16):
            client.send(nbd.WRITE, number * MIB, data=b"w" * 4096)
        client.send(nbd.DISC)
        client.close()
        server.wait_until_idle()
        reader = server.connect(nbd.STRUCTURED)
        for number in range(16):
            assert reader.ask(nbd.READ, number * MIB, 4096).whole() == b"w" * 4096


def test_a_message_that_is_no_request_ends_the_connection(image: Path) -> None:
    with Served(tapfs.open(image, format="raw", writable=True)) as server:
        for nonsense in (
            b"\xff" * 28,
            server.connect(nbd.SIMPLE).request_bytes(nbd.WRITE, 1, 0, 32 * MIB + 1),
        ):
            client = server.connect(nbd.SIMPLE)
            client.connection.sendall(nonsense)
            with pytest.raises((EOFError, ConnectionError)):
                client.receive(1)


def test_what_one_connection_has_flushed_another_one_reads(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    tapfs.create(path, "qcow2", 64 * MIB)
    with Served(tapfs.open(path, format="qcow2", writable=True)) as server:
        clients = [server.connect(nbd.EXTENDED) for _ in range(8)]

        def write(number: int) -> None:
            for step in range(32):
                offset = (step * 8 + number) * 65536
                assert clients[number].ask(nbd.WRITE, offset, data=bytes([number + 1]) * 65536).error == 0
            assert clients[number].ask(nbd.FLUSH).error == 0

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen = clients[0].ask(nbd.READ, 0, 16 * MIB).whole()
        assert seen == b"".join(bytes([number + 1]) * 65536 for number in range(8)) * 32


def test_the_end_of_the_server_answers_what_was_asked(image: Path) -> None:
    with Served(tapfs.open(image, format="raw", writable=True)) as server:
        client = server.connect(nbd.STRUCTURED)
        asked = [client.send(nbd.WRITE, number * 4096, data=b"s" * 4096, flags=nbd.FUA) for number in range(64)]
        wait_for(lambda: server.statistics().writes > 0)
        ending = threading.Thread(target=server.stop)
        ending.start()
        done = 0
        try:
            for cookie in asked:
                assert client.answer(cookie).error in {0, errno.ESHUTDOWN}
                done += 1
        except (EOFError, ConnectionError):
            pass
        ending.join()
        assert done > 0
    assert image.read_bytes()[:4096] == b"s" * 4096


def test_sockets_of_clients_are_closed(image: Path) -> None:
    with Served(tapfs.open(image, format="raw")) as server:
        before = len(os.listdir("/proc/self/fd"))
        clients = [server.connect(nbd.STRUCTURED) for _ in range(200)]
        for client in clients:
            assert len(client.ask(nbd.READ, 0, 512).whole()) == 512
        for client in clients:
            client.close()
        server.wait_until_idle()
        assert len(os.listdir("/proc/self/fd")) == before


def test_flushes_that_wait_at_once_are_one_and_a_failure_is_each_ones_own(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Served(tapfs.open(image, format="raw", writable=True)) as server:
        disk = server.export.image
        began, go_on, flushes = threading.Event(), threading.Event(), list[int]()

        def flush() -> None:
            flushes.append(len(flushes))
            began.set()
            go_on.wait(30)
            if len(flushes) > 2:
                raise OSError(errno.EIO, "the host failed")

        monkeypatch.setattr(disk, "flush", flush)
        client = server.connect(nbd.STRUCTURED)
        first = client.send(nbd.FLUSH)
        assert began.wait(30)
        asked = [client.send(nbd.WRITE, number * 4096, data=b"f" * 4096, flags=nbd.FUA) for number in range(40)]
        wait_for(lambda: server.statistics().parked >= 41)
        go_on.set()
        assert [client.answer(cookie).error for cookie in (first, *asked)] == [0] * 41
        assert len(flushes) == 2
        assert client.ask(nbd.FLUSH).error == errno.EIO
        monkeypatch.undo()
        assert client.ask(nbd.FLUSH).error == 0


@pytest.mark.parametrize("style", STYLES)
def test_zeros_of_a_read_are_told_as_holes(tmp_path: Path, style: int) -> None:
    path = tmp_path / "disk.qcow2"
    tapfs.create(path, "qcow2", 8 * MIB)
    with tapfs.open(path, writable=True) as disk:
        disk.write(2 * MIB, b"d" * 512)
        disk.write(4 * MIB - 1, b"e")
        disk.write(5 * MIB, bytes(MIB))  # zeros that the image holds as data
    with Served(tapfs.open(path)) as server:
        client = server.connect(style)
        found = client.ask(nbd.READ, 0, 6 * MIB)
        assert found.whole() == bytes(2 * MIB) + b"d" * 512 + bytes(2 * MIB - 513) + b"e" + bytes(2 * MIB)
        told = [] if style == nbd.SIMPLE else [(0, MIB), (MIB, MIB), (4 * MIB, MIB), (5 * MIB, MIB)]
        assert sorted(found.holes) == told
        assert client.ask(nbd.READ, 100, 1).holes == ([] if style == nbd.SIMPLE else [(100, 1)])
        # Who wants no fragments gets bytes.
        if style != nbd.SIMPLE:
            found = client.ask(nbd.READ, 0, 4096, flags=nbd.DF)
            assert (found.whole(), found.holes) == (bytes(4096), [])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("command", [nbd.READ, nbd.WRITE, nbd.FLUSH])
def test_a_limit_holds_what_comes_behind_its_debt(image: Path, style: int, command: int) -> None:
    """A request in the debt of another is not begun, until the limit is changed or the server ends."""
    data = bytes(4096) if command == nbd.WRITE else b""
    length = 4096 if command == nbd.READ else 0
    with Served(tapfs.open(image, format="raw", writable=True)) as server:
        server.export.limit(1, 0)
        client, other = server.connect(style), server.connect(style)
        assert client.ask(nbd.READ, 0, 4096).error == 0
        waiting = client.send(command, 0, length, data), other.send(command, 0, length, data)
        client.connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.answer(waiting[0], reads=command == nbd.READ)
        client.connection.settimeout(30)
        server.export.limit(0, 0)
        assert client.answer(waiting[0], reads=command == nbd.READ).error == 0
        assert other.answer(waiting[1], reads=command == nbd.READ).error == 0
        server.export.limit(0, 1)
        assert client.ask(nbd.FLUSH).error == 0
        client.send(command, 0, length, data)
        server.stop()  # it waits for nobody's rate
