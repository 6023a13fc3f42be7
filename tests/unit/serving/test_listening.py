"""Unix sockets of servers: who takes over what a killed server has left, and what is removed at the end."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.listening import listen_locally, remove_left_socket, remove_socket


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "socket"


def left(path: Path) -> None:
    """A socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


def test_one_of_many_servers_takes_over_a_left_socket(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def slowly(name: str) -> None:
        time.sleep(0.002)  # others look meanwhile
        unlink(name)

    monkeypatch.setattr(os, "unlink", slowly)

    def attempt(_: int) -> socket.socket | None:
        try:
            return listen_locally(str(path))
        except ImageError as error:
            if error.kind is not ErrorKind.LOCKED:
                raise
            return None

    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            left(path)
            (listener,) = [each for each in threads.map(attempt, range(8)) if each is not None]
            assert connects(path)
            remove_socket(str(path))
            assert not path.exists()
            listener.close()


def test_the_socket_of_another_server_stays(path: Path) -> None:
    with listen_locally(str(path)):
        os.unlink(path)
        left(path)
        remove_socket(str(path))
        assert path.exists(), "somebody has removed ours and made another"
    os.unlink(path)
    with listen_locally(str(path)):
        remove_left_socket(str(path))
        assert connects(path)
        remove_socket(str(path))
    assert not path.exists()


def test_only_what_is_a_socket_and_left_is_removed(path: Path) -> None:
    left(path)
    remove_left_socket(str(path))
    assert not path.exists()
    path.write_text("not a socket")
    remove_left_socket(str(path))
    remove_left_socket(str(path.with_name("nothing")))
    assert path.read_text() == "not a socket"
