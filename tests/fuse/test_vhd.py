"""Mounts of VHDs: a differencing image shows its parent and takes the writes, a fixed one shows its disk alone."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from tests.fuse.conftest import Mounts

MIB = 1 << 20


@pytest.fixture
def base(mounts: Mounts, tmp_path: Path) -> Path:
    """A fixed VHD of 8 MiB with a partition from 1 MiB on."""
    raw, path = tmp_path / "disk.raw", tmp_path / "base.vhd"
    raw.write_bytes(bytes(2 * MIB) + random.Random(1).randbytes(MIB) + bytes(5 * MIB))
    subprocess.run(["sfdisk", "-q", raw], input=b"start=2048\n", check=True)
    assert mounts.run("convert", "-f", "raw", "-O", "vhd", "-o", "subformat=fixed", raw, path).code == 0
    return path


def test_a_differencing_image(mounts: Mounts, tmp_path: Path, base: Path) -> None:
    child = tmp_path / "child.vhd"
    before = base.read_bytes()
    assert mounts.run("create", "-f", "vhd", "-b", "base.vhd", "-F", "vhd", child).code == 0
    directory = mounts.mount(child, "--rw")
    assert (directory / "part1").read_bytes() == before[MIB:-512]
    with (directory / "part1").open("r+b") as part:
        part.seek(MIB + 700)
        part.write(b"mine" * 1000)
    mounts.umount(directory)
    assert base.read_bytes() == before
    expected = bytearray(before[:-512])
    expected[2 * MIB + 700 : 2 * MIB + 4700] = b"mine" * 1000
    directory = mounts.mount(child)
    assert (directory / "disk").read_bytes() == expected
    mounts.umount(directory)
    assert mounts.run("check", child).code == 0


def test_a_fixed_image_ends_before_its_footer(mounts: Mounts, base: Path) -> None:
    before = base.read_bytes()
    directory = mounts.mount(base, "--rw")
    assert (directory / "disk").stat().st_size == 8 * MIB
    with (directory / "disk").open("r+b") as disk:
        disk.seek(8 * MIB - 100)
        assert disk.read(1000) == before[-612:-512]
        disk.seek(8 * MIB - 3)
        disk.write(b"end")
    mounts.umount(directory)
    assert base.read_bytes() == before[:-515] + b"end" + before[-512:]
