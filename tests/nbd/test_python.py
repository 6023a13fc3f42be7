"""`tapfs.serve`: a server that a Python program starts and closes, and what it raises."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "runtime"))


def test_a_program_serves_a_disk_and_closes_the_server(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    tapfs.create(image, "qcow2", MIB)
    with tapfs.serve(image, writable=True, name="a disk") as server:
        assert server.uri.startswith("nbd+unix:///a%20disk?socket=")
        assert str(server.pid) in os.listdir("/proc")
        words = ["qemu-io", "-f", "raw", server.uri, "-c", "write -P 5 0 64k"]
        subprocess.run(words, check=True, capture_output=True)
    with tapfs.open(image) as disk:
        assert disk.read(0, 65536) == b"\5" * 65536
    assert [path for path in (tmp_path / "runtime").rglob("*") if not path.is_dir()] == []
    server.close()


def test_a_server_may_end_with_its_last_client(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    tapfs.create(image, "qcow2", MIB)
    server = tapfs.serve(image, temporary=True, socket=tmp_path / "s", exit_when_idle=True)
    subprocess.run(["nbdinfo", server.uri], check=True, capture_output=True)
    server.wait()
    assert not (tmp_path / "s").exists()


def test_what_keeps_a_server_from_starting_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as missing:
        tapfs.serve(tmp_path / "nothing")
    assert missing.value.kind is ErrorKind.NOT_FOUND
    assert missing.value.path == str(tmp_path / "nothing")
    (tmp_path / "raw").write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="is no HOST:PORT"):
        tapfs.serve(tmp_path / "raw", tcp="::1")
    with pytest.raises(TypeError):
        tapfs.serve(tmp_path / "raw", backing_formats="raw")
    with pytest.raises(ImageError, match="No such"):
        tapfs.serve(tmp_path / "raw", socket=tmp_path / "no/folder")
