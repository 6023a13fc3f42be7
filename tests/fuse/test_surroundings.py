"""A mount does not depend on the program that starts it, nor on changes of its mount point."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
from pathlib import Path

import pytest

from tapfs.errors import CODES, ErrorKind
from tests.fuse.conftest import Mounts, is_traced


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(os.urandom(1 << 20))
    return path


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(mounts: Mounts, image: Path, closed: str) -> None:
    directory = mounts.directory()
    command = f'exec "$@" {closed}'
    words = [*mounts.command, "mount", "--rw", "-f", "raw", "--engine", mounts.engine, image, directory]
    subprocess.run(["sh", "-c", command, "sh", *words], check=True, env=mounts.environment)
    content = image.read_bytes()
    assert hashlib.sha256((directory / "disk").read_bytes()).digest() == hashlib.sha256(content).digest()
    with (directory / "disk").open("r+b") as disk:
        disk.write(b"new")
    mounts.umount(directory)
    assert image.read_bytes() == b"new" + content[3:]


def test_the_server_lets_go_of_what_it_inherited(mounts: Mounts, image: Path) -> None:
    directory = mounts.directory()
    reader, writer = os.pipe()
    words = [*mounts.command, "mount", "--engine", mounts.engine, image, directory]
    subprocess.run(words, check=True, env=mounts.environment, pass_fds=[writer])
    os.close(writer)
    with os.fdopen(reader, "rb") as end:
        assert end.read() == b""  # hangs while somebody holds the other end
    mounts.umount(directory)


@pytest.mark.usefixtures("root")
def test_a_covered_mount_stays(mounts: Mounts, image: Path) -> None:
    directory = mounts.mount(image)
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    try:
        refused = mounts.run("umount", directory)
    finally:
        subprocess.run(["umount", directory], check=True)
    assert refused.code == CODES[ErrorKind.LOCKED].exit_code
    assert "mounted over it" in refused.err
    assert (directory / "disk").read_bytes() == image.read_bytes()
    mounts.umount(directory)


@pytest.mark.parametrize(
    ("flags", "of_write"),
    [
        *((flags, 0) for flags in (os.O_DSYNC, os.O_SYNC, os.O_DIRECT | os.O_DSYNC, os.O_DIRECT | os.O_SYNC)),
        *((0, os.RWF_DSYNC), (os.O_DIRECT, os.RWF_DSYNC), (os.O_DIRECT, os.RWF_SYNC)),
    ],
)
def test_synchronous_writes_are_durable_when_they_return(
    mounts: Mounts, image: Path, tmp_path: Path, flags: int, of_write: int
) -> None:
    directory = mounts.mount(image, "--rw", "-f", "raw")
    (server,) = mounts.processes()
    log = tmp_path / "strace"
    with subprocess.Popen(
        ["strace", "-f", "-qq", "-e", "trace=fdatasync,fsync", "-o", log, "-p", str(server)], stderr=subprocess.PIPE
    ) as strace:
        assert strace.stderr is not None
        # strace says nothing more with -qq: it is there when the kernel names it as the tracer of every thread.
        while not is_traced(server, strace.pid):
            assert strace.poll() is None
        descriptor = os.open(directory / "disk", os.O_RDWR | flags)
        try:
            assert os.pwritev(descriptor, [mmap.mmap(-1, 4096)], 0, of_write) == 4096  # aligned as O_DIRECT wants it
            syncs = log.read_text()
        finally:
            os.close(descriptor)
            strace.terminate()
    assert "sync(" in syncs
    mounts.umount(directory)
