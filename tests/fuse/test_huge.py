"""A mounted disk of petabytes: seeks in it end, and what is written beside them is durable."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.fuse.conftest import Mounts

#: In a process of its own, for a seek that does not end cannot be ended.
SEEKS = """
import errno, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
size = os.fstat(descriptor).st_size
try:
    os.lseek(descriptor, 0, os.SEEK_DATA)
except OSError as error:
    print(errno.errorcode[error.errno])
print(os.lseek(descriptor, 5, os.SEEK_HOLE))
os.pwrite(descriptor, b"x" * 65536, size // 2)
os.fsync(descriptor)
print(os.lseek(descriptor, 0, os.SEEK_DATA) == size // 2, os.lseek(descriptor, size // 2, os.SEEK_HOLE) - size // 2)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: other host file systems have no files of such lengths."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.mark.parametrize(("format_name", "size"), [("qcow", "4096T"), ("raw", "7168P")])
def test_seeks_of_a_huge_disk(
    folder: Path, tmp_path: Path, tapfs_command: list[str], format_name: str, size: str
) -> None:
    mounts = Mounts(tmp_path, tapfs_command, "native")
    path = folder / "disk"
    options = ["-o", "cluster_size=65536"] if format_name == "qcow" else []
    assert mounts.run("create", "-f", format_name, *options, path, size) == Ran(0, "", "")
    directory = mounts.mount(path, "-f", format_name, "--rw")
    try:
        done = subprocess.run(
            [sys.executable, "-c", SEEKS, directory / "disk"], capture_output=True, text=True, check=False, timeout=120
        )
        assert Ran(done.returncode, done.stdout, done.stderr) == Ran(0, "ENXIO\n5\nTrue 65536\n", "")
        mounts.umount(directory)
    finally:
        mounts.force_away()
