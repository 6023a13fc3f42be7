"""A host file system that is full: what was written before stays, and a flush finds room for its tables."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError, NewImage

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill_up(disk: tapfs.Image) -> int:
    """Write until the host is full; the bytes that were written before that."""
    for at in range(0, SIZE, MIB):
        try:
            disk.write(at, bytes([at // MIB + 1]) * MIB)
        except ImageError as error:
            if error.kind is not ErrorKind.NO_SPACE:
                raise
            return at
    raise AssertionError("the host has more space than it should")


# VHD and VHDX are left out: their large blocks are written in place into holes of the host file, and what a write
# that fails has taken there may be data.
@pytest.mark.parametrize("format_name", ["qcow", "qcow2", "vmdk", "vdi"])
def test_what_was_written_before_the_host_was_full_is_kept(small: Path, format_name: str) -> None:
    path = small / "image"
    tapfs.create_image(path, NewImage(format_name, SIZE))
    with tapfs.open(path, format=format_name, writable=True) as disk:
        written = fill_up(disk)
        disk.flush()
    assert written >= 3 * MIB
    with tapfs.open(path, format=format_name) as disk:
        for at in range(0, written, MIB):
            assert disk.read(at, MIB) == bytes([at // MIB + 1]) * MIB
        # The write that failed has written a part or nothing.
        assert set(disk.read(written, MIB)) <= {0, written // MIB + 1}
    assert tapfs.check(path, format=format_name).corruptions == 0
