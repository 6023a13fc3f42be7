"""Copies that are kept between runs: nothing is fetched twice, and nothing that is not the same any more is used."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.chain import OpenOptions
from tapfs.disk.image import Image
from tapfs.disk.opening import open_image
from tapfs.host.remote.options import RemoteOptions
from tests.web_server import WebServer, web_server

MIB = 1 << 20
SIZE = 3 * MIB
BLOCK = 64 << 10


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def server(content: bytes) -> Iterator[WebServer]:
    with web_server(content) as server:
        yield server


def opened(server: WebServer, folder: Path, copy_bytes: int = 8 << 30) -> Image:
    remote = RemoteOptions(kept_in=str(folder), copy_bytes=copy_bytes)
    return open_image(server.url + "/x", OpenOptions(format="raw", remote=remote))


def fetched(server: WebServer) -> int:
    """Bytes that were asked for since the last call, but for the first byte of each opening."""
    total = sum(stop - start for start, stop in server.asked if stop - start > 1)
    server.asked.clear()
    return total


def test_what_is_there_is_not_fetched_again(server: WebServer, content: bytes, tmp_path: Path) -> None:
    with opened(server, tmp_path / "kept") as disk:
        assert disk.read(MIB, MIB) == content[MIB : 2 * MIB]
    assert fetched(server) == MIB
    with opened(server, tmp_path / "kept") as disk:
        assert disk.read(0, SIZE) == content
    assert fetched(server) == SIZE - MIB
    with opened(server, tmp_path / "kept") as disk:
        assert disk.read(0, SIZE) == content
    assert fetched(server) == 0
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700

    # What has changed is fetched anew, all of it.
    server.etag, server.content = '"two"', content[::-1]
    with opened(server, tmp_path / "kept") as disk:
        assert disk.read(0, SIZE) == content[::-1]
    assert fetched(server) == SIZE


def test_python_keeps_what_has_come_too(server: WebServer, content: bytes, tmp_path: Path) -> None:
    address = server.url + "/x"
    with tapfs.open(address, format="raw", remote_cache=tmp_path / "kept", remote_cache_bytes=64 * MIB) as disk:
        assert disk.read(0, MIB) == content[:MIB]
    assert fetched(server) == MIB
    with tapfs.open_file(address, format="raw", remote_cache=tmp_path / "kept") as file:
        assert file.read(MIB) == content[:MIB]
    assert tapfs.info(address, format="raw", remote_cache=tmp_path / "kept")["virtual_size"] == SIZE
    assert fetched(server) < MIB
    with pytest.raises(ValueError, match="at least"):
        tapfs.open(address, remote_cache_bytes=MIB)


def test_no_list_names_what_is_given_up(server: WebServer, content: bytes, tmp_path: Path) -> None:
    with opened(server, tmp_path) as disk:
        assert disk.read(0, SIZE // 2) == content[: SIZE // 2]
    (listed,) = tmp_path.glob("*.blocks")
    with opened(server, tmp_path, copy_bytes=MIB) as disk:
        assert disk.read(0, 10) == content[:10]
        assert listed.exists()
        assert disk.read(SIZE // 2, SIZE // 2) == content[SIZE // 2 :]
        assert not listed.exists()  # whatever happens now, a block that is gone is not taken for one that is there
        for start in range(0, SIZE, BLOCK):
            assert disk.read(start, BLOCK) == content[start : start + BLOCK]
    assert listed.exists()
    fetched(server)
    with opened(server, tmp_path) as disk:
        assert disk.read(0, SIZE) == content
    assert SIZE - 2 * MIB <= fetched(server) < SIZE


@pytest.mark.parametrize("damage", ["copy gone", "list cut", "copy cut", "list of another copy"])
def test_what_does_not_belong_together_is_not_used(
    server: WebServer, content: bytes, tmp_path: Path, damage: str
) -> None:
    with opened(server, tmp_path) as disk:
        assert disk.read(0, SIZE) == content
    (copy,), (listed,) = tmp_path.glob("*.data"), tmp_path.glob("*.blocks")
    if damage == "copy gone":
        copy.unlink()
    elif damage == "list cut":
        os.truncate(listed, listed.stat().st_size - 3)
    elif damage == "copy cut":
        os.truncate(copy, SIZE - 1)
    else:
        copy.rename(tmp_path / "away")  # so that its number is not used again
        copy.write_bytes(bytes(SIZE))
    with opened(server, tmp_path) as disk:
        assert disk.read(0, SIZE) == content


def test_a_copy_that_another_has_is_left_alone(
    server: WebServer, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapfs.host.remote.kept_copy._LOCK_TRIES", 1)
    with opened(server, tmp_path) as disk:
        assert disk.read(0, 10) == content[:10]
    (copy,) = tmp_path.glob("*.data")
    before = copy.stat().st_blocks
    with copy.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with opened(server, tmp_path) as disk:
            assert disk.read(0, SIZE) == content
    assert copy.stat().st_blocks == before
