"""Writable mounts: what is written is there, for QEMU too, and what cannot be flushed is told."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import signal
import subprocess
from itertools import count
from pathlib import Path

import pytest

from tests.fuse.conftest import Mounts, refused, wait_for

MIB = 1 << 20


#: Names of formats that qemu-img calls otherwise.
_TO_QEMU = {"vhd": "vpc"}


@pytest.mark.parametrize("format_name", ["raw", "qcow", "vhd"])
def test_random_writes(mounts: Mounts, tmp_path: Path, format_name: str) -> None:
    image, expected = tmp_path / "image", tmp_path / "expected.raw"
    assert mounts.run("create", "-f", format_name, image, "8M").code == 0
    model = bytearray(8 * MIB)
    choice = random.Random(7)
    directory = mounts.mount(image, "-f", format_name, "--rw")
    assert (directory / "disk").stat().st_mode & 0o777 == 0o600
    descriptor = os.open(directory / "disk", os.O_RDWR)
    try:
        for turn in range(150):
            offset = choice.randrange(8 * MIB - 1)
            data = choice.randbytes(min(choice.choice([1, 512, 4096, 150_000]), 8 * MIB - offset))
            assert os.pwrite(descriptor, data, offset) == len(data)
            model[offset : offset + len(data)] = data
            if turn % 50 == 49:
                os.fsync(descriptor)
        assert os.pread(descriptor, 8 * MIB, 0) == model
    finally:
        os.close(descriptor)
    mounts.umount(directory)
    expected.write_bytes(model)
    said = _TO_QEMU.get(format_name, format_name)
    compare = ["qemu-img", "compare", "-f", said, "-F", "raw", str(image), str(expected)]
    assert subprocess.run(compare, check=False, capture_output=True).returncode == 0
    assert mounts.run("check", "-f", format_name, image).code == (63 if format_name == "raw" else 0)


@pytest.mark.usefixtures("root")
def test_file_system_made_inside(mounts: Mounts, tmp_path: Path) -> None:
    image, inside = tmp_path / "image.qcow", tmp_path / "inside"
    inside.mkdir()
    assert mounts.run("create", "-f", "qcow", image, "32M").code == 0
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    subprocess.run(["mkfs.ext4", "-q", "-F", directory / "disk"], check=True)
    subprocess.run(["mount", "-o", "loop", directory / "disk", inside], check=True)
    try:
        content = random.Random(3).randbytes(3 * MIB)
        (inside / "file").write_bytes(content)
    finally:
        subprocess.run(["umount", inside], check=True)
    wait_for(lambda: str(directory) not in _loop_files())
    mounts.umount(directory)
    # Read by another who knows the format, and checked by another who knows the file system.
    flat = tmp_path / "flat.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow", "-O", "raw", image, flat], check=True)
    subprocess.run(["e2fsck", "-fn", flat], check=True, capture_output=True)
    read = subprocess.run(["debugfs", "-R", "cat /file", flat], check=True, capture_output=True).stdout
    assert read == content


def test_what_a_disk_does_not_do(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(b"a" * MIB)
    directory = mounts.mount(image, "-f", "raw", "--rw")
    disk = directory / "disk"
    attempts = {
        lambda: os.truncate(disk, 5): errno.EPERM,
        lambda: os.truncate(disk, MIB + 1): errno.EPERM,
        lambda: os.chmod(disk, 0o400): errno.EPERM,
        lambda: os.utime(disk, (0, 0)): errno.EPERM,
        lambda: os.open(directory / "info.json", os.O_WRONLY): errno.EROFS,
    }
    if os.geteuid() == 0:  # the kernel refuses an ordinary user by the mode of the directory
        attempts |= {
            lambda: os.unlink(disk): errno.EPERM,
            lambda: os.rename(disk, directory / "other"): errno.EPERM,
            lambda: os.mkdir(directory / "new"): errno.EPERM,
            lambda: os.symlink("disk", directory / "new"): errno.EPERM,
            lambda: os.link(disk, directory / "new"): errno.EPERM,
            lambda: os.open(directory / "new", os.O_WRONLY | os.O_CREAT): errno.EPERM,
        }
    for attempt, number in attempts.items():
        with refused(number):
            attempt()
    with disk.open("ab", buffering=0) as file, refused(errno.ENOSPC):
        file.write(b"past the end")
    os.truncate(disk, MIB)
    with disk.open("r+b", buffering=0) as file:
        file.seek(-3, os.SEEK_END)
        assert file.write(b"12345") == 3  # as a block device does
    mounts.umount(directory)
    assert image.read_bytes() == b"a" * (MIB - 3) + b"123"


def test_writer_is_alone(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow"
    assert mounts.run("create", "-f", "qcow", image, "1M").code == 0
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    (pid,) = mounts.processes()
    # What other processes have open is not to be seen from a sandbox.
    assert mounts.run("mount", "-f", "qcow", image, mounts.directory()).code == 15
    refused = mounts.run("mount", "--no-sandbox", "-f", "qcow", image, mounts.directory())
    assert refused.code == 15
    assert f"process {pid}" in refused.err
    assert refused.err.count("\n") == 1
    mounts.umount(directory)


def limit(pid: int, size: int) -> None:
    """Have the host refuse a process what lies behind `size` in a file; an image on a full host fails no flush."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def starve(disk: Path, pid: int, size: int) -> tuple[int, int]:
    """Write one byte to clusters, until the host refuses the process behind the disk the flush of their tables.

    The descriptor, still open, and the number of clusters.
    """
    descriptor = os.open(disk, os.O_RDWR)
    for number in count():
        limit(pid, resource.RLIM_INFINITY)
        os.pwrite(descriptor, b"x", number * 2 * MIB)
        limit(pid, size)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return descriptor, number + 1
    raise AssertionError


@pytest.fixture
def sparse_image(tmp_path: Path, mounts: Mounts) -> Path:
    """A qcow image without a table."""
    image = tmp_path / "image.qcow"
    assert mounts.run("create", "-f", "qcow", image, "4G").code == 0
    return image


def test_flush_error_reaches_umount(mounts: Mounts, sparse_image: Path) -> None:
    size = sparse_image.stat().st_size
    directory = mounts.mount(sparse_image, "-f", "qcow", "--rw")
    (pid,) = mounts.processes()
    descriptor, written = starve(directory / "disk", pid, size)
    failed = mounts.run("umount", directory)
    assert failed.code == 14
    assert failed.err.startswith("tapfs: error: ")
    assert failed.err.count("\n") == 1
    # It stays, so that nothing is lost once there is room again.
    limit(pid, resource.RLIM_INFINITY)
    os.close(descriptor)
    mounts.umount(directory)
    assert mounts.run("check", "-f", "qcow", sparse_image).code == 0
    read = mounts.mount(sparse_image, "-f", "qcow")
    with (read / "disk").open("rb") as disk:
        for number in range(written):
            disk.seek(number * 2 * MIB)
            assert disk.read(2) == b"x\0"
    mounts.umount(read)


def test_forced_umount_still_reports(mounts: Mounts, sparse_image: Path) -> None:
    size = sparse_image.stat().st_size
    directory = mounts.mount(sparse_image, "-f", "qcow", "--rw")
    (pid,) = mounts.processes()
    descriptor, _ = starve(directory / "disk", pid, size)
    failed = mounts.run("umount", "--force", directory)
    assert failed.code == 14
    assert mounts.mounted() == []
    with refused(errno.ENOTCONN):
        os.pread(descriptor, 1, 0)
    with refused():
        os.close(descriptor)


def test_signal_reports_by_the_exit_code(mounts: Mounts, sparse_image: Path) -> None:
    size = sparse_image.stat().st_size
    directory = mounts.directory()
    process = mounts.foreground(sparse_image, directory, "-f", "qcow", "--rw")
    wait_for(lambda: len(mounts.processes()) == 1)  # it looks at its mount by a process that ends
    descriptor, _ = starve(directory / "disk", mounts.processes()[0], size)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 14
    assert "cannot" in said.splitlines()[-1]
    assert "Traceback" not in said
    with refused():
        os.close(descriptor)


def test_background_flush(mounts: Mounts, tmp_path: Path) -> None:
    """What a writer neither flushes nor closes is in the image soon all the same."""
    image = tmp_path / "image.qcow"
    assert mounts.run("create", "-f", "qcow", image, "4M").code == 0
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    with (directory / "disk").open("r+b", buffering=0) as disk:
        disk.write(b"precious")
        (pid,) = mounts.processes()
        wait_for(lambda: _flat(image).startswith(b"precious"))
        mounts.kill(pid)
        wait_for(lambda: not mounts.processes())
        assert mounts.run("umount", directory).code == 0
        assert _flat(image).startswith(b"precious")
        with refused():
            disk.close()


def test_a_write_that_is_to_be_durable_takes_the_metadata_along(mounts: Mounts, tmp_path: Path) -> None:
    """RWF_DSYNC of one write, past the kernel's memory: no FSYNC follows, the flags of the WRITE say it."""
    image = tmp_path / "image.qcow"
    assert mounts.run("create", "-f", "qcow", image, "4M").code == 0
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    memory = mmap.mmap(-1, 4096)
    memory[:8] = b"precious"
    descriptor = os.open(directory / "disk", os.O_RDWR | os.O_DIRECT)
    assert os.pwritev(descriptor, [memory], 0, os.RWF_DSYNC) == 4096
    # At once: soon a flush in the background would bring it there, too.
    (tmp_path / "copy").write_bytes(image.read_bytes())
    assert _flat(tmp_path / "copy") == b"precious"
    os.close(descriptor)
    mounts.umount(directory)


def _flat(image: Path) -> bytes:
    """The first bytes of a disk, by QEMU."""
    command = ["qemu-io", "-U", "-r", "-f", "qcow", "-c", "read -v 0 8", str(image)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return bytes.fromhex("".join(said.splitlines()[0].split()[1:9]))


def _loop_files() -> str:
    return "".join(path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file"))
