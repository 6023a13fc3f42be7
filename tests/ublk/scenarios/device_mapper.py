"""A device of the device mapper over files in memory that keeps a log of its writes, and file systems on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.laboratory.commands import run

MEMORY = Path("/images/power")
#: The first device of the device mapper; there is no udev that would name it.
DEVICE = "/dev/dm-0"
MOUNT = "/run/mounted"
SECTOR = 512
_NAME = "power"
#: File system: the command that makes one as small as these. XFS wants a word more for that.
FILE_SYSTEMS = {
    "ext4": ["mkfs.ext4", "-q", "-E", "nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K", "--unsupported"],
}


@contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder in memory, which is taken away with all that is in it."""
    shutil.rmtree(MEMORY, ignore_errors=True)
    MEMORY.mkdir()
    try:
        yield MEMORY
    finally:
        shutil.rmtree(MEMORY, ignore_errors=True)


def new_file(name: str, size: int) -> Path:
    """A hole of so many bytes."""
    path = MEMORY / name
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextmanager
def loop(path: Path) -> Iterator[str]:
    """A block device over a file."""
    device = run("losetup", "--find", "--show", str(path))
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(device: str, file_system: str) -> Iterator[None]:
    """The file system on a device, at MOUNT."""
    os.makedirs(MOUNT, exist_ok=True)
    run("mount", "-t", file_system, device, MOUNT)
    try:
        yield
    finally:
        run("umount", MOUNT)


@contextmanager
def logged(lower: str, record: str, size: int) -> Iterator[None]:
    """DEVICE is the lower device, and what is written to it is recorded on another one."""
    table = f"0 {size // SECTOR} log-writes {lower} {record}"
    run("dmsetup", "create", _NAME, "--noudevsync", "--table", table)
    try:
        yield
    finally:
        run("dmsetup", "remove", "--noudevsync", _NAME)


def mark(name: str) -> None:
    """Put a mark into the log."""
    run("dmsetup", "message", _NAME, "0", "mark", name)
