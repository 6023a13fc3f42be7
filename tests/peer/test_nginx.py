"""Images on nginx: ranges, redirects, a server without ranges, and a mount whose process was forked."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs
from tests.conftest import Ran

MIB = 1 << 20

CONFIGURATION = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/errors; user root;
events {{ }}
http {{
  access_log {folder}/access;
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  server {{
    listen 127.0.0.1:{port}; root {folder}/files;
    location /whole/ {{ alias {folder}/files/; max_ranges 0; }}
    location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
  }}
}}
"""


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server, and the folder of its files."""
    folder = tmp_path / "nginx"
    (folder / "files").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    (folder / "conf").write_text(CONFIGURATION.format(folder=folder, port=port))
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin") or "nginx"
    with subprocess.Popen([program, "-c", folder / "conf", "-e", folder / "errors"]) as process:
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        yield f"http://127.0.0.1:{port}", folder / "files"
        process.terminate()


def _large(image: Path, plain: Path) -> None:
    """A qcow2 image of 100 GiB with all of its tables, a GPT and an ext4 file system that fills the disk."""
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, "100G"]
    subprocess.run(words, check=True)
    size = 100 << 30
    with plain.open("wb") as file:
        file.truncate(size)
    subprocess.run(["sfdisk", "-q", plain], input=b"label: gpt\nstart=1MiB\n", check=True)
    words = ["mkfs.ext4", "-q", "-E", "offset=1048576,nodiscard", plain, str(size // 1024 - 4096)]
    subprocess.run(words, check=True)
    with plain.open("rb") as source, tapfs.open(image, writable=True) as disk:
        for offset in (0, MIB, 2 * MIB, size - MIB):
            source.seek(offset)
            disk.write(offset, source.read(MIB))


def test_images_on_nginx(nginx: tuple[str, Path], tapfs_process: Callable[..., Ran], tmp_path: Path) -> None:
    url, files = nginx
    content = random.Random(1).randbytes(3 * MIB) + bytes(5 * MIB)
    (tmp_path / "disk.raw").write_bytes(content)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", tmp_path / "disk.raw", files / "disk.qcow2"], check=True)
    _large(files / "large.qcow2", tmp_path / "large.raw")

    info = tapfs_process("info", f"{url}/moved/large.qcow2").out
    assert "100 GiB" in info
    assert "ext4" in info
    sent = [line.split('"')[2].split() for line in (files.parent / "access").read_text().splitlines()]
    assert sum(int(length) for _, length in sent) < 2 * MIB
    whole = tapfs_process("info", f"{url}/whole/disk.qcow2")
    assert whole.code == 12
    assert "no range requests" in whole.err
    assert tapfs_process("info", f"{url}/none.qcow2").code == 17

    assert tapfs_process("convert", "-O", "raw", f"{url}/disk.qcow2", tmp_path / "copy.raw").code == 0
    assert (tmp_path / "copy.raw").read_bytes() == content
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    mounted = tapfs_process("mount", "--temp", f"{url}/disk.qcow2", mountpoint)
    try:
        assert mounted.code == 0, mounted.err
        with (mountpoint / "disk").open("r+b", buffering=0) as disk:
            disk.write(b"over")
        assert (mountpoint / "disk").read_bytes() == b"over" + content[4:]
        assert f"{url}/disk.qcow2" in tapfs_process("list").out
    finally:
        assert tapfs_process("umount", f"{url}/disk.qcow2").code == 0
