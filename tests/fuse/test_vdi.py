"""Mounts of VDIs: a differencing image shows the parent that its UUID names, and QEMU reads what a mount wrote."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from tests.fuse.conftest import Mounts

MIB = 1 << 20


@pytest.fixture
def base(mounts: Mounts, tmp_path: Path) -> tuple[Path, bytes]:
    """A VDI of 8 MiB with a partition from 1 MiB on, in a folder of its own, and what its disk holds."""
    raw, path = tmp_path / "disk.raw", tmp_path / "elsewhere" / "base.vdi"
    path.parent.mkdir()
    raw.write_bytes(bytes(2 * MIB) + random.Random(1).randbytes(MIB) + bytes(5 * MIB))
    subprocess.run(["sfdisk", "-q", raw], input=b"start=2048\n", check=True)
    assert mounts.run("convert", "-f", "raw", "-O", "vdi", raw, path).code == 0
    return path, raw.read_bytes()


def test_a_differencing_image_over_a_parent_in_another_folder(
    mounts: Mounts, tmp_path: Path, base: tuple[Path, bytes]
) -> None:
    path, disk = base
    before = path.read_bytes()
    child = tmp_path / "machine" / "Snapshots" / "child.vdi"
    child.parent.mkdir(parents=True)
    assert mounts.run("create", "-f", "vdi", "-b", path, "-F", "vdi", child).code == 0
    assert mounts.run("mount", child, tmp_path).code == 17
    folder = f"--parent-folder={path.parent}"
    directory = mounts.mount(child, "--rw", folder)
    assert (directory / "part1").read_bytes() == disk[MIB:]
    with (directory / "part1").open("r+b") as part:
        part.seek(MIB + 700)
        part.write(b"mine" * 1000)
    mounts.umount(directory)
    assert path.read_bytes() == before
    expected = bytearray(disk)
    expected[2 * MIB + 700 : 2 * MIB + 4700] = b"mine" * 1000
    directory = mounts.mount(child, folder)
    assert (directory / "disk").read_bytes() == expected
    mounts.umount(directory)
    assert mounts.run("check", child).code == 0


@pytest.mark.parametrize("option", ["static=off", "static=on"])
def test_qemu_reads_what_a_mount_wrote(mounts: Mounts, tmp_path: Path, option: str) -> None:
    image = tmp_path / "a.vdi"
    assert mounts.run("create", "-f", "vdi", "-o", option, image, "24M").code == 0
    expected = bytearray(24 * MIB)
    choice = random.Random(5)
    directory = mounts.mount(image, "--rw")
    with (directory / "disk").open("r+b", buffering=0) as disk:
        for _ in range(60):
            offset = choice.randrange(24 * MIB)
            data = choice.randbytes(min(choice.choice([1, 512, 5000, 200_000]), 24 * MIB - offset))
            disk.seek(offset)
            assert disk.write(data) == len(data)
            expected[offset : offset + len(data)] = data
    mounts.umount(directory)
    subprocess.run(["qemu-img", "check", "-q", "-f", "vdi", image], check=True)
    raw = tmp_path / "a.raw"
    subprocess.run(["qemu-img", "convert", "-f", "vdi", "-O", "raw", image, raw], check=True)
    assert raw.read_bytes() == expected
