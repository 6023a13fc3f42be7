"""A device of the device mapper over files in memory that keeps a log of its writes or fails, file systems on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.laboratory.commands import run

MEMORY = Path("/images/power")
#: The first device of the device mapper; there is no udev that would name it.
DEVICE = "/dev/dm-0"
MOUNT = "/run/mounted"
SECTOR = 512
_NAME = "power"
#: What dm-flakey does: seconds for which it works, seconds for which it does not, and what it does then.
WORKS = "1 0"
FAILS_WRITES = "0 1 1 error_writes"
LOSES_WRITES = "0 1 1 drop_writes"
#: File system: the command that makes one as small as these. XFS wants a word more for that.
FILE_SYSTEMS = {
    "ext4": ["mkfs.ext4", "-q", "-E", "nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K", "--unsupported"],
}


@contextmanager
def empty_folder() -> Generator[Path]:
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
def loop(path: Path) -> Generator[str]:
    """A block device over a file."""
    device = run("losetup", "--find", "--show", str(path))
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(device: str, file_system: str) -> Generator[None]:
    """The file system on a device, at MOUNT."""
    os.makedirs(MOUNT, exist_ok=True)
    run("mount", "-t", file_system, device, MOUNT)
    try:
        yield
    finally:
        run("umount", MOUNT)


@contextmanager
def logged(lower: str, record: str, size: int) -> Generator[None]:
    """DEVICE is the lower device, and what is written to it is recorded on another one."""
    table = f"0 {size // SECTOR} log-writes {lower} {record}"
    run("dmsetup", "create", _NAME, "--noudevsync", "--table", table)
    try:
        yield
    finally:
        run("dmsetup", "remove", "--noudevsync", _NAME)


@contextmanager
def flaky(lower: str, size: int) -> Generator[None]:
    """DEVICE is the lower device; `behave` says how it works from a moment on."""
    run("dmsetup", "create", _NAME, "--noudevsync", "--table", _table(lower, size, WORKS))
    try:
        yield
    finally:
        run("dmsetup", "remove", "--noudevsync", _NAME)


def behave(lower: str, size: int, how: str) -> None:
    """From now on DEVICE works, or fails in one of two ways. What was asked of it before is done as before.

    In one process: a new one of this program would close files of mounts that lie on the device, and wait for it.
    """
    table = _table(lower, size, how)
    suspend = f"dmsetup suspend --noudevsync --nolockfs --noflush {_NAME}"
    run("sh", "-c", f"{suspend} && dmsetup load {_NAME} --table '{table}' && dmsetup resume --noudevsync {_NAME}")


def _table(lower: str, size: int, how: str) -> str:
    return f"0 {size // SECTOR} flakey {lower} 0 {how}"


def mark(name: str) -> None:
    """Put a mark into the log."""
    run("dmsetup", "message", _NAME, "0", "mark", name)
