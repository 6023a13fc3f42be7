"""VMDKs mounted: the file systems inside edited on every layout, and QEMU reads what the kernel wrote."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import tapfs
from tests.fuse.conftest import Mounts
from tests.fuse.test_partitions import mounted, output
from tests.peer.test_convert import qemu

MIB = 1 << 20


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse", "monolithicFlat", "vmfsSparse"])
def test_a_file_system_in_a_vmdk(mounts: Mounts, tmp_path: Path, subformat: str) -> None:
    raw, image = tmp_path / "raw", tmp_path / "disk.vmdk"
    with raw.open("wb") as file:
        file.truncate(24 * MIB)
    subprocess.run(["mkfs.ext4", "-qF", raw], check=True)
    tapfs.convert(raw, image, format="raw", target_format="vmdk", options={"subformat": subformat})
    noise = random.Random(subformat).randbytes(MIB)
    directory = mounts.mount(image, "--rw")
    with mounted(directory / "disk", tmp_path / "inside") as inside:
        (inside / "new").write_bytes(noise)
    output("e2fsck", "-fn", directory / "disk")
    mounts.umount(directory)
    assert tapfs.check(image).corruptions == 0
    back = tmp_path / "back"
    qemu("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, back)
    directory = mounts.mount(image)
    assert (directory / "disk").read_bytes() == back.read_bytes()
    mounts.umount(directory)
    with mounted(back, tmp_path / "again") as inside:
        assert (inside / "new").read_bytes() == noise


def test_a_delta_and_a_stream(mounts: Mounts, tmp_path: Path) -> None:
    raw, packed, base, child = (tmp_path / name for name in ("raw", "packed.vmdk", "base.vmdk", "child.vmdk"))
    disk = bytearray(random.Random(1).randbytes(2 * MIB) + b"text" * MIB)
    raw.write_bytes(disk)
    tapfs.convert(raw, packed, format="raw", target_format="vmdk", options={"subformat": "streamOptimized"})
    tapfs.convert(packed, base, target_format="vmdk")
    directory = mounts.mount(packed)
    assert (directory / "disk").read_bytes() == disk
    mounts.umount(directory)
    tapfs.create(child, "vmdk", backing=str(base), backing_format="vmdk")
    directory = mounts.mount(child, "--rw")
    with (directory / "disk").open("r+b") as file:
        file.seek(MIB + 1000)
        file.write(b"child" * 10_000)
    mounts.umount(directory)
    disk[MIB + 1000 : MIB + 51_000] = b"child" * 10_000
    back = tmp_path / "back"
    qemu("qemu-img", "convert", "-f", "vmdk", "-O", "raw", child, back)
    assert back.read_bytes() == disk
