"""Opening a disk with O_TRUNC: nothing, as on a block device, also for those who have it mapped."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.fuse.conftest import Mounts, refused

MIB = 1 << 20

#: Keeps a dirty page of the disk while another opens it with O_TRUNC. A touch of the page may be a SIGBUS.
MAPPED = """
import mmap, os, sys
disk = sys.argv[1]
descriptor = os.open(disk, os.O_RDWR)
mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
mapping[1 << 20 : (1 << 20) + 4] = b"NEW!"
other = os.open(disk, os.O_WRONLY | os.O_TRUNC)
print(os.fstat(descriptor).st_size, os.fstat(other).st_size)
print(mapping[1 << 20 : (1 << 20) + 4].decode())
mapping.flush()
print(os.pread(descriptor, 4, 1 << 20).decode())
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(b"OLD!" * (2 * MIB // 4))
    return path


def require_kept(disk: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MAPPED, disk], capture_output=True, text=True, check=False)
    assert Ran(done.returncode, done.stdout, done.stderr) == Ran(0, f"{2 * MIB} {2 * MIB}\nNEW!\nNEW!\n", "")


def test_a_mapping_keeps_what_was_stored(mounts: Mounts, image: Path) -> None:
    directory = mounts.mount(image, "-f", "raw", "--rw")
    require_kept(directory / "disk")
    mounts.umount(directory)
    assert image.read_bytes() == b"OLD!" * (MIB // 4) + b"NEW!" + b"OLD!" * (MIB // 4 - 1)


@pytest.mark.usefixtures("root")
def test_a_mapping_of_a_disk_that_the_kernel_passes_through(tmp_path: Path, image: Path, mounts: Mounts) -> None:
    directory = mounts.mount(image, "-f", "raw", "--rw", "--engine", "passthrough")
    require_kept(directory / "disk")
    mounts.umount(directory)


def test_names_that_are_opened_for_writing_anew(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    """What dd, the shell and Python do with the name of a file."""
    directory = mounts.mount(image, "-f", "raw", "--rw")
    disk = directory / "disk"
    source = tmp_path / "source"
    source.write_bytes(b"dd" * 2048)
    subprocess.run(["dd", f"if={source}", f"of={disk}", "bs=4096", "status=none"], check=True)
    subprocess.run(["sh", "-c", 'printf shell > "$1"', "sh", disk], check=True)
    with disk.open("wb", buffering=0) as file:
        file.seek(8192)
        file.write(b"python")
    os.truncate(disk, 0)  # cannot be told from an open with O_TRUNC
    assert disk.stat().st_size == 2 * MIB
    with disk.open("r+b", buffering=0) as file:
        for size in (0, 5, 2 * MIB + 1):
            with refused(errno.EPERM):
                os.ftruncate(file.fileno(), size)
        os.ftruncate(file.fileno(), 2 * MIB)
    content = disk.read_bytes()
    mounts.umount(directory)
    expected = bytearray(b"OLD!" * (2 * MIB // 4))
    expected[:4096] = b"dd" * 2048
    expected[:5] = b"shell"
    expected[8192:8198] = b"python"
    assert content == image.read_bytes() == expected


def test_what_is_no_disk_is_not_truncated(mounts: Mounts, image: Path) -> None:
    directory = mounts.mount(image, "-f", "raw", "--rw")
    with refused(errno.EROFS):
        os.open(directory / "info.json", os.O_WRONLY | os.O_TRUNC)
    if os.geteuid() == 0:  # the mode keeps an ordinary user from it
        with refused(errno.EPERM):
            os.truncate(directory / "info.json", 0)
    mounts.umount(directory)


def test_a_read_only_disk_is_not_truncated(mounts: Mounts, image: Path) -> None:
    directory = mounts.mount(image, "-f", "raw")
    with refused(errno.EROFS):
        os.open(directory / "disk", os.O_WRONLY | os.O_TRUNC)
    with refused(errno.EROFS):
        os.truncate(directory / "disk", 0)
    mounts.umount(directory)


@pytest.mark.parametrize("format_name", ["raw", "qcow"])
def test_an_image_that_somebody_truncates(mounts: Mounts, image: Path, tmp_path: Path, format_name: str) -> None:
    """What is lost is an error, never zeros; what is left can be read."""
    path = tmp_path / f"cut.{format_name}"
    assert mounts.run("convert", "-f", "raw", "-O", format_name, image, path).code == 0
    directory = mounts.mount(path, "-f", format_name)
    os.truncate(path, MIB)
    with (directory / "disk").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4096, 0) == b"OLD!" * 1024
        with refused(errno.EIO):
            os.pread(file.fileno(), 4096, MIB + MIB // 2)
    mounts.umount(directory)
